"""pFedMoAP: Mixture of Experts Made Personalized, for adapters: the nearest clients' adapters as frozen experts.

Luo, Chen, Wu. ICLR 2025. https://arxiv.org/abs/2410.10114; code github.com/ljaiverson/pFedMoAP

The paper shares prompts of a frozen CLIP. This module does the same with adapters on a frozen model:

    down      the average of all adapters, and the last adapters of the K - 1 nearest other clients, which stay frozen
    client    its adapter starts as the average; a private gate weights all K:
              g = softmax(V x),   y = W0 x + s lam B_0 A_0 x + s sum_j g_j B_j A_j x         B_0, A_0 the client's own
    up        its own adapter        server: average by n_k

    own     <layer>.pairs.own.*      nearest  <layer>.pairs.near<j>.*      V   context.state: <layer>.route

When a client first takes part, it trains its adapter alone, as in the paper. The adapter restarts from the average in
every round; the gate persists.

What is ours: adapters in place of prompts; a linear gate in place of attention over text features; the cosine distance
of B (`distance` "l2": the distance of all numbers, as in the paper); K from a client's memory, at most `K`. The paper's
prompts for CLIP are not implemented. The paper's tables could not be obtained. In the released code, stale gates and
features of one client reach the next, and the learning rate decays once per client. Every client sees the unchanged
adapters of other clients, which is a privacy cost of the method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from consilium.algorithms.fedlease import distances
from consilium.algorithms.mixed import MixedModels, heads_of, own_adapters
from consilium.constraints import Factor, Few, Scale, Width
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    Payload,
    Server,
    derive_seed,
    setting,
)
from consilium.errors import PayloadError
from consilium.moe.mixtures import Mixing, initial_pair, initial_route, mixtures, names_of
from consilium.moe.model import TaskModel
from consilium.params import Params
from consilium.setup import MixtureSetup

__all__ = ["pFedMoAP"]

OWN = "own"


@dataclass(frozen=True)
class pFedMoAP(Algorithm):
    """A client's own adapter, and the nearest clients' adapters as frozen experts behind a private gate.

    Args:
        K: adapters of a client's mixture, its own included, >= 1; fewer where its memory has no room. 1 is FedAvg.
        r: rank of the adapters, >= 1.
        alpha: the scale of an adapter is alpha / r.
        lam: weight of the client's own adapter, which is added to the mixture, >= 0.
        distance: distance between clients: "cosine" of B, or "l2" of all numbers.
        targets: names of the adapted layers; (): query and value projections.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    K: Few = setting(4, "memory")
    r: Width = setting(8, "memory")
    alpha: Scale = setting(16.0, "factor")
    lam: Factor = setting(0.5, "factor")
    distance: Literal["cosine", "l2"] = setting("cosine", "server")
    targets: tuple[str, ...] = setting((), "free")

    def reads(self) -> frozenset[str]:
        return frozenset({"single adapters"} if self.K > 1 else ())

    def models(self, setup: MixtureSetup, near: int) -> MixedModels:
        """Return the builder and trainer of models with the adapters of `near` other clients."""
        own_adapters(setup, "pFedMoAP")
        mixing = Mixing(self.r, self.alpha / self.r, near + 1, "rows" if near else "", self.targets)
        return MixedModels(setup, mixing, (OWN,))

    def server(self, setup: MixtureSetup) -> Server:
        return PFedMoAPServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return PFedMoAPClient(setup, self)


class PFedMoAPServer(Server):
    """A server that holds the average adapter and the last adapter of each client.

    Attributes:
        last: client -> its last adapter.
    """

    def __init__(self, setup: MixtureSetup, algorithm: pFedMoAP):
        self.setup, self.algorithm = setup, algorithm
        self.models = algorithm.models(setup, 0)
        self.params = setup.zero_heads()
        for path, (x, y) in self.models.paths.items():
            rng = torch.Generator().manual_seed(derive_seed(setup.seed, "pFedMoAP", path))
            a, b = initial_pair(x, y, algorithm.r, rng)
            self.params |= {f"{path}.pairs.{OWN}.a": a, f"{path}.pairs.{OWN}.b": b}
        self.last: dict[ClientId, Params] = {}

    def unable(self, client: ClientInfo) -> str | None:
        return self.models.lacks(client, 1)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        candidates = [client for client in clients if self.unable(client) is None]
        participants = self.setup.sampling.choose(candidates, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in participants}

    def deliver(self, client: ClientInfo) -> Payload:
        params = {key: t for key, t in self.params.items() if not key.startswith("head.")}
        neighbour_params: Params = {}
        for j, neighbour in enumerate(self._nearest(client)):
            neighbour_params |= {
                key.replace(f".pairs.{OWN}.", f".pairs.near{j}."): t for key, t in self.last[neighbour].items()
            }
        return Payload({"params": {**params, **heads_of(self.params, client.task)}, "near": neighbour_params})

    def _nearest(self, client: ClientInfo) -> list[ClientId]:
        """Return the nearest other clients, as many as this client has room for; none before it has taken part."""
        if client.id not in self.last:
            return []
        other_ids = sorted(self.last.keys() - {client.id})
        distance_by_id = dict(zip(other_ids, self._distances(client.id, other_ids), strict=True))
        room = next((n for n in range(self.algorithm.K - 1, 0, -1) if self.models.lacks(client, n + 1, 1) is None), 0)
        return sorted(other_ids, key=lambda other: distance_by_id[other])[:room]

    def _distances(self, client: ClientId, others: Sequence[ClientId]) -> list[float]:
        client_params = self.last[client]
        if self.algorithm.distance == "l2":
            return [
                sum(float((t.double() - self.last[o][key].double()).square().sum()) for key, t in client_params.items())
                for o in others
            ]
        b_K = [[self.last[c][f"{path}.pairs.{OWN}.b"] for path in self.models.paths] for c in (client, *others)]
        return distances(b_K)[0, 1:].tolist()

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = self.setup.mean(self.params)
        for client, reply in replies:
            params = reply.group("params")
            mean.add(params, reply.scalars["num_examples"])
            if self.algorithm.K > 1:
                self.last[client] = {key: t for key, t in params.items() if not key.startswith("head.")}
        self.params = mean.mean(self.params)
        return mean.told()

    def state(self) -> Payload:
        adapters = {f"{client}/{key}": t for client, adapter in self.last.items() for key, t in adapter.items()}
        return Payload({"params": self.params, "last": adapters})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self.last = {}
        for key, tensor in state.group("last").items():
            client, _, name = key.partition("/")
            self.last.setdefault(client, {})[name] = tensor


class PFedMoAPClient(Client):
    """A client that trains its own adapter and its gate, and keeps the gate private."""

    def __init__(self, setup: MixtureSetup, algorithm: pFedMoAP):
        self.setup, self.algorithm = setup, algorithm
        algorithm.models(setup, 0)

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        models, params, slots = self._ready(payload, context)
        model = models.build(params, context, slots, is_frozen)
        self._weigh(model)
        fit_result, scalars = models.train(model, context)
        flat_params = models.flatten(model, fit_result.masters)
        routes = {key: t for key, t in flat_params.items() if key.endswith(".route")}
        if routes:
            context.state.params = routes
        server_params = payload.group("params")
        return Payload({"params": {key: t for key, t in flat_params.items() if key in server_params}}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        models, params, slots = self._ready(payload, context)
        return models.score(params, context, slots, prepare=self._weigh)

    def _weigh(self, model: TaskModel) -> None:
        """Give the client's own adapter the weight lam if there are adapters of other clients, else 1."""
        for _, mixture in mixtures(model):
            mixture.always_weight = self.algorithm.lam if mixture.route is not None else 1.0

    def _ready(self, payload: Payload, context: ClientContext) -> tuple[MixedModels, Params, list[str]]:
        """Return the builder of the model, its parameters and the slots of its gates."""
        neighbour_params = payload.group("near")
        models = self.algorithm.models(self.setup, 0)
        count = len(names_of(neighbour_params, next(iter(models.paths))))
        if count >= max(self.algorithm.K, 1):
            raise PayloadError(f"the server sent {count} adapters of others; K is {self.algorithm.K}")
        params = {**payload.group("params"), **neighbour_params}
        if not count:
            return models, params, []
        models = self.algorithm.models(self.setup, count)
        slots = [OWN, *(f"near{j}" for j in range(count))]
        for path, (x, _) in models.paths.items():
            route = context.state.params.get(f"{path}.route")
            if route is None or len(route) != len(slots):
                rng = torch.Generator().manual_seed(derive_seed(self.setup.seed, "pFedMoAP", path, "route"))
                fresh_route: Tensor = initial_route(len(slots), x, rng)
                overlap = 0 if route is None else min(len(route), len(slots))
                route = fresh_route if route is None else torch.cat([route[:overlap], fresh_route[overlap:]])
            params[f"{path}.route"] = route
        return models, params, slots


def is_frozen(key: str) -> bool:
    """Return True if a parameter belongs to another client's adapter."""
    return ".pairs.near" in key
