"""FedAvgFT and FedProxFT: federated training, then local fine-tuning by each client.

Cheng, Chadha, Duchi. 2021. https://arxiv.org/abs/2108.07313: FedAvg followed by local fine-tuning is a strong baseline
of personalised federated learning. The federated method is FedAvg or FedProx. Before it is scored, a client trains the
delivered model on its own data for `personal` more epochs. The result is discarded: nothing of it is sent or kept.

Departures: none. The optimiser and the learning rates are those of `fit`.
"""

from dataclasses import dataclass

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedprox import FedProx
from consilium.constraints import Count
from consilium.core import Client, ClientContext, Payload, experts_from_scalars
from consilium.setup import Setup
from consilium.training import fit, tested
from consilium.work import setting

__all__ = ["FedAvgFT", "FedProxFT"]


@dataclass(frozen=True)
class FedAvgFT(FedAvg):
    """FedAvg, scored after local fine-tuning.

    Args:
        experts: see FedAvg.
        personal: epochs of fine-tuning, >= 1.
    """

    personal: Count = setting(1, "epochs")

    def client(self, setup: Setup) -> Client:
        return FineTunedClient(setup, super().client(setup), self.personal)


@dataclass(frozen=True)
class FedProxFT(FedProx):
    """FedProx, scored after local fine-tuning without the proximal term.

    Args:
        mu: see FedProx.
        experts: see FedAvg.
        pull: see FedProx.
        personal: epochs of fine-tuning, >= 1.
    """

    personal: Count = setting(1, "epochs")

    def client(self, setup: Setup) -> Client:
        return FineTunedClient(setup, super().client(setup), self.personal)


class FineTunedClient(Client):
    """A client that trains like the client it wraps, and fine-tunes the delivered model before it scores it."""

    def __init__(self, setup: Setup, federated: Client, personal: int):
        self.setup = setup
        self.federated = federated
        self.personal = personal

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        return self.federated.train(payload, context)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        self.setup.admit(context, experts_from_scalars(payload.scalars))
        model = self.setup.build_sent(payload, context)
        train = self.setup.encode(context, context.data.train)
        fit(model, train, self.setup.fit, context, epochs=self.personal)
        return tested(self.setup, model, context)
