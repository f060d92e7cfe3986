"""Padding of all sparse layers to the same number of experts, so that plain transformers can read the model.

A sub-MoE with the same number of experts in all layers only needs a configuration with that number. If the numbers
differ, the smaller layers are padded to the largest with experts of zeros that no token reaches. This is exact in the
following cases:

    router with a bias     Switch (`router_bias` is switched on), gpt-oss: the new rows have the logit LOW for every
                           token, so their softmax is 0.0 and they are only chosen if there is no other expert
    sigmoid + correction   DeepSeek-V3, GLM4-MoE: the new experts' correction is LOW, so they rank last; the weights of
                           the chosen experts do not depend on them, as long as every layer has k experts
    no bias                OLMoE, Mixtral, Qwen2- and Qwen3-MoE, GraniteMoE, PhiMoE, DeepSeek-V2, Ernie 4.5, and
                           sigmoids with fewer than k experts. A row w that loses for the hidden state h wins for -h; a
                           copy of a held row takes a second place among the best k or a share of the softmax; and a
                           correction does not remove a new row from the sum that the weights are divided by. The hidden
                           state therefore gets a coordinate with a known sign, see `widen`, and the new rows are
                           strongly negative there

Two more settings have one value for all layers. Groups: a sliced layer has one group. A model that also has a whole
layer which restricts its choice to groups is refused. Capacity (Switch): the largest value is used. The model is the
same as long as no sequence has more tokens than the smallest value.
"""

import copy
from typing import Any

import torch
from torch import nn

from consilium.core import counts_of
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts
from consilium.moe.families import TOP_K, Family
from consilium.moe.model import TaskModel, text_config
from consilium.moe.surgery import attribute
from consilium.moe.widen import widen, widens

__all__ = ["can_fill", "uniform"]

LOW = -1e9
"""A logit or correction that always loses, in every dtype we use."""


def uniform(model: TaskModel) -> tuple[Any, int | None]:
    """Pad the sparse layers in place, and return the configuration that the model then has.

    The model itself no longer runs correctly, because its routers keep the old counts. Save its backbone, which may
    have been replaced, with the configuration, and load both.

    Args:
        model: a model from `slice_experts`, without adapters, not on the meta device.

    Returns:
        The configuration, a changed copy, and the largest number of tokens of a sequence; None: no limit.

    Raises:
        ModelError: if no configuration gives this model; the message gives the reason.
    """
    family, full_config, blocks = model.family, copy.deepcopy(model.backbone.config), model.blocks()
    config = text_config(full_config)
    counts = counts_of(all_experts(model))
    n_experts = max(counts.values())
    _check_others(model, n_experts)
    setattr(config, family.number, n_experts)
    if family.top_k is not None:
        name = next(name for name in TOP_K if isinstance(getattr(config, name, None), int))
        setattr(config, name, max(attribute(block, family.top_k) for block in blocks.values()))
    if family.groups:
        config.n_group, config.topk_group = _groups(model)
    token_limit = None
    if family.capacity is not None:
        capacities = {attribute(block, family.capacity) for block in blocks.values()}
        config.expert_capacity = max(capacities)
        token_limit = min(capacities) if len(capacities) > 1 else None
    if min(counts.values()) < n_experts:
        if family.extra:
            raise ModelError(
                f"the layers hold different numbers of experts, and the router of {family.name} has rows behind theirs"
            )
        has_bias = _biased(family, min(counts.values()) < getattr(config, "num_experts_per_tok", 1))
        if not has_bias and not widens(model):
            count_list = ", ".join(str(n) for n in counts.values())
            raise ModelError(
                f"the layers hold {count_list} experts, and a {family.name} configuration has one number: its routers "
                "have no bias and its output is tied to its embeddings, so that an expert that fills up could be chosen"
            )
        config.router_bias = True  # Switch needs this; other families do not read it.
        for name, block in blocks.items():
            _fill(block, family, counts[name], n_experts)
        if not has_bias:
            widen(model, config, counts)
    return full_config, token_limit


def can_fill(model: TaskModel) -> bool:
    """Return True if layers with fewer experts can be padded without changing the logits, see the module."""
    return _biased(model.family, False) or widens(model)


def _check_others(model: TaskModel, most: int) -> None:
    """Raise if blocks that are never cut have another number of experts, since a configuration has only one number."""
    family = model.family
    for name, module in model.backbone.named_modules():
        if type(module).__name__ == family.block and name not in model.blocks() and family.layout == "fused":
            experts = getattr(module, family.experts, None)
            n_experts = len(getattr(experts, family.tensors[0])) if experts is not None else most
            if n_experts not in (most, most + family.extra):
                raise ModelError(
                    f"{name} chooses its {n_experts} experts by token and keeps them all, the other layers hold "
                    f"{most}, and a configuration has one number"
                )


def _biased(family: Family, few: bool) -> bool:
    """Return True if a bias suffices to exclude an expert; `few`: some layers hold fewer experts than a token uses."""
    if family.score != "softmax" and family.correction:
        return not few
    return family.correction is None and family.score == "softmax" and "bias" in family.rows[-1]


def _groups(model: TaskModel) -> tuple[int, int]:
    """Return the n_group and topk_group that apply to all blocks."""
    routers = [block.get_submodule(model.family.router) for block in model.blocks().values()]
    pairs = {(router.num_group or 1, router.topk_group or 1) for router in routers}
    if len(pairs) == 1:
        return pairs.pop()
    is_greedy = getattr(model.config, "topk_method", "") == "greedy"
    if not is_greedy and any(n_groups != n_chosen for n_groups, n_chosen in pairs):
        raise ModelError(
            f"some layers hold all experts and choose among {max(pairs)[0]} groups of them, the others have one group; "
            "a configuration has one number"
        )
    return 1, 1


def _fill(block: nn.Module, family: Family, count: int, most: int) -> None:
    experts = block.get_submodule(family.experts)
    for row in family.row_paths:
        owner, _, name = row.rpartition(".")
        module = block.get_submodule(owner)
        tensor = getattr(module, name)
        if tensor is None:  # Routers of Switch have no bias at first.
            tensor = nn.Parameter(torch.zeros(count, dtype=module.weight.dtype))
        # A bias is [E] or, in Ernie, [1, E]; a weight is [E, D].
        padded_tensor = _grown(tensor, tensor.ndim - 1, most, LOW) if "bias" in name else _grown(tensor, 0, most, 0.0)
        setattr(module, name, nn.Parameter(padded_tensor, False) if isinstance(tensor, nn.Parameter) else padded_tensor)
    for name in family.tensors:
        setattr(experts, name, nn.Parameter(_grown(getattr(experts, name), 0, most, 0.0), False))
    for place in range(count, most) if family.layout == "modules" else ():
        empty_expert = copy.deepcopy(experts.get_submodule(family.module.format(0)))
        for parameter in empty_expert.parameters():
            parameter.data.zero_()
        experts.add_module(family.module.format(place), empty_expert)


def _grown(tensor: torch.Tensor, dim: int, most: int, value: float) -> torch.Tensor:
    """Return the tensor padded with `value` to length `most` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = most - shape[dim]
    return torch.cat([tensor.detach(), torch.full(shape, value, dtype=tensor.dtype)], dim)
