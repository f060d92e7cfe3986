"""Observation of routers: demanded experts, served experts and balance.

Routers are hooked, never wrapped or replaced, and only during the forward call inside `Tap.batch`. Gradient
checkpointing runs a forward pass again during the backward pass, outside of it, so it is not counted twice.

Shapes: T tokens, E experts, K top-k, D model width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from consilium.core import ExpertSet
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, router_row_of, row_dimension
from consilium.moe.families import Family
from consilium.moe.model import Batch, TaskModel
from consilium.moe.surgery import attribute, put_tensor, set_attribute, share_block, whole_settings
from consilium.params import Params

__all__ = ["Tap", "Usage", "shares"]


@dataclass
class Usage:
    """Routed tokens per expert of the full model, without padding; int64 [E] per block.

    Attributes:
        demand: tokens that the router asks for, over all its rows, held here or not. These are the top-k of the
            unmasked logits, corrected and restricted to groups as in the family. With `fit.gates` "constant" and
            "slice", the held rows were trained under a softmax that is invariant to a common shift of their logits. No
            gradient moves this shift, so held and absent rows stay comparable except for the optimiser's own scaling.
        served: tokens that this model's experts computed; capacity-dropped tokens are not served.
        slots: tokens times top-k that passed the block, so demand / slots sums to one in every block.
    """

    demand: dict[str, Tensor] = field(default_factory=dict)
    served: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)

    def probability(self, which: str = "demand") -> dict[str, Tensor]:
        """Return p_ij = n_ij / N of the paper, float64 [E] per block; zeros if no token passed."""
        counts = self.demand if which == "demand" else self.served
        return {block: n.double() / max(self.slots[block], 1) for block, n in counts.items()}


def shares(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each expert in the counts of its block, float64 [E]; zeros if nothing was counted."""
    return {block: n.double() / max(float(n.sum()), 1.0) for block, n in counts.items()}


class Tap:
    """A set of hooks on every router of a model; `close` (or leaving a `with` block) removes them.

    Args:
        model: the (sub-)model.
        held: the full-model ids in the model's places; None: all, in order.
        outside: router rows of experts that are not held, by flat names, so that demand can be measured over the full
            router; with None or missing rows, demand is measured over the rows that are present.
        counts: experts of the full model per block; None: the largest id in `held` plus one.
    """

    def __init__(
        self,
        model: TaskModel,
        held: ExpertSet | None = None,
        outside: Params | None = None,
        counts: Mapping[str, int] | None = None,
    ):
        self.model = model
        self.held = dict(all_experts(model) if held is None else held)
        self.counts = dict(counts or {block: max(ids) + 1 for block, ids in self.held.items()})
        self.usage = Usage()
        self.logits: dict[str, Tensor] = {}
        self._routed: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._counting = False
        self._active = False
        self._outside = outside or {}
        self._blocks = model.blocks()
        self._hooks = [
            block.get_submodule(model.family.router).register_forward_hook(self._hook(name), with_kwargs=True)
            for name, block in self._blocks.items()
        ]

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def batch(self, batch: Batch, count: bool = False) -> Iterator[None]:
        """Capture the router logits of one forward call inside the block, and count usage if `count`."""
        self._masks = self.model.masks(batch)
        self.logits, self._routed, self._gates, self._counting, self._active = {}, {}, {}, count, True
        try:
            yield
        finally:
            self._active = False

    def served(self, block: str) -> Tensor:
        """Return real tokens of the last batch that each expert in the model computed, int64 [E] by local place."""
        mask_T, routed = self._mask(block), self._routed[block]
        places = len(self.held[block])
        if self.model.family.dispatch:
            return (routed.reshape(-1, places)[mask_T] > 0).sum(0)
        choices = routed.reshape(mask_T.shape[0], -1)[mask_T].flatten()
        if self.model.family.extra:  # A choice may be of something other than an expert, or voided by a gate of 0.
            is_real = self._gates[block].reshape(mask_T.shape[0], -1)[mask_T].flatten() != 0
            choices = choices[is_real & (choices < places)]
        return torch.bincount(choices, minlength=places)

    def gates(self) -> dict[str, Tensor]:
        """Return block -> G_e(x_i), float32 [T, E]: the last batch's router probabilities of the experts in the model.

        T counts real tokens. Each row sums to one. It is the softmax of the logits, or each sigmoid divided by their
        sum (DeepSeek-V3, Eq 19), without the correction bias. The result carries the gradient of the logits.
        """
        gates = {}
        for block, logits_TE in self.logits.items():
            logits_TE = logits_TE[self._mask(block), : len(self.held[block])].float()
            if self.model.family.probabilities:
                gates[block] = nn.functional.normalize(logits_TE, p=1, dim=-1)
            elif self.model.family.score == "softmax":
                gates[block] = logits_TE.softmax(-1)
            else:
                scores_TE = SCORES[self.model.family.score](logits_TE)
                gates[block] = nn.functional.normalize(scores_TE, p=1, dim=-1)
        return gates

    def balance_loss(self) -> Tensor:
        """Return the load-balance loss of the last batch: the mean over layers of E * sum_e f_e * P_e (Switch, Eq 4).

        f_e is the share of real tokens' slots with the top-k choice e. P_e is the mean router probability of e (for
        sigmoids: each divided by their sum, DeepSeek-V3, Eq 19). The loss is one if the load is perfectly even and E/K
        if the same K experts take all. Each layer has its own E, as sub-models need. A model without sparse layers
        has the loss 0.
        """
        losses = []
        for block, gates_TE in self.gates().items():
            n_experts = gates_TE.shape[-1]
            if self.model.family.dispatch:
                logits_TE = self.logits[block][self._mask(block)]
                choices = logits_TE.detach().topk(self._top_k(block), dim=-1).indices.flatten()
                count_E = torch.bincount(choices, minlength=n_experts)
            else:
                count_E = self.served(block)
            share_E = count_E / max(int(count_E.sum()), 1)
            losses.append(n_experts * (share_E * gates_TE.mean(0)).sum())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def _hook(self, block: str):
        family = self.model.family

        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: tuple[Tensor, ...]
        ) -> None:
            if not self._active:
                return
            logits_TE = output[family.logits].reshape(-1, output[family.logits].shape[-1])
            routed = output[family.routed].detach()
            places = len(self.held[block])
            is_unexpected = routed.shape[-1] != places if family.dispatch else routed.is_floating_point()
            if is_unexpected or logits_TE.shape[-1] < places:
                raise ModelError(
                    f"the router of {block} does not answer as it does in transformers 5.23; installed is "
                    f"{transformers.__version__}: install the version in constraints.txt"
                )
            self.logits[block], self._routed[block] = logits_TE, routed
            self._gates[block] = output[family.gates].detach()
            if self._counting:
                with torch.no_grad():
                    self._count(block, args, kwargs)

        return record

    def _count(self, block: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask_T = self._mask(block)
        held_ids = torch.tensor(self.held[block])
        served_counts = torch.zeros(self.counts[block], dtype=torch.int64)
        served_counts[held_ids] = self.served(block).cpu().to(torch.int64)
        ids, full_router = self._whole_router(block)
        choices, k = _ask(full_router, self._blocks[block], self.model.family, args, kwargs, len(ids))
        choices = choices.reshape(mask_T.shape[0], -1)[mask_T].flatten()
        choices = choices[choices < len(ids)].cpu()
        demand = torch.bincount(ids[choices], minlength=self.counts[block])

        usage = self.usage
        usage.demand[block] = usage.demand.get(block, 0) + demand
        usage.served[block] = usage.served.get(block, 0) + served_counts
        usage.slots[block] = usage.slots.get(block, 0) + int(mask_T.sum()) * k

    def _whole_router(self, name: str) -> tuple[Tensor, nn.Module]:
        """Return the ids [X] of experts with a known router row, ascending, and a copied router with these rows."""
        family, block, prefix = self.model.family, self._blocks[name], f"{name}.router."
        held_ids = self.held[name]
        places = {place for key in self._outside if (place := router_row_of(key)) is not None}
        absent_ids = sorted(i for block_, i in places if block_ == name and i not in held_ids)
        ids = torch.tensor([*held_ids, *absent_ids])
        order = ids.argsort()  # Groups are defined by the ids of the full model.
        router_copy = _share_router(block, family)
        for path in family.row_paths:
            owner, _, leaf = path.rpartition(".")
            tensor = getattr(router_copy.get_submodule(owner), leaf, None)
            if tensor is None:
                continue
            dim = row_dimension(tensor, len(held_ids))
            rows = list(tensor.detach().unbind(dim))
            held_rows, extra_rows = rows[: len(held_ids)], rows[len(held_ids) :]
            zero = torch.zeros_like(rows[0])
            absent_rows = [
                self._outside.get(f"{prefix}{i}.{leaf}", zero).to(zero).reshape(zero.shape) for i in absent_ids
            ]
            all_rows = [*held_rows, *absent_rows]
            put_tensor(
                router_copy.get_submodule(owner),
                leaf,
                torch.stack([*(all_rows[i] for i in order.tolist()), *extra_rows], dim),
            )
        _restore(router_copy, block, family, len(ids), len(ids) == self.counts[name], len(held_ids))
        return ids[order], router_copy

    def _mask(self, block: str) -> Tensor:
        side = "decoder" if block.startswith("decoder.") else "encoder"
        mask = self._masks[side].reshape(-1)
        if mask.shape[0] != self.logits[block].shape[0]:
            raise ModelError(f"{block} routed {self.logits[block].shape[0]} tokens, the batch has {mask.shape[0]}")
        return mask

    def _top_k(self, block: str) -> int:
        path = self.model.family.top_k
        return 1 if path is None else int(attribute(self._blocks[block], path))


SCORES = {"sigmoid": torch.sigmoid, "sqrtsoftplus": lambda x: nn.functional.softplus(x).sqrt()}
"""Score functions other than the softmax."""
UNLIMITED = 2**31
"""A capacity that no sequence reaches."""


def _share_router(block: nn.Module, family: Family) -> nn.Module:
    """Return a module with a copy of a block's router in evaluation mode, which shares its tensors but has no hooks."""
    router_copy = nn.Module()
    router = share_block(block.get_submodule(family.router)).eval()
    router._forward_hooks.clear()
    router._forward_hooks_with_kwargs.clear()
    parents = family.router.split(".")
    if len(parents) != 1:
        raise ModelError(f"the router of {family.name} is at {family.router!r}, not in its block")
    router_copy.add_module(parents[0], router)
    for path in family.beside:
        tensor = getattr(block, path)
        if isinstance(tensor, nn.Parameter):
            router_copy.register_parameter(path, tensor)
        else:
            router_copy.register_buffer(path, tensor, persistent=False)
    return router_copy


def _restore(copied: nn.Module, block: nn.Module, family: Family, rows: int, complete: bool, held: int) -> None:
    """Give a copied router the settings of the full model, for `rows` rows."""
    for path, value in whole_settings(block, family).items():
        if not path.startswith(f"{family.router}."):
            continue
        if path in family.counts:
            value = attribute(copied, path) + rows - held
        elif path == family.top_k:
            value = min(value, family.choices(rows))
        elif path == family.capacity:
            value = UNLIMITED
        elif not complete:
            value = 1  # Groups are defined over all experts.
        set_attribute(copied, path, value)


def _ask(
    copied: nn.Module, block: nn.Module, family: Family, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
) -> tuple[Tensor, int]:
    """Return the places that a copied router chooses [.., K], and K."""
    replacements = {id(getattr(block, path)): getattr(copied, path) for path in family.beside}
    args = tuple(replacements.get(id(arg), arg) for arg in args)
    output = copied.get_submodule(family.router)(*args, **{k: replacements.get(id(v), v) for k, v in kwargs.items()})
    if family.dispatch:
        k = 1 if family.top_k is None else int(attribute(copied, family.top_k))
        return output[family.logits].topk(k, dim=-1).indices, k
    return output[family.routed], output[family.routed].shape[-1]
