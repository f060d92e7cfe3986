"""AffinityMoE: sub-MoEs chosen by contribution, one layer budget for all clients, averages weighted by likeness.

This is a method of this project and not of a paper. It starts from FedMoE (https://arxiv.org/abs/2408.11304) and makes
three changes. Each can be switched off:

1. Choice (`choice`). In the first round each client runs the full model on rows of its training data and measures
   what each expert contributes, c_ie = mean over tokens of (gate x norm of the expert's output). It keeps the experts
   that contribute most. FedMoE ranks by how often an expert is requested, but a rare expert may matter more.
2. Budget (`budget`). The number of experts that a layer keeps matters more than the choice of experts. A few shapes
   (`moe.layers.shapes`) are compared by the loss of the sub-models that they give, measured on validation rows and
   averaged over the clients. The best shape is used for all clients. A client's number of experts is what its memory
   allows. FedMoE's Eq 3 has one threshold of usage instead.
3. Likeness (`likeness`). The server keeps one state per client. It moves each state by the changes of that client and
   of similar clients:

       s_ij   = floor + (1 - floor) max(0, cos(g_i, g_j))^2,   s_ii = 1
       w_i[k] += sum_j n_j s_ij (w_j'[k] - w_j[k]) / sum_j n_j s_ij      over the j that trained the tensor k

   g_i is the usage of experts that client i measured in the first round minus the mean usage of all clients. w_j is
   what client j was sent, and w_j' is what it returned. For a tensor of an expert, j runs over the clients that hold
   the expert.

    c_ie   reply group "contribution"              n_j    scalars["num_examples"]
    g_i    `shares[client]`, joined over layers    w_i    `states[client]`

If `privacy.usage` is not "exact", a site sends only one of the two measures, in reduced form: "contribution" if the
experts are chosen by it, else "demand". The server then uses this one for both. Experts that are equal in the reduced
form are ordered by their usage on the public data.

A client keeps its structure for the whole run. `params`, the global model, moves by the mean of all changes, with
weights n_j. The server's work in a round grows with the number of replies times the number of all clients.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from consilium.algorithms.randommoe import random_choice
from consilium.constraints import Share, Width
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
    setting,
)
from consilium.errors import BudgetError
from consilium.moe.addressing import select
from consilium.moe.gates import absent_rows
from consilium.moe.layers import most, shapes
from consilium.params import Like, Params
from consilium.scoring import mean_loss, profile
from consilium.setup import MixtureSetup
from consilium.training import local_round, local_test

__all__ = ["AffinityMoE", "affinities"]

Scores = Mapping[str, Tensor]
"""Block -> a number per expert [E], float64."""
MOST = 2**40
MEASURES = ("demand", "contribution")
"""Groups of a reply that measure how much the client's data uses each expert."""
NEXT = 1e-9
"""Weight of the public usage, small enough that it only breaks ties between experts."""


@dataclass(frozen=True)
class AffinityMoE(Algorithm):
    """Sub-MoEs chosen by contribution under a searched layer budget, averaged over similar clients.

    Args:
        choice: ranking of the experts of a layer: "contribution"; "usage", how often the client's router requests them,
            as in FedMoE; "public", how often it requested them on the public data, so that all clients of a size have
            the same experts (nested); or "random".
        budget: "searched" (see the module) or "even", the same number of experts in every layer.
        likeness: "usage" weighs clients by how similar their usage of experts is; "none" weighs all clients the same,
            as FedMoE does; "self" uses the client's own changes only, so that it trains alone.
        floor: weight of a client that is not similar at all, in [0, 1]. At 0, clients that all have the same kind of
            text hardly learn from each other, because nothing tells them apart: use likeness "none" for them.
        rows: rows of training data on which a client measures its usage of experts. Few rows make similar clients look
            different.
        scored: rows of validation data on which a client scores each shape.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    merges: ClassVar[bool] = False
    choice: Literal["contribution", "usage", "public", "random"] = setting("contribution", "free")
    budget: Literal["searched", "even"] = setting("searched", "free")
    likeness: Literal["usage", "none", "self"] = setting("usage", "server")
    floor: Share = setting(0.0, "server")
    rows: Width = setting(64, "batch_size")
    scored: Width = setting(8, "batch_size")

    def chooses_by_memory(self) -> bool:
        return True

    def reads(self) -> frozenset[str]:
        return frozenset({"usage", "losses of sub-models"})

    def server(self, setup: MixtureSetup) -> Server:
        return AffinityMoEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return AffinityMoEClient(setup, self)


def affinities(usage: Mapping[ClientId, Scores], floor: float) -> dict[ClientId, dict[ClientId, float]]:
    """Return s_ij of the module docstring for all pairs of clients.

    Args:
        usage: client -> block -> share of the tokens that ask for each expert.
        floor: weight of clients that are not similar at all, in [0, 1].
    """
    names = sorted(usage)
    rows = torch.stack([torch.cat([usage[name][block].double() for block in sorted(usage[name])]) for name in names])
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = (rows @ rows.T).clamp_min(0.0).fill_diagonal_(1.0)
    affinity = floor + (1 - floor) * cosines.square()
    return {a: dict(zip(names, row, strict=True)) for a, row in zip(names, affinity.tolist(), strict=True)}


# --- the server half ----------------------------------------------------------------------------------------------


@dataclass
class AffinityMoEServer(Server):
    """A server that holds the full MoE and, for each client, its experts and its own state."""

    setup: MixtureSetup
    algorithm: AffinityMoE
    map: dict[ClientId, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    states: dict[ClientId, Params] = field(default_factory=dict)
    shares: dict[ClientId, dict[str, Tensor]] = field(default_factory=dict)
    alike: dict[ClientId, dict[ClientId, float]] = field(default_factory=dict)
    shape: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = self.setup.initial_params()
        for client in self.setup.clients:
            if lack := self.setup.lacks(client, self.setup.least):
                raise BudgetError(f"client {client.id} cannot hold the smallest sub-MoE: {lack}; give it more memory")

    @property
    def stage(self) -> str:
        return "training" if self.map else "profile"

    def unable(self, client: ClientInfo) -> str | None:
        """Return why the client cannot run the full MoE, or None if it can.

        After the first round every client has a sub-MoE that fits, so the result is None.
        """
        return None if self.map else self.setup.lacks(client, self.setup.model.counts, "forward")

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        if not self.map:
            able_clients = [client for client in clients if self.unable(client) is None]
            if able_clients:
                return {c.id: self._task(c) for c in able_clients}
            self._cut({}, {}, {})
        participants = self.setup.sampling.choose(clients, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in participants}

    def _task(self, client: ClientInfo) -> Payload:
        experts = sum(self.setup.fitting(client).values())
        return Payload({"params": select(self.params, client.task)}, {"stage": "profile", "total": experts})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        if sent.scalars["stage"] != "profile":
            return super().expects(client, sent)
        counts = self.setup.model.counts
        return {
            "demand": {block: Like((n,), torch.int64, 0, MOST, needed=False) for block, n in counts.items()},
            "contribution": {block: Like((n,), torch.float32, 0, needed=False) for block, n in counts.items()},
            "losses": {"shapes": Like((len(shapes(len(counts))),), torch.float32, 0)},
        }

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        """Return the fault of a profile, or None if it has none.

        A site may send one measure of usage or both, but each of them must cover every layer.
        """
        if sent.scalars["stage"] != "profile":
            return None
        sizes = {len(reply.groups[group]) for group in MEASURES if reply.groups.get(group)}
        return None if sizes == {len(self.setup.model.counts)} else f"{' or '.join(MEASURES)} of a layer is missing"

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        if self.map:
            return self._merged(replies)
        usage, contribution, losses = {}, {}, {}
        public = self._public()
        for client, reply in replies:
            measures = [_normalised(reply.groups[group]) for group in MEASURES if reply.groups.get(group)]
            if len(measures) == 1:
                measures = [{b: p_E + NEXT * public[b] for b, p_E in measures[0].items()}] * 2
            usage[client], contribution[client] = measures
            losses[client] = reply.group("losses")["shapes"].double()
        self._cut(usage, contribution, losses)
        return {"profiled": float(len(usage)), "shape": float(self.shape)}

    def _cut(
        self,
        usage: dict[ClientId, dict[str, Tensor]],
        contribution: dict[ClientId, dict[str, Tensor]],
        losses: Mapping[ClientId, Tensor],
    ) -> None:
        """Choose the shape, the experts of every client and the likeness of all pairs.

        A client without a measurement is given the mean of the measured clients, or the public usage if there are none.
        """
        setup, method, public = self.setup, self.algorithm, self._public()
        means = [_mean(list(measurements.values())) or public for measurements in (usage, contribution)]
        if losses and method.budget == "searched":
            self.shape = int(torch.stack(list(losses.values())).mean(0).argmin())
        for client in setup.clients:
            self.shares[client.id] = usage.get(client.id, means[0])
            scores_by_choice = {
                "contribution": contribution.get(client.id, means[1]),
                "usage": self.shares[client.id],
                "public": public,
            }
            counts = setup.fitting(client, shapes(len(setup.model.counts))[self.shape])
            if method.choice == "random":
                experts = random_choice(setup, client.id, counts)
            else:
                experts = most(scores_by_choice[method.choice], counts)
            self.map[client.id], self.states[client.id] = experts, select(self.params, client.task, experts)
            source = "measured" if client.id in usage else "estimated"
            self.log.append(
                {"event": "structure", "client": client.id, "experts": sum(counts.values()), "source": source}
            )
        self.alike = self._affinities()

    def _public(self) -> dict[str, Tensor]:
        return _normalised(self.setup.public_usage("no usage"))

    def _affinities(self) -> dict[ClientId, dict[ClientId, float]]:
        if self.algorithm.likeness == "self":
            return {a: {b: float(a == b) for b in self.shares} for a in self.shares}
        return affinities(self.shares, self.algorithm.floor if self.algorithm.likeness == "usage" else 1.0)

    def _merged(self, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        """Move the clients' states and the global model by the changes in the replies."""
        sums: dict[ClientId, Params] = {client: {} for client in (*self.states, "")}
        weights: dict[ClientId, dict[str, float]] = {client: {} for client in sums}
        for client, reply in replies:
            n_j, client_state = float(reply.scalars["num_examples"]), self.states[client]
            for key, tensor in reply.group("params").items():
                change = tensor.double() - client_state[key].double()
                for receiver, total in sums.items():
                    if receiver and key not in self.states[receiver]:
                        continue
                    weight = n_j * (self.alike[receiver][client] if receiver else 1.0)
                    if weight:
                        total[key] = total[key].add_(change, alpha=weight) if key in total else change * weight
                        weights[receiver][key] = weights[receiver].get(key, 0.0) + weight
        for client, total in sums.items():
            state = self.states[client] if client else self.params
            for key, change in total.items():
                change /= weights[client][key]
                state[key] = (state[key].double() + change).to(state[key].dtype)
        likenesses = [s for a, row in self.alike.items() for b, s in row.items() if a != b]
        return {"likeness": sum(likenesses) / max(len(likenesses), 1)}

    def deliver(self, client: ClientInfo) -> Payload:
        experts = self.map.get(client.id)
        state = {**absent_rows(self.params, experts), **self.states[client.id]} if experts else self.params
        payload = self.setup.sub_moe(state, client.task, experts)
        return Payload(payload.groups, {**payload.scalars, "stage": "training"})

    def structure(self) -> ExpertMap | None:
        return {client: dict(experts) for client, experts in self.map.items()} or None

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        return {client: {b: p_E.tolist() for b, p_E in p.items()} for client, p in self.shares.items()}

    def events(self) -> list[dict[str, Any]]:
        log, self.log = self.log, []
        return log

    def state(self) -> Payload:
        states = {f"{client}/{key}": t for client, params in self.states.items() for key, t in params.items()}
        shares = {f"{client}/{block}": p for client, blocks in self.shares.items() for block, p in blocks.items()}
        record = {"map": self.map, "shape": self.shape, "log": self.log}
        return Payload({"params": self.params, "states": states, "shares": shares}, {"affinity": json.dumps(record)})

    def restore(self, state: Payload) -> None:
        self.params = state.group("params")
        self.states, self.shares = _by_client(state.group("states")), _by_client(state.group("shares"))
        record = json.loads(str(state.scalars["affinity"]))
        self.map = {c: {block: tuple(ids) for block, ids in experts.items()} for c, experts in record["map"].items()}
        self.shape, self.log = record["shape"], record["log"]
        self.alike = self._affinities() if self.shares else {}


def _normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each expert in the sum of its block, float64 [E]; zeros where the sum is zero."""
    return {block: s_E.double() / (float(s_E.sum()) or 1.0) for block, s_E in scores.items()}


def _mean(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {block: torch.stack([scores[block] for scores in found]).mean(0) for block in found[0]} if found else {}


def _by_client(tensors: Params) -> dict[ClientId, dict[str, Tensor]]:
    client_tensors: dict[ClientId, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        client, _, name = key.partition("/")
        client_tensors.setdefault(client, {})[name] = tensor
    return client_tensors


# --- the client half ----------------------------------------------------------------------------------------------


class AffinityMoEClient(Client):
    """A client that measures the full MoE in the first round and trains its sub-MoE in all others."""

    def __init__(self, setup: MixtureSetup, algorithm: AffinityMoE):
        self.setup = setup
        self.algorithm = algorithm
        # Only one measure is sent in reduced form: a second would reveal more than one upper half and would spend the
        # epsilon of the noise twice.
        main_measure = "contribution" if algorithm.choice == "contribution" else "demand"
        usage = {group: Reveal("usage", "less" if group == main_measure else "nothing") for group in MEASURES}
        self.reveals = {**usage, "losses": Reveal("score", "less")}

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        if payload.scalars["stage"] == "profile":
            return self._profile(payload, context)
        return local_round(self.setup, payload, context)[1]

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)

    def _profile(self, payload: Payload, context: ClientContext) -> Payload:
        """Measure usage and contributions on training rows, and score the shapes on validation rows."""
        setup = self.setup
        params, total = payload.group("params"), int(payload.scalars["total"])
        model = setup.build(params, context)
        demand, contribution = profile(
            setup, model, setup.encode(context, context.data.train), context, self.algorithm.rows
        )
        del model
        candidates = shapes(len(setup.model.counts))
        losses = torch.zeros(len(candidates))
        if self.algorithm.budget == "searched":
            scores_by_choice = {"usage": demand, "public": setup.public_usage("no usage")}
            expert_scores = scores_by_choice.get(self.algorithm.choice, contribution)
            validation = setup.encode(context, context.data.validation)
            for place, shape in enumerate(candidates):
                experts = most(expert_scores, setup.spread(total, shape))
                sub_model = setup.build_sent(setup.sub_moe(params, context.data.task.name, experts), context)
                losses[place] = mean_loss(setup, sub_model, validation, context, self.algorithm.scored)
        scalars = {
            "num_examples": context.info.num_examples,
            "experts": sum(setup.model.counts.values()),
            **setup.reported(setup.model.counts, "forward"),
        }
        groups = {"demand": demand, "contribution": contribution, "losses": {"shapes": losses}}
        return Payload(groups, scalars)
