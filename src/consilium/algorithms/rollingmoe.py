"""RollingMoE: sub-MoEs by a window of experts that rolls on in every round.

The rule of FedRolex (Alam, Liu, Yan, Zhang. NeurIPS 2022. https://arxiv.org/abs/2212.01548) for experts instead of
units: in round t a client holds the experts t, t + 1, .. (mod E) of every layer, as many as its memory allows, so that
all experts are trained by all clients in turn, and those of a round overlap. Next to NestedMoE and RandomMoE it is
what a method that chooses experts for each client has to beat.

    x_e <- sum_{k holds e} n_k x_k,e / sum_{k holds e} n_k

Departures: `step` rolls by more than one expert a round; a client is scored with the experts that it would train next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consilium.algorithms.randommoe import RandomMoE, RandomMoEServer
from consilium.core import ClientId, ClientInfo, ExpertMap, Payload, Server, setting
from consilium.setup import Setup

__all__ = ["RollingMoE", "rolled"]


@dataclass(frozen=True)
class RollingMoE(RandomMoE):
    """Sub-MoEs of a window of experts that rolls.

    Args:
        experts: experts per layer for every client; None: as many as the client's memory allows.
        share: share of a client's memory that its sub-MoE may use, in (0, 1]; the fewest experts that
            its router works with it always has.
        step: experts by which the window moves in a round, >= 1.
    """

    step: int = setting(1, "server", "[1, 1e4]")

    def server(self, setup: Setup) -> Server:
        super().server(setup)  # which checks the number of experts
        return RollingServer(setup, self)

    def choose(self, setup: Setup, client: ClientId, n: int) -> dict[str, tuple[int, ...]]:
        """Return the window of the first round."""
        return rolled(setup, max(n, setup.model.family.least), 0)


def rolled(setup: Setup, n: int, start: int) -> dict[str, tuple[int, ...]]:
    """Return the n experts from `start` on, around the end, of every block."""
    return {
        block: tuple(sorted((start + i) % total for i in range(min(n, total))))
        for block, total in setup.model.counts.items()
    }


class RollingServer(RandomMoEServer):
    """RandomMoE's server, with a map that rolls.

    Attributes:
        round: of which the windows are; after a round those of the next.
    """

    def __init__(self, setup: Setup, algorithm: RollingMoE):
        super().__init__(setup, algorithm)
        self.step, self.round = algorithm.step, 1
        self.sizes = {client: max(map(len, held.values())) for client, held in self.map.items()}

    def _roll(self, round: int) -> None:
        self.round = round
        start = (round - 1) * self.step
        self.map: ExpertMap = {client: rolled(self.setup, n, start) for client, n in self.sizes.items()}

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        self._roll(round)
        return super().configure(round, clients)

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        told = super().aggregate(round, replies)
        self._roll(round + 1)
        return told

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"round": self.round})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self._roll(int(state.scalars["round"]))
