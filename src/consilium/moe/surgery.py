"""Slicing of a sub-MoE from a model, with its own experts, and its own number of them, in every layer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from consilium.core import ExpertSet, counts_of
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, row_dimension
from consilium.moe.families import Family
from consilium.moe.model import TaskModel

__all__ = [
    "attribute",
    "checked",
    "experts_in",
    "graft",
    "put_tensor",
    "set_attribute",
    "share_block",
    "slice_block",
    "slice_experts",
    "whole_settings",
]


def checked(keep: ExpertSet, counts: Mapping[str, int], family: Family | None = None) -> dict[str, tuple[int, ...]]:
    """Return `keep` in the order of the blocks, after checking it against the number of experts per block.

    Raises:
        ModelError: if a block is missing or unknown, if a block has no expert or fewer than the family's router needs,
            or if ids are not ascending, distinct and in 0 .. E-1.
    """
    if set(keep) != set(counts):
        differences = sorted(set(keep) ^ set(counts))
        raise ModelError(
            f"experts must be named for each block of the model and no other; {differences[0]!r} is not both"
        )
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
    rows, and top-k becomes min(k, E). Gates that are shares of that softmax are larger than in the full model, see
    `gates.attach_gates`. If a router chooses among groups first, a sliced block has one group. If a family limits the
    tokens per expert (Switch), the limit grows by E_full / E_kept, because fewer experts share the same tokens. A block
    that keeps all its experts does not change in any bit. The configuration is not changed, because it cannot express
    counts that differ by layer.

    Raises:
        ModelError: see `checked`.
    """
    totals = counts_of(all_experts(model))
    keep = checked(keep, totals, model.family)
    for name, block in model.blocks().items():
        if len(keep[name]) < totals[name]:
            slice_block(block, model.family, keep[name])
    return model


def graft(model: TaskModel) -> TaskModel:
    """Add one expert and one router row, copies of the last ones, to every sparse block, in place.

    This works on the meta device too. As in a slice, a router that chooses among groups has one group afterwards.
    """
    family = model.family
    for name, total in counts_of(all_experts(model)).items():
        block = model.blocks()[name]
        experts = block.get_submodule(family.experts)
        if family.layout == "modules":
            last_expert = experts.get_submodule(family.module.format(total - 1))
            experts.add_module(family.module.format(total), copy.deepcopy(last_expert))
        ids = (*range(total), total - 1)
        for path in family.row_paths:
            _select(block, path, ids, total)
        for tensor in family.tensors:
            _select(experts, tensor, ids, total)
        for path in family.counts:
            set_attribute(block, path, attribute(block, path) + 1)
        for path in _group_settings(family):
            set_attribute(block, path, 1)
    return model


def experts_in(block: nn.Module, family: Family) -> int:
    """Return the number of experts of a block."""
    return int(attribute(block, family.row_paths[0]).shape[0]) - family.extra


def slice_block(block: nn.Module, family: Family, ids: Sequence[int]) -> nn.Module:
    """Keep only these experts of one block, in place, and return the block."""
    total, count = experts_in(block, family), len(ids)
    if count == total:
        return block
    if not hasattr(block, WHOLE):
        setattr(block, WHOLE, {path: attribute(block, path) for path in settings(family)})
    experts = block.get_submodule(family.experts)
    for path in family.row_paths:
        _select(block, path, ids, total)
    for tensor in family.tensors:
        _select(experts, tensor, ids, total)
    if family.layout == "modules":
        kept_modules = [experts.get_submodule(family.module.format(i)) for i in ids]
        for place in range(total):
            delattr(experts, family.module.format(place))
        for place, module in enumerate(kept_modules):
            experts.add_module(family.module.format(place), module)
    for path in family.counts:
        set_attribute(block, path, attribute(block, path) - total + count)
    if family.top_k is not None:
        set_attribute(block, family.top_k, min(attribute(block, family.top_k), family.choices(count)))
    for path in _group_settings(family):
        set_attribute(block, path, 1)
    if family.capacity is not None:
        set_attribute(block, family.capacity, -(-attribute(block, family.capacity) * total // count))
    return block


WHOLE = "_before_slicing"
"""Attribute of a sliced block with the settings that it had before."""


def settings(family: Family) -> tuple[str, ...]:
    """Return the paths of a block's settings that slicing changes."""
    scalar_paths = tuple(path for path in (family.top_k, family.capacity) if path is not None)
    return (*family.counts, *scalar_paths, *_group_settings(family))


def whole_settings(block: nn.Module, family: Family) -> dict[str, Any]:
    """Return the settings that a block had before slicing."""
    old_settings = getattr(block, WHOLE, None)
    return (
        dict(old_settings) if old_settings is not None else {path: attribute(block, path) for path in settings(family)}
    )


def _group_settings(family: Family) -> tuple[str, ...]:
    return (f"{family.router}.num_group", f"{family.router}.topk_group") if family.groups else ()


def share_block(block: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its parameters and buffers."""
    memo = {id(t): t for t in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, memo)


def _select(block: nn.Module, path: str, ids: Sequence[int], total: int) -> None:
    """Keep the rows `ids` of the tensor at `path`, if the block has one, and the rows after those of experts."""
    owner, _, name = path.rpartition(".")
    module = block.get_submodule(owner)
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    dim = row_dimension(tensor, total)
    extra_rows = range(total, tensor.shape[dim])
    index = torch.tensor([*ids, *extra_rows], device=tensor.device)
    put_tensor(module, name, tensor.detach().index_select(dim, index))


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer."""
    old_tensor = getattr(module, name)
    setattr(
        module, name, nn.Parameter(tensor, old_tensor.requires_grad) if isinstance(old_tensor, nn.Parameter) else tensor
    )
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features = len(tensor)


def attribute(block: nn.Module, path: str) -> Any:
    """Return the attribute of a block at a path of a `Family`."""
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name)
    return value


def set_attribute(block: nn.Module, path: str, value: int) -> None:
    """Set a number of a block; a configuration on the path is copied first, because other blocks share it."""
    owner, _, name = path.rpartition(".")
    target: Any = block
    for part in owner.split(".") if owner else ():
        inner = getattr(target, part)
        if isinstance(inner, PretrainedConfig):
            inner = copy.copy(inner)
            setattr(target, part, inner)
        target = inner
    setattr(target, name, value)
