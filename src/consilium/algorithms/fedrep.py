"""FedPer and FedRep: a shared representation with personal heads (and routers).

FedPer: Federated Learning with Personalization Layers. Arivazhagan, Aggarwal, Singh, Choudhary. 2019.
https://arxiv.org/abs/1912.00818
FedRep: Exploiting Shared Representations for Personalized Federated Learning. Collins, Hassani, Mokhtari, Shakkottai.
ICML 2021. https://arxiv.org/abs/2102.07078

    phi <- sum_k n_k / n phi_k       phi   all but the personal parts, group "params"     h_k    context.state.params

FedPer trains phi and h_k together. FedRep first trains h_k alone for `head_epochs`, with phi as received. It then
trains phi for the epochs of `fit`, with h_k frozen.

Departures: in a mixture of experts, the personal part may be the routers, the head, or both. The server also sends the
initial personal part and never changes it, so that a new client need not read the pretrained model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.constraints import Count
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientInfo,
    ExpertSet,
    Payload,
    Server,
    derive_seed,
    experts_from_scalars,
)
from consilium.moe.addressing import router_row_of, table
from consilium.moe.model import TaskModel
from consilium.params import Like
from consilium.setup import Setup
from consilium.training import Correct, local_round, local_test
from consilium.work import setting

__all__ = ["FedPer", "FedRep"]


@dataclass(frozen=True)
class FedPer(Algorithm):
    """A shared representation and personal parts, trained together.

    Args:
        private: the personal part: "head", "router" (of mixtures of experts), or "both".
        experts: see FedAvg.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe", "cohort")
    dense: ClassVar[bool] = True
    head_epochs: ClassVar[int] = 0  # FedRep trains the personal part first
    private: Literal["head", "router", "both"] = setting("head", "free")
    experts: int | Literal["all", "fit"] = setting("all", "server")

    def server(self, setup: Setup) -> Server:
        return PersonalServer(setup, self)

    def client(self, setup: Setup) -> Client:
        return PersonalClient(setup, self)

    def is_private(self, key: str) -> bool:
        """Return whether a flat name belongs to the personal part."""
        is_head, is_router_row = key.startswith("head."), router_row_of(key) is not None
        return (is_head and self.private != "router") or (is_router_row and self.private != "head")


@dataclass(frozen=True)
class FedRep(FedPer):
    """A shared representation and personal parts, trained one after the other.

    Args:
        private: see FedPer.
        experts: see FedAvg.
        head_epochs: epochs of the personal part, >= 1.
    """

    head_epochs: Count = setting(1, "epochs")


class PersonalServer(FedAvgServer):
    """A FedAvg server that does not receive the personal parts."""

    def __init__(self, setup: Setup, algorithm: FedPer):
        super().__init__(setup, common_experts(setup, algorithm.experts))
        self.is_private = algorithm.is_private

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        params = super().expects(client, sent)["params"]
        return {"params": {key: like for key, like in params.items() if not self.is_private(key)}}


class PersonalClient(Client):
    """A client that keeps the personal parts in its state."""

    def __init__(self, setup: Setup, algorithm: FedPer):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        is_private, experts = self.algorithm.is_private, experts_from_scalars(payload.scalars)
        client_payload = self._mine(payload, context)
        if self.algorithm.head_epochs:
            head_setup = replace(self.setup, fit=replace(self.setup.fit, epochs=self.algorithm.head_epochs))
            head_context = replace(context, seed=derive_seed(context.seed, "head"))
            trained_params = local_round(
                head_setup, client_payload, head_context, frozen(experts, lambda key: not is_private(key))
            )[1].group("params")
            private_params = {key: t for key, t in trained_params.items() if is_private(key)}
            client_payload = Payload(
                {**client_payload.groups, "params": client_payload.group("params") | private_params}, payload.scalars
            )
            _, reply = local_round(self.setup, client_payload, context, frozen(experts, is_private))
        else:
            _, reply = local_round(self.setup, client_payload, context)
        params = reply.group("params")
        context.state.params = {key: t for key, t in params.items() if is_private(key)}
        return Payload({"params": {key: t for key, t in params.items() if not is_private(key)}}, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, self._mine(payload, context), context)

    def _mine(self, payload: Payload, context: ClientContext) -> Payload:
        params = payload.group("params") | context.state.params
        return Payload({**payload.groups, "params": params}, payload.scalars)


def frozen(held: ExpertSet | None, still: Callable[[str], bool]) -> Callable[[TaskModel], Correct]:
    """Return a factory of corrections that freeze some parameters by dropping their gradients.

    Args:
        held: the experts of the model; None: all.
        still: function that returns whether the parameter with a flat name is frozen.
    """

    def make(model: TaskModel) -> Correct:
        names = table(model, held)
        first_names = {path: name if isinstance(name, str) else name[0] for path, name in names.items()}

        def correct(trainable: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
            for path, p in trainable.items():
                if still(first_names[path]):
                    p.grad = None

        return correct

    return make
