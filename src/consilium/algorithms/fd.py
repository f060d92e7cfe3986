"""FD: Communication-Efficient On-Device Machine Learning: Federated Distillation.

Jeong, Oh, Kim, Park, Bennis, Kim. https://arxiv.org/abs/1811.11479

Clients exchange, for each class, the mean of their logits over the class's examples:

    F_k,c = mean of z_k(x) over client k's examples of class c        after local training
    F_c   = mean over the clients that have the class                 at the server, by their numbers of examples
    loss  = CE + gamma * D(z(x), F_y)                                  for the classes that have an F

    F        group "prototypes", label -> [C]        gamma    FD.gamma

Departures: logits are logits (the paper's are normalised), and D is their mean squared difference, or KL by the option
`distance`. A client's own logits are part of its teacher; the paper leaves them out, which the server can only do for
clients it heard of in the same round. Means are taken once after training and not along the way.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from consilium.algorithms.fedproto import PrototypeServer, class_means
from consilium.algorithms.fml import kl
from consilium.core import Algorithm, Client, ClientContext, Payload, Server
from consilium.errors import ConfigError
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import Setup
from consilium.training import Objective, tested, trained

__all__ = ["FD"]


@dataclass(frozen=True)
class FD(Algorithm):
    """Federated distillation by the mean logits of each class.

    Args:
        gamma: weight of the distance to them, >= 0.
        distance: "mse" of logits, or "kl" of the probabilities.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    merges: ClassVar[bool] = False
    gamma: float = 1.0
    distance: Literal["mse", "kl"] = "mse"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise ConfigError(f"gamma is {self.gamma}; it must be a finite number >= 0")
        if self.distance not in ("mse", "kl"):
            raise ConfigError(f"distance is {self.distance!r}; allowed are mse, kl")

    def server(self, setup: Setup) -> Server:
        return PrototypeServer(setup, setup.classes)

    def client(self, setup: Setup) -> Client:
        return FDClient(setup, self)


class FDClient(Client):
    """Learns from the data and from the others' logits."""

    def __init__(self, setup: Setup, algorithm: FD):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.setup.build(self.setup.own_params(context), context)
        told = trained(self.setup, model, context, taught(payload.group("prototypes"), model, self.algorithm))
        context.state.params = flatten(model)
        logits, scalars = class_means(model, self.setup, context, lambda x: model.head(model.backbone(x)))
        return Payload({"prototypes": logits}, {**told, **scalars})

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self.setup.build(self.setup.own_params(context), context), context)


def taught(logits: Params, model: SplitModel, algorithm: FD) -> Objective:
    """CE + gamma * D, D averaged over the batch, 0 for an example whose class has no logits."""
    device, labels = next(model.parameters()).device, model.labels
    known_C = torch.tensor([label in logits for label in labels], device=device)
    teacher_CC = torch.stack([logits.get(label, torch.zeros(len(labels))) for label in labels]).to(device)

    def objective(model: SplitModel, batch: dict[str, Tensor]) -> Tensor:
        z, y = model(batch)
        loss, known = F.cross_entropy(z, y), known_C[y]
        if not known.any():
            return loss
        teacher, student = teacher_CC[y][known], z[known]
        apart = kl(teacher, student) if algorithm.distance == "kl" else F.mse_loss(student, teacher)
        return loss + algorithm.gamma * apart * known.float().mean()

    return objective
