"""NestedMoE: sub-MoEs of the publicly most used experts, where larger ones contain the smaller ones.

This is the rule of HeteroFL (Diao, Ding, Tarokh. ICLR 2021. https://arxiv.org/abs/2010.01264) with experts instead of
channels: a client with more memory holds all experts of a client with less memory, and more. All clients rank experts
alike, by the share of public tokens in the model's card, so most clients train the same few experts. A method that
chooses experts for each client has to beat this one.

    x_e <- sum_{k holds e} n_k x_k,e / sum_{k holds e} n_k

Departures: none. The sizes follow from the memory of the devices, as in RandomMoE.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from consilium.algorithms.randommoe import RandomMoE
from consilium.core import ClientId
from consilium.moe.layers import most
from consilium.setup import MixtureSetup

__all__ = ["NestedMoE"]


@dataclass(frozen=True)
class NestedMoE(RandomMoE):
    """Fixed sub-MoEs of the publicly most used experts.

    Args:
        experts: experts per layer for every client; None: as many as the client's memory allows.
        share: share of a client's memory that its sub-MoE may use, in (0, 1]; a client always has the fewest
            experts that its router works with.
    """

    def choose(self, setup: MixtureSetup, client: ClientId, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the experts of every block with the largest share of public tokens."""
        return most(setup.public_usage("common experts"), counts)
