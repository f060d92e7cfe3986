"""FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to Statistical Heterogeneity.

Qin, Deng, Zhao, Yan. KDD 2023. https://doi.org/10.1145/3580305.3599344

Mutual learning as in FML between a private model and a small shared one; a client predicts by both, weighted by what
it learns on a slice of its data that nobody trains on:

    lambda_k = argmin over [0, 1] of CE(lambda z_own + (1 - lambda) z_small) on the slice       models as they are
    L_own = CE_own + KL(p_small || p_own),    L_small = CE_small + KL(p_own || p_small)
    small <- sum_{k in S} n_k / n small_k;    prediction: lambda_k z_own + (1 - lambda_k) z_small

    small    params["small.*"]: all that travels      own, lambda_k   context.state: private.*, head.*, share

Departures: lambda is learned after local training, for the prediction that follows, with gradient steps and clipping;
the received small model is not the one it was learned with, which is as in the paper's own prediction step. We read
the method from descriptions of it; a loss of the ensemble itself, if the paper has one, is not part of this.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fml import FML, SMALL, FMLClient, Pair, pair_model, small_params
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, derive_seed
from consilium.errors import ConfigError
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import Setup
from consilium.training import tested, trained

__all__ = ["FedAPEN", "learned_share"]


@dataclass(frozen=True)
class FedAPEN(Algorithm):
    """Mutual learning, and an ensemble of both models with a learned weight.

    Args:
        slice: share of a client's training data that is kept for learning the weight, in (0, 0.5].
        steps: gradient steps on the weight, >= 1.
        eta: learning rate of the weight, > 0.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    slice: float = 0.05
    steps: int = 50
    eta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.slice <= 0.5:
            raise ConfigError(f"slice is {self.slice}; it must be within (0, 0.5]")
        if self.steps < 1 or not 0 < self.eta < float("inf"):
            raise ConfigError(f"steps is {self.steps} and eta {self.eta}; they must be at least 1 and above 0")

    def server(self, setup: Setup) -> Server:
        return FedAvgServer(setup, params=small_params(setup))

    def client(self, setup: Setup) -> Client:
        return FedAPENClient(setup, self)


class FedAPENClient(Client):
    """Trains both models on all but the slice, then learns the weight on it."""

    def __init__(self, setup: Setup, algorithm: FedAPEN):
        self.setup = setup
        self.algorithm = algorithm
        self.mutual = FMLClient(setup, FML(alpha=0.5, beta=0.5))

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        train, data = context.data.train, context.data
        n = min(max(1, round(self.algorithm.slice * len(train))), len(train) - 1)
        # The same slice in every round: what it judges must not have been trained on.
        seed = derive_seed(self.setup.seed, "slice", context.info.id)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        kept = replace(train, index=train.index[order[:n]])
        rest = replace(context, data=replace(data, train=replace(train, index=train.index[order[n:]])))
        model = self._model(payload, context)
        told = trained(self.setup, model, rest, lambda model, batch: 2 * self.mutual.objective(model, batch))
        batch = kept.batch(range(n), context.device)
        model.eval()
        with torch.no_grad():
            own, small = model.head(model.backbone(batch["x"])), model.backbone.small(batch["x"])
        share = learned_share(own, small, batch["labels"], float(model.backbone.share), self.algorithm)
        model.backbone.share.fill_(share)
        params = flatten(model)
        context.state.params = {key: t for key, t in params.items() if not key.startswith(SMALL)}
        told |= {"report/ensemble weight": share}
        return Payload({"params": {key: t for key, t in params.items() if key.startswith(SMALL)}}, told)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(payload, context), context)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        small = payload.group("params")
        begun: Params = {} if context.state.params else {"share": torch.tensor(0.5)}
        return pair_model(self.setup, {**small, **begun}, context, Weighted, Ensemble)


class Weighted(Pair):
    """A pair, and lambda in a buffer."""

    def __init__(self, private: nn.Module, small: nn.Module, classes: int):
        super().__init__(private, small, classes)
        self.register_buffer("share", torch.tensor(0.5))


class Ensemble(SplitModel):
    """In training the own model; in evaluation lambda z_own + (1 - lambda) z_small."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        own, labels = super().forward(batch)
        if self.training:
            return own, labels
        share = self.backbone.share
        return share * own + (1 - share) * self.backbone.small(batch["x"]), labels


def learned_share(own: Tensor, small: Tensor, labels: Tensor, start: float, algorithm: FedAPEN) -> float:
    """lambda in [0, 1] after gradient steps on the cross-entropy of the mixed logits [n, C], each step clipped."""
    share = torch.tensor(start, device=own.device)
    for _ in range(algorithm.steps):
        share.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(share * own + (1 - share) * small, labels), share)
        share = (share.detach() - algorithm.eta * slope).clamp(0, 1)
    return share.item()
