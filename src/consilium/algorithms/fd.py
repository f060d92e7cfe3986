"""FD: Communication-Efficient On-Device Machine Learning: Federated Distillation.

Jeong, Oh, Kim, Park, Bennis, Kim. https://arxiv.org/abs/1811.11479

Clients exchange, for each class, the mean of their logits over the class's examples:

    F_k,c = mean of z_k(x) over client k's examples of class c             after local training
    F_c   = mean of F_j,c over the other clients j != k that have the class    at the server, for client k
    loss  = CE + gamma * D(z(x), F_y)                                      for the classes that have an F

    F        group "prototypes", label -> [C]        gamma    FD.gamma        own    FD.own

Departures: D is the mean squared difference of logits, as in the comparisons of the pFedMoE family and HtFLlib. In the
paper the vectors are softmax outputs and D is their cross-entropy; `distance="ce"` selects this. Means are taken once
after training and not along the way. Not all clients take part in every round, so F_c comes from the last round in
which class c was sent. A class that only client k has sent teaches client k nothing. HtFLlib includes the client's own
vectors in the mean; `own` selects this.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from consilium.algorithms.fedproto import PrototypeServer, class_means
from consilium.algorithms.fml import kl
from consilium.constraints import Factor
from consilium.core import Algorithm, Client, ClientContext, ClientId, ClientInfo, Payload, Reveal, Server, setting
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import Objective, Supervised, tested, trained

__all__ = ["FD"]


@dataclass(frozen=True)
class FD(Algorithm):
    """Federated distillation by the mean logits of each class.

    Args:
        gamma: weight of the distance to the mean logits, >= 0.
        distance: "mse" of logits; "kl" of the probabilities that mean logits give; "ce", the cross-entropy to mean
            probabilities, which are then exchanged instead of logits.
        own: whether a client's own vectors are part of its teacher.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    merges: ClassVar[bool] = False
    gamma: Factor = setting(1.0, "factor")
    distance: Literal["mse", "kl", "ce"] = setting("mse", "free")
    own: bool = setting(False, "server")

    def server(self, setup: CohortSetup) -> Server:
        return FDServer(setup, self)

    def client(self, setup: CohortSetup) -> Client:
        return FDClient(setup, self)


class FDServer(PrototypeServer):
    """A server that averages, per class, the vectors of the other clients.

    It keeps the vectors of each class from the last round in which the class was sent.
    """

    def __init__(self, setup: CohortSetup, algorithm: FD):
        super().__init__(setup, setup.classes, counts=False)
        self.own = algorithm.own
        self.sent: dict[str, Params] = {}  # label -> client -> [C]

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        vectors_by_label: dict[str, Params] = defaultdict(dict)
        for client, reply in replies:
            for label, vector in reply.group("prototypes").items():
                vectors_by_label[label][client] = vector
        self.sent = {**self.sent, **vectors_by_label}
        self.params = self.params | {label: _mean(vectors) for label, vectors in vectors_by_label.items()}
        return {}

    def deliver(self, client: ClientInfo) -> Payload:
        vectors_by_label = {
            label: {c: t for c, t in vectors.items() if self.own or c != client.id}
            for label, vectors in sorted(self.sent.items())
        }
        return Payload(
            {"prototypes": {label: _mean(vectors) for label, vectors in vectors_by_label.items() if vectors}}
        )

    def state(self) -> Payload:
        vectors_by_key = {
            f"{client}/{label}": t for label, vectors in self.sent.items() for client, t in vectors.items()
        }
        return Payload({"params": self.params, "sent": vectors_by_key})

    def restore(self, state: Payload) -> None:
        self.params, self.sent = state.group("params"), defaultdict(dict)
        for key, vector in state.group("sent").items():
            client, _, label = key.partition("/")
            self.sent[label][client] = vector


def _mean(vectors: Params) -> Tensor:
    return torch.stack(list(vectors.values())).double().mean(0).float()


class FDClient(Client):
    """A client that learns from its data and from the logits of other clients."""

    reveals: Mapping[str, Reveal] = {"prototypes": Reveal("update", "exact")}

    def __init__(self, setup: CohortSetup, algorithm: FD):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.setup.build(self.setup.own_params(context), context)
        scalars = trained(
            self.setup,
            model,
            context,
            taught(payload.group("prototypes"), model, self.algorithm, self.setup.fit.cross_entropy),
        )
        context.state.params = flatten(model)
        means, _ = class_means(model, self.setup, context, lambda x: self._output(model.head(model.backbone(x))))
        return Payload({"prototypes": means}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self.setup.build(self.setup.own_params(context), context), context)

    def _output(self, z: Tensor) -> Tensor:
        """Return the vectors to exchange for logits [B, C]: probabilities for "ce", else the logits themselves."""
        return z.softmax(1) if self.algorithm.distance == "ce" else z


def taught(logits: Params, model: SplitModel, algorithm: FD, supervised: Supervised = F.cross_entropy) -> Objective:
    """Return the objective CE + gamma * D, with D averaged over the batch.

    D is 0 for an example if no logits are known for its class.
    """
    device, labels = next(model.parameters()).device, model.labels
    known_C = torch.tensor([label in logits for label in labels], device=device)
    teacher_CC = torch.stack([logits.get(label, torch.zeros(len(labels))) for label in labels]).to(device)

    def objective(model: SplitModel, batch: dict[str, Tensor]) -> Tensor:
        z, y = model(batch)
        loss, mask_B = supervised(z, y), known_C[y]
        if not mask_B.any():
            return loss
        teacher, student = teacher_CC[y][mask_B], z[mask_B]
        distance = {"mse": F.mse_loss, "kl": lambda z, t: kl(t, z), "ce": F.cross_entropy}[algorithm.distance]
        return loss + algorithm.gamma * distance(student, teacher) * mask_B.float().mean()

    return objective
