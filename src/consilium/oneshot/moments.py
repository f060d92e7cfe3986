"""Statistics of hidden states: sums for the ridge router, and initial values of a guest's router row.

Shapes: N tokens, X width of a module's input.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from consilium.moe.model import TaskModel
from consilium.oneshot.base import Base, Frozen

__all__ = ["first_row", "measure", "measure_routers"]


@torch.no_grad()
def measure(model: TaskModel, paths: Sequence[str], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return path -> sum over real tokens of (x, 1)(x, 1)^T, float32 [X + 1, X + 1]; x is the module's input.

    Args:
        model: the public model, without anything attached.
    """
    sums: dict[str, Tensor] = {}
    real: list[Tensor] = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_NX = inputs[0].reshape(-1, inputs[0].shape[-1])[real[0]].double()
            x_NX = torch.cat([x_NX, x_NX.new_ones(len(x_NX), 1)], dim=1)
            sums[path] = sums.get(path, 0) + x_NX.t() @ x_NX

        return record

    handles = [model.backbone.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    for batch in batches:
        real[:] = [batch["attention_mask"].bool().reshape(-1)]
        model(batch)
    for handle in handles:
        handle.remove()
    return {path: total.float().cpu() for path, total in sums.items()}


def first_row(rows_ED: Tensor, mean_D: Tensor | None) -> Tensor:
    """Return the initial router row of a guest.

    It points along the mean input of the block. Its mean logit equals that of the public expert that the site's tokens
    ask for most, or 1 if the public rows are zero (a dense model). A longer row would take tokens from the public
    experts before the guest has learned anything.

    Args:
        mean_D: mean input of the block; None: a row of zeros is returned.
    """
    if mean_D is None:
        return torch.zeros_like(rows_ED[0])
    logit = (rows_ED.float() @ mean_D).max() if rows_ED.any() else torch.ones(())
    return (mean_D * (logit / mean_D.square().sum())).to(rows_ED.dtype)


@torch.no_grad()
def measure_routers(
    model: Frozen, batches: Iterator[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return block -> mean input of its router, float32 [D], and block -> tokens per expert [E], over real tokens."""
    sums: dict[str, Tensor] = {}
    usage: dict[str, Tensor] = {}
    real: list[Tensor] = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            x_ND = inputs[0].reshape(-1, inputs[0].shape[-1])[real[0]]
            counts_E = torch.bincount(output[2][real[0]].flatten(), minlength=len(module.weight))
            sums[path] = sums.get(path, 0) + x_ND.double().sum(0)
            usage[path] = usage.get(path, 0) + counts_E

        return record

    blocks = Base.sparse(model)
    hooks = [b.get_submodule(model.family.router).register_forward_hook(hook(p)) for p, b in blocks.items()]
    tokens = 0
    for batch in batches:
        real[:] = [batch["attention_mask"].bool().reshape(-1)]
        tokens += int(real[0].sum())
        model(batch)
    for handle in hooks:
        handle.remove()
    return {path: (total / tokens).float() for path, total in sums.items()}, usage
