"""HeteroFL, FedRolex and FedDropout: sub-networks of one small model, by width.

HeteroFL: Diao, Ding, Tarokh. ICLR 2021. https://arxiv.org/abs/2010.01264
FedRolex: Alam, Liu, Yan, Zhang. NeurIPS 2022. https://arxiv.org/abs/2212.01548
FedDropout: Caldas, Konecny, McMahan, Talwalkar. 2018. https://arxiv.org/abs/1812.07210

Client k trains a share beta_k of the units of every hidden layer of size U. The server averages every parameter by n_k
over the clients that trained it. The methods differ in the units that a client trains in round t:

    HeteroFL     0 .. ceil(beta_k U) - 1: larger sub-networks contain the smaller ones
    FedRolex     t, t + 1, .. (mod U): a window that moves by one unit each round
    FedDropout   random units

    beta_k   `shares`, cycled over the clients in the order of their ids     units   scalars "units/<layer>"

Departures: the representation keeps its width, so that heads are the same for all clients. HeteroFL's scaler and its
static batch norms are left out (the models have no norms). A client is scored with the sub-network that it would train
next; FedRolex scores the whole model at the server. The published finding of FedRolex can be checked: rolling windows
are better than random ones, and these better than static ones. For mixtures of experts, the same baselines choose
experts instead of units: NestedMoE, RollingMoE and RandomMoE.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from consilium.algorithms.fedavg import FedAvgServer
from consilium.constraints import PositiveShare
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
from consilium.models.cohort import SplitModel
from consilium.models.narrow import chain, cut, narrowed, put
from consilium.moe.addressing import flatten, select
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FedDropout", "FedRolex", "HeteroFL", "SubNetClient", "units_from", "window"]

Units = dict[str, list[int]]


@dataclass(frozen=True)
class HeteroFL(Algorithm):
    """Sub-networks of the first units of every layer.

    Args:
        shares: shares of the units of every hidden layer, each in (0, 1], cycled over the clients in the order of their
            ids.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort",)
    merges: ClassVar[bool] = False
    which: ClassVar[Literal["static", "rolling", "random"]] = "static"
    shares: tuple[PositiveShare, ...] = setting((1.0, 0.5, 0.25), "server")

    def server(self, setup: CohortSetup) -> Server:
        return SubNetServer(setup, self)

    def client(self, setup: CohortSetup) -> Client:
        return SubNetClient(setup)


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """Sub-networks of a window of units that moves every round.

    Args:
        shares: see HeteroFL.
    """

    which: ClassVar[Literal["static", "rolling", "random"]] = "rolling"


@dataclass(frozen=True)
class FedDropout(HeteroFL):
    """Sub-networks of random units, drawn again in every round.

    Args:
        shares: see HeteroFL.
    """

    which: ClassVar[Literal["static", "rolling", "random"]] = "random"


def window(units: int, share: float, round: int, which: str, *seed: object) -> list[int]:
    """Return the units of a layer in a round, ascending; at least one.

    Args:
        units: U, all units of the layer.
        share: beta_k, in (0, 1].
        round: the round, from 1.
        which: "static", "rolling" or "random".
        seed: parts of the seed of a random choice.
    """
    count = max(1, -int(-share * units // 1))
    if which == "random":
        rng = torch.Generator().manual_seed(derive_seed(*seed, round))
        return sorted(torch.randperm(units, generator=rng)[:count].tolist())
    start = (round - 1) % units if which == "rolling" else 0
    return sorted((start + i) % units for i in range(count))


def units_from(payload: Payload) -> Units:
    """Return the units in a payload's scalars, by layer."""
    return {k.removeprefix("units/"): list(v) for k, v in payload.scalars.items() if k.startswith("units/")}


class SubNetServer(FedAvgServer):
    """A server that cuts a sub-network for each client and merges what returns into the same places.

    Attributes:
        round: round of the current windows; after `aggregate` it is the next round.
    """

    def __init__(self, setup: CohortSetup, algorithm: HeteroFL):
        super().__init__(setup)
        self.algorithm, self.round = algorithm, 1
        with torch.device("meta"):
            self.links = chain(setup.model.extractor(setup.model.architectures[0], setup.shape))
        client_ids = sorted(client.id for client in setup.clients)
        self.share = {c: algorithm.shares[i % len(algorithm.shares)] for i, c in enumerate(client_ids)}

    def units(self, client: ClientId) -> Units:
        """Return layer -> current units of a client; layers that it has in full, such as the last, are left out."""
        share, algorithm = self.share[client], self.algorithm
        if share == 1:
            return {}
        return {
            link.name: window(link.units, share, self.round, algorithm.which, self.setup.seed, client, link.name)
            for link in self.links[:-1]
        }

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        self.round = round
        return super().configure(round, clients)

    def deliver(self, client: ClientInfo) -> Payload:
        units = self.units(client.id)
        params = cut(select(self.params, client.task), self.links, units)
        return Payload({"params": params}, {f"units/{layer}": ids for layer, ids in units.items()})

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        self.params = self.merged(replies)
        self.round = round + 1
        return {}

    def merged(self, replies: Iterable[tuple[ClientId, Payload]]) -> Params:
        """Return the mean of every parameter by n_k over the clients that trained it; others keep their value."""
        sums = {key: torch.zeros_like(t, dtype=torch.float64) for key, t in self.params.items()}
        counts = {key: torch.zeros_like(t) for key, t in sums.items()}
        for client, reply in replies:
            n_k, params = float(reply.scalars["num_examples"]), reply.group("params")
            put(sums, counts, params, self.links, self.units(client), n_k)
            for key in (key for key in params if key.startswith("head.")):
                sums[key] += n_k * params[key].double()
                counts[key] += n_k
        return {
            key: torch.where(counts[key] > 0, sums[key] / counts[key].clamp(min=1e-30), value.double()).to(value.dtype)
            if counts[key].any()
            else value
            for key, value in self.params.items()
        }

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"round": self.round})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self.round = int(state.scalars["round"])


class SubNetClient(Client):
    """A client that trains the sub-network that it was sent."""

    def __init__(self, setup: CohortSetup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.build(payload, context)
        scalars = trained(self.setup, model, context)
        return Payload({"params": flatten(model)}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self.build(payload, context), context)

    def build(self, payload: Payload, context: ClientContext) -> SplitModel:
        """Build the live sub-network."""
        cohort, units = self.setup.model, units_from(payload)
        make = partial(cohort.extractor, context.info.architecture, self.setup.shape)
        return self.setup.split_model(lambda: narrowed(make(), units), payload.group("params"), context)
