"""FedSSA: Semantic Similarity-based Aggregation for Efficient Model-Heterogeneous Personalized Federated Learning.

Yi, Yu, Shi, Wang, Liu, Cui, Li. IJCAI 2024. https://arxiv.org/abs/2312.09006

Clients share the header rows of the classes in their training data. A client mixes each row that it receives with its
own row, and the weight of its own row decays over the rounds:

    theta_s <- mean of theta_k,s over the clients of the round that have class s
    client: row s <- mu_t * own row + (1 - mu_t) * theta_s   for its classes; other rows stay its own
    mu_t = mu0 * cos(pi t / (2 T_stable)) for t < T_stable, else 0                 t = 0 in the first round

    theta_s  head rows, group "params"      mu0, T_stable   fields       t   scalars "t"

Departures: none from the paper. The authors' code differs from it, and this module does not follow the code: it uses
mu * own + theta (weights that do not sum to 1), applies mu for two rounds only, and averages the last headers of all
clients.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from consilium.algorithms.fedavg import FedAvgServer
from consilium.constraints import Count, Share
from consilium.core import Algorithm, Client, ClientContext, ClientId, ClientInfo, Payload, Server, setting
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FedSSA"]


@dataclass(frozen=True)
class FedSSA(Algorithm):
    """Header rows, averaged per class over the clients that have the class.

    Args:
        mu0: weight of the client's own row in the first round, in [0, 1].
        T_stable: rounds until that weight has decayed to 0, >= 1.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    mu0: Share = setting(0.5, "free")
    T_stable: Count = setting(10, "free")

    def mu(self, t: int) -> float:
        """Return mu_t, the weight of the client's own row in round t (counted from 0)."""
        return self.mu0 * math.cos(math.pi * t / (2 * self.T_stable)) if t < self.T_stable else 0.0

    def server(self, setup: CohortSetup) -> Server:
        return FedSSAServer(setup)

    def client(self, setup: CohortSetup) -> Client:
        return FedSSAClient(setup, self)


class FedSSAServer(Server):
    """A server that samples clients as FedAvg does and takes the unweighted mean of each class row over its senders."""

    def __init__(self, setup: CohortSetup):
        self.averaging = FedAvgServer(setup, params=setup.head_params(setup.common_width))
        self.rounds = 0

    @property
    def params(self) -> Params:
        return self.averaging.params

    def configure(self, round: int, clients: list[ClientInfo]) -> dict[ClientId, Payload]:
        self.rounds = round - 1
        return {
            c: Payload(payload.groups, {"t": round - 1})
            for c, payload in self.averaging.configure(round, clients).items()
        }

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = self.averaging.setup.mean(self.params)
        for _, reply in replies:
            mean.add(reply.group("params"), 1.0)
        self.averaging.params = mean.mean(self.params)
        return mean.told()

    def deliver(self, client: ClientInfo) -> Payload:
        return Payload(self.averaging.deliver(client).groups, {"t": self.rounds + 1})

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"rounds": self.rounds})

    def restore(self, state: Payload) -> None:
        self.averaging.restore(state)
        self.rounds = int(state.scalars["rounds"])


class FedSSAClient(Client):
    """A client that mixes the received rows of its own classes into its header."""

    def __init__(self, setup: CohortSetup, algorithm: FedSSA):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        scalars = trained(self.setup, model, context)
        context.state.params = flatten(model)
        rows = {key: context.state.params[key] for key in own_rows(context)}
        return Payload({"params": rows}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(payload, context), context)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        client_params, server_params = self.setup.own_params(context), payload.group("params")
        mu = self.algorithm.mu(int(payload.scalars["t"]))
        mixed_rows = {key: mu * client_params[key] + (1 - mu) * server_params[key] for key in own_rows(context)}
        return self.setup.build({**client_params, **mixed_rows}, context)


def own_rows(context: ClientContext) -> list[str]:
    """Return the names of the head rows of the classes in the client's training data."""
    task, classes = context.data.task.name, sorted(set(context.data.train.targets))
    return [f"head.{task}.{label}.{leaf}" for label in classes for leaf in ("weight", "bias")]
