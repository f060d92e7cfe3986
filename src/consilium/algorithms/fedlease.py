"""FedLEASE: Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning.

Wang, Fan, Zhao, Deng, Ye, Li, Jin. NeurIPS 2025. https://arxiv.org/abs/2509.15087; code
github.com/lei-wang-link/FedLEASE

The model is frozen. In `warmup` rounds every client trains an adapter alone. Then the clients are clustered, and every
client holds one expert for each cluster:

    d(i, j) = mean over layers of 1 - cos(B_i, B_j);   average linkage; M in 2 .. M_max by the silhouette
    expert_m <- sum_{k in m} n_k / n adapter_k
    router of a client in cluster j: slots for expert 1 .. M, and M - 1 more slots for expert j: V [2M - 1, X]
    g = softmax(V x), the M largest kept and scaled to 1;   y = W0 x + s sum g B_e A_e x

A token may therefore use only its own cluster's expert, or several experts. A client trains its own cluster's expert
and V. The expert is averaged within the cluster.

    adapter_k   <layer>.pairs.own.*      experts  <layer>.pairs.e<m>.*     V   context.state: <layer>.route

Departures: V stays with the client. The head keeps learning after the warm-up; in the released code it does not. At the
hand-over a client gets all experts at once; in the released code it gets its own first. Layers 0, 10 and 20 get their
experts as well; the released code rewrites the names of these layers. A client that was absent in the warm-up has a
warm-up round when it is first chosen. It then joins the cluster with the nearest members on average. With only two
known clients there is one cluster. The published GLUE scores are for RoBERTa-large with the validation set as test set,
so scores here cannot be compared with them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from consilium.algorithms.fedavg import averaged
from consilium.algorithms.mixed import MixedModels, heads_of, own_adapters
from consilium.constraints import Scale, Width
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
from consilium.errors import PayloadError, shown
from consilium.moe.mixtures import Mixing, initial_pair, initial_route
from consilium.params import Like, Params
from consilium.setup import MixtureSetup

__all__ = ["FedLEASE", "clusters", "distances"]

OWN = "own"


@dataclass(frozen=True)
class FedLEASE(Algorithm):
    """Clusters of clients with one expert each, and routers that may use their own cluster's expert alone.

    Args:
        r: rank of the adapters, >= 1.
        alpha: the scale of an adapter is alpha / r.
        warmup: rounds in which clients train alone, >= 1.
        M_max: largest number of clusters, >= 2.
        targets: names of the adapted layers; (): query and value projections.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    merges: ClassVar[bool] = False
    r: Width = setting(4, "memory")
    alpha: Scale = setting(16.0, "factor")
    warmup: Width = setting(5, "server")
    M_max: Annotated[int, Interval(ge=2, le=1e4)] = setting(4, "memory")
    targets: tuple[str, ...] = setting((), "free")

    def models(self, setup: MixtureSetup, experts: int) -> MixedModels:
        """Return the object that builds and trains the models of clients.

        Args:
            setup: the setup of the run.
            experts: M; 0 in the warm-up.
        """
        own_adapters(setup, "FedLEASE")
        mixing = Mixing(self.r, self.alpha / self.r, max(experts, 1), "rows" if experts else "", self.targets)
        return MixedModels(setup, mixing, () if experts else (OWN,))

    def server(self, setup: MixtureSetup) -> Server:
        return FedLEASEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FedLEASEClient(setup, self)


def distances(b_K: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Return d [K, K], the mean over layers of 1 - cos(B_i, B_j); a layer counts 1 if one of its B is zero.

    Args:
        b_K: client -> layer -> B.
    """
    layers = []
    for layer_matrices in zip(*b_K, strict=True):
        flat_KX = torch.stack([b.double().flatten() for b in layer_matrices])
        unit_KX = flat_KX / flat_KX.norm(dim=1, keepdim=True).clamp(min=1e-30)
        layers.append(1 - unit_KX @ unit_KX.t())
    d_KK = torch.stack(layers).mean(0).clamp(min=0)
    return d_KK.fill_diagonal_(0).numpy()


def clusters(d_KK: np.ndarray, most: int) -> list[int]:
    """Return the cluster of each client, numbered in the order of the clients.

    Clients are clustered by average linkage. The number of clusters in 2 .. `most` is the one with the best silhouette.

    Args:
        d_KK: distances between clients, [K, K].
        most: largest number of clusters.
    """
    from sklearn.cluster import AgglomerativeClustering  # imported here because it takes a second
    from sklearn.metrics import silhouette_score

    clients = len(d_KK)
    if clients < 3:
        return list(range(max(clients - 1, 1))) + [0] * (clients > 1)
    best_quality, best_labels = -2.0, [0] * clients
    for m in range(2, min(most, clients - 1) + 1):
        labels = AgglomerativeClustering(m, metric="precomputed", linkage="average").fit_predict(d_KK)
        quality = silhouette_score(d_KK, labels, metric="precomputed")
        if quality > best_quality + 1e-12:
            best_quality, best_labels = quality, labels.tolist()
    order = {label: i for i, label in enumerate(dict.fromkeys(best_labels))}
    return [order[label] for label in best_labels]


class FedLEASEServer(Server):
    """A server that collects adapters in the warm-up and then averages experts within clusters.

    Attributes:
        cluster: client -> its cluster.
        adapters: client -> the adapter that it sent last in the warm-up.
        rounds: number of rounds with replies.
    """

    def __init__(self, setup: MixtureSetup, algorithm: FedLEASE):
        self.setup, self.algorithm = setup, algorithm
        self.models = algorithm.models(setup, 0)
        self.params = setup.zero_heads()
        for path, (x, y) in self.models.paths.items():
            for name in (OWN, *(f"e{m}" for m in range(algorithm.M_max))):
                rng = torch.Generator().manual_seed(derive_seed(setup.seed, "FedLEASE", path))  # same start for all
                a, b = initial_pair(x, y, algorithm.r, rng)
                self.params |= {f"{path}.pairs.{name}.a": a, f"{path}.pairs.{name}.b": b}
        self.cluster: dict[ClientId, int] = {}
        self.adapters: dict[ClientId, Params] = {}
        self.examples: dict[ClientId, int] = {}
        self.rounds = 0
        self.log: list[dict[str, Any]] = []

    @property
    def stage(self) -> str:
        return "experts" if self.cluster else "warm-up"

    @property
    def M(self) -> int:
        """Return the number of clusters."""
        return max(self.cluster.values(), default=-1) + 1

    def unable(self, client: ClientInfo) -> str | None:
        return self.models.lacks(client, self.algorithm.M_max)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        able_clients = [client for client in clients if self.unable(client) is None]
        participants = self.setup.sampling.choose(able_clients, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in participants}

    def deliver(self, client: ClientInfo) -> Payload:
        cluster, heads = self.cluster.get(client.id), heads_of(self.params, client.task)
        names = (OWN,) if cluster is None else tuple(f"e{m}" for m in range(self.M))
        keys = [f"{path}.pairs.{name}.{leaf}" for path in self.models.paths for name in names for leaf in "ab"]
        return Payload(
            {"params": heads | {key: self.params[key] for key in keys}},
            {"M": 0 if cluster is None else self.M, "own": OWN if cluster is None else f"e{cluster}"},
        )

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        slot, params = str(sent.scalars["own"]), super().expects(client, sent)["params"]
        return {"params": {k: like for k, like in params.items() if k.startswith("head.") or f".pairs.{slot}." in k}}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean, reply_count, has_clusters = self.setup.mean(self.params), 0, bool(self.cluster)
        for client, reply in replies:
            params, n_k = reply.group("params"), reply.scalars["num_examples"]
            if client not in self.cluster:
                self.adapters[client] = {k: t for k, t in params.items() if not k.startswith("head.")}
                self.examples[client] = int(n_k)
                params = heads_of(params)
            mean.add(params, n_k)
            reply_count += 1
        self.params = mean.mean(self.params)
        self.rounds += bool(reply_count)
        if has_clusters:
            self._join()
        elif self.rounds >= self.algorithm.warmup and len(self.adapters) > 1:
            self._cluster()
        return {"clusters": float(self.M)}

    def _cluster(self) -> None:
        """End the warm-up: cluster the clients and make one expert per cluster."""
        clients = sorted(self.adapters)
        d_KK = distances([self._b(client) for client in clients])
        self.cluster = dict(zip(clients, clusters(d_KK, self.algorithm.M_max), strict=True))
        for m in range(self.M):
            members = [client for client in clients if self.cluster[client] == m]
            replies = [(c, Payload({"params": self.adapters[c]}, {"num_examples": self.examples[c]})) for c in members]
            expert = averaged(self.adapters[members[0]], replies)
            self.params |= {key.replace(f".pairs.{OWN}.", f".pairs.e{m}."): t for key, t in expert.items()}
        for client, m in self.cluster.items():
            self.log.append({"event": "cluster", "client": client, "experts": m})

    def _join(self) -> None:
        """Add each client with a late warm-up to the cluster with the nearest members on average."""
        for client in sorted(self.adapters.keys() - self.cluster.keys()):
            clustered_clients = sorted(self.cluster)
            d = distances([self._b(client), *(self._b(other) for other in clustered_clients)])[0, 1:]
            means = [
                np.mean([d[i] for i, other in enumerate(clustered_clients) if self.cluster[other] == m])
                for m in range(self.M)
            ]
            self.cluster[client] = int(np.argmin(means))
            self.log.append({"event": "cluster", "client": client, "experts": self.cluster[client]})

    def _b(self, client: ClientId) -> list[Tensor]:
        return [self.adapters[client][f"{path}.pairs.{OWN}.b"] for path in self.models.paths]

    def state(self) -> Payload:
        adapters = {f"{client}/{key}": t for client, adapter in self.adapters.items() for key, t in adapter.items()}
        record = {"cluster": self.cluster, "examples": self.examples, "rounds": self.rounds, "log": self.log}
        return Payload({"params": self.params, "adapters": adapters}, {"lease": json.dumps(record)})

    def restore(self, state: Payload) -> None:
        self.params, self.adapters = state.group("params"), {}
        for key, tensor in state.group("adapters").items():
            client, _, name = key.partition("/")
            self.adapters.setdefault(client, {})[name] = tensor
        record: Mapping[str, Any] = json.loads(str(state.scalars["lease"]))
        self.cluster, self.examples, self.rounds, self.log = (
            record[name] for name in ("cluster", "examples", "rounds", "log")
        )

    def events(self) -> list[dict[str, Any]]:
        log, self.log = self.log, []
        return log


class FedLEASEClient(Client):
    """A client that trains its own adapter in the warm-up, and later its cluster's expert and its router."""

    def __init__(self, setup: MixtureSetup, algorithm: FedLEASE):
        self.setup, self.algorithm = setup, algorithm
        algorithm.models(setup, 0)

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        slot, experts = str(payload.scalars["own"]), int(payload.scalars["M"])
        models, params, slots = self._ready(payload, context)

        def is_frozen(key: str) -> bool:
            return ".pairs." in key and f".pairs.{slot}." not in key

        model = models.build(params, context, slots, is_frozen)
        fit_result, scalars = models.train(model, context)
        flat_params = models.flatten(model, fit_result.masters)
        shared_params = {
            key: t for key, t in flat_params.items() if key.startswith("head.") or f".pairs.{slot}." in key
        }
        state_params = (
            {key: t for key, t in flat_params.items() if key.endswith(".route")} if experts else shared_params
        )
        context.state.params, context.state.scalars = state_params, {"M": experts, "own": slot}
        return Payload({"params": shared_params}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        models, params, slots = self._ready(payload, context)
        return models.score(params, context, slots)

    def _ready(self, payload: Payload, context: ClientContext) -> tuple[MixedModels, Params, list[str]]:
        """Return the builder of the model, its parameters and the slots of its routers."""
        slot, experts, params = str(payload.scalars["own"]), int(payload.scalars["M"]), payload.group("params")
        models, state = self.algorithm.models(self.setup, experts), context.state
        if experts and (experts > self.algorithm.M_max or slot not in [f"e{m}" for m in range(experts)]):
            raise PayloadError(f"the server sent {experts} clusters and the own expert {shown(slot)}")
        if not experts:  # in the warm-up a client continues from the adapter that it kept
            return models, {**params, **(state.params if state.scalars.get("M") == 0 else {})}, []
        slots = [f"e{m}" for m in range(experts)] + [slot] * (experts - 1)
        if (state.scalars.get("M"), state.scalars.get("own")) == (experts, slot):
            return models, {**params, **state.params}, slots
        routes = {}
        for path, (x, _) in models.paths.items():
            rng = torch.Generator().manual_seed(derive_seed(self.setup.seed, "FedLEASE", path, "route"))
            routes[f"{path}.route"] = initial_route(len(slots), x, rng)
        return models, {**params, **routes}, slots
