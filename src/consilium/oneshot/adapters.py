"""Low-rank adapters of several sites on one module of the public model.

    y = f(x) + sum_e c_e(x) s_e B_e A_e x

f is the frozen module, s_e = alpha / rank, and c [N, E] comes from a router (see `routers`). Ranks may differ between
sites. Targets are linear layers, which PEFT can adapt too, and whole feed-forward blocks of the model's width, which
PEFT cannot adapt.

Shapes: N tokens, E adapters, R rank, X and Y width of the input and the output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from consilium.errors import ConfigError
from consilium.moe.model import TaskModel
from consilium.oneshot.base import Base

__all__ = ["Adapted", "Pair", "Targets", "attach", "deltas", "initial_pairs", "target_modules"]

Targets = Literal["linear", "blocks", "both"]
"""Linear layers outside of experts; feed-forward blocks (sparse or dense) as a whole; both."""
Weigh = Callable[[Tensor], Tensor]
"""x [N, X] -> c [N, E]."""


@dataclass(frozen=True)
class Pair:
    """One adapter: A [R, X], B [Y, R], and the factor s of their product."""

    a_RX: Tensor
    b_YR: Tensor
    scale: float


class Adapted(nn.Module):
    """A frozen module with adapters; `weigh` gives the coefficients of the adapters, None: all are 1."""

    def __init__(self, module: nn.Module, pairs: Sequence[Pair], weigh: Weigh | None = None):
        super().__init__()
        self.module = module
        self.a = nn.ParameterList(nn.Parameter(pair.a_RX.clone()) for pair in pairs)
        self.b = nn.ParameterList(nn.Parameter(pair.b_YR.clone()) for pair in pairs)
        self.scales = tuple(pair.scale for pair in pairs)
        self.weigh = weigh

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return f(hidden) with the adapters' changes, of the same shape."""
        out = self.module(hidden, *args, **kwargs)
        x_NX = hidden.reshape(-1, hidden.shape[-1])
        c_NE = None if self.weigh is None else self.weigh(x_NX)
        for e, (a_RX, b_YR, scale) in enumerate(zip(self.a, self.b, self.scales, strict=True)):
            change_NY = nn.functional.linear(nn.functional.linear(x_NX, a_RX), b_YR) * scale
            if c_NE is not None:
                change_NY = change_NY * c_NE[:, e, None].to(change_NY.dtype)
            out = out + change_NY.view(*hidden.shape[:-1], -1)
        return out


def target_modules(model: TaskModel, targets: Targets) -> dict[str, tuple[int, int]]:
    """Return path -> (X, Y) of the modules that get adapters, in the order of the model."""
    shapes: dict[str, tuple[int, int]] = {}
    backbone, width = model.backbone, model.config.hidden_size
    sparse = Base.sparse(model) if model.family.block else {}
    head = backbone.get_output_embeddings()
    for path, module in backbone.named_modules():
        is_inside = any(path.startswith(f"{block}.") for block in sparse)
        is_linear = isinstance(module, nn.Linear) and module is not head and not is_inside
        block = path in sparse or (path.endswith(".mlp") and not is_inside)
        if is_linear and targets != "blocks":
            shapes[path] = (module.in_features, module.out_features)
        if block and targets != "linear":
            shapes[path] = (width, width)
    return shapes


def initial_pairs(model: TaskModel, targets: Targets, rank: int, alpha: float, seed: int) -> dict[str, Pair]:
    """Return path -> an adapter that changes nothing: A uniform in +-1/sqrt(X), as in PEFT, and B zero.

    Raises:
        ConfigError: for a rank above the narrower side of a module.
    """
    rng, pairs = torch.Generator().manual_seed(seed), {}
    for path, (x, y) in target_modules(model, targets).items():
        if not 1 <= rank <= min(x, y):
            raise ConfigError(f"rank is {rank}; {path} is {y} x {x}, so it must be within 1..{min(x, y)}")
        a_RX = (2 * torch.rand(rank, x, generator=rng) - 1) / x**0.5
        pairs[path] = Pair(a_RX.to(model.dtype), torch.zeros(y, rank, dtype=model.dtype), alpha / rank)
    return pairs


def attach(model: TaskModel, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Adapted]:
    """Attach adapters to modules of a live model, in place, and return path -> module with adapters."""
    modules: dict[str, Adapted] = {}
    for path in sorted(pairs, key=len, reverse=True):  # modules inside of an adapted block come first
        parent, _, name = path.rpartition(".")
        owner = model.backbone.get_submodule(parent)
        modules[path] = Adapted(getattr(owner, name), pairs[path])
        setattr(owner, name, modules[path])
    return {path: modules[path] for path in pairs}


def deltas(pairs: Sequence[Pair]) -> Iterator[Tensor]:
    """Yield s B A [Y, X] of each adapter, float32."""
    for pair in pairs:
        yield pair.scale * pair.b_YR.float() @ pair.a_RX.float()
