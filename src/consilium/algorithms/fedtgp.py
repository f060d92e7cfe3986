"""FedTGP: Trainable Global Prototypes with Adaptive-Margin-Enhanced Contrastive Learning.

Zhang, Liu, Hua, Cao. AAAI 2024. https://arxiv.org/abs/2401.03230

Clients work as in FedProto. The server does not average their prototypes P_k^c. Instead it trains one prototype per
class, which lies near the clients' prototypes of that class and far from those of other classes:

    P^c    = phi(v^c; theta)                                   v^c a trained vector, phi two linear layers and a ReLU
    delta  = min(max over c != c' of ||Q^c - Q^c'||, tau)      Q^c: the plain mean of the round's P_k^c
    loss   = -log e^-(d(P_k^c, P^c) + delta) / (e^-(d(P_k^c, P^c) + delta) + sum_{c' != c} e^-d(P_k^c, P^c'))
    client: CE + lambda * ||f_k(x) - P^y||^2                   d the Euclidean distance

    v, phi   server.params       P^c    group "prototypes" down        P_k^c   group "prototypes" up      lambda  lam
    S        server_epochs       tau    tau                            eta     eta_s

Departures: classes that no client has sent yet are neither trained nor sent. The authors' library (HtFLlib) computes
delta from the distance of each class to its nearest other class and takes the largest, which is `gap="nearest"`; it
uses lambda 10. The clients' distance is the mean over d, as in FedProto.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedproto import FedProtoClient
from consilium.constraints import Count, Factor, Scale
from consilium.core import Algorithm, Client, ClientId, ClientInfo, Payload, Server, derive_seed, setting
from consilium.models.cohort import initial
from consilium.params import Like
from consilium.setup import CohortSetup

__all__ = ["FedTGP", "contrast", "margin"]


@dataclass(frozen=True)
class FedTGP(Algorithm):
    """Prototypes that the server trains to keep classes apart.

    Args:
        lam: weight of the clients' distance to the prototypes (lambda), >= 0.
        tau: largest margin, >= 0.
        gap: distance between classes that gives the margin: the "largest" of all pairs, or the largest distance of a
            class to its "nearest" other class.
        server_epochs: passes over the round's prototypes (S), >= 1.
        eta_s: learning rate of the server, > 0; None: fit.lr.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    merges: ClassVar[bool] = False
    lam: Factor = setting(1.0, "factor")
    tau: Annotated[float, Interval(ge=0, le=1e12)] = setting(100.0, "server")
    gap: Literal["largest", "nearest"] = setting("largest", "server")
    server_epochs: Count = setting(100, "server")
    eta_s: Scale | None = setting(None, "server")

    def server(self, setup: CohortSetup) -> Server:
        return FedTGPServer(setup, self)

    def client(self, setup: CohortSetup) -> Client:
        return FedProtoClient(setup, self.lam, counts=False)


class FedTGPServer(Server):
    """A server that trains one vector per class and the network phi."""

    def __init__(self, setup: CohortSetup, algorithm: FedTGP):
        self.setup = setup
        self.algorithm = algorithm
        d = setup.common_width
        self.labels = [label for labels in setup.heads.values() for label in labels]
        self.params = initial(lambda: _trainable(len(self.labels), d), setup.seed, "FedTGP")
        self.known: set[str] = set()

    def configure(self, round: int, clients: list[ClientInfo]) -> dict[ClientId, Payload]:
        return {c.id: self.deliver(c) for c in self.setup.sampling.choose(clients, round, self.setup.seed)}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        pairs = [(label, t) for _, reply in replies for label, t in sorted(reply.group("prototypes").items())]
        if not pairs:
            return {}
        self.known |= {label for label, _ in pairs}
        class_indices = {label: i for i, label in enumerate(sorted(self.known))}
        prototypes_ND = torch.stack([t for _, t in pairs])
        y_N = torch.tensor([class_indices[label] for label, _ in pairs])
        delta = margin(prototypes_ND, y_N, self.algorithm.tau, self.algorithm.gap)
        module = self._module()
        optimizer = torch.optim.SGD(module.parameters(), lr=self.algorithm.eta_s or self.setup.fit.lr)
        generator = torch.Generator().manual_seed(derive_seed(self.setup.seed, "FedTGP", round))
        for _ in range(self.algorithm.server_epochs):
            for rows in torch.randperm(len(y_N), generator=generator).split(self.setup.fit.batch_size):
                optimizer.zero_grad()
                contrast(prototypes_ND[rows], y_N[rows], self._prototypes(module), delta).backward()
                optimizer.step()
        self.params = {key: t.detach().clone() for key, t in module.named_parameters()}
        return {"margin": delta}

    def deliver(self, client: ClientInfo) -> Payload:
        with torch.no_grad():
            prototypes = self._prototypes(self._module()) if self.known else ()
        return Payload({"prototypes": {c: t.clone() for c, t in zip(sorted(self.known), prototypes, strict=True)}})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        like = Like(self.params["vectors.weight"].shape[1:], torch.float32, needed=False)
        return {"prototypes": dict.fromkeys(self.labels, like)}

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"known": sorted(self.known)})

    def restore(self, state: Payload) -> None:
        self.params = state.group("params")
        self.known = set(state.scalars["known"])

    def _module(self) -> nn.Module:
        module = _trainable(*self.params["vectors.weight"].shape)
        module.load_state_dict(self.params)
        return module

    def _prototypes(self, module: nn.Module) -> Tensor:
        """Return P^c of the known classes in sorted order, [C, d]."""
        rows = torch.tensor([self.labels.index(label) for label in sorted(self.known)])
        return module["phi"](module["vectors"](rows))


def _trainable(classes: int, d: int) -> nn.ModuleDict:
    phi = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
    return nn.ModuleDict({"vectors": nn.Embedding(classes, d), "phi": phi})


def margin(sent_ND: Tensor, y_N: Tensor, tau: float, gap: str = "largest") -> float:
    """Return the margin delta, a distance between the mean prototypes of classes, at most tau; 0 with one class.

    Args:
        sent_ND: prototypes that clients sent.
        y_N: class index of each prototype.
        tau: see `FedTGP`.
        gap: see `FedTGP`.
    """
    means = torch.stack([sent_ND[y_N == c].mean(0) for c in y_N.unique().tolist()])
    if len(means) == 1:
        return 0.0
    distances_CC = torch.cdist(means, means)
    if gap == "nearest":
        distances_CC = distances_CC.fill_diagonal_(torch.inf).min(1).values
    return min(distances_CC.max().item(), tau)


def contrast(sent_BD: Tensor, y_B: Tensor, prototypes_CD: Tensor, delta: float) -> Tensor:
    """Return the server's loss (see the module), mean over the batch.

    It is the cross-entropy of the negative distances, after delta is added to the distance to a prototype's own class.
    """
    distances_BC = torch.cdist(sent_BD, prototypes_CD)
    return F.cross_entropy(-(distances_BC + delta * F.one_hot(y_B, len(prototypes_CD))), y_B)
