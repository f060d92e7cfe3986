"""LG-FedAvg: Think Locally, Act Globally: Federated Learning with Local and Global Representations.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency. https://arxiv.org/abs/2001.01523

Every client keeps its own extractor, and the clients share the top layers:

    theta_g <- sum_{k in S} n_k / n theta_g,k        theta_g   head rows, group "params"; the rest: context.state

Departures: the shared part is the linear head, as in all comparisons of the pFedMoE family, so the extractors must end
in the same width. A row is averaged over the clients that have its label.
"""

from dataclasses import dataclass
from typing import ClassVar

from consilium.algorithms.fedavg import FedAvgServer
from consilium.core import Algorithm, Client, ClientContext, Payload, Server
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["LGFedAvg"]


@dataclass(frozen=True)
class LGFedAvg(Algorithm):
    """Private extractors and one averaged head."""

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")

    def server(self, setup: CohortSetup) -> Server:
        return FedAvgServer(setup, params=setup.head_params(setup.common_width))

    def client(self, setup: CohortSetup) -> Client:
        return LGFedAvgClient(setup)


class LGFedAvgClient(Client):
    """A client that keeps its own extractor and replaces its head by the received one."""

    def __init__(self, setup: CohortSetup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        scalars = trained(self.setup, model, context)
        params = flatten(model)
        head = {key: t for key, t in params.items() if key.startswith("head.")}
        context.state.params = {key: t for key, t in params.items() if key not in head}
        return Payload({"params": head}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(payload, context), context)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        return self.setup.build({**self.setup.own_params(context), **payload.group("params")}, context)
