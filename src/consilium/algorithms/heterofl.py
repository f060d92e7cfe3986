"""HeteroFL, FedRolex and FedDropout: sub-networks of one small model, by width.

HeteroFL: Diao, Ding, Tarokh. ICLR 2021. https://arxiv.org/abs/2010.01264
FedRolex: Alam, Liu, Yan, Zhang. NeurIPS 2022. https://arxiv.org/abs/2212.01548
FedDropout: Caldas, Konecny, McMahan, Talwalkar. 2018. https://arxiv.org/abs/1812.07210

Client k trains a share beta_k of the units of every hidden layer of size U; the server takes of every parameter the
mean over who trained it, by n_k. They differ in which units in round t:

    HeteroFL     0 .. ceil(beta_k U) - 1: the larger contain the smaller
    FedRolex     t, t + 1, .. (mod U): a window that rolls on by one unit each round
    FedDropout   random ones

    beta_k   `shares`, of the clients in the order of their ids, again and again     units   scalars "units/<layer>"

Departures: the representation keeps its width, so that heads are the same for all; HeteroFL's scaler and its static
batch norms are left out (the models have no norms). A client is scored with the sub-network that it would train next;
FedRolex scores the whole model at the server. Its public finding, rolling before random before static windows, is an
order that can be checked. Our mixtures of experts have the same baselines for experts: NestedMoE, RollingMoE and
RandomMoE.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from consilium.algorithms.fedavg import FedAvgServer
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
from consilium.setup import Setup
from consilium.training import tested, trained

__all__ = ["FedDropout", "FedRolex", "HeteroFL", "SubNetClient", "units_from", "window"]

Units = dict[str, list[int]]


@dataclass(frozen=True)
class HeteroFL(Algorithm):
    """The first units of every layer.

    Args:
        shares: of the units of every hidden layer, each in (0, 1], of the clients in the order of their ids and again
            from the first.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort",)
    merges: ClassVar[bool] = False
    which: ClassVar[Literal["static", "rolling", "random"]] = "static"
    shares: tuple[float, ...] = setting((1.0, 0.5, 0.25), "server", "(0, 1]")

    def server(self, setup: Setup) -> Server:
        return SubNetServer(setup, self)

    def client(self, setup: Setup) -> Client:
        return SubNetClient(setup)


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """A window of units that rolls on.

    Args:
        shares: see HeteroFL.
    """

    which: ClassVar[Literal["static", "rolling", "random"]] = "rolling"


@dataclass(frozen=True)
class FedDropout(HeteroFL):
    """Random units in every round.

    Args:
        shares: see HeteroFL.
    """

    which: ClassVar[Literal["static", "rolling", "random"]] = "random"


def window(units: int, share: float, round: int, which: str, *seed: object) -> list[int]:
    """Return the units of a layer in a round (from 1), ascending; at least one."""
    count = max(1, -int(-share * units // 1))
    if which == "random":
        rng = torch.Generator().manual_seed(derive_seed(*seed, round))
        return sorted(torch.randperm(units, generator=rng)[:count].tolist())
    start = (round - 1) % units if which == "rolling" else 0
    return sorted((start + i) % units for i in range(count))


def units_from(payload: Payload) -> Units:
    """The units in a payload's scalars."""
    return {k.removeprefix("units/"): list(v) for k, v in payload.scalars.items() if k.startswith("units/")}


class SubNetServer(FedAvgServer):
    """Cuts a sub-network for each client, and merges what returns where it came from.

    Attributes:
        round: of which windows are; after a round those of the next.
    """

    def __init__(self, setup: Setup, algorithm: HeteroFL):
        super().__init__(setup)
        self.algorithm, self.round = algorithm, 1
        with torch.device("meta"):
            self.links = chain(setup.model.extractor(setup.model.architectures[0], setup.shape))
        ordered = sorted(client.id for client in setup.clients)
        self.share = {c: algorithm.shares[i % len(algorithm.shares)] for i, c in enumerate(ordered)}

    def units(self, client: ClientId) -> Units:
        """Layer -> the units of a client now; none of the last layer, which it has whole."""
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
        """The mean of every parameter over who trained it, by n_k; others keep their value."""
        sums = {key: torch.zeros_like(t, dtype=torch.float64) for key, t in self.params.items()}
        counts = {key: torch.zeros_like(t) for key, t in sums.items()}
        for client, reply in replies:
            n_k, params = float(reply.scalars["num_examples"]), reply.group("params")
            put(sums, counts, params, self.links, self.units(client), n_k)
            for key in (key for key in params if key.startswith("head.")):
                sums[key] += n_k * params[key].double()
                counts[key] += n_k
        return {
            key: torch.where(counts[key] > 0, sums[key] / counts[key].clamp(min=1e-30), old.double()).to(old.dtype)
            if counts[key].any()
            else old
            for key, old in self.params.items()
        }

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"round": self.round})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self.round = int(state.scalars["round"])


class SubNetClient(Client):
    """Trains the sub-network that it was sent."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.build(payload, context)
        told = trained(self.setup, model, context)
        return Payload({"params": flatten(model)}, told)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self.build(payload, context), context)

    def build(self, payload: Payload, context: ClientContext) -> SplitModel:
        """The live sub-network."""
        cohort, units = self.setup.model, units_from(payload)
        make = partial(cohort.extractor, context.info.architecture, self.setup.shape)
        return self.setup.split_model(lambda: narrowed(make(), units), payload.group("params"), context)
