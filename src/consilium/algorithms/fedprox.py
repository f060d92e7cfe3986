"""FedProx: Federated Optimization in Heterogeneous Networks.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. MLSys 2020. https://arxiv.org/abs/1812.06127

Algorithm 2: client k minimises h_k(w; w^t) = F_k(w) + mu/2 * ||w - w^t||^2 (Eq 2); the server is FedAvg's.

    w^t    the weights as received      mu     FedProx.mu

Departures: the penalty's gradient mu * (w - w^t) is added to the gradient instead of the penalty to the loss, which
is the same and costs no graph. Every client does all its local steps (no stragglers, gamma = 0 is not simulated). The
server averages by n_k as FedAvg does; the paper samples by n_k and averages uniformly.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, setting
from consilium.moe.addressing import parameters
from consilium.moe.model import TaskModel
from consilium.setup import Setup
from consilium.training import Correct, local_round, local_test

__all__ = ["FedProx"]

REFERENCES = 1  # w^t, beside the weights that train


@dataclass(frozen=True)
class FedProx(Algorithm):
    """FedAvg with a proximal term.

    Args:
        mu: weight of the proximal term, >= 0; 0 is FedAvg.
        experts: see FedAvg.
    """

    mu: float = setting(0.01, "factor", "[0, 1e4]")
    experts: int | Literal["all", "fit"] = setting("all", "server")

    def server(self, setup: Setup) -> Server:
        return FedAvgServer(setup, common_experts(setup, self.experts, REFERENCES), REFERENCES)

    def client(self, setup: Setup) -> Client:
        return FedProxClient(setup, self.mu)


class FedProxClient(Client):
    """FedAvg's client, pulled back towards the received weights."""

    def __init__(self, setup: Setup, mu: float):
        self.setup = setup
        self.mu = mu

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        # At mu = 0 there is no pull: a zero gradient would move, by Adam's momentum, experts that no token reached.
        pull = (lambda model: proximal(model, self.mu)) if self.mu else None
        return local_round(self.setup, payload, context, pull, references=REFERENCES)[1]

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)


def proximal(model: TaskModel, mu: float) -> Correct:
    """Adds mu * (w - w^t) to every gradient, w^t being the model's weights now."""
    received = {path: p.detach().clone() for path, p in parameters(model).items() if p.requires_grad}

    def correct(trainable: dict[str, torch.nn.Parameter]) -> None:
        for path, p in trainable.items():
            pull = p.detach() - received[path]
            p.grad = pull.mul_(mu) if p.grad is None else p.grad.add_(pull, alpha=mu)

    return correct
