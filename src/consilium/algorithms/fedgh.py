"""FedGH: Heterogeneous Federated Learning with Generalized Global Header.

Yi, Wang, Liu, Shi, Yu. ACM MM 2023. https://arxiv.org/abs/2303.13137

Clients send the mean representation of each class. The server trains one header on them, and the clients adopt it:

    R_k^s  = mean of F_k(x) over client k's examples of class s, after local training
    theta  <- theta - eta_s * gradient of CE(H(R_k^s; theta), s), over all (k, s) of the round
    client: the header becomes theta

    theta    head rows, group "params" down        R_k^s    group "prototypes" up, label -> [d]       eta_s   eta_s

Departures: none in the rule. Batches of prototypes have the clients' batch size. The authors' released code steps the
client's optimiser and never the header's, so the header stays at its random initial value. `eta_s=0` reproduces this: a
frozen common header.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fedproto import class_means
from consilium.constraints import Count
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
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Like
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FedGH"]


@dataclass(frozen=True)
class FedGH(Algorithm):
    """One header for all, trained at the server on class prototypes.

    Args:
        eta_s: learning rate of the header, >= 0; 0 leaves it at its initial value; None: fit.head_lr.
        epochs: passes over the round's prototypes, >= 1.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    merges: ClassVar[bool] = False
    eta_s: Annotated[float, Interval(ge=0, le=1e6)] | None = setting(None, "server")
    epochs: Count = setting(1, "server")

    def server(self, setup: CohortSetup) -> Server:
        return FedGHServer(setup, self)

    def client(self, setup: CohortSetup) -> Client:
        return FedGHClient(setup)


class FedGHServer(Server):
    """A server that trains the header rows of the single task."""

    def __init__(self, setup: CohortSetup, algorithm: FedGH):
        self.averaging = FedAvgServer(setup, params=setup.head_params(setup.common_width))
        self.setup = setup
        self.algorithm = algorithm
        self.eta_s = setup.fit.head_lr if algorithm.eta_s is None else algorithm.eta_s
        setup.classes  # noqa: B018 - raises if the clients have more than one task
        ((self.task, self.labels),) = setup.heads.items()

    @property
    def params(self) -> dict[str, Tensor]:
        return self.averaging.params

    def configure(self, round: int, clients: list[ClientInfo]) -> dict[ClientId, Payload]:
        return self.averaging.configure(round, clients)

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        pairs = [(label, t) for _, reply in replies for label, t in sorted(reply.group("prototypes").items())]
        if pairs and self.eta_s:
            prototypes = torch.stack([t for _, t in pairs])
            y = torch.tensor([self.labels.index(label) for label, _ in pairs])
            self._train(prototypes, y, derive_seed(self.setup.seed, "FedGH", round))
        return {}

    def _train(self, prototypes_ND: Tensor, y_N: Tensor, seed: int) -> None:
        keys = [[f"head.{self.task}.{label}.{leaf}" for label in self.labels] for leaf in ("weight", "bias")]
        header = [torch.stack([self.params[key] for key in group]).requires_grad_() for group in keys]
        optimizer = torch.optim.SGD(header, lr=self.eta_s)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.algorithm.epochs):
            for rows in torch.randperm(len(y_N), generator=generator).split(self.setup.fit.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(F.linear(prototypes_ND[rows], *header), y_N[rows]).backward()
                optimizer.step()
        for group, tensor in zip(keys, header, strict=True):
            self.averaging.params |= {key: t.clone() for key, t in zip(group, tensor.detach(), strict=True)}

    def deliver(self, client: ClientInfo) -> Payload:
        return self.averaging.deliver(client)

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        rows = {label: self.params[f"head.{self.task}.{label}.weight"] for label in self.labels}
        return {"prototypes": {label: Like.of(row, needed=False) for label, row in rows.items()}}

    def restore(self, state: Payload) -> None:
        self.averaging.restore(state)


class FedGHClient(Client):
    """A client that adopts the common header, trains, and sends class prototypes."""

    reveals: Mapping[str, Reveal] = {"prototypes": Reveal("update", "exact")}

    def __init__(self, setup: CohortSetup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        scalars = trained(self.setup, model, context)
        context.state.params = flatten(model)
        prototypes, _ = class_means(model, self.setup, context)
        return Payload({"prototypes": prototypes}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(payload, context), context)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        return self.setup.build({**self.setup.own_params(context), **payload.group("params")}, context)
