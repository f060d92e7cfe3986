"""Cutting a sub-MoE out of a model: its own experts, and its own number of them, in every layer."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from consilium.core import ExpertSet, counts_of
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts
from consilium.moe.families import Family
from consilium.moe.model import TaskModel

__all__ = ["attribute", "checked", "graft", "slice_experts"]


def checked(keep: ExpertSet, counts: Mapping[str, int], family: Family | None = None) -> dict[str, tuple[int, ...]]:
    """`keep` in the order of the blocks, after checking it against the number of experts per block.

    Raises:
        ModelError: for a block missing or unknown, no expert in a block or fewer than the family's router needs, or
            ids that are not ascending, distinct and in 0 .. E-1.
    """
    if set(keep) != set(counts):
        odd = sorted(set(keep) ^ set(counts))
        raise ModelError(f"experts must be named for each block of the model and no other; {odd[0]!r} is not both")
    for block, ids in keep.items():
        if not ids:
            raise ModelError(f"{block} would keep no expert; every layer needs at least one")
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= counts[block]:
            raise ModelError(
                f"{block}: experts {list(ids)} must be ascending, distinct and within 0..{counts[block] - 1}"
            )
        if family is not None and len(ids) < min(family.least, counts[block]):
            raise ModelError(
                f"{block} would keep {len(ids)} expert; the router of {family.name} ranks its best {family.least}, so "
                "every layer needs as many"
            )
    return {block: tuple(keep[block]) for block in counts}


def slice_experts(model: TaskModel, keep: ExpertSet) -> TaskModel:
    """Keep only the named experts and their router rows, in place; works on the meta device too.

    The sliced model equals the full one with its router masked to the kept experts: the softmax runs over the kept
    rows, top-k becomes min(k, E). In families whose gates are shares of that softmax they are larger than in the full
    model, see `gates.attach_gates`. Where a router chooses among groups first, a sliced block has one group. Where a
    family limits the tokens an expert serves (Switch), the limit grows by E_full / E_kept, because fewer experts share
    the same tokens. Keeping every expert of a block changes nothing in it, not one bit. The configuration is left
    alone: counts differ by layer, which no configuration can say.

    Raises:
        ModelError: see `checked`.
    """
    totals = counts_of(all_experts(model))
    keep = checked(keep, totals, model.family)
    for name, block in model.blocks().items():
        if len(keep[name]) < totals[name]:
            _slice_block(block, model.family, keep[name], totals[name])
    return model


def graft(model: TaskModel) -> TaskModel:
    """Give every sparse block one expert and one router row more, copies of its last, in place; works on the meta
    device too. As in a slice, a router that chooses among groups has one group afterwards."""
    family = model.family
    for name, total in counts_of(all_experts(model)).items():
        block = model.blocks()[name]
        experts = block.get_submodule(family.experts)
        if family.layout == "modules":
            last = experts.get_submodule(family.module.format(total - 1))
            experts.add_module(family.module.format(total), deepcopy(last))
        ids = (*range(total), total - 1)
        router = block.get_submodule(family.router)
        for row in family.rows:
            _select(router, row, ids, total)
        for tensor in family.tensors:
            _select(experts, tensor, ids, total)
        for path in family.counts:
            _set(block, path, total + 1)
        if family.groups:
            router.num_group = router.topk_group = 1
    return model


def _slice_block(block: nn.Module, family: Family, ids: Sequence[int], total: int) -> None:
    router, experts = block.get_submodule(family.router), block.get_submodule(family.experts)
    for row in family.rows:
        _select(router, row, ids, total)
    for tensor in family.tensors:
        _select(experts, tensor, ids, total)
    if family.layout == "modules":
        kept = [experts.get_submodule(family.module.format(i)) for i in ids]
        for place in range(total):
            delattr(experts, family.module.format(place))
        for place, module in enumerate(kept):
            experts.add_module(family.module.format(place), module)
    for path in family.counts:
        _set(block, path, len(ids))
    if family.top_k is not None:
        _set(block, family.top_k, min(attribute(block, family.top_k), len(ids)))
    if family.groups:
        router.num_group = router.topk_group = 1
    if family.capacity is not None:
        _set(block, family.capacity, -(-attribute(block, family.capacity) * total // len(ids)))


def _select(module: nn.Module, path: str, ids: Sequence[int], total: int) -> None:
    """Keep the given rows of the parameter or buffer at `path` below the module, if it has one."""
    *parents, name = path.split(".")
    owner = module.get_submodule(".".join(parents))
    tensor = getattr(owner, name, None)
    if tensor is None:
        return
    index = torch.tensor(list(ids), device=tensor.device)
    kept = tensor.detach().index_select(int(tensor.shape[0] != total), index)  # a row [1, E]: along the second
    setattr(owner, name, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)
    if isinstance(owner, nn.Linear):
        owner.out_features = len(ids)


def attribute(block: nn.Module, path: str) -> Any:
    """What a block has at a path that the table of families names."""
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)


def _set(block: nn.Module, path: str, value: int) -> None:
    owner, _, name = path.rpartition(".")
    setattr(block.get_submodule(owner), name, value)
