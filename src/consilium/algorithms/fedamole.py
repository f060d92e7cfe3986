"""FedAMoLE: Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model Architectures.

Zhang, Wang, Zhou, Li, Cao, Hu, Qi, Jin. The Web Conference 2026. https://arxiv.org/abs/2411.19128; code
github.com/zyc140345/FedAMoLE

The model is frozen. Next to each target layer are one shared adapter and some of E domain adapters, which are chosen
per client and layer. A router weighs the domain adapters. None of its tensors depends on the number of experts, so any
number works:

    z_e = <P x, A_e x> / sqrt(r),   g = softmax over the held experts, the top 2 kept and scaled to 1
    y   = W0 x + s B_s A_s x + sum_e g_e s B_e A_e x            loss + 0.001 sum over layers of |H| sum_e P_e f_e

    up      held adapters, shared adapter, P; per layer the means over tokens, t_k of P x and m_ke of A_e x
    server  every adapter becomes the mean over its holders; E_e is the mean of m_ke over the same clients
    reverse selection, per layer: S[e, k] = softmax over k of <E_e, t_k> / sqrt(r); choose X in {0, 1} that maximises
            sum S X, with `choices` clients per expert and between top_k and max_k experts per client

    P   <layer>.route      A_e, B_e   <layer>.pairs.e<id>.a, .b      A_s, B_s   <layer>.pairs.shared.a, .b

The constraint matrix is that of a bipartite b-matching and is totally unimodular, so every vertex of the linear
programme is an exact assignment. HiGHS's dual simplex (scipy) finds the optimal vertex; the authors use SCIP.

Departures: means are weighted by n_k (`weight` "uniform" is the authors' rule). max_k follows from a client's memory
and is at most `max_experts`. If the experts have more places to give than the clients have room, the lowest scored
experts get fewer clients. An absent client keeps its last t_k. A client that has never trained is scored at the mean of
the others. An expert that no client returned keeps its value. Trainable parameters are float32, because small steps are
lost in the authors' bfloat16. `keep` adds a bonus for experts that a client already holds. The embeddings are computed
on training rows; the authors hold 5 % out. The authors' noise on updates is left out: as they draw it, it is not
differential privacy.

The published 25.66 MB per client and round count upload and download in bfloat16 for Llama-3.2-1B, with 7 adapters per
layer and P. In float32 it is twice as much. The published scores are those of the best round, before aggregation.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from consilium.algorithms.mixed import MixedModels, heads_of, own_adapters
from consilium.constraints import Count, Factor, Few, PositiveShare, Scale, Width
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    Payload,
    Reveal,
    Server,
    derive_seed,
    setting,
)
from consilium.errors import ConfigError
from consilium.moe.mixtures import Mixing, initial_pair, initial_route, names_of
from consilium.params import Like, Params
from consilium.setup import MixtureSetup

__all__ = ["FedAMoLE", "reverse_selection", "scores"]

SHARED = "shared"


@dataclass(frozen=True)
class FedAMoLE(Algorithm):
    """A mixture of adapters in which the experts choose their clients.

    Args:
        E: domain experts per layer, >= 2.
        r: rank of the adapters, >= 1.
        alpha: the scale of an adapter is alpha / r.
        top_k: domain experts that a token uses, and the fewest that a client holds, >= 1.
        choices: c, number of clients that hold each expert, >= 1; capped at the number of clients.
        max_experts: most domain experts that a client holds per layer, >= 1; fewer if its memory has no room.
        balance: weight of the load-balance loss.
        decay: the learning rates are those of `fit` times decay^(round - 1), in (0, 1].
        dropout: dropout rate of the adapters' input, in [0, 0.9].
        rows: training rows over which the mean embeddings are computed.
        assign: "reverse" (selection by the embeddings), "random" (random scores in every round), or "static" (the
            random assignment of the start is kept).
        even: whether all clients hold the same number of experts per layer, to within one.
        keep: bonus on the score of an expert that a client already holds, >= 0.
        weight: weight of a client in the means: "examples" (n_k) or "uniform".
        targets: names of the adapted layers; (): query and value projections.
    """

    merges: ClassVar[bool] = False
    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    E: Annotated[int, Interval(ge=2, le=1e4)] = setting(30, "server")
    r: Width = setting(8, "memory")
    alpha: Scale = setting(16.0, "factor")
    top_k: Few = setting(2, "memory")
    choices: Width = setting(2, "server")
    max_experts: Few = setting(8, "server")
    balance: Factor = setting(0.001, "factor")
    decay: PositiveShare = setting(0.99, "factor")
    dropout: Annotated[float, Interval(ge=0, le=0.9)] = setting(0.05, "factor")
    rows: Count = setting(200, "tokens")
    assign: Literal["reverse", "random", "static"] = setting("reverse", "server")
    even: bool = setting(False, "server")
    keep: Annotated[float, Interval(ge=0, le=1e6)] = setting(0.0, "server")
    weight: Literal["examples", "uniform"] = setting("examples", "server")
    targets: tuple[str, ...] = setting((), "free")

    def reads(self) -> frozenset[str]:
        return frozenset({"mean embeddings"} if self.assign == "reverse" else ())

    def models(self, setup: MixtureSetup) -> MixedModels:
        """Return the object that builds and trains the models of clients."""
        own_adapters(setup, "FedAMoLE")
        mixing = Mixing(self.r, self.alpha / self.r, self.top_k, "dot", self.targets, self.dropout)
        return MixedModels(setup, mixing, (SHARED,), self.balance)

    def server(self, setup: MixtureSetup) -> Server:
        return FedAMoLEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FedAMoLEClient(setup, self)


# --- reverse selection ------------------------------------------------------------------------------------------------


def scores(expert_ER: Tensor, token_KR: Tensor) -> Tensor:
    """Return S [E, K], the softmax over clients of <E_e, t_k> / sqrt(r)."""
    return (expert_ER @ token_KR.t() / expert_ER.shape[1] ** 0.5).softmax(-1)


def reverse_selection(
    scores_EK: Tensor, choices: int, least: Sequence[int], most: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Assign experts to clients by maximising sum S X exactly, under the constraints of both sides.

    Args:
        scores_EK: S, float [E, K].
        choices: clients per expert.
        least: fewest experts per client, [K].
        most: most experts per client, [K].

    Returns:
        X [E, K] bool, and the number of clients per expert. If the clients have too little room, the experts with the
        lowest scores (by the sum of their best `choices` scores) get fewer than `choices` clients.

    Raises:
        ConfigError: if there are too few experts to give every client its least.
    """
    from scipy.optimize import linprog  # imported here: it takes a second, and only this method needs it

    experts, clients = scores_EK.shape
    choices = min(choices, clients)
    if experts * choices < sum(least):
        raise ConfigError(
            f"{experts} experts with {choices} clients each are {experts * choices} places, but {clients} clients need "
            f"{sum(least)}; raise E or choices, or lower top_k"
        )
    clients_per_expert = [choices] * experts
    expert_order = scores_EK.topk(choices, dim=1).values.sum(1).argsort(stable=True).tolist()
    for i in range(max(sum(clients_per_expert) - sum(most), 0)):
        clients_per_expert[expert_order[i % experts]] -= 1
    cells = experts * clients
    rows = np.kron(np.eye(experts), np.ones((1, clients)))
    columns = np.kron(np.ones((1, experts)), np.eye(clients))
    solution = linprog(
        -scores_EK.double().numpy().reshape(cells),
        A_ub=np.vstack([columns, -columns]),
        b_ub=np.concatenate([np.asarray(most), -np.asarray(least)]),
        A_eq=rows,
        b_eq=np.asarray(clients_per_expert),
        bounds=(0, 1),
        method="highs-ds",
    )
    if not solution.success:
        raise ConfigError(f"no assignment of {experts} experts to {clients} clients: {solution.message}")
    x_EK = torch.as_tensor(solution.x.reshape(experts, clients))
    if not torch.allclose(x_EK, x_EK.round(), atol=1e-6):
        raise RuntimeError("the linear programme ended between vertices, which a b-matching does not have")
    return x_EK.round().bool(), clients_per_expert


# --- the server half --------------------------------------------------------------------------------------------------


class FedAMoLEServer(Server):
    """A server that holds all experts, the clients' embeddings and the assignment of experts to clients.

    Attributes:
        held: client -> layer -> names of its domain experts.
        tokens: client -> layer -> t_k.
        experts: layer -> name -> E_e.
    """

    def __init__(self, setup: MixtureSetup, algorithm: FedAMoLE):
        self.setup, self.algorithm, self.models = setup, algorithm, algorithm.models(setup)
        self.names = [f"e{i}" for i in range(algorithm.E)]
        self.params: Params = {}
        for path, (x, y) in self.models.paths.items():
            rng = torch.Generator().manual_seed(derive_seed(setup.seed, "FedAMoLE", path))
            for name in (SHARED, *self.names):
                a, b = initial_pair(x, y, algorithm.r, rng)
                self.params |= {f"{path}.pairs.{name}.a": a, f"{path}.pairs.{name}.b": b}
            self.params[f"{path}.route"] = initial_route(algorithm.r, x, rng)
        self.params |= setup.zero_heads()
        self.able = [c for c in sorted(setup.clients, key=lambda c: c.id) if self.unable(c) is None]
        self.most = {c.id: self._most(c) for c in self.able}
        self.tokens: dict[ClientId, Params] = {}
        self.experts: dict[str, Params] = {path: {} for path in self.models.paths}
        self.held: dict[ClientId, dict[str, list[str]]] = {c.id: {} for c in self.able}
        self.log: list[dict[str, Any]] = []
        if self.able:
            self._assign(0)

    def unable(self, client: ClientInfo) -> str | None:
        return self.models.lacks(client, self.algorithm.top_k + 1)

    def _most(self, client: ClientInfo) -> int:
        """Return max_k, the number of domain experts per layer that fit the client's memory."""
        counts = range(self.algorithm.max_experts, self.algorithm.top_k, -1)
        return next((n for n in counts if self.models.lacks(client, n + 1) is None), self.algorithm.top_k)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        able_clients = [client for client in clients if client.id in self.held]
        participants = self.setup.sampling.choose(able_clients, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in participants}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean, reply_count = self.setup.mean(self.params), 0
        weighted_embeddings: dict[str, list[tuple[float, Tensor]]] = {}
        for client, reply in replies:
            weight = float(reply.scalars["num_examples"]) if self.algorithm.weight == "examples" else 1.0
            mean.add(reply.group("params"), weight)
            self.tokens[client] = reply.group("token")
            for key, tensor in reply.group("experts").items():
                weighted_embeddings.setdefault(key, []).append((weight, tensor.double()))
            reply_count += 1
        self.params = mean.mean(self.params)
        for key, pairs in weighted_embeddings.items():
            path, _, name = key.rpartition("/")
            total = sum(weight for weight, _ in pairs)
            self.experts[path] = self.experts[path] | {name: (sum(w * t for w, t in pairs) / total).float()}
        if reply_count and self.algorithm.assign != "static" and round != self.setup.rounds:
            self._assign(round)
        expert_counts = [len(names) for names_by_layer in self.held.values() for names in names_by_layer.values()]
        return {"held": sum(expert_counts) / max(len(expert_counts), 1), **mean.told()}

    def _assign(self, round: int) -> None:
        """Assign the experts of every layer to clients by reverse selection."""
        algorithm, clients = self.algorithm, [c.id for c in self.able]
        least, most = [algorithm.top_k] * len(clients), [self.most[c] for c in clients]
        assignment: dict[ClientId, dict[str, list[str]]] = {client: {} for client in clients}
        short_experts = 0
        for path in self.models.paths:
            s_EK = self._scores(path, clients, round)
            if algorithm.even:
                experts_per_client = len(self.names) * min(algorithm.choices, len(clients)) / len(clients)
                room = [self.most[c] for c in clients]
                least = [max(algorithm.top_k, min(math.floor(experts_per_client), most_k)) for most_k in room]
                most = [max(algorithm.top_k, min(math.ceil(experts_per_client), most_k)) for most_k in room]
            x_EK, clients_per_expert = reverse_selection(s_EK, algorithm.choices, least, most)
            short_experts += sum(n < min(algorithm.choices, len(clients)) for n in clients_per_expert)
            for k, client in enumerate(clients):
                assignment[client][path] = [self.names[e] for e in x_EK[:, k].nonzero().flatten().tolist()]
        self.held = assignment
        if short_experts:
            self.log.append({"event": "fewer places", "client": "", "experts": short_experts})

    def _scores(self, path: str, clients: Sequence[ClientId], round: int) -> Tensor:
        """Return S [E, K] of a layer, float64; the scores are random until the first embeddings are known."""
        known_clients = [client for client in clients if client in self.tokens]
        if not known_clients or self.algorithm.assign == "random":
            rng = torch.Generator().manual_seed(derive_seed(self.setup.seed, "FedAMoLE", path, "scores", round))
            s_EK = torch.rand(len(self.names), len(clients), generator=rng, dtype=torch.float64)
        else:
            zero = torch.zeros(self.algorithm.r, dtype=torch.float64)
            tokens = {client: self.tokens[client][path].double() for client in known_clients}
            mean_token = torch.stack(list(tokens.values())).mean(0)
            token_KR = torch.stack([tokens.get(client, mean_token) for client in clients])
            embeddings = self.experts[path]
            s_EK = scores(
                torch.stack([embeddings[n].double() if n in embeddings else zero for n in self.names]), token_KR
            )
        if self.algorithm.keep:
            membership = [[float(n in self.held[c].get(path, ())) for c in clients] for n in self.names]
            s_EK = s_EK + self.algorithm.keep * torch.tensor(membership, dtype=torch.float64)
        return s_EK

    def deliver(self, client: ClientInfo) -> Payload:
        params = heads_of(self.params, client.task)
        for path, names in self.held.get(client.id, {}).items():
            keys = [f"{path}.pairs.{name}.{leaf}" for name in (SHARED, *names) for leaf in "ab"]
            params |= {key: self.params[key] for key in (*keys, f"{path}.route")}
        return Payload({"params": params})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        like = Like((self.algorithm.r,), torch.float32)
        names_by_layer = {path: names_of(sent.group("params"), path) for path in self.models.paths}
        experts = {f"{path}/{name}": like for path, names in names_by_layer.items() for name in names if name != SHARED}
        return {**super().expects(client, sent), "token": dict.fromkeys(names_by_layer, like), "experts": experts}

    def state(self) -> Payload:
        tokens = {f"{client}/{path}": t for client, embeddings in self.tokens.items() for path, t in embeddings.items()}
        experts = {f"{path}/{name}": t for path, embeddings in self.experts.items() for name, t in embeddings.items()}
        record_json = json.dumps({"held": self.held, "log": self.log})
        return Payload({"params": self.params, "tokens": tokens, "experts": experts}, {"amole": record_json})

    def restore(self, state: Payload) -> None:
        self.params, self.tokens = state.group("params"), {}
        self.experts = {path: {} for path in self.models.paths}
        for key, tensor in state.group("tokens").items():
            client, _, path = key.partition("/")
            self.tokens.setdefault(client, {})[path] = tensor
        for key, tensor in state.group("experts").items():
            path, _, name = key.rpartition("/")
            self.experts[path][name] = tensor
        record = json.loads(str(state.scalars["amole"]))
        self.held, self.log = record["held"], record["log"]

    def events(self) -> list[dict[str, Any]]:
        log, self.log = self.log, []
        return log


# --- the client half --------------------------------------------------------------------------------------------------


class FedAMoLEClient(Client):
    """A client that trains the adapters that it was sent and returns the mean embeddings of its tokens."""

    reveals: Mapping[str, Reveal] = {
        "token": Reveal("usage", "exact"),
        "experts": Reveal("usage", "exact"),
    }

    def __init__(self, setup: MixtureSetup, algorithm: FedAMoLE):
        self.algorithm, self.models = algorithm, algorithm.models(setup)

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.models.build(payload.group("params"), context)
        fit_result, scalars = self.models.train(model, context, self.algorithm.decay)
        token, experts = {}, {}
        for path, mixture in self.models.measured(model, context, self.algorithm.rows).items():
            means = {name: (total / mixture.count).float() for name, total in mixture.sums.items()}
            token[path] = means.pop("token")
            experts |= {f"{path}/{name}": mean for name, mean in means.items()}
        params = self.models.flatten(model, fit_result.masters)
        return Payload({"params": params, "token": token, "experts": experts}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return self.models.score(payload.group("params"), context)
