"""A cohort of small models: every client may have its own architecture, which consists of an extractor and a head.

    cnn-1 .. cnn-5      the five CNNs of the pFedMoE family (arXiv 2402.01350 for CIFAR); conv, conv, FC1, FC2
    mnist-1 .. mnist-5  the same for MNIST
    mlp-1 .. mlp-3      for tables: one hidden layer and FC2

An extractor maps a batch [B, *S] to representations [B, d]; `SplitModel` puts a linear head on it. `models.encoders`
says how to name a function of your own, or an encoder of `transformers` for images or texts, e.g.
`--model.architectures mypackage.nets:make_resnet,cnn-5`. Convolutions, norms (their buffers travel like parameters) and
all other torch modules are allowed.

Shapes: B examples, *S the shape of one ((C, H, W) or (columns,)), d width of a representation, C labels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from consilium.blocked import through
from consilium.constraints import NonNegativeInt, PositiveInt, check_settings, forbid
from consilium.core import derive_seed
from consilium.errors import ConfigError
from consilium.kinds import Gives, Model
from consilium.models import encoders
from consilium.params import Params

__all__ = ["ARCHITECTURES", "Cohort", "SplitModel", "initial", "padded", "real_rows"]

_REAL: ContextVar[Tensor | None] = ContextVar("real rows of the batch", default=None)


@contextmanager
def padded(real: Tensor | None) -> Iterator[None]:
    """Mark the real rows of the batch inside the block; the others are padding, see `batched`.

    Args:
        real: True for real rows, [B] bool; None: all rows are real.
    """
    token = _REAL.set(real)
    try:
        yield
    finally:
        _REAL.reset(token)


def real_rows() -> Tensor | None:
    """Return which rows of the batch are real, [B] bool, or None if all are.

    Modules that compute statistics over a batch must leave out the other rows.
    """
    return _REAL.get()


@dataclass(frozen=True)
class Cohort(Model):
    """Small models, one architecture per client.

    Args:
        architectures: names, one by one or with commas, see `models.cohort` and `models.encoders`; client k (in id
            order, from 0) has the (k mod n)-th of n. One name: all clients have the same model, as methods that average
            whole models need.
        small: architecture of the model that all clients share next to their own, in methods with such a model
            (pFedMoE's proxy).
        width: width of every representation (d, FC2), >= 1; 500 in the paper for CIFAR, 50 for MNIST. Functions of your
            own and encoders have their own width.
        kernel: kernel size of the convolutions, >= 1; 5 in the paper.
        padding: padding around the input of the convolutions, >= 0; 0 in the paper.
    """

    architectures: tuple[str, ...] = ("cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5")
    small: str = "cnn-5"
    width: PositiveInt = 500
    kernel: PositiveInt = 5
    padding: NonNegativeInt = 0

    form: ClassVar[str] = "classification"
    counts: ClassVar[Mapping[str, int]] = {}
    fingerprint: ClassVar[str] = ""  # There are no files to identify: small models start from the seed.
    torch_dtype: ClassVar[torch.dtype] = torch.float32
    dense: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        names = tuple(part for name in self.architectures for part in name.split(","))
        object.__setattr__(self, "architectures", tuple(encoders.resolved(name) for name in names))
        object.__setattr__(self, "small", encoders.resolved(self.small))
        check_settings(self, "model.")
        forbid(not self.architectures, "model.architectures is empty; name at least one")
        for name in (*self.architectures, self.small):
            if name not in ARCHITECTURES and not encoders.is_function(name) and not encoders.is_model(name):
                choices = ", ".join(ARCHITECTURES)
                raise ConfigError(f"architecture {name!r} is unknown; allowed are {choices}, or {encoders.FORMS}")

    @property
    def world(self) -> str:
        """Return the world that methods must be able to train, see `core.Algorithm.worlds`."""
        return "cohort" if len(set(self.architectures)) == 1 else "mixed"

    @property
    def path(self) -> str:
        """Return the name of the cohort in messages."""
        return ", ".join(dict.fromkeys(self.architectures))

    @property
    def reads(self) -> frozenset[Gives]:
        """Return what the data may consist of: tensors, and texts to classify if all models may be text encoders."""
        reads_texts = not ARCHITECTURES.keys() & {*self.architectures, self.small}
        return frozenset[Gives]({"tensors", "labelled texts"} if reads_texts else {"tensors"})

    def ready(self) -> None:
        """Do nothing: small models start from the seed, or are read when a client's is built."""

    def check_site(self, shape: tuple[int, ...]) -> None:
        """Check that a site has one architecture, and that it takes examples of this shape.

        Raises:
            ConfigError: for several architectures, or one that does not take the examples.
        """
        if self.world != "cohort":
            raise ConfigError(
                f"a site has one model: choose --model.architectures of {self.path}, or another that the server knows"
            )
        self.width_of(self.architecture(0), shape)

    def round(self, params: Params) -> Params:
        """Return the parameters unchanged; small models are float32."""
        return params

    def architecture(self, client: int) -> str:
        """Return the architecture of the client at an index, from 0, in the order of ids."""
        return self.architectures[client % len(self.architectures)]

    def extractor(self, name: str, shape: tuple[int, ...]) -> nn.Module:
        """Build an extractor [B, *shape] -> [B, d] with an attribute `width` = d; the shape is () for texts."""
        return ARCHITECTURES[name](shape, self) if name in ARCHITECTURES else encoders.extractor(name, shape)

    def tokenizer(self) -> Any:
        """Return the tokenizer that all architectures share.

        Raises:
            ConfigError: if they have different tokenizers, or if no architecture has one.
        """
        return encoders.one_tokenizer((*self.architectures, self.small))

    def width_of(self, name: str, shape: tuple[int, ...]) -> int:
        """Return d of an architecture, without allocating weights."""
        with torch.device("meta"):
            return self.extractor(name, shape).width


class SplitModel(nn.Module):
    """A model of an extractor and a head: logits [B, C] = head(backbone(x)).

    Args:
        backbone: the extractor [B, *S] -> [B, d], with an attribute `width` = d.
        task: name of the task.
        labels: label names of the task.
    """

    rowwise = True  # see `batched`
    family = None  # The model has no sparse blocks, so it is of no family of `moe.families`.
    adapters = None
    dtype = torch.float32

    def __init__(self, backbone: nn.Module, task: str, labels: tuple[str, ...]):
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.labels = labels
        self.head = nn.Linear(backbone.width, len(labels))

    def blocks(self) -> dict[str, nn.Module]:
        """Return the sparse blocks; there are none."""
        return {}

    def masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks of the real positions; there are none, because every position of a tensor is real."""
        return {}

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [B, C], float32, and their targets [B]."""
        return self.head(self.backbone(batch["x"])).float(), batch["labels"]


def initial(make: Callable[[], nn.Module], *seed: Any) -> Params:
    """Return the initial parameters and float buffers of a module; equal seeds give equal values.

    Args:
        make: builds the module with its own initialisation.
        seed: parts of the seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*seed))
        module = make()
    tensors = dict(module.named_parameters()) | {k: t for k, t in module.named_buffers() if t.is_floating_point()}
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


class CNN(nn.Sequential):
    """A CNN of two times (conv, pool, ReLU), then FC1, ReLU, FC2, ReLU.

    Max-pooling before ReLU gives the same result as ReLU before max-pooling.

    Args:
        shape: (C, H, W) of the images.
        cohort: the settings of kernel, padding and width.
        conv1: filters of the first convolution.
        conv2: filters of the second convolution.
        fc1: units of FC1; FC2 has cohort.width.

    Raises:
        ConfigError: if the examples are no images, or too small for the kernel.
    """

    rowwise = True

    def __init__(self, shape: tuple[int, ...], cohort: Cohort, conv1: int, conv2: int, fc1: int):
        if len(shape) != 3:
            raise ConfigError(f"examples have shape {shape}; a CNN needs (channels, height, width): use mlp-1 .. mlp-3")
        sides = [_side(_side(side, cohort), cohort) for side in shape[1:]]
        if min(sides) < 1:
            raise ConfigError(
                f"images of {shape[1]} x {shape[2]} are too small for two convolutions of kernel {cohort.kernel} and "
                f"padding {cohort.padding}; use --model.kernel 3 --model.padding 1"
            )
        kernel, padding = cohort.kernel, cohort.padding
        super().__init__(
            nn.Conv2d(shape[0], conv1, kernel, padding=padding), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(conv1, conv2, kernel, padding=padding), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(conv2 * math.prod(sides), fc1), nn.ReLU(),
            nn.Linear(fc1, cohort.width), nn.ReLU(),
        )  # fmt: skip
        self.width = cohort.width

    def forward(self, x: Tensor) -> Tensor:
        return through(self, x)


class MLP(nn.Sequential):
    """A perceptron of FC1, ReLU, FC2, ReLU on the flattened example."""

    rowwise = True

    def __init__(self, shape: tuple[int, ...], cohort: Cohort, fc1: int):
        layers = nn.Linear(math.prod(shape), fc1), nn.ReLU(), nn.Linear(fc1, cohort.width), nn.ReLU()
        super().__init__(nn.Flatten(), *layers)
        self.width = cohort.width


def _side(pixels: int, cohort: Cohort) -> int:
    """Return the length of a side after a convolution and a 2 x 2 pool."""
    return (pixels + 2 * cohort.padding - cohort.kernel + 1) // 2


def _cnn(*sizes: int) -> Callable[[tuple[int, ...], Cohort], nn.Module]:
    return lambda shape, cohort: CNN(shape, cohort, *sizes)


def _mlp(fc1: int) -> Callable[[tuple[int, ...], Cohort], nn.Module]:
    return lambda shape, cohort: MLP(shape, cohort, fc1)


ARCHITECTURES: dict[str, Callable[[tuple[int, ...], Cohort], nn.Module]] = {
    "cnn-1": _cnn(16, 32, 2000),
    "cnn-2": _cnn(16, 16, 2000),
    "cnn-3": _cnn(16, 32, 1000),
    "cnn-4": _cnn(16, 32, 800),
    "cnn-5": _cnn(16, 32, 500),
    **{f"mnist-{i}": _cnn(20, 20, fc1) for i, fc1 in enumerate((300, 200, 150, 100, 50), 1)},
    **{f"mlp-{i}": _mlp(fc1) for i, fc1 in enumerate((128, 64, 32), 1)},
}
"""Name -> function (shape of one example, cohort) -> extractor."""
