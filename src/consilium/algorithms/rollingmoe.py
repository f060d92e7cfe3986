"""RollingMoE: sub-MoEs of a window of experts that moves in every round.

This is the rule of FedRolex (Alam, Liu, Yan, Zhang. NeurIPS 2022. https://arxiv.org/abs/2212.01548) with experts
instead of units: in round t a client holds the experts t, t + 1, .. (mod E) of every layer, as many as its memory
allows. All clients thus train all experts in turn, and the experts of the clients of a round overlap. A method that
chooses experts for each client has to beat this one, next to NestedMoE and RandomMoE.

    x_e <- sum_{k holds e} n_k x_k,e / sum_{k holds e} n_k

Departures: `step` can move the window by more than one expert a round. A client is scored with the experts that it
would train next.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from consilium.algorithms.randommoe import RandomMoE, RandomMoEServer
from consilium.constraints import Few
from consilium.core import ClientId, ClientInfo, ExpertMap, Payload, Server, counts_of, setting
from consilium.setup import MixtureSetup

__all__ = ["RollingMoE", "rolled"]


@dataclass(frozen=True)
class RollingMoE(RandomMoE):
    """Sub-MoEs of a window of experts that moves every round.

    Args:
        experts: experts per layer for every client; None: as many as the client's memory allows.
        share: share of a client's memory that its sub-MoE may use, in (0, 1]; a client always has the fewest
            experts that its router works with.
        step: experts by which the window moves in a round, >= 1.
    """

    step: Few = setting(1, "server")

    def server(self, setup: MixtureSetup) -> Server:
        super().server(setup)  # the base class checks the number of experts
        return RollingServer(setup, self)

    def choose(self, setup: MixtureSetup, client: ClientId, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the window of the first round."""
        return rolled(setup, counts, 0)


def rolled(setup: MixtureSetup, counts: Mapping[str, int], start: int) -> dict[str, tuple[int, ...]]:
    """Return `counts[block]` consecutive experts of every block from `start` on, modulo the number of experts."""
    return {
        block: tuple(sorted((start + i) % total for i in range(counts[block])))
        for block, total in setup.model.counts.items()
    }


class RollingServer(RandomMoEServer):
    """A RandomMoE server with a map that moves every round.

    Attributes:
        round: round of the current windows; after `aggregate` it is the next round.
    """

    def __init__(self, setup: MixtureSetup, algorithm: RollingMoE):
        super().__init__(setup, algorithm)
        self.step, self.round = algorithm.step, 1
        self.sizes = {client: counts_of(expert_ids) for client, expert_ids in self.map.items()}

    def _roll(self, round: int) -> None:
        self.round = round
        start = (round - 1) * self.step
        self.map: ExpertMap = {client: rolled(self.setup, counts, start) for client, counts in self.sizes.items()}

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        self._roll(round)
        return super().configure(round, clients)

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        scalars = super().aggregate(round, replies)
        self._roll(round + 1)
        return scalars

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"round": self.round})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self._roll(int(state.scalars["round"]))
