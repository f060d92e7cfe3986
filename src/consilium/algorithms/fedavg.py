"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. AISTATS 2017. https://arxiv.org/abs/1602.05629

Algorithm 1: clients train the server's model w on their own data; w <- sum_k n_k / n * w_k over the sampled clients.

    w      params                       n_k    scalars["num_examples"]

Departures: none in the rule. Heads belong to tasks: a client receives and returns the head rows of its own task, and
a row is averaged over the clients that hold it. `experts` selects one sub-MoE for all clients, so that FedAvg can be
compared at the memory of the smallest device. With "all" (the default, the plain method), clients that cannot hold the
model cannot take part. `fit.gates` sets how the gates of a sub-MoE are scaled.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ExpertSet,
    Payload,
    Server,
    counts_of,
    setting,
)
from consilium.errors import BudgetError, ConfigError
from consilium.moe.layers import most
from consilium.params import Params, WeightedMean
from consilium.setup import Setup
from consilium.training import local_round, local_test

__all__ = ["FedAvg", "FedAvgClient", "FedAvgServer", "averaged", "common_experts"]


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Federated averaging.

    Args:
        experts: experts per layer of the common model: "all", a number, or "fit", the most that the smallest
            device can train, leaving out devices that cannot train one; the experts with the largest share of public
            tokens are kept.
    """

    experts: int | Literal["all", "fit"] = setting("all", "server")
    dense: ClassVar[bool] = True

    def server(self, setup: Setup) -> Server:
        return FedAvgServer(setup, common_experts(setup, self.experts))

    def client(self, setup: Setup) -> Client:
        return FedAvgClient(setup)


class FedAvgServer(Server):
    """A server that sends one model to the sampled clients and averages the replies.

    Args:
        held: the experts of the common model; None: all.
        references: copies of the weights that a client keeps in addition to the one it trains, for the memory test.
        params: the parameters to average; None: the whole model. A client is sent the head rows of its own task only.
    """

    def __init__(self, setup: Setup, held: ExpertSet | None = None, references: int = 0, params: Params | None = None):
        self.setup = setup
        self.held = held
        self.references = references
        self.params = setup.initial_params() if params is None else params

    def held_by(self, client: ClientInfo) -> ExpertSet | None:
        """Return the experts that this client trains, or None for all."""
        return self.held

    def unable(self, client: ClientInfo) -> str | None:
        experts = self.held_by(client)
        counts = counts_of(experts) if experts else self.setup.model.counts
        return self.setup.lacks(client, counts, references=self.references)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        able_clients = [client for client in clients if self.unable(client) is None]
        participants = self.setup.sampling.choose(able_clients, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in participants}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = self.setup.mean(self.params, round)
        self.params = averaged(self.params, replies, mean)
        return mean.told()

    def deliver(self, client: ClientInfo) -> Payload:
        return self.setup.sub_moe(self.params, client.task, self.held_by(client), client)


class FedAvgClient(Client):
    """A client that trains the experts named in the payload, or all experts if it names none."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        return local_round(self.setup, payload, context)[1]

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)


def averaged(params: Params, replies: Iterable[tuple[ClientId, Payload]], mean: WeightedMean | None = None) -> Params:
    """Return sum_k n_k w_k / sum_k n_k for each key, over the clients that returned the key.

    A key that no client returned keeps its value.
    """
    mean = mean or WeightedMean()
    for _, reply in replies:
        mean.add(reply.group("params"), reply.scalars["num_examples"])
    return mean.mean(params)


def common_experts(
    setup: Setup, experts: int | Literal["all", "fit"], references: int = 0
) -> dict[str, tuple[int, ...]] | None:
    """Return the experts of the sub-MoE that all clients share, or None for the whole model.

    The experts are ranked by the public usage in the model's card. Without a card they are chosen at random from the
    run's seed.

    Raises:
        ConfigError: if the number is below the least or above the number of experts of the model.
        BudgetError: if `experts` is "fit" and no device can hold one expert per layer. If only some devices cannot,
            their clients are unable to take part.
    """
    if experts == "all":
        return None
    totals = setup.model.counts
    if experts == "fit" and all(c.memory_bytes is None for c in setup.clients):
        return None
    if not totals:
        raise ConfigError(f"experts is {experts!r}, but {setup.model.path} has no experts; leave it at 'all'")
    if experts == "fit":
        return _fitting_experts(setup, references)
    least, total = setup.model.family.least, max(totals.values())
    if not least <= experts <= total:
        raise ConfigError(f"experts is {experts}; allowed are {least}..{total}, 'all' and 'fit'")
    usage = setup.public_usage("common experts")
    return most(usage, dict.fromkeys(usage, experts))


def _fitting_experts(setup: Setup, references: int) -> dict[str, tuple[int, ...]]:
    """Return the publicly most used experts, as many as the smallest device that can train one per layer has room for.

    Raises:
        BudgetError: if no device can hold one expert per layer.
    """
    able_clients = [c for c in setup.clients if not setup.lacks(c, setup.least, references=references)]
    if not able_clients:
        largest_client = max(setup.clients, key=lambda c: c.memory_bytes or 0)
        lack = setup.lacks(largest_client, setup.least, references=references)
        raise BudgetError(f"no device can hold one expert per layer, not even {largest_client.id}: {lack}")
    smallest_client = min(able_clients, key=lambda c: math.inf if c.memory_bytes is None else c.memory_bytes)
    counts = setup.sub_moe_counts(smallest_client, references=references)
    return most(setup.public_usage("common experts"), counts)
