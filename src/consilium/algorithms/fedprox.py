"""FedProx: Federated Optimization in Heterogeneous Networks.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. MLSys 2020. https://arxiv.org/abs/1812.06127

Algorithm 2: client k minimises h_k(w; w^t) = F_k(w) + mu/2 * ||w - w^t||^2 (Eq 2); the server is FedAvg's.

    w^t    the weights as received      mu     FedProx.mu

Departures: the penalty's gradient mu * (w - w^t) is added to the gradient, instead of adding the penalty to the loss.
The result is the same and needs no graph. With plain SGD (`fit.optimizer sgd`, `fit.clip 0`) this is the paper's
method. AdamW divides the whole gradient by its size, and clipping scales it, so with them mu is not the paper's mu: a
pull far below the gradient is normalised away. `pull="step"` leaves the gradient as it is and takes the proximal step
of the penalty after each step of the optimiser: w <- (w + lr mu w^t) / (1 + lr mu). Every client does all its local
steps (no stragglers, gamma = 0 is not simulated). The server averages by n_k as FedAvg does; the paper samples by n_k
and averages uniformly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.constraints import Factor
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, setting
from consilium.moe.addressing import parameters
from consilium.moe.model import TaskModel
from consilium.setup import Setup
from consilium.training import Correct, local_round, local_test

__all__ = ["FedProx"]

REFERENCES = 1  # a copy of w^t stays in memory next to the weights that train


@dataclass(frozen=True)
class FedProx(Algorithm):
    """FedAvg with a proximal term.

    Args:
        mu: weight of the proximal term, >= 0; 0 is FedAvg.
        experts: see FedAvg.
        pull: where the penalty acts: on the "gradient", as in the paper, or in a separate "step" after the optimiser.
    """

    mu: Factor = setting(0.01, "factor")
    experts: int | Literal["all", "fit"] = setting("all", "server")
    pull: Literal["gradient", "step"] = setting("gradient", "free")
    dense: ClassVar[bool] = True

    def server(self, setup: Setup) -> Server:
        return FedAvgServer(setup, common_experts(setup, self.experts, REFERENCES), REFERENCES)

    def client(self, setup: Setup) -> Client:
        return FedProxClient(setup, self)


class FedProxClient(Client):
    """A FedAvg client with a pull back towards the received weights."""

    def __init__(self, setup: Setup, algorithm: FedProx):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        # At mu = 0 no pull is added: with a zero gradient, Adam's momentum would move experts that no token reached.
        mu, is_step = self.algorithm.mu, self.algorithm.pull == "step"
        pull = (lambda model: proximal(model, mu)) if mu and not is_step else None
        step_mu = mu if is_step else 0.0
        return local_round(self.setup, payload, context, pull, references=REFERENCES, anchored=step_mu)[1]

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)


def proximal(model: TaskModel, mu: float, anchor: Mapping[str, torch.Tensor] | None = None) -> Correct:
    """Return a correction that adds mu * (w - w^t) to every gradient.

    Args:
        model: the model that is trained.
        mu: weight of the proximal term, >= 0.
        anchor: path -> w^t; None: the current weights of the model.
    """
    anchor_weights = {path: p.detach().clone() for path, p in parameters(model).items() if p.requires_grad}
    if anchor is not None:
        anchor_weights = {path: anchor[path].detach().to(p.device, copy=True) for path, p in anchor_weights.items()}

    def correct(trainable: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        for path, p in trainable.items():
            if anchor_weights[path].dtype != weights[path].dtype:  # take the float32 masters, which have not moved yet
                anchor_weights[path] = weights[path].detach().clone()
            pull = weights[path].detach() - anchor_weights[path]
            p.grad = pull.mul_(mu).to(p.dtype) if p.grad is None else p.grad.add_(pull, alpha=mu)

    return correct
