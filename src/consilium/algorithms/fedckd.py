"""FedCKD and pFedSD: distillation from the common model and from the client's own previous model.

FedCKD: Comprehensive Knowledge Distillation for Federated Learning. Wang, Liu, Guo, Li, Ge. IEEE SMC 2024.
https://arxiv.org/abs/2411.03569 pFedSD: Personalized Edge Intelligence via Federated Self-Knowledge Distillation. Jin,
Bai, Chen, Liu, Li. IEEE TPDS 2023.

    w <- w_g as received;   T1 = w_g;   T2 = v_k, the weights after the last participation (they stay on the client)
    L = CE(w) + lam_g tau^2 KL(p_T1 || p_w) + lam_h tau^2 KL(p_T2 || p_w)          T2 where there is one
    v_k <- w;   w_g <- sum_k n_k / n w_k

pFedSD has only the second teacher. Only abstract-level text was available for FedCKD: two teachers, a student, FedAvg
at the server. The loss, its weights and `anneal` are ours. The defaults are those of a public port of pFedSD (lam 0.5,
tau 3), with the weight split evenly between the teachers. The paper reports up to +1.98 points on CIFAR-100 over the
best baseline, tested before aggregation. This is no target here, because the equations are missing.

    lam_g, lam_h    weights of the teachers        tau   temperature        v_k    context.state.params
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fml import kl
from consilium.constraints import Factor
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, setting
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FedCKD", "distilled", "pFedSD"]


@dataclass(frozen=True)
class FedCKD(Algorithm):
    """FedAvg with two teachers.

    Args:
        lam_g: weight of the common model as a teacher, >= 0.
        lam_h: weight of the client's own previous model as a teacher, >= 0.
        tau: temperature, > 0.
        anneal: whether lam_h falls to 0 over the rounds of the run, by a cosine.
        deploy: model with which a client predicts: its own as last "trained", or the "aggregated" one.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort",)
    lam_g: Factor = setting(0.25, "factor")
    lam_h: Factor = setting(0.25, "factor")
    tau: Annotated[float, Interval(gt=0, le=1e4)] = setting(3.0, "factor")
    anneal: bool = setting(False, "free")
    deploy: Literal["trained", "aggregated"] = setting("trained", "free")

    def server(self, setup: CohortSetup) -> Server:
        return FedAvgServer(setup)

    def client(self, setup: CohortSetup) -> Client:
        return FedCKDClient(setup, self)


@dataclass(frozen=True)
class pFedSD(FedCKD):
    """FedAvg with the client's own previous model as a teacher.

    Args:
        lam_g: weight of the common model as a teacher, 0 in the paper.
        lam_h: see FedCKD.
        tau: see FedCKD.
        anneal: see FedCKD.
        deploy: see FedCKD.
    """

    lam_g: Factor = setting(0.0, "factor")
    lam_h: Factor = setting(0.5, "factor")


class FedCKDClient(Client):
    """A client that learns from its data, the common model and its own previous model."""

    def __init__(self, setup: CohortSetup, algorithm: FedCKD):
        self.setup, self.algorithm = setup, algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        params, method = payload.group("params"), self.algorithm
        model, share = self.setup.build(params, context), 1.0
        if method.anneal and self.setup.rounds:
            share = (1 + math.cos(math.pi * min(context.round / self.setup.rounds, 1.0))) / 2
        teachers = [(method.lam_g, params), (share * method.lam_h, context.state.params)]
        teacher_models = [
            (weight, self._teacher(teacher_params, context))
            for weight, teacher_params in teachers
            if weight and teacher_params
        ]
        cross_entropy = self.setup.fit.cross_entropy

        def objective(model: SplitModel, batch: Mapping[str, Tensor]) -> Tensor:
            logits, labels = model(batch)
            with torch.no_grad():
                teacher_logits = [(weight, teacher(batch)[0]) for weight, teacher in teacher_models]
            return cross_entropy(logits, labels) + distilled(logits, teacher_logits, method.tau)

        scalars = trained(self.setup, model, context, objective if teacher_models else None)
        trained_params = flatten(model)
        context.state.params = trained_params
        return Payload({"params": trained_params}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        trained_params = context.state.params if self.algorithm.deploy == "trained" else {}
        return tested(self.setup, self.setup.build(trained_params or payload.group("params"), context), context)

    def _teacher(self, params: Params, context: ClientContext) -> SplitModel:
        return self.setup.build(params, context).requires_grad_(False).eval()


def distilled(logits: Tensor, teachers: list[tuple[float, Tensor]], tau: float) -> Tensor:
    """Return the sum over teachers of weight tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)).

    Args:
        logits: the student's logits, [B, C].
        teachers: pairs of a weight and the teacher's logits, [B, C].
        tau: temperature, > 0.

    Returns:
        A scalar, the mean over the batch.
    """
    return sum((weight * tau**2 * kl(t / tau, logits / tau) for weight, t in teachers), logits.new_zeros(()))
