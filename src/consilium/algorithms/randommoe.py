"""randomMoE: FedMoE's baseline with random sub-MoEs.

Mei, Cai, Zhou, Wang, Xu: FedMoE, section on baselines. https://arxiv.org/abs/2408.11304

Each client gets a random subset of the experts once and keeps it (in the paper: 8 of 32 in each layer). Training and
modular aggregation are FedMoE's: the trunk is averaged by n_k, and an expert and its router row by n_k over the clients
that hold it.

Departures: the paper's 8 of 32 for all is the option `experts`; by default every client holds as many experts per
layer as its own memory allows. FedMoE may grow into the same memory but starts below it, at alpha * M_k; `share` gives
randomMoE that smaller budget. The gates of a sub-MoE are scaled as `fit.gates` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from consilium.algorithms.fedavg import FedAvgClient, FedAvgServer
from consilium.constraints import PositiveShare
from consilium.core import Algorithm, Client, ClientId, ClientInfo, ExpertMap, ExpertSet, Server, derive_seed, setting
from consilium.errors import ConfigError
from consilium.setup import MixtureSetup

__all__ = ["RandomMoE", "random_choice"]


@dataclass(frozen=True)
class RandomMoE(Algorithm):
    """Fixed random sub-MoEs.

    Args:
        experts: experts per layer for every client; None: as many as the client's memory allows.
        share: share of a client's memory that its sub-MoE may use, in (0, 1]; a client always has the fewest
            experts that its router works with.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    experts: int | None = setting(None, "server")
    share: PositiveShare = setting(1.0, "server")

    def chooses_by_memory(self) -> bool:
        return self.experts is None and self.share == 1

    def server(self, setup: MixtureSetup) -> Server:
        minimum, maximum = setup.model.family.least, max(setup.model.counts.values())
        if self.experts is not None and not minimum <= self.experts <= maximum:
            raise ConfigError(f"experts is {self.experts}; allowed are {minimum}..{maximum}")
        return RandomMoEServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FedAvgClient(setup)

    def choose(self, setup: MixtureSetup, client: ClientId, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the client's experts, `counts[block]` of every block."""
        return random_choice(setup, client, counts)


class RandomMoEServer(FedAvgServer):
    """A FedAvg server with a fixed client-expert map."""

    def __init__(self, setup: MixtureSetup, algorithm: RandomMoE):
        super().__init__(setup, held=None)
        self.map: ExpertMap = {}
        for client in setup.clients:
            if algorithm.experts:
                counts = {block: min(algorithm.experts, total) for block, total in setup.model.counts.items()}
            else:
                counts = setup.sub_moe_counts(client, algorithm.share)
            self.map[client.id] = algorithm.choose(setup, client.id, counts)

    def held_by(self, client: ClientInfo) -> ExpertSet:
        return self.map[client.id]

    def structure(self) -> ExpertMap:
        return dict(self.map)


def random_choice(setup: MixtureSetup, client: ClientId, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return `counts[block]` random experts of every block, from the run's seed and the client's id."""
    rng = torch.Generator().manual_seed(derive_seed(setup.seed, "random experts", client))
    return {
        block: tuple(sorted(torch.randperm(total, generator=rng)[: counts[block]].tolist()))
        for block, total in setup.model.counts.items()
    }
