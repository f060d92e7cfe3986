"""HFedMoE: resource-aware heterogeneous federated learning with mixture-of-experts.

City University of Hong Kong, University of Hong Kong. 2026. https://arxiv.org/abs/2601.00583

The method has three modules. Selection: in every batch a client scores the experts that its tokens are routed to
(importance, Eq 3-5, less beta times an information-bottleneck term, Eq 10-14) and trains the best of them within its
budget (Eq 15). The forward pass keeps every token's own top-k; the backward pass reaches only the chosen experts.
Expert aggregation: an expert is averaged over the clients with a router that gives it at least tau of its mass
(Eq 16-17). Router aggregation: a client's router is weighted by the usage and the importance, for this client, of the
experts that it dominates (Eq 18-21).

    G_e(x_i)    Tap.gates()                         s_b(e), KL_e, I_b(e)   importance, divergence, information
    E_union     Tap.served(b) > 0                   E_active(c)            best_experts(...)
    u_c(e)      reply group "usage"                 s_b^c(e)               reply group "importance"
    n_c(e)      reply group "trained"               S_c, alpha(c)          dominant, router_weights
    C_budget    payload scalar "budget"             tau                    HFedMoE.tau / E

Our reading, where the paper is silent or contradicts itself:
- x_i are tokens without padding. G is the softmax over all rows of the model's own router, before any top-k, so that
  its logarithm exists; 0 log 0 = 0. For sigmoid routers (DeepSeek-V3, GLM4), each sigmoid is divided by their sum,
  without the correction bias, so that u_c sums to one in each layer as for all other routers.
- Experts are ranked by I_b (Eq 14); `beta=0` ranks by importance alone. Eq 15 is taken literally: an expert with
  I_b < 0 is not chosen, except as the only one of its layer. Eq 11 is printed without the (1-G) term of a Bernoulli
  variable's divergence; `kl="bernoulli"` adds it.
- C_budget counts experts over all layers jointly, at least one in each; `per_layer` divides it among the layers.
  With `Experiment.layers` the experts that a device holds are divided by these weights; a batch may train any of them.
- u_c and s_b^c are measured on the forward passes of the round's training: u_c over all its tokens, s_b^c as the mean
  of s_b over its batches. tau is given in units of 1/E, where E is the number of experts of the layer, because u_c sums
  to one over them.
- An expert can reach tau without ever having been chosen. It is therefore merged only from clients that trained it
  (n_c(e) > 0, counted in batches), and only those clients send it. `weight="batches"` weights it by n_c(e) instead of
  |D_c|. If no client qualifies, the expert stays unchanged, bit for bit.
- alpha(c) is computed for the router of each layer and divided by its sum over the clients. As printed, the weights of
  Eq 20-21 do not sum to one and shrink the router from round to round; `router="literal"` shows this. `router="row"`
  weights each row by its own p_c(e) over the clients that dominate it. If no holder of a row dominates any expert of
  its layer, the row is averaged by |D_c|; in "row", a row that no client dominates keeps its value. The paper never
  uses r(c) (Eq 18); `coverage` multiplies alpha(c) by it.
- The paper's forward pass needs every routed expert in memory, whatever the budget. Here a client receives only as many
  experts as it can hold (`resident`): those that its validation data asked for most when it last took part, and at
  first the publicly most used ones. A token goes to the best of them. The client also receives the router rows of the
  other experts, to measure demand. The experts' gates then stay on the scale of the full model, as `fit.gates` says. G
  and everything that is measured with it are over the held experts.
- "Others' gradients are masked" is applied to activations as well as to parameters: the output of an expert that is not
  chosen is a constant, so neither the router's weight for it nor the layers below learn from those tokens. The router
  thus learns only from the tokens of the experts that it has chosen, which can reinforce the choice.
- Only the experts of the last choice have moments in the optimiser, because the budget bounds the memory of moments. An
  expert that was dropped and is chosen again starts with new moments, so its next step has the size of the learning
  rate. A random choice drops more experts from batch to batch than a choice by score does.
- Both budgets come from the device's memory, or are given as shares of the experts.

`select="random"`, `experts="plain"` and `router="plain"` each switch one module off: `select` then chooses at random
under the same budget, `experts` averages by |D_c| over all clients that hold an expert, trained or not, and `router`
averages by |D_c| over all routers.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from consilium.constraints import Factor, PositiveShare, Share
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ExpertMap,
    Payload,
    Reveal,
    Server,
    counts_of,
    derive_seed,
    experts_from_scalars,
    setting,
)
from consilium.errors import ConfigError
from consilium.moe.addressing import expert_of, router_row_of
from consilium.moe.gates import absent_rows
from consilium.moe.layers import most
from consilium.moe.routing import Tap
from consilium.params import Like, Params
from consilium.setup import MixtureSetup
from consilium.training import local_round, local_test

__all__ = ["HFedMoE", "best_experts", "divergence", "dominant", "importance", "information", "router_weights"]

Held = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HFedMoE(Algorithm):
    """Experts chosen per batch under a budget, and merged by usage.

    Args:
        lam: weight of an expert's mean gate against its largest gate in its importance (lambda), in [0, 1] (Eq 5).
        beta: weight of the information-bottleneck term, >= 0 (Eq 14).
        tau: least usage at which an expert is merged, in units of 1/E, >= 0 (Eq 17).
        budget: shares of all experts that a batch trains, in (0, 1], cycled over the clients in the order of their
            ids; (): what a client's memory allows.
        resident: shares of all experts that a client holds, in (0, 1], cycled likewise, never less than it trains; ():
            with `budget` all experts (the paper), else what its memory allows.
        per_layer: divide both budgets among the layers, instead of ranking the experts of all layers together.
        kl: "paper" (Eq 11 as printed) or "bernoulli" (the whole divergence of a 0/1 variable).
        select: "information" (Eq 14-15) or "random" choice among the routed experts under the same budget.
        experts: "usage" (Eq 17) or "plain" average.
        router: "importance" (Eq 20-21, normalised), "row" (a weight per row), "literal" (as printed) or "plain".
        coverage: multiply alpha(c) by r(c) (Eq 18).
        weight: weight of a client in Eq 17: "examples" (`|D_c|`) or "batches" in which it trained the expert.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)

    lam: Share = setting(0.5, "factor")
    beta: Factor = setting(0.1, "factor")
    tau: Annotated[float, Interval(ge=0, le=1e12)] = setting(0.5, "server")
    budget: tuple[PositiveShare, ...] = setting((), "server")
    resident: tuple[PositiveShare, ...] = setting((), "server")
    per_layer: bool = setting(False, "free")
    kl: Literal["paper", "bernoulli"] = setting("paper", "free")
    select: Literal["information", "random"] = setting("information", "free")
    experts: Literal["usage", "plain"] = setting("usage", "free")
    router: Literal["importance", "row", "literal", "plain"] = setting("importance", "server")
    coverage: bool = setting(False, "server")
    weight: Literal["examples", "batches"] = setting("examples", "server")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resident and not self.budget:
            raise ConfigError("resident is given without budget; give both, or neither for budgets by memory")

    def reads(self) -> frozenset[str]:
        return frozenset({"usage", "importance", "counts of trained batches"})

    def server(self, setup: MixtureSetup) -> Server:
        if not setup.merging.plain and self.router != "plain":
            raise ConfigError(
                f"router {self.router!r} weighs router rows by what clients declare, beside any rule of merging; take "
                "router 'plain'"
            )
        return HFedMoEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return HFedMoEClient(setup, self)


# --- selection ----------------------------------------------------------------------------------------------------


def importance(gates_TE: Tensor, lam: float) -> Tensor:
    """Return s_b(e) [E] = lambda * mean_i G_e(x_i) + (1 - lambda) * max_i G_e(x_i) (Eq 3-5)."""
    return lam * gates_TE.mean(0) + (1 - lam) * gates_TE.amax(0)


def divergence(gates_TE: Tensor, kl: Literal["paper", "bernoulli"] = "paper") -> Tensor:
    """Return KL_e [E] = mean_i G_e(x_i) log(G_e(x_i) / p_e), p_e = mean_i G_e(x_i) (Eq 10-11), in nats, >= 0.

    "bernoulli" adds mean_i (1 - G_e(x_i)) log((1 - G_e(x_i)) / (1 - p_e)). Without this term it is not the divergence
    of a 0/1 variable.
    """

    def gain(q_TE: Tensor) -> Tensor:
        mean_E = q_TE.mean(0)
        # By Jensen's inequality this is >= 0, except for rounding.
        return (torch.xlogy(q_TE, q_TE).mean(0) - torch.xlogy(mean_E, mean_E)).clamp(min=0)

    return gain(gates_TE) + (gain(1 - gates_TE) if kl == "bernoulli" else 0)


def information(gates_TE: Tensor, lam: float, beta: float, kl: Literal["paper", "bernoulli"] = "paper") -> Tensor:
    """Return I_b(e) [E] = s_b(e) - beta * KL_e (Eq 14)."""
    return importance(gates_TE, lam) - beta * divergence(gates_TE, kl)


def best_experts(
    scores: Mapping[str, Tensor],
    among: Mapping[str, Collection[int]],
    budget: int,
    least: int = 1,
    per_layer: bool = False,
) -> Held:
    """Return the experts within the budget with the largest sum of scores (Eq 15), ascending ids per block.

    In a tie the first layer wins, then the lower id.

    Args:
        scores: block -> scores [E], finite.
        among: block -> ids of the experts that may be chosen (E_union).
        budget: number of experts over all blocks.
        least: number of experts that every block gets in any case (fewer if `among` has fewer); further experts need
            a score >= 0.
        per_layer: whether each block gets `least` and a share of the rest in proportion to its E, rounded down.

    Raises:
        ConfigError: if the budget is too small for `least` in every block.
    """
    ranking = {
        block: [e for e in score_E.argsort(descending=True, stable=True).tolist() if e in among[block]]
        for block, score_E in scores.items()
    }
    expert_ids = {block: ids[:least] for block, ids in ranking.items()}
    room = budget - sum(map(len, expert_ids.values()))
    if room < 0:
        raise ConfigError(f"a budget of {budget} experts is too small for {len(scores)} layers with {least} each")
    candidates = [(block, e) for block, ids in ranking.items() for e in ids[least:] if scores[block][e] >= 0]
    if per_layer:
        total = sum(len(score_E) for score_E in scores.values())
        rooms = {block: room * len(score_E) // total for block, score_E in scores.items()}
        for block, e in candidates:
            if len(expert_ids[block]) < least + rooms[block]:
                expert_ids[block].append(e)
    else:
        for block, e in sorted(candidates, key=lambda place: -float(scores[place[0]][place[1]]))[:room]:
            expert_ids[block].append(e)
    return {block: tuple(sorted(ids)) for block, ids in expert_ids.items()}


class Selection:
    """The choice of experts for each batch (`choose` of `training.fit`), and the usage and importance it measures.

    Args:
        algorithm: the settings.
        budget: C_budget, number of experts over all layers.
        generator: generator of the random choice.
    """

    def __init__(self, algorithm: HFedMoE, budget: int, generator: torch.Generator):
        self.algorithm = algorithm
        self.budget = budget
        self.generator = generator
        self.tokens: dict[str, int] = {}
        self.batches = 0
        self.mass: dict[str, Tensor] = {}
        self.important: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, tap: Tap) -> Held:
        algorithm, scores, candidates = self.algorithm, {}, {}
        for block, gates_TE in tap.gates().items():
            gates_TE = gates_TE.cpu().double()
            self.tokens[block] = self.tokens.get(block, 0) + len(gates_TE)
            self.mass[block] = self.mass.get(block, 0) + gates_TE.sum(0)
            self.important[block] = self.important.get(block, 0) + importance(gates_TE, algorithm.lam)
            candidates[block] = tap.served(block).nonzero().flatten().tolist()
            if algorithm.select == "random":
                scores[block] = torch.rand(gates_TE.shape[1], generator=self.generator)
            else:
                scores[block] = information(gates_TE, algorithm.lam, algorithm.beta, algorithm.kl)
        self.batches += 1
        return best_experts(scores, candidates, self.budget, per_layer=algorithm.per_layer)

    def usage(self) -> dict[str, Tensor]:
        """Return u_c(e) (Eq 16): block -> float64 [E], the mean gate over all tokens; it sums to one."""
        return {block: mass_E / self.tokens[block] for block, mass_E in self.mass.items()}

    def importance(self) -> dict[str, Tensor]:
        """Return s_b^c(e): block -> float64 [E], the mean of s_b over the batches."""
        return {block: total_E / self.batches for block, total_E in self.important.items()}


# --- aggregation --------------------------------------------------------------------------------------------------


def dominant(usage_E: Tensor, tau: float) -> Tensor:
    """Return S_c as a mask: True where u_c(e) >= tau / E, shaped like `usage_E` [.., E]."""
    return usage_E >= tau / usage_E.shape[-1]


def router_weights(
    usage_CE: Tensor,
    importance_CE: Tensor,
    held_CE: Tensor,
    examples_C: Tensor,
    tau: float,
    how: Literal["importance", "row", "literal"] = "importance",
    coverage: bool = False,
) -> Tensor:
    """Return the weight [C, E] of each client's router rows in one layer (Eq 18-21).

    p_c(e) = u_c(e) s_c(e);  alpha(c) = sum_{e in S_c} p_c(e) / |S_global|, S_global the union of the S_c of the round.
    Over the clients that hold a row, the weights sum to one ("importance": always; "row": where a client dominates the
    row, else zero). In "literal" they are not normalised.

    Args:
        usage_CE: usage, zero where a client does not hold the expert.
        importance_CE: importance, zero where a client does not hold the expert.
        held_CE: bool, True where a client holds the expert.
        examples_C: |D_c|.
        tau: see `HFedMoE`.
        how: see `HFedMoE.router`.
        coverage: see `HFedMoE`.
    """
    dominant_CE = dominant(usage_CE, tau) & held_CE
    union_size = dominant_CE.any(0).sum().clamp(min=1)  # |S_global|
    p_CE = usage_CE * importance_CE * dominant_CE
    alpha_CE = p_CE if how == "row" else (p_CE.sum(1, keepdim=True) / union_size) * held_CE
    if coverage:
        alpha_CE = alpha_CE * dominant_CE.sum(1, keepdim=True) / union_size  # r(c)
    if how == "literal":
        return alpha_CE
    if how == "importance":
        no_weight_E = alpha_CE.sum(0) == 0
        alpha_CE = torch.where(no_weight_E, examples_C.unsqueeze(1) * held_CE, alpha_CE)
    return torch.nan_to_num(alpha_CE / alpha_CE.sum(0))  # 0 / 0: no client holds or dominates the row


@dataclass
class _Told:
    """Router information from a reply: rows by flat name, u and s [E] per block, and |D_c|."""

    rows: Params
    usage: Params
    importance: Params
    examples: float


def merged_rows(params: Params, told: Sequence[_Told], algorithm: HFedMoE) -> Params:
    """Return the merged router rows (Eq 21); except in "literal", rows without any weight are left out."""
    weights, places = {}, [{router_row_of(key) for key in t.rows} for t in told]
    for block in told[0].usage if told and places[0] else ():
        usage_CE = torch.stack([t.usage[block] for t in told])
        weights[block] = router_weights(
            usage_CE,
            torch.stack([t.importance[block] for t in told]),
            torch.tensor([[(block, e) in entries for e in range(usage_CE.shape[1])] for entries in places]),
            torch.tensor([t.examples for t in told], dtype=torch.float64),
            algorithm.tau,
            algorithm.router,
            algorithm.coverage,
        )
    rows = {}
    for key in sorted({key for t in told for key in t.rows}):
        block, e = router_row_of(key)
        entries = [(float(weights[block][c, e]), t.rows[key]) for c, t in enumerate(told) if key in t.rows]
        if any(weight for weight, _ in entries) or algorithm.router == "literal":
            rows[key] = sum(weight * row.double() for weight, row in entries).to(params[key].dtype)
    return rows


# --- the server half ----------------------------------------------------------------------------------------------


@dataclass
class HFedMoEServer(Server):
    """A server that holds the full MoE and, for each client, its two budgets and its last demand and trained experts.

    Attributes:
        budgets: client -> (experts it holds, experts a batch trains), over all layers.
        demand: client -> block -> demand probabilities [E] of its last round.
        chosen: client -> block -> share of the batches of its last round that trained each expert [E].
    """

    setup: MixtureSetup
    algorithm: HFedMoE
    budgets: dict[ClientId, tuple[int, int]] = field(default_factory=dict)
    demand: dict[ClientId, dict[str, Tensor]] = field(default_factory=dict)
    chosen: dict[ClientId, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = self.setup.initial_params()
        for index, client in enumerate(sorted(self.setup.clients, key=lambda c: c.id)):
            self.budgets[client.id] = budgets(self.setup, self.algorithm, client, index)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        participants = self.setup.sampling.choose(clients, round, self.setup.seed)
        return {client.id: self._task(client) for client in participants}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean, router_reports, trained_counts, merged_experts = self.setup.mean(self.params, round), [], [], set()
        for client, reply in replies:
            params, weights = reply.group("params"), self._expert_weights(reply)
            examples = float(reply.scalars["num_examples"])
            rows = {} if self.algorithm.router == "plain" else {k: t for k, t in params.items() if self._learnt_row(k)}

            def weight(key: str, weights: Params = weights, examples: float = examples) -> float:
                place = expert_of(key)
                return examples if place is None else float(weights[place[0]][place[1]])

            mean.add({key: t for key, t in params.items() if key not in rows}, weight)
            router_reports.append(_Told(rows, reply.group("usage"), reply.group("importance"), examples))
            demand = reply.group("demand")  # in the order of the layers, which breaks ties
            self.demand[client] = _shares({block: demand[block] for block in self.setup.model.counts})
            batches, steps = reply.group("trained"), max(int(reply.scalars["steps"]), 1)
            self.chosen[client] = {block: batches[block].double() / steps for block in self.setup.model.counts}
            trained_counts.append(sum(int((n_E > 0).sum()) for n_E in batches.values()))
            merged_experts |= {(block, e) for block, w_E in weights.items() for e in w_E.nonzero().flatten().tolist()}
        self.params = mean.mean(self.params) | merged_rows(self.params, router_reports, self.algorithm)
        counts = (
            {"trained": sum(trained_counts) / len(trained_counts), "merged": float(len(merged_experts))}
            if trained_counts
            else {}
        )
        return {**counts, **mean.told()}

    def deliver(self, client: ClientInfo) -> Payload:
        expert_ids = self.resident(client)
        return self.setup.sub_moe(self.params, client.task, expert_ids, client)

    def resident(self, client: ClientInfo) -> Held:
        """Return the experts that this client holds now: those with the highest demand, within its forward budget.

        The budget assumes experts that are spread evenly over the layers. A step needs more memory if they concentrate
        in one layer, and the device then holds fewer experts.
        """
        demand = self.demand.get(client.id) or _shares(self.setup.public_usage("no usage", client.id))
        all_ids = {block: range(total) for block, total in self.setup.model.counts.items()}
        (forward_budget, backward_budget), least = self.budgets[client.id], self.setup.model.family.least
        while True:
            if self.setup.layers:
                expert_ids = most(demand, self.setup.spread(forward_budget))
            else:
                expert_ids = best_experts(demand, all_ids, forward_budget, least, self.algorithm.per_layer)
            counts = counts_of(expert_ids)
            if counts == self.setup.least or not self.setup.lacks(client, counts, trained=backward_budget):
                return expert_ids
            forward_budget -= 1

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        """Return the tensors that a reply must have.

        With `experts="usage"` only trained experts return, so no expert is required here; `objection` checks that
        exactly the trained ones are there.
        """

        def each(dtype: torch.dtype, most: float) -> dict[str, Like]:
            return {block: Like((n,), dtype, 0, most) for block, n in self.setup.model.counts.items()}

        params = super().expects(client, sent)["params"]
        if self.algorithm.experts == "usage":
            params = {k: replace(like, needed=like.needed and expert_of(k) is None) for k, like in params.items()}
        counts = {group: each(torch.int64, 2**40) for group in ("demand", "trained")}
        shares = {group: each(torch.float64, 1 + 1e-6) for group in ("usage", "importance")}
        return {"params": params, **counts, **shares}

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        if "steps" not in reply.scalars:
            return "steps is missing"
        batches, sent_places = reply.group("trained"), {expert_of(k) for k in sent.group("params")}
        trained_places = {(block, e) for block, n_E in batches.items() for e in n_E.nonzero().flatten().tolist()}
        if foreign_places := sorted(trained_places - sent_places):
            return (
                f"expert {foreign_places[0][1]} of {foreign_places[0][0]} was trained, which the client was not given"
            )
        if any(int(n_E.max()) > reply.scalars["steps"] for n_E in batches.values()):
            return "an expert was trained in more batches than there were"
        expected_keys = {k for k in sent.group("params") if expert_of(k) in trained_places}
        returned_keys = {k for k in reply.group("params") if expert_of(k)}
        if sent.scalars.get("halves"):  # one adapter of a pair returns, so compare places, not names
            expected_keys, returned_keys = ({expert_of(k) for k in keys} for keys in (expected_keys, returned_keys))
        if self.algorithm.experts == "usage" and returned_keys != expected_keys:
            return "the experts that return are not those that were trained"
        return None

    def _task(self, client: ClientInfo) -> Payload:
        payload = self.deliver(client)
        absent_params = absent_rows(self.params, experts_from_scalars(payload.scalars))
        return Payload(
            {**payload.groups, "router": absent_params}, {**payload.scalars, "budget": self.budgets[client.id][1]}
        )

    def _expert_weights(self, reply: Payload) -> Params:
        """Return block -> weight of this client in the mean of each expert, float64 [E] (Eq 17)."""
        examples, weights = float(reply.scalars["num_examples"]), {}
        for block, n_E in reply.group("trained").items():
            full_E = torch.full(n_E.shape, examples, dtype=torch.float64)
            if self.algorithm.experts == "plain":
                weights[block] = full_E
                continue
            size_E = n_E.double() if self.algorithm.weight == "batches" else full_E
            weights[block] = size_E * (n_E > 0) * dominant(reply.group("usage")[block], self.algorithm.tau)
        return weights

    def _learnt_row(self, key: str) -> bool:
        """Return True if a name belongs to a trained router row; a correction bias is averaged like the trunk."""
        return router_row_of(key) is not None and not key.endswith(".e_score_correction_bias")

    # --- reports and checkpoints

    def structure(self) -> ExpertMap | None:
        return {client.id: self.resident(client) for client in self.setup.clients}

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        return _lists(self.demand)

    def trained(self) -> dict[ClientId, dict[str, list[float]]]:
        return _lists(self.chosen)

    def state(self) -> Payload:
        groups = {
            name: {
                f"{client}/{block}": x_E
                for client, tensors_by_block in tensors_by_client.items()
                for block, x_E in tensors_by_block.items()
            }
            for name, tensors_by_client in (("demand", self.demand), ("chosen", self.chosen))
        }
        return Payload({"params": self.params, **groups})

    def restore(self, state: Payload) -> None:
        self.params = state.group("params")
        for name in ("demand", "chosen"):
            tensors, blocks = state.group(name), self.setup.model.counts
            clients = sorted({key.split("/")[0] for key in tensors})
            setattr(self, name, {client: {b: tensors[f"{client}/{b}"] for b in blocks} for client in clients})


def _lists(told: Mapping[ClientId, Mapping[str, Tensor]]) -> dict[ClientId, dict[str, list[float]]]:
    return {client: {block: x_E.tolist() for block, x_E in blocks.items()} for client, blocks in told.items()}


def budgets(setup: MixtureSetup, algorithm: HFedMoE, client: ClientInfo, place: int) -> tuple[int, int]:
    """Return (experts that a client holds, experts that a batch trains), over all layers.

    Args:
        setup: the set-up of the run.
        algorithm: the settings.
        client: the client.
        place: index of the client among all clients in the order of their ids, which selects its shares.

    Raises:
        ConfigError: if both shares and device memory are given, or if a share leaves a layer without an expert.
        BudgetError: if the device cannot hold one expert per layer.
    """
    totals = setup.model.counts
    total, layers = sum(totals.values()), len(totals)
    if not algorithm.budget:
        return setup.budgets(client)
    if client.memory_bytes is not None:
        raise ConfigError(f"client {client.id} has device memory, which budget would ignore; leave one of them out")
    share = algorithm.budget[place % len(algorithm.budget)]
    backward = round(share * total)
    if backward < layers:
        raise ConfigError(
            f"budget {share:g} of {total} experts is {backward}; with {layers} layers it must be at least "
            f"{layers / total:g}, one expert in each"
        )
    resident_share = algorithm.resident[place % len(algorithm.resident)] if algorithm.resident else 1.0
    minimum = sum(min(setup.model.family.least, n) for n in totals.values())
    return max(round(resident_share * total), backward, minimum), backward


def _shares(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return block -> float64 [E] that sums to one, or zeros if nothing was counted."""
    return {block: n_E.double() / max(float(n_E.sum()), 1e-12) for block, n_E in counts.items()}


# --- the client half ----------------------------------------------------------------------------------------------


class HFedMoEClient(Client):
    """A client that trains, in every batch, the best of its experts within its budget.

    Its server merges by exact usage and importance, and expects only the trained experts in a reply.
    """

    reveals: Mapping[str, Reveal] = {
        group: Reveal("usage", "exact") for group in ("demand", "usage", "importance", "trained")
    }

    def __init__(self, setup: MixtureSetup, algorithm: HFedMoE):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        expert_ids, budget = experts_from_scalars(payload.scalars), int(payload.scalars["budget"])
        generator = torch.Generator().manual_seed(derive_seed(context.seed, "selection"))
        selection = Selection(self.algorithm, budget, generator)
        _, reply = local_round(self.setup, payload, context, usage=True, choose=selection, learning=budget)
        groups = {name: group for name, group in reply.groups.items() if name != "served"}
        measurements = {"usage": selection.usage(), "importance": selection.importance(), "trained": groups["trained"]}
        for name, blocks in measurements.items():
            groups[name] = {block: self._spread(x_E, expert_ids[block], block) for block, x_E in blocks.items()}
        if self.algorithm.experts == "usage":  # the server still has the experts that were not trained
            groups["params"] = {k: t for k, t in groups["params"].items() if _moved(k, groups["trained"])}
        return Payload(groups, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)

    def _spread(self, values: Tensor, ids: Sequence[int], block: str) -> Tensor:
        """Return the values of the held experts at their ids among all experts of a block, zero elsewhere."""
        all_values = torch.zeros(self.setup.model.counts[block], dtype=values.dtype)
        all_values[list(ids)] = values
        return all_values


def _moved(key: str, trained: Mapping[str, Tensor]) -> bool:
    place = expert_of(key)
    return place is None or bool(trained[place[0]][place[1]])
