"""Watching routers: what they ask for, what is served, and how evenly (shapes: T tokens, E experts, K top-k, D model).

Routers are hooked, never wrapped or replaced, and only during the forward call inside `Tap.batch`: gradient
checkpointing runs a forward again during the backward pass, outside of it, and is therefore not counted twice.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from consilium.core import ExpertSet
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts
from consilium.moe.model import Batch, TaskModel
from consilium.moe.surgery import attribute
from consilium.params import Params

__all__ = ["Tap", "Usage", "shares"]


@dataclass
class Usage:
    """Routed tokens per expert of the full model, padding left out; int64 [E] per block.

    demand: what the router asks for over all its rows, held here or not (top-k of the unmasked logits, corrected
        and restricted to groups as the family does it). With `fit.gates` "constant" and "slice" the rows held were
        trained under a softmax that is blind to a common shift of their logits: no gradient moves it, so rows held
        and absent stay comparable but for what the optimiser's own scaling adds.
    served: what this model's experts really computed; capacity-dropped tokens are not served.
    slots: tokens times top-k that passed the block, so demand / slots sums to one in every block.
    """

    demand: dict[str, Tensor] = field(default_factory=dict)
    served: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)

    def probability(self, which: str = "demand") -> dict[str, Tensor]:
        """p_ij = n_ij / N of the paper, float64 [E] per block; zeros where no token passed."""
        counts = self.demand if which == "demand" else self.served
        return {block: n.double() / max(self.slots[block], 1) for block, n in counts.items()}


def shares(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each expert in the counts of its block, float64 [E]; zeros where nothing was counted."""
    return {block: n.double() / max(float(n.sum()), 1.0) for block, n in counts.items()}


class Tap:
    """Hooks on every router of a model; `close` (or a `with` block) takes them off again.

    Args:
        model: the (sub-)model.
        held: the full-model ids in the model's places; None: all, in order.
        outside: router rows of experts that are not held, flat names, so that demand can be measured over the
            full router; None or missing rows: demand is measured over the rows there are.
        counts: experts of the full model per block; None: as many as the model holds.
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
        self._masks: dict[str, Tensor] = {}
        self._counting = False
        self._active = False
        self._outside = {block: self._rows(block, outside or {}) for block in self.held}
        family = model.family
        self._hooks = [
            block.get_submodule(family.router).register_forward_hook(self._hook(name))
            for name, block in model.blocks().items()
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
        """Around one forward call: captures this batch's router logits, and counts usage if asked."""
        self._masks = self.model.masks(batch)
        self.logits, self._routed, self._counting, self._active = {}, {}, count, True
        try:
            yield
        finally:
            self._active = False

    def served(self, block: str) -> Tensor:
        """Real tokens of the last batch that each expert in the model computed, int64 [E] by local place."""
        mask_T, routed = self._mask(block), self._routed[block]
        places = len(self.held[block])
        if self.model.family.dispatch:
            return routed.reshape(-1, places)[mask_T].sum(0)
        return torch.bincount(routed.reshape(mask_T.shape[0], -1)[mask_T].flatten(), minlength=places)

    def gates(self) -> dict[str, Tensor]:
        """Block -> G_e(x_i), float32 [T, E]: the last batch's router probabilities of the experts in the model.

        T: real tokens. Each row sums to one: the softmax of the logits, or each sigmoid divided by their sum
        (DeepSeek-V3, Eq 19); a correction bias has no part in it. They carry the gradient of the logits.
        """
        gates = {}
        for block, logits_TE in self.logits.items():
            logits_TE = logits_TE[self._mask(block)].float()
            if self.model.family.choice == "sigmoid":
                gates[block] = nn.functional.normalize(logits_TE.sigmoid(), p=1, dim=-1)
            else:
                gates[block] = logits_TE.softmax(-1)
        return gates

    def balance_loss(self) -> Tensor:
        """Load-balance loss of the last batch: the mean over layers of E * sum_e f_e * P_e (Switch, Eq 4).

        f_e: the share of real tokens' slots whose top-k choice is e; P_e: the mean router probability of e (of
        sigmoids: each divided by their sum, DeepSeek-V3, Eq 19). One when perfectly even, E/K when the same K experts
        take all. Each layer has its own E, as sub-models need. A model without sparse layers has none to balance: 0.
        """
        losses = []
        for block, gates_TE in self.gates().items():
            logits_TE = self.logits[block][self._mask(block)].float()
            k = self._top_k(block)
            chosen_TK = self._choose(logits_TE, self._correction(block), k, self._groups(block))
            n_experts = logits_TE.shape[-1]
            share_E = torch.bincount(chosen_TK.flatten(), minlength=n_experts) / max(chosen_TK.numel(), 1)
            losses.append(n_experts * (share_E * gates_TE.mean(0)).sum())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def _hook(self, block: str):
        family = self.model.family

        def record(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            if not self._active:
                return
            logits_TE = output[family.logits].reshape(-1, output[family.logits].shape[-1])
            routed = output[family.routed].detach()
            places = len(self.held[block])
            if routed.is_floating_point() or (family.dispatch and routed.shape[-1] != places):
                raise ModelError(
                    f"the router of {block} does not answer as it does in transformers 5.23; installed is "
                    f"{transformers.__version__}: install the version in constraints.txt"
                )
            self.logits[block], self._routed[block] = logits_TE, routed
            if self._counting:
                with torch.no_grad():
                    self._count(block, args[0].reshape(-1, args[0].shape[-1]), logits_TE)

        return record

    def _count(self, block: str, hidden_TD: Tensor, logits_TE: Tensor) -> None:
        mask_T = self._mask(block)
        held = torch.tensor(self.held[block], device=logits_TE.device)
        served = torch.zeros(self.counts[block], dtype=torch.int64)
        served[held.cpu()] = self.served(block).cpu().to(torch.int64)

        ids, rows_XD, bias_X, correction_X = self._outside[block]
        all_ids = torch.cat([held, ids.to(held.device)])
        logits, correction = logits_TE[mask_T].float(), self._correction(block)
        if len(ids):
            extra = hidden_TD[mask_T].float() @ rows_XD.to(logits.device).T + bias_X.to(logits.device)
            logits = torch.cat([logits, extra], dim=-1)
            correction = None if correction is None else torch.cat([correction, correction_X.to(logits.device)])
        order = all_ids.argsort()  # groups go by the ids of the full model
        k = min(self._top_k(block, full=True), logits.shape[-1])
        groups = self._groups(block, full=True) if len(all_ids) == self.counts[block] else None
        chosen = self._choose(logits[:, order], None if correction is None else correction[order], k, groups)
        demand = torch.bincount(all_ids[order][chosen.flatten()].cpu(), minlength=self.counts[block])

        usage = self.usage
        usage.demand[block] = usage.demand.get(block, 0) + demand
        usage.served[block] = usage.served.get(block, 0) + served
        usage.slots[block] = usage.slots.get(block, 0) + int(mask_T.sum()) * k

    def _mask(self, block: str) -> Tensor:
        side = "decoder" if block.startswith("decoder.") else "encoder"
        mask = self._masks[side].reshape(-1)
        if mask.shape[0] != self.logits[block].shape[0]:
            raise ModelError(f"{block} routed {self.logits[block].shape[0]} tokens, the batch has {mask.shape[0]}")
        return mask

    def _choose(self, logits_TE: Tensor, correction_E: Tensor | None, k: int, groups: tuple[int, int] | None) -> Tensor:
        """The places [T, K] of the experts that the family's router takes; groups: how many there are and may serve."""
        family = self.model.family
        scores_TE = logits_TE.detach()
        if family.choice is not None:
            scores_TE = scores_TE.sigmoid() if family.choice == "sigmoid" else scores_TE.softmax(-1)
            scores_TE = scores_TE + correction_E
        if groups is not None:
            scores_TGX = scores_TE.unflatten(-1, (groups[0], -1))
            best_TG = scores_TGX.topk(family.groups, dim=-1).values.sum(-1)
            allowed_TG = torch.zeros_like(best_TG, dtype=torch.bool)
            allowed_TG.scatter_(-1, best_TG.topk(groups[1], dim=-1).indices, True)
            scores_TE = scores_TGX.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores_TE.topk(k, dim=-1).indices

    def _correction(self, block: str) -> Tensor | None:
        """The correction biases [E] of the experts in the model."""
        family = self.model.family
        if family.choice is None:
            return None
        return attribute(self.model.blocks()[block], f"{family.router}.{family.rows[-1]}").detach().flatten()

    def _groups(self, block: str, full: bool = False) -> tuple[int, int] | None:
        """How many groups the router of a block (full: of the full model) has, and how many a token may use."""
        family, config = self.model.family, self.model.config
        if not family.groups or getattr(config, "topk_method", "") == "greedy":
            return None
        router = self.model.blocks()[block].get_submodule(family.router)
        return (config.n_group, config.topk_group) if full else (router.num_group, router.topk_group)

    def _top_k(self, block: str, full: bool = False) -> int:
        path = self.model.family.top_k
        if path is None:
            return 1
        if full:
            return int(getattr(self.model.config, "num_experts_per_tok", 1))
        return int(attribute(self.model.blocks()[block], path))

    def _rows(self, block: str, outside: Params) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids [X], rows [X, D], biases [X] and correction biases [X] of the experts of a block that are not held."""
        prefix = f"{block}.router."
        ids = sorted(
            int(k[len(prefix) :].split(".")[0]) for k in outside if k.startswith(prefix) and k.endswith(".weight")
        )
        ids = [i for i in ids if i not in self.held[block]]
        if not ids:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)

        def leaves(name: str) -> Tensor:
            zero = torch.zeros(())
            return torch.stack([outside.get(f"{prefix}{i}.{name}", zero).float().reshape(()) for i in ids])

        rows = torch.stack([outside[f"{prefix}{i}.weight"].float() for i in ids])
        return torch.tensor(ids), rows, leaves("bias"), leaves("e_score_correction_bias")
