"""Mixtures of adapters on linear layers: a frozen W0, adapters next to it, and a router that weighs the adapters.

    y = W0 x + s sum_{i in always} B_i A_i x + s sum_{slots j among the top k} g_j B_e(j) A_e(j) x

The adapters A_i [R, X], B_i [Y, R] of a layer have names. A slot of the router stands for one adapter, and several
slots may stand for the same one. There are two routers:

    "dot"    z_e = <P x, A_e x> / sqrt(R), P [R, X]: one slot per adapter, for any number of them (FedAMoLE)
    "rows"   z = V x, V [slots, X]: a row per slot (CoMiGS, FedLEASE)

g is the softmax of z over the slots; its k largest values are kept and scaled to a sum of 1. Adapters and routers are
float32 whatever the model's dtype is, so that small steps are not lost. Their output is rounded once.

Flat names are the paths in the live model: `<layer>.pairs.<name>.a` and `.b`, `<layer>.route` (P or V).

Shapes: B examples, S tokens, X inputs, Y outputs, R rank, N real tokens, J slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.errors import ConfigError
from consilium.moe.build import ModelSource
from consilium.moe.model import Batch, TaskModel
from consilium.params import Params

__all__ = [
    "AdapterMixture",
    "Mixing",
    "attach",
    "initial_pair",
    "initial_route",
    "layers",
    "mark",
    "mixtures",
    "names_of",
]

ATTENTION = (("q_proj", "v_proj"), ("q", "v"), ("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"), ("qkv_proj",))
"""Sets of projections that are adapted by default. The first set that a model has in full is used."""


@dataclass(frozen=True)
class Mixing:
    """The settings for mixing the adapters of a layer.

    Args:
        rank: R.
        scale: s.
        top_k: k.
        router: "dot" or "rows", see the module; "": there is none, all adapters are `always` on.
        targets: names of the linear layers, by their last part; (): query and value projections.
        dropout: dropout rate of the adapters' input, in training.
    """

    rank: int
    scale: float
    top_k: int = 1
    router: Literal["dot", "rows", ""] = "dot"
    targets: tuple[str, ...] = ()
    dropout: float = 0.0


class Pair(nn.Module):
    """One adapter: A [R, X], B [Y, R]."""

    def __init__(self, x: int, y: int, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, x))
        self.b = nn.Parameter(torch.zeros(y, rank))


class AdapterMixture(nn.Module):
    """A linear layer with adapters next to it, see the module.

    Args:
        base: the layer, which is frozen.
        names: names of the adapters.
        always: adapters that are applied to every token.
        slots: the adapters that the router's slots stand for.
        mixing: the settings.

    Attributes:
        mask: real tokens [B, S] bool of the next batch; None: all.
        always_weight: factor of the adapters that are applied to every token.
        balance: after a forward pass, J sum_j P_j f_j: P the mean probability of a slot, f its share of the choices.
        sums: with `measure` on, "token" -> sum over real tokens of P x [R], adapter -> sum of A_e x [R].
        count: number of real tokens in these sums.
        used: slot -> number of real tokens that chose it, float64 [J], while `measure` is on.
    """

    def __init__(
        self, base: nn.Linear, names: Sequence[str], always: Sequence[str], slots: Sequence[str], mixing: Mixing
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.always, self.slots, self.mixing = tuple(always), tuple(slots), mixing
        y, x = base.weight.shape
        self.pairs = nn.ModuleDict({name: Pair(x, y, mixing.rank) for name in names})
        rows = mixing.rank if mixing.router == "dot" else len(self.slots)
        self.route = nn.Parameter(torch.empty(rows, x)) if mixing.router and self.slots else None
        self.always_weight = 1.0
        self.mask: Tensor | None = None
        self.balance: Tensor | None = None
        self.measure = False
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.used = torch.zeros(len(self.slots), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y, shape = self.base(x), x.shape[:-1]
        x_TX = x.reshape(-1, x.shape[-1]).float()
        real_T = self._real(shape, x_TX)
        dropout_TX = F.dropout(x_TX, self.mixing.dropout, self.training)
        addition = self.always_weight * sum(
            (dropout_TX @ self.pairs[n].a.t()) @ self.pairs[n].b.t() for n in self.always
        )
        if self.route is not None:
            addition = addition + self._mixed(x_TX, dropout_TX, real_T)
        if isinstance(addition, float):  # There are neither adapters that are always on nor a router.
            return y
        return y + (self.mixing.scale * addition).reshape(y.shape).to(y.dtype)

    def weights(self, x_TX: Tensor, real_T: Tensor) -> Tensor:
        """Return g [T, J], zero for slots that are not among the top k, and set `balance`."""
        z_TJ = self._logits(x_TX, real_T)
        p_TJ = z_TJ.softmax(-1)
        k = min(self.mixing.top_k, len(self.slots))
        top_k = p_TJ.topk(k, dim=-1)
        gates_TJ = torch.zeros_like(p_TJ).scatter(-1, top_k.indices, top_k.values)
        choices_TJ = (gates_TJ > 0)[real_T]
        f_J = choices_TJ.float().mean(0) / k
        self.balance = len(self.slots) * (p_TJ[real_T].mean(0) * f_J.detach()).sum()
        if self.measure:
            self.used += choices_TJ.sum(0).double().cpu()
        return gates_TJ / gates_TJ.sum(-1, keepdim=True)

    def _logits(self, x_TX: Tensor, real_T: Tensor) -> Tensor:
        if self.mixing.router == "rows":
            return x_TX @ self.route.t()
        token_TR = x_TX @ self.route.t()
        keys = {name: x_TX @ self.pairs[name].a.t() for name in self.slots}
        if self.measure:
            for name, rows_TR in {"token": token_TR, **keys}.items():
                self.sums[name] = self.sums.get(name, 0) + rows_TR[real_T].detach().double().sum(0).cpu()
            self.count += int(real_T.sum())
        return torch.stack([(token_TR * key_TR).sum(-1) for key_TR in keys.values()], dim=-1) / self.mixing.rank**0.5

    def _mixed(self, x_TX: Tensor, read_TX: Tensor, real_T: Tensor) -> Tensor:
        """Return sum_j g_j B_e(j) A_e(j) x [T, Y], where each adapter only computes the tokens that chose it."""
        g_TJ = self.weights(x_TX, real_T)
        addition = x_TX.new_zeros(len(x_TX), self.base.weight.shape[0])
        for name in dict.fromkeys(self.slots):
            g_T = g_TJ[:, [j for j, slot in enumerate(self.slots) if slot == name]].sum(-1)
            rows = g_T.nonzero().flatten()
            if len(rows):
                pair = self.pairs[name]
                out = (read_TX[rows] @ pair.a.t()) @ pair.b.t()
                addition = addition.index_add(0, rows, g_T[rows, None] * out)
        return addition

    def _real(self, shape: torch.Size, x_TX: Tensor) -> Tensor:
        """Return a mask of real tokens [T] bool; all True if `mask` is for other positions (cross attention)."""
        if self.mask is None or self.mask.shape != shape:
            return torch.ones(len(x_TX), dtype=torch.bool, device=x_TX.device)
        return self.mask.reshape(-1)


# --- construction -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def layers(source: ModelSource, targets: tuple[str, ...] = ()) -> Mapping[str, tuple[int, int]]:
    """Return path -> (X, Y) of the linear layers with these names outside the experts.

    Raises:
        ConfigError: if the model has none of them.
    """
    model = source.skeleton("", ())
    block_prefixes = tuple(f"{block}." for block in model.blocks())
    linear_sides = {
        path: (module.in_features, module.out_features)
        for path, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(block_prefixes)
    }
    last_names = {path.rsplit(".", 1)[-1] for path in linear_sides}
    target_names = targets or next((names for names in ATTENTION if last_names.issuperset(names)), ())
    target_sides = {path: sides for path, sides in linear_sides.items() if path.rsplit(".", 1)[-1] in target_names}
    if not target_sides:
        raise ConfigError(
            f"targets is {targets}, but {source.path} has no such linear layer; it has {', '.join(sorted(last_names))}"
        )
    return target_sides


def initial_pair(x: int, y: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return an initial adapter in float32: A uniform in +-1/sqrt(X) and B zero."""
    if rank > min(x, y):
        raise ConfigError(f"the rank is {rank}; a layer is {y} x {x}, so it must be at most {min(x, y)}")
    return (2 * torch.rand(rank, x, generator=generator) - 1) / x**0.5, torch.zeros(y, rank)


def initial_route(rows: int, x: int, generator: torch.Generator) -> Tensor:
    """Return an initial router [rows, X] in float32, uniform in +-1/sqrt(X), as linear layers are initialised."""
    return (2 * torch.rand(rows, x, generator=generator) - 1) / x**0.5


def names_of(params: Mapping[str, Tensor], path: str) -> list[str]:
    """Return the names of the adapters of a layer among flat parameters.

    They are sorted so that sums do not depend on the order of arrival.
    """
    prefix = f"{path}.pairs."
    return sorted(key[len(prefix) : -2] for key in params if key.startswith(prefix) and key.endswith(".a"))


def attach(
    model: TaskModel,
    params: Params,
    mixing: Mixing,
    paths: Mapping[str, tuple[int, int]],
    always: Sequence[str] = (),
    slots: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
) -> TaskModel:
    """Freeze a live model except its head, and replace linear layers by mixtures with these parameters.

    Args:
        params: values by flat names; they also determine which adapters a layer has.
        mixing: the settings of the mixtures.
        paths: the layers to replace.
        always: adapters that are applied to every token.
        slots: slots of all layers, or layer -> slots; None: every adapter that is not in `always` has one.
    """
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    device = next(model.backbone.parameters()).device
    for path in paths:
        owner, _, name = path.rpartition(".")
        names = names_of(params, path)
        layer_slots = slots.get(path) if isinstance(slots, Mapping) else slots
        layer_slots = [n for n in names if n not in always] if layer_slots is None else layer_slots
        parent = model.backbone.get_submodule(owner)
        mixture = AdapterMixture(getattr(parent, name), names, [n for n in always if n in names], layer_slots, mixing)
        mixture_params = {key: p for key, p in mixture.named_parameters() if not key.startswith("base.")}
        for key, parameter in mixture_params.items():
            value = params[f"{path}.{key}"]
            if value.shape != parameter.shape:
                raise ConfigError(f"{path}.{key} has shape {tuple(value.shape)}, it must be {tuple(parameter.shape)}")
            parameter.data = value.to(device, torch.float32, copy=True)
        setattr(parent, name, mixture)
    return model


def mixtures(model: TaskModel) -> Iterator[tuple[str, AdapterMixture]]:
    """Yield (path, mixture) for all layers that have one."""
    for path, module in model.backbone.named_modules():
        if isinstance(module, AdapterMixture):
            yield path, module


def mark(model: TaskModel, batch: Batch) -> None:
    """Set the positions of real tokens of the next batch in all mixtures."""
    masks = list(model.masks(batch).values())
    for path, mixture in mixtures(model):
        mixture.mask = masks[-1] if path.startswith("decoder.") else masks[0]
