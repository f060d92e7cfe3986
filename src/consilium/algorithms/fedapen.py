"""FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to Statistical Heterogeneity.

Qin, Deng, Zhao, Yan. KDD 2023. https://doi.org/10.1145/3580305.3599344

A private model and a small shared one learn from each other as in FML. A client predicts with both. It learns their
weight on a slice of its data that is never trained on:

    lambda_k = argmin over [0, 1] of CE(lambda z_own + (1 - lambda) z_small) on the slice       models as they are
    L_own    = CE_own + KL(p_small || p_own) + CE(lambda_k z_own + (1 - lambda_k) z_small)      z_small as it is
    L_small  = CE_small + KL(p_own || p_small) + CE(lambda_k z_own + (1 - lambda_k) z_small)    z_own as it is
    small <- sum_{k in S} n_k / n small_k;    prediction: lambda_k z_own + (1 - lambda_k) z_small

    small    params["small.*"]: only this is sent     own, lambda_k   context.state: private.*, head.*, share

As in the authors' code, a client learns lambda whenever it has received a new small model. It takes gradient steps from
the last lambda (1/2 before the first round) and clips after each step. This lambda weighs the ensemble in training and
in prediction. A client that takes part learns lambda for the round. A prediction with the delivered model learns lambda
again and does not keep it.

Departures: the small models are averaged by n_k, whereas the authors' code averages them evenly. A gradient step uses
the whole slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fml import SMALL, Pair, kl, pair_model, small_params
from consilium.constraints import Count, Rate
from consilium.core import Algorithm, Client, ClientContext, Payload, Reveal, Server, Work, derive_seed, setting
from consilium.data.tensor import TensorSplit
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.scoring import read_batches
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FedAPEN", "learned_share"]


@dataclass(frozen=True)
class FedAPEN(Algorithm):
    """Mutual learning, and an ensemble of both models with a learned weight.

    Args:
        slice: share of a client's training data that is kept for learning the weight, in (0, 0.5].
        steps: gradient steps on the weight, >= 1.
        eta: learning rate of the weight, > 0; None: fit.lr. The authors' code takes 10 steps of 0.001, which suits a
            hundred rounds; in few rounds they leave the weight near 1/2.
        ensemble: whether the models also learn from the loss of the ensemble.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    slice: Annotated[float, Interval(gt=0, le=0.5)] = setting(0.05, "free")
    steps: Count = setting(10, "steps")
    eta: Rate | None = setting(None, "lr")
    ensemble: bool = setting(True, "free")

    def server(self, setup: CohortSetup) -> Server:
        return FedAvgServer(setup, params=small_params(setup))

    def client(self, setup: CohortSetup) -> Client:
        return FedAPENClient(setup, self)


class FedAPENClient(Client):
    """A client that learns the weight on the slice and then trains both models on the other rows."""

    reveals: Mapping[str, Reveal] = {"report/ensemble weight": Reveal("update")}

    def __init__(self, setup: CohortSetup, algorithm: FedAPEN):
        self.setup = setup
        self.algorithm = algorithm if algorithm.eta else replace(algorithm, eta=setup.fit.lr)

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        weight_split, rest_context = self._slices(context)
        if context.state.params:
            self._learn(model, weight_split, context)
        scalars = trained(self.setup, model, rest_context, self.objective)
        params = flatten(model)
        context.state.params = {key: t for key, t in params.items() if not key.startswith(SMALL)}
        scalars |= {"report/ensemble weight": float(model.backbone.share)}
        return Payload({"params": {key: t for key, t in params.items() if key.startswith(SMALL)}}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        if context.state.params:
            self._learn(model, self._slices(context)[0], context)
        return tested(self.setup, model, context)

    def objective(self, model: SplitModel, batch: dict[str, Tensor]) -> Tensor:
        """Return L_own + L_small.

        The ensemble's loss is a part of both. It is added once, since its gradient reaches the weights of both models.
        """
        own_logits, small_logits, y = model(batch)[0], model.backbone.small(batch["x"]), batch["labels"]
        supervised = self.setup.fit.cross_entropy
        loss = (
            supervised(own_logits, y)
            + kl(small_logits.detach(), own_logits)
            + supervised(small_logits, y)
            + kl(own_logits.detach(), small_logits)
        )
        if not self.algorithm.ensemble:
            return loss
        share = model.backbone.share
        return loss + supervised(share * own_logits + (1 - share) * small_logits, y)

    def _slices(self, context: ClientContext) -> tuple[TensorSplit, ClientContext]:
        """Return the rows on which the weight is learned, and a context with the other training rows.

        The slice is the same in every round, because neither model may ever have trained on it.
        """
        train = self.setup.encode(context, context.data.train)
        n = min(max(1, round(self.algorithm.slice * len(train))), len(train) - 1)
        seed = derive_seed(self.setup.seed, "slice", context.info.id)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        weight_split, rest_split = (replace(train, index=train.index[part]) for part in (order[:n], order[n:]))
        return weight_split, replace(context, data=replace(context.data, train=rest_split))

    def _learn(self, model: SplitModel, kept: TensorSplit, context: ClientContext) -> None:
        (batch,) = read_batches(kept, len(kept), context)
        model.eval()
        with torch.no_grad():
            own_logits, small_logits = model.head(model.backbone(batch["x"])), model.backbone.small(batch["x"])
        share = learned_share(
            own_logits, small_logits, batch["labels"], float(model.backbone.share), self.algorithm, context.work
        )
        model.backbone.share.fill_(share)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        shared_params = payload.group("params")
        initial_buffers: Params = {} if context.state.params else {"share": torch.tensor(0.5)}
        return pair_model(self.setup, {**shared_params, **initial_buffers}, context, Weighted, Ensemble)


class Weighted(Pair):
    """A pair of models with lambda in a buffer."""

    def __init__(self, private: nn.Module, small: nn.Module, classes: int):
        super().__init__(private, small, classes)
        self.register_buffer("share", torch.tensor(0.5))


class Ensemble(SplitModel):
    """A model that returns z_own in training and lambda z_own + (1 - lambda) z_small in evaluation."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        own_logits, labels = super().forward(batch)
        if self.training:
            return own_logits, labels
        share = self.backbone.share
        return share * own_logits + (1 - share) * self.backbone.small(batch["x"]), labels


def learned_share(
    own: Tensor, small: Tensor, labels: Tensor, start: float, algorithm: FedAPEN, work: Work | None = None
) -> float:
    """Return lambda after gradient steps on the cross-entropy of the mixed logits [n, C].

    Lambda is clipped to [0, 1] after each step. The steps count against `work`.
    """
    work = work or Work()
    work.plan(algorithm.steps)
    share = torch.tensor(start, device=own.device)
    for _ in range(algorithm.steps):
        work.step()
        share.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(share * own + (1 - share) * small, labels), share)
        share = (share.detach() - algorithm.eta * slope).clamp(0, 1)
    return share.item()
