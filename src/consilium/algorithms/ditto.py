"""Ditto: Fair and Robust Federated Learning Through Personalization.

Li, Hu, Beirami, Smith. ICML 2021. https://arxiv.org/abs/2012.04221

Algorithm 1: the clients train a common model w as in FedAvg. Each client also keeps a personal model v_k that is pulled
towards w:

    w   <- sum_k n_k / n w_k                                 w      params
    v_k <- argmin F_k(v) + lambda / 2 * ||v - w^t||^2        v_k    context.state.params      lambda   lam

Departures: v_k is trained for the local epochs of `fit` in each round in which the client takes part. It starts from
the first w that the client receives. The penalty's gradient passes through clipping and the optimiser; see FedProx.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.algorithms.fedprox import proximal
from consilium.constraints import Factor
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientState,
    Payload,
    Server,
    derive_seed,
    experts_from_scalars,
)
from consilium.moe.addressing import local
from consilium.setup import Setup
from consilium.training import local_round, local_test
from consilium.work import setting

__all__ = ["Ditto"]

REFERENCES = 1  # a copy of w^t stays in memory while v trains


@dataclass(frozen=True)
class Ditto(Algorithm):
    """FedAvg with a personal model per client that stays near the common one.

    Args:
        lam: weight of the distance to the common model (lambda), >= 0; 0 is local training.
        experts: see FedAvg.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe", "cohort")
    lam: Factor = setting(0.1, "factor")
    experts: int | Literal["all", "fit"] = setting("all", "server")
    dense: ClassVar[bool] = True

    def server(self, setup: Setup) -> Server:
        return FedAvgServer(setup, common_experts(setup, self.experts, REFERENCES), REFERENCES)

    def client(self, setup: Setup) -> Client:
        return DittoClient(setup, self.lam)


class DittoClient(Client):
    """A client that trains the common model for the server and a personal model for itself."""

    def __init__(self, setup: Setup, lam: float):
        self.setup = setup
        self.lam = lam

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        experts = experts_from_scalars(payload.scalars)
        common_params = self.setup.both_halves(payload.group("params"), context.private.params)
        _, reply = local_round(self.setup, payload, context, references=REFERENCES)
        personal_payload = Payload({**payload.groups, "params": context.state.params or common_params}, payload.scalars)
        personal_context = replace(context, seed=derive_seed(context.seed, "personal"), private=ClientState())
        _, personal_reply = local_round(
            self.setup,
            personal_payload,
            personal_context,
            lambda model: proximal(model, self.lam, local(model, common_params, experts)),
            references=REFERENCES,
        )
        context.state.params = {
            **personal_payload.group("params"),
            **personal_reply.group("params"),
            **personal_context.private.params,
        }
        return Payload(reply.groups, {**reply.scalars, "validation": personal_reply.scalars["validation"]})

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        personal_params = context.state.params or payload.group("params")
        return local_test(self.setup, Payload({**payload.groups, "params": personal_params}, payload.scalars), context)
