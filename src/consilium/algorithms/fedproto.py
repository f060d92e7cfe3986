"""FedProto: Federated Prototype Learning across Heterogeneous Clients.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang. AAAI 2022. https://arxiv.org/abs/2105.00243

Clients exchange the mean representation of each class and never weights:

    C_k^(j) = 1 / |D_k,j| * sum_{x in D_k,j} f_k(x)                            Eq 3, after local training
    C^(j)   = sum_k |D_k,j| / N_j * C_k^(j), over the clients with class j     Eq 6 (without its extra 1 / |N_j|)
    loss    = CE + lambda * ||f_k(x) - C^(y)||^2                               Eq 7, for the classes that have a C

    C^(j)    group "prototypes", label -> [d]      |D_k,j|   group "counts", label -> []     lambda   lam

Departures: the distance is the mean over d of squared differences, as in the authors' code, so that lambda does not
depend on the width. The paper predicts by the nearest prototype; `infer` selects this. By default the head predicts, as
in all methods compared here. A prototype that no client of the round sent keeps its value. With `privacy.labels`
"names" a client sends 1 for each |D_k,j|, so that Eq 6 is the plain mean over the clients that have the class, as in
the authors' code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.constraints import Factor
from consilium.core import Algorithm, Client, ClientContext, ClientId, ClientInfo, Payload, Reveal, Server, setting
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Like, Params, WeightedMean
from consilium.scoring import read_batches
from consilium.setup import CohortSetup
from consilium.training import Objective, Supervised, tested, trained

__all__ = ["FedProto", "FedProtoClient", "PrototypeServer", "class_means"]


@dataclass(frozen=True)
class FedProto(Algorithm):
    """An exchange of class prototypes instead of weights.

    Args:
        lam: weight of the distance to the prototypes (lambda), >= 0; HtFLlib uses 10.
        infer: prediction by the "head", or by the nearest "prototype".
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    merges: ClassVar[bool] = False
    lam: Factor = setting(1.0, "factor")
    infer: Literal["head", "prototype"] = setting("head", "free")

    def server(self, setup: CohortSetup) -> Server:
        return PrototypeServer(setup)

    def client(self, setup: CohortSetup) -> Client:
        return FedProtoClient(setup, self.lam, self.infer)


class PrototypeServer(Server):
    """A server that averages one vector per class over the clients that sent it, weighted by their examples.

    Args:
        width: width of the vectors; None: the width of the representations.
        counts: whether replies hold the number of examples of each class.
    """

    def __init__(self, setup: CohortSetup, width: int | None = None, counts: bool = True):
        self.setup = setup
        self.counts = counts
        width = setup.common_width if width is None else width
        self.params = {label: torch.zeros(width) for labels in setup.heads.values() for label in labels}
        self.known: set[str] = set()

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        return {c.id: self.deliver(c) for c in self.setup.sampling.choose(clients, round, self.setup.seed)}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = WeightedMean()
        for _, reply in replies:
            counts = reply.group("counts")
            mean.add(reply.group("prototypes"), lambda label, counts=counts: float(counts[label]))
            self.known |= reply.group("prototypes").keys()
        self.params = mean.mean(self.params)
        return {}

    def deliver(self, client: ClientInfo) -> Payload:
        return Payload({"prototypes": {label: self.params[label] for label in sorted(self.known)}})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        count = Like((), torch.int64, 1, client.num_examples, needed=False)
        prototypes = {label: Like.of(t, needed=False) for label, t in self.params.items()}
        return {"prototypes": prototypes, **({"counts": dict.fromkeys(prototypes, count)} if self.counts else {})}

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        if not self.counts:
            return None
        counts = reply.group("counts")
        if counts.keys() != reply.group("prototypes").keys():
            return "counts are not of the labels of the prototypes"
        if (total := sum(int(n) for n in counts.values())) > client.num_examples:
            return f"counts sum to {total}, of {client.num_examples} examples"
        return None

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"known": sorted(self.known)})

    def restore(self, state: Payload) -> None:
        self.params = state.group("params")
        self.known = set(state.scalars["known"])


class FedProtoClient(Client):
    """A client that pulls its representations towards the prototypes and sends the class means of its own.

    Args:
        counts: whether the number of examples of each class is sent as well.
    """

    def __init__(self, setup: CohortSetup, lam: float, infer: str = "head", counts: bool = True):
        self.setup = setup
        self.lam = lam
        self.infer = infer
        self.counts = counts
        reveals = {"prototypes": Reveal("update", "exact")}
        if counts:
            reveals["counts"] = Reveal("labels", "less")
        self.reveals = reveals

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.setup.build(self.setup.own_params(context), context)
        scalars = trained(
            self.setup,
            model,
            context,
            drawn(payload.group("prototypes"), model, self.lam, self.setup.fit.cross_entropy),
        )
        context.state.params = flatten(model)
        prototypes, counts = class_means(model, self.setup, context)
        return Payload({"prototypes": prototypes, **({"counts": counts} if self.counts else {})}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        model = self.setup.build(self.setup.own_params(context), context)
        if self.infer == "prototype" and (prototypes := payload.group("prototypes")):
            model.head = Nearest(prototypes, model.labels).to(context.device)
        return tested(self.setup, model, context)


def drawn(prototypes: Params, model: SplitModel, lam: float, supervised: Supervised = F.cross_entropy) -> Objective:
    """Return the objective CE + lam * mean squared distance of each representation to its class's prototype.

    The distance is 0 for a class without a prototype.
    """
    device = next(model.parameters()).device
    known_C = torch.tensor([label in prototypes for label in model.labels], device=device)
    zero = torch.zeros(model.backbone.width)
    target_CD = torch.stack([prototypes.get(label, zero) for label in model.labels]).to(device)

    def objective(model: SplitModel, batch: dict[str, Tensor]) -> Tensor:
        features, y = model.backbone(batch["x"]), batch["labels"]
        loss = supervised(model.head(features), y)
        distance_B = (features - target_CD[y]).square().mean(1) * known_C[y]
        return loss + lam * distance_B.mean()

    return objective


def class_means(
    model: SplitModel, setup: CohortSetup, context: ClientContext, of: Callable[[Tensor], Tensor] | None = None
) -> tuple[Params, Params]:
    """Return label -> mean vector of its training examples [D], and label -> number of examples, int64 [].

    Args:
        of: function that maps examples to vectors, [B, *S] -> [B, D]; None: their representations.
    """
    of = of or model.backbone
    data = setup.encode(context, context.data.train)
    model.eval()
    sums_CD: Tensor | float = 0.0
    counts_C = torch.zeros(len(model.labels), dtype=torch.int64)
    with torch.inference_mode():
        for batch in read_batches(data, 4 * setup.fit.batch_size, context):
            y = batch["labels"].cpu()
            one_hot_CB = F.one_hot(y, len(model.labels)).T.double()
            sums_CD = sums_CD + one_hot_CB @ of(batch["x"]).double().cpu()
            counts_C += torch.bincount(y, minlength=len(counts_C))
    classes = counts_C.nonzero().flatten().tolist()
    means = {model.labels[c]: (sums_CD[c] / counts_C[c]).float() for c in classes}
    return means, {model.labels[c]: counts_C[c].clone() for c in classes}


class Nearest(nn.Module):
    """A head that returns minus the squared distance to each label's prototype as logits [B, C].

    A label without a prototype is never predicted.
    """

    def __init__(self, prototypes: Params, labels: tuple[str, ...]):
        super().__init__()
        infinite_point = torch.full_like(next(iter(prototypes.values())), float("inf"))
        self.register_buffer("points_CD", torch.stack([prototypes.get(label, infinite_point) for label in labels]))

    def forward(self, features_BD: Tensor) -> Tensor:
        return -(features_BD.unsqueeze(1) - self.points_CD).square().sum(-1)
