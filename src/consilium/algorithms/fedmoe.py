"""FedMoE: Personalized Federated Learning via Heterogeneous Mixture of Experts.

Mei, Cai, Zhou, Wang, Xu. 2024. https://arxiv.org/abs/2408.11304

Stage one (one exchange). Clients that can hold the full MoE attach LoRA to its experts, train a few epochs and measure
on validation data how often each expert is requested. For the others the server takes the volume-weighted mean of the
clients with the same task. Each client's first sub-MoE keeps, in every layer, the most used experts up to the largest
common threshold theta that fits alpha * M_k (Eq 3, by bisection).

Stage two (Algorithm 1). Sampled clients train their sub-MoE. The server merges trunk, experts and router rows over the
clients that hold them. If the validation score of a client has stopped improving, the client is compared with the
others (Eq 4). Its number of experts moves to the mean of its top-K neighbours (Eq 5): it adds or removes the experts
that these neighbours use most or least (Eq 6). A change that does not help is rolled back, and the structure is frozen.

    p_ij     FedMoEServer.p[client], rows joined     n_ij / N over validation tokens (per block: sums to one)
    M_k      ClientInfo.memory_bytes                 alpha    FedMoE.alpha, head-room for stage two
    w_k      payload group "params"                  acc      scalars["validation"]
    S(u_k)   similar(...)                            p-hat    p_hat(...)

Departures, each where the paper is silent or contradicts itself:
- With `Experiment.layers`, the numbers of experts of the layers are given, and Eq 3's threshold is not used.
- The paper does not say over which experts a sub-MoE's gates are normalised. `fit.gates` sets this here; by default the
  mean total gate stays that of the full model (`moe.gates`).
- p is the demand of the router over all its rows: clients also receive the rows of experts that they do not hold (group
  "router", for measuring only). `usage="served"` uses the tokens that the held experts served.
- In the shrinking branch of the paper, the n of "top n" is <= 0. Here |n| experts are removed, and n = 0 changes
  nothing. n is rounded half away from zero. No layer loses its last expert (its last two where the family's router
  ranks two). In one change, no layer loses more than 1 - `floor` of the demand it serves.
- Growth stops at the first expert for which M_k (not alpha * M_k) is too small. Both limits are in the memory model's
  bytes: weights, gradients, optimiser and activations.
- "Has not improved" means that the score has not exceeded the client's best for `patience` participations. A change is
  accepted with the first better score and rolled back after `patience` participations without one.
- The clients of a round are judged in the order of their ids. Each sees the changes before it, as in the loop of
  Algorithm 1. Absent clients keep the p that they sent last. Neighbours without any similarity change nothing.
- If no client of a task was profiled, p is estimated from all profiled clients. If no client was profiled at all, p is
  the public usage in the model's card; without a card the structure is random.
- Structure is chosen on validation data; test data is used for the report only.
- With `Experiment.privacy.usage`, clients can send less than p: the upper half of the experts, or noised shares.
- `stage1="none"` starts from random experts, `stage1="forward"` profiles without training, `stage2=False` keeps the
  first structure: the paper's ablations and a cheaper stage one. `rank="layer"` ranks z-scores of p-hat within each
  layer; `weight="tokens"` weighs an expert by the validation tokens it served instead of by n_k.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from consilium.algorithms.randommoe import random_choice
from consilium.constraints import Count, Fraction, PositiveShare
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
    setting,
)
from consilium.errors import BudgetError
from consilium.moe.addressing import expert_of, router_row_of
from consilium.moe.budget import Mode
from consilium.moe.gates import absent_rows
from consilium.moe.layers import most
from consilium.moe.lora import add_expert_lora
from consilium.moe.routing import Tap, shares
from consilium.params import Like
from consilium.scoring import evaluate
from consilium.setup import MixtureSetup
from consilium.training import fit, local_round, local_test, seeded

__all__ = ["FedMoE", "largest_structure", "p_hat", "similar", "similarity", "structure_at", "z_scores"]

Usage = Mapping[str, Tensor]
"""Block -> p_i, float64 [E]."""
Held = dict[str, tuple[int, ...]]
MOST = 2**40
"""Largest number of tokens that a client may report for an expert."""


@dataclass(frozen=True)
class FedMoE(Algorithm):
    """Heterogeneous sub-MoEs chosen by expert usage.

    Args:
        alpha: share of a client's memory that the first structure may use, in (0, 1].
        K: number of neighbours that a client is compared with, >= 1 (Eq 5).
        patience: participations without improvement before a change, and to judge one, >= 1.
        stage1: first measurement of p: "lora" (the paper), "forward" (no training), "none" (random structure).
        stage1_epochs: local epochs of LoRA training in stage one.
        lora_rank: rank of the adapters in stage one; with `fit.lora`, its adapters are trained in stage one instead.
        stage2: whether structures change after stage one.
        freeze: whether a client keeps its structure for good after a change was rolled back.
        usage: "demand" (all router rows) or "served" (held experts only) for Eq 4 to 6.
        rank: "joint" ranks p-hat itself over all layers, "layer" ranks its z-scores within each layer.
        weight: "examples" (n_k) or "tokens" (validation tokens served) for merging experts; an expert that served
            no tokens keeps the server's weights.
        floor: share of the demand served by a layer that it keeps in one shrinking, in [0, 1).
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    alpha: PositiveShare = setting(0.9, "server")
    K: Count = setting(3, "server")
    patience: Count = setting(2, "server")
    stage1: Literal["lora", "forward", "none"] = setting("lora", "free")
    stage1_epochs: Count = setting(5, "epochs")
    lora_rank: Count = setting(8, "memory")
    stage2: bool = setting(True, "server")
    freeze: bool = setting(True, "server")
    usage: Literal["demand", "served"] = setting("demand", "server")
    rank: Literal["joint", "layer"] = setting("joint", "server")
    weight: Literal["examples", "tokens"] = setting("examples", "server")
    floor: Fraction = setting(0.5, "server")

    def rank_for(self, setup: MixtureSetup) -> int:
        """Return the rank of the adapters in stage one."""
        return setup.fit.lora.rank or self.lora_rank

    def asks(self) -> tuple[str, ...]:
        """Return the groups of usage that clients send."""
        tokens = ("served",) if self.weight == "tokens" else ()
        return tuple(dict.fromkeys((self.usage, *tokens)))

    def mode_for(self, setup: MixtureSetup) -> Mode:
        """Return the mode of stage one for the memory model."""
        if self.stage1 != "lora":
            return "forward"
        return "lora" if setup.fit.lora.rank else "peft"

    def chooses_by_memory(self) -> bool:
        return True

    def reads(self) -> frozenset[str]:
        inputs = {"usage"} if self.stage2 or self.stage1 != "none" else set()
        return frozenset(inputs | ({"validation scores"} if self.stage2 else set()))

    def server(self, setup: MixtureSetup) -> Server:
        return FedMoEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FedMoEClient(setup, self)


# --- the equations ------------------------------------------------------------------------------------------------


def structure_at(p: Usage, theta: float, least: int = 1) -> Held:
    """Return the smallest structure that covers a share theta of the usage in every layer.

    A layer takes its experts by descending p (ties: lower id first) until their sum reaches theta (Eq 3).

    Args:
        p: block -> p_i, [E].
        theta: share of the usage to cover, in [0, 1].
        least: fewest experts of a layer.
    """
    structure = {}
    for block, p_E in p.items():
        order = p_E.argsort(descending=True, stable=True)
        count = int((p_E[order].cumsum(0) < theta - 1e-9).sum())
        structure[block] = tuple(sorted(order[: max(count + 1, least)].tolist()))
    return structure


def largest_structure(p: Usage, fits: Callable[[Mapping[str, int]], bool], least: int = 1) -> Held:
    """Return the structure at the largest theta in [0, 1] that fits, found by bisection (the heuristic for Eq 3).

    Args:
        p: block -> p_i, [E].
        fits: function that returns whether given numbers of experts per block fit the memory; must be monotone.
        least: fewest experts of a layer.

    Raises:
        BudgetError: if not even `least` experts per layer fit.
    """
    low_theta, high_theta = 0.0, 1.0
    best_structure = structure_at(p, low_theta, least)
    if not fits(counts_of(best_structure)):
        raise BudgetError(f"{_per_layer(least)} does not fit")
    if fits(counts_of(full_structure := structure_at(p, high_theta, least))):
        return full_structure
    for _ in range(40):
        theta = (low_theta + high_theta) / 2
        if fits(counts_of(candidate := structure_at(p, theta, least))):
            low_theta, best_structure = theta, candidate
        else:
            high_theta = theta
    return best_structure


def similarity(p_k: Usage, p_a: Usage) -> float:
    """Return the cosine of the flattened L x E usage matrices (Eq 4); 0 if one of them is zero."""
    a = torch.cat([p_k[block] for block in sorted(p_k)])
    b = torch.cat([p_a[block] for block in sorted(p_k)])
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0


def similar(k: ClientId, p: Mapping[ClientId, Usage], K: int) -> dict[ClientId, float]:
    """Return the K clients most similar to k with their similarities (Eq 5; ties: lower id first)."""
    sims = {a: similarity(p[k], p[a]) for a in sorted(p) if a != k}
    return dict(sorted(sims.items(), key=lambda item: -item[1])[:K])


def p_hat(sims: Mapping[ClientId, float], p: Mapping[ClientId, Usage]) -> dict[str, Tensor]:
    """Return p-hat_ij = sum_a sim_a p_ij(a) / sum_a sim_a over the similar clients (Eq 6); float64 [E] per block."""
    total = sum(sims.values()) or 1.0
    blocks = p[next(iter(sims))]
    return {block: sum(s * p[a][block] for a, s in sims.items()) / total for block in blocks}


def z_scores(p: Usage) -> dict[str, Tensor]:
    """Return p in standard deviations from its layer's mean; zeros in a layer where all experts are equal."""
    return {block: (p_E - p_E.mean()) / max(float(p_E.std(correction=0)), 1e-12) for block, p_E in p.items()}


def _per_layer(least: int) -> str:
    return "one expert per layer" if least == 1 else f"a choice of {least} experts per layer"


def _round_half_away(x: float) -> int:
    return int(abs(x) + 0.5) * (1 if x > 0 else -1)


# --- the server half ----------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """The progress of a client in stage two.

    Attributes:
        best: best validation score so far.
        stale: participations without a better score, counted from the last decision on the structure.
        before: structure to roll back to while a change is on trial; None: no change is on trial.
        frozen: whether the structure no longer changes.
    """

    best: float = -1.0
    stale: int = 0
    before: Held | None = None
    frozen: bool = False


@dataclass
class FedMoEServer(Server):
    """A server that holds the full MoE, the client-expert map, the usage p and each client's progress."""

    setup: MixtureSetup
    algorithm: FedMoE
    map: dict[ClientId, Held] = field(default_factory=dict)
    p: dict[ClientId, dict[str, Tensor]] = field(default_factory=dict)
    measured: list[ClientId] = field(default_factory=list)
    progress: dict[ClientId, _Progress] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = self.setup.initial_params()
        self.progress = {c.id: _Progress() for c in self.setup.clients}
        for client in self.setup.clients:
            if lack := self.setup.lacks(client, self.setup.least):
                raise BudgetError(
                    f"client {client.id} cannot hold the smallest sub-MoE, {_per_layer(self._least)}: {lack}; "
                    "give it more memory, or lower fit.batch_size or fit.max_length"
                )
        if self.algorithm.stage1 == "none":
            self._random_structures()

    @property
    def _least(self) -> int:
        """Return the fewest experts that a layer of a sub-MoE may have."""
        return self.setup.model.family.least

    @property
    def stage(self) -> str:
        return "two" if self.map else "one"

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        if self.stage == "one":
            able_clients = [client for client in clients if self.unable(client) is None]
            if able_clients:
                return {client.id: self._profiled(client) for client in able_clients}
            self._set_structures()
        participants = self.setup.sampling.choose(clients, round, self.setup.seed)
        return {client.id: self._sub_moe(client) for client in participants}

    def _profiled(self, client: ClientInfo) -> Payload:
        """Return the full MoE, which a client measures in stage one."""
        payload = self.setup.sub_moe(self.params, client.task, None, client)
        return Payload(payload.groups, {**payload.scalars, "stage": "one"})

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        if self.stage == "one":
            for client, reply in replies:
                self.p[client] = self._usage(reply)
                self.measured.append(client)
            self._set_structures()
            return {"profiled": float(len(self.measured))}
        mean, scores = self.setup.mean(self.params, round), {}
        for client, reply in replies:
            mean.add(reply.group("params"), self._weight(reply))
            self.p[client] = self._usage(reply)
            if self.algorithm.stage2:
                scores[client] = float(reply.scalars["validation"])
        self.params = mean.mean(self.params)
        for client, accuracy in scores.items():
            self._follow(client, accuracy)
        expert_counts = [sum(counts_of(experts).values()) for experts in self.map.values()]
        return {"experts": sum(expert_counts) / len(expert_counts), **mean.told()}

    def deliver(self, client: ClientInfo) -> Payload:
        return self.setup.sub_moe(self.params, client.task, self.map.get(client.id), client)

    def unable(self, client: ClientInfo) -> str | None:
        """Return why the client cannot profile the full MoE in stage one, or None if it can.

        In stage two every client has a sub-MoE that fits, so the result is None.
        """
        if client.id in self.map:
            return None
        mode = self.algorithm.mode_for(self.setup)
        return self.setup.lacks(client, self.setup.model.counts, mode, rank=self.algorithm.rank_for(self.setup))

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        counts = {block: Like((n,), torch.int64, 0, MOST) for block, n in self.setup.model.counts.items()}
        params = super().expects(client, sent) if sent.scalars["stage"] == "two" else {}
        return {**params, **dict.fromkeys(self.algorithm.asks(), counts)}

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        needs_validation = self.algorithm.stage2 and sent.scalars["stage"] == "two"
        return "validation is missing" if needs_validation and "validation" not in reply.scalars else None

    def _sub_moe(self, client: ClientInfo) -> Payload:
        payload = self.deliver(client)
        router_rows = absent_rows(self.params, self.map[client.id])
        return Payload({**payload.groups, "router": router_rows}, {**payload.scalars, "stage": "two"})

    def _weight(self, reply: Payload) -> float | Callable[[str], float]:
        n_k = float(reply.scalars["num_examples"])
        if self.algorithm.weight == "examples":
            return n_k
        token_counts = reply.group("served")

        def weight(key: str) -> float:
            place = expert_of(key) or router_row_of(key)
            return n_k if place is None else float(token_counts[place[0]][place[1]])

        return weight

    def _usage(self, reply: Payload) -> dict[str, Tensor]:
        counts = reply.group(self.algorithm.usage)
        return shares({block: counts[block] for block in self.setup.model.counts})

    def _info(self, client: ClientId) -> ClientInfo:
        return next(c for c in self.setup.clients if c.id == client)

    # stage one

    def _set_structures(self) -> None:
        """Estimate p where it was not measured, then choose each client's first sub-MoE within alpha * M_k."""
        for client in self.setup.clients:
            if client.id not in self.p:
                self.p[client.id] = self._estimate(client)
            memory_share = self.algorithm.alpha

            def fits(counts: Mapping[str, int], client: ClientInfo = client, share: float = memory_share) -> bool:
                return client.memory_bytes is None or (
                    self.setup.footprint(counts).total <= share * client.memory_bytes
                )

            try:
                if self.setup.layers:  # the layers' shares are given, and Eq 3's threshold has nothing to decide
                    structure = most(self.p[client.id], self.setup.fitting(client, share=memory_share))
                else:
                    structure = largest_structure(self.p[client.id], fits, self._least)
            except BudgetError:  # the smallest sub-MoE fits M_k, as checked at the start, but not alpha * M_k
                structure = structure_at(self.p[client.id], 0.0, self._least)
            self.map[client.id] = structure
            self._note("structure", client.id, experts=sum(counts_of(structure).values()),
                       source="measured" if client.id in self.measured else "estimated")  # fmt: skip

    def _estimate(self, client: ClientInfo) -> dict[str, Tensor]:
        """Return the volume-weighted mean p of the measured clients with the same task.

        Without such clients the mean is over all measured clients; without any of these it is the public usage.
        """
        infos = [self._info(a) for a in self.measured]
        peers = [a for a in infos if a.task == client.task] or infos
        if not peers:
            shares = self.setup.public_usage("no usage", client.id)
            return {b: share.double() / float(share.sum()) for b, share in shares.items()}
        total = sum(a.num_examples for a in peers)
        return {
            block: sum(a.num_examples * self.p[a.id][block] for a in peers) / total for block in self.setup.model.counts
        }

    def _random_structures(self) -> None:
        """Give each client as many random experts per layer as fit alpha * M_k, if there is no stage one."""
        for client in self.setup.clients:
            counts = self.setup.sub_moe_counts(client, share=self.algorithm.alpha)
            self.map[client.id] = random_choice(self.setup, client.id, counts)
            self._note("structure", client.id, experts=sum(counts_of(self.map[client.id]).values()), source="random")

    # stage two

    def _follow(self, client: ClientId, accuracy: float) -> None:
        """Apply lines 9 to 27 of Algorithm 1 to one client, with patience, roll-back and freeze."""
        progress = self.progress[client]
        if accuracy > progress.best:
            progress.best, progress.stale = accuracy, 0
            if progress.before is not None:
                progress.before = None
                self._note("accept", client, validation=accuracy)
            return
        progress.stale += 1
        if progress.frozen or progress.stale < self.algorithm.patience:
            return
        progress.stale = 0
        if progress.before is not None:
            self.map[client], progress.before = progress.before, None
            progress.frozen = self.algorithm.freeze
            self._note("rollback", client, experts=sum(counts_of(self.map[client]).values()))
            if progress.frozen:
                self._note("freeze", client)
            return
        structure = self._adjusted(client)
        if structure != self.map[client]:
            progress.before, self.map[client] = self.map[client], structure

    def _adjusted(self, client: ClientId) -> Held:
        """Return the structure after growing or shrinking towards the client's neighbours (Eq 4 to 6)."""
        usage_by_client = {a: p for a, p in self.p.items() if a in self.map}
        sims = similar(client, usage_by_client, self.algorithm.K)
        if not any(sims.values()):
            return self.map[client]
        old_count = sum(counts_of(self.map[client]).values())
        mean_count = sum(sum(counts_of(self.map[a]).values()) for a in sims) / len(sims)
        n = _round_half_away(mean_count - old_count)
        target_scores = p_hat(sims, usage_by_client)
        if self.algorithm.rank == "layer":
            target_scores = z_scores(target_scores)
        structure = self._grown(client, target_scores, n) if n > 0 else self._shrunk(client, target_scores, -n)
        new_count = sum(counts_of(structure).values())
        if new_count != old_count:
            self._note(
                "grow" if new_count > old_count else "shrink", client, experts=new_count, neighbours=sorted(sims)
            )
        return structure

    def _grown(self, client: ClientId, wanted: Usage, n: int) -> Held:
        structure = {block: set(ids) for block, ids in self.map[client].items()}
        candidates = [(b, j) for b, p_E in wanted.items() for j in range(len(p_E)) if j not in structure[b]]
        info = self._info(client)
        for block, j in sorted(candidates, key=lambda e: -float(wanted[e[0]][e[1]]))[:n]:
            structure[block].add(j)
            if self.setup.lacks(info, counts_of(structure)):
                structure[block].discard(j)
                break
        return {block: tuple(sorted(ids)) for block, ids in structure.items()}

    def _shrunk(self, client: ClientId, wanted: Usage, m: int) -> Held:
        structure = {block: set(ids) for block, ids in self.map[client].items()}
        client_usage = self.p[client]
        candidates = [(b, j) for b, ids in self.map[client].items() for j in ids]
        floors = {
            b: self.algorithm.floor * float(client_usage[b][list(ids)].sum()) for b, ids in self.map[client].items()
        }
        removed_count = 0
        for block, j in sorted(candidates, key=lambda e: float(wanted[e[0]][e[1]])):
            remaining = structure[block] - {j}
            if removed_count == m:
                break
            if len(remaining) >= self._least and float(client_usage[block][list(remaining)].sum()) >= floors[block]:
                structure[block] = remaining
                removed_count += 1
        return {block: tuple(sorted(ids)) for block, ids in structure.items()}

    # the record

    def _note(self, event: str, client: ClientId, **more: Any) -> None:
        self.log.append({"event": event, "client": client, **more})

    def events(self) -> list[dict[str, Any]]:
        log, self.log = self.log, []
        return log

    def structure(self) -> ExpertMap | None:
        return {client: dict(experts) for client, experts in self.map.items()} or None

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        return {client: {b: p_E.tolist() for b, p_E in p.items()} for client, p in self.p.items()}

    def state(self) -> Payload:
        p = {f"{client}/{block}": p_E for client, blocks in self.p.items() for block, p_E in blocks.items()}
        record = {
            "map": self.map,
            "measured": self.measured,
            "progress": {client: asdict(progress) for client, progress in self.progress.items()},
            "log": self.log,
        }
        return Payload({"params": self.params, "p": p}, {"fedmoe": json.dumps(record)})

    def restore(self, state: Payload) -> None:
        self.params = state.group("params")
        p = state.group("p")
        blocks = self.setup.model.counts  # in the order of the layers, which breaks ties between equal p-hat
        self.p = {
            client: {b: p[f"{client}/{b}"] for b in blocks} for client in sorted({key.split("/")[0] for key in p})
        }
        record = json.loads(str(state.scalars["fedmoe"]))
        self.map = {client: _held(experts) for client, experts in record["map"].items()}
        self.measured = record["measured"]
        self.progress = {
            client: _Progress(**{**fields, "before": _held(fields["before"])})
            for client, fields in record["progress"].items()
        }
        self.log = record["log"]


def _held(held: Mapping[str, Sequence[int]] | None) -> Held | None:
    return None if held is None else {block: tuple(ids) for block, ids in held.items()}


# --- the client half ----------------------------------------------------------------------------------------------


class FedMoEClient(Client):
    """A client that profiles the full MoE in stage one and trains its sub-MoE in stage two."""

    def __init__(self, setup: MixtureSetup, algorithm: FedMoE):
        self.setup = setup
        self.algorithm = algorithm
        # The served counts depend on the experts held, so their upper half or noised shares would mean little.
        needs = {"demand": "less", "served": "exact"}
        reveals = {group: Reveal("usage", needs[group]) for group in algorithm.asks()}
        if algorithm.stage2:
            reveals["validation"] = Reveal("score", "less")
        self.reveals = reveals

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        if payload.scalars["stage"] == "one":
            return self._profile(payload, context)
        reply = local_round(self.setup, payload, context, usage=True)[1]
        unasked_groups = {"demand", "served"} - set(self.algorithm.asks())
        return Payload({k: group for k, group in reply.groups.items() if k not in unasked_groups}, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)

    def _profile(self, payload: Payload, context: ClientContext) -> Payload:
        """Train LoRA on the experts if the method does, then measure the usage on validation data (stage one)."""
        setup, lora = self.setup, self.algorithm.stage1 == "lora"
        footprint = setup.admit(context, None, self.algorithm.mode_for(setup), rank=self.algorithm.rank_for(setup))
        model = setup.build_sent(payload, context)
        del payload  # frees a copy of the weights, see local_round
        scalars: dict[str, Any] = {"num_examples": context.info.num_examples}
        if lora:
            if not setup.fit.lora.rank:
                with seeded(derive_seed(context.seed, "lora")):
                    add_expert_lora(model, self.algorithm.lora_rank)
            train = setup.encode(context, context.data.train)
            fit_result = fit(model, train, setup.fit, context, epochs=self.algorithm.stage1_epochs)
            scalars |= {"train_loss": fit_result.loss, "steps": fit_result.steps, "cut": train.cut}
        start = time.perf_counter()
        with Tap(model, counts=setup.model.counts) as tap:
            validation = setup.encode(context, context.data.validation)
            scalars["validation"] = evaluate(model, validation, context, setup, tap)
        scalars["seconds_evaluate"] = time.perf_counter() - start
        scalars |= {"experts": sum(setup.model.counts.values()), **footprint}
        usage = {"demand": tap.usage.demand, "served": tap.usage.served}
        return Payload({group: usage[group] for group in self.algorithm.asks()}, scalars)
