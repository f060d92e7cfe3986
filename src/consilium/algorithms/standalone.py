"""Standalone: every client trains on its own data, and no weights travel.

This is the lower bound that any federation has to beat. A client starts from the public pretrained model (in a cohort:
from its architecture's initial weights). In each round that it is chosen for, it continues from its last weights, which
are kept in the client's state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ExpertSet,
    Payload,
    Server,
    experts_from_scalars,
    setting,
)
from consilium.setup import Setup
from consilium.training import local_round, local_test

__all__ = ["Standalone"]


@dataclass(frozen=True)
class Standalone(Algorithm):
    """Local training only.

    Args:
        experts: see FedAvg.
    """

    experts: int | Literal["all", "fit"] = setting("all", "server")
    worlds: ClassVar[tuple[str, ...]] = ("moe", "cohort", "mixed")
    merges: ClassVar[bool] = False
    exchanges: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    def server(self, setup: Setup) -> Server:
        return StandaloneServer(setup, common_experts(setup, self.experts))

    def client(self, setup: Setup) -> Client:
        return StandaloneClient(setup)


class StandaloneServer(FedAvgServer):
    """A server that chooses the clients of a round and sends no tensors, only the expert ids of the common model."""

    def __init__(self, setup: Setup, held: ExpertSet | None):
        super().__init__(setup, held, params={})
        self.sent = Payload(scalars=setup.slice_scalars(held) if held else {})

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        for _ in replies:
            pass
        return {}

    def deliver(self, client: ClientInfo) -> Payload:
        return self.sent


class StandaloneClient(Client):
    """A client that keeps its model in its state."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        client_payload = self._own(payload, context)
        _, reply = local_round(self.setup, client_payload, context)
        context.state.params = {
            **client_payload.group("params"),
            **reply.group("params"),
            **client_payload.group("router"),
        }
        return Payload(scalars=reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, self._own(payload, context), context)

    def _own(self, payload: Payload, context: ClientContext) -> Payload:
        expert_ids = experts_from_scalars(payload.scalars)
        params = context.state.params or self.setup.initial_params(context.info)
        client_payload = self.setup.sub_moe(params, context.data.task.name, expert_ids, context.info)
        return Payload(client_payload.groups, payload.scalars)
