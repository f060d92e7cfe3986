"""FedMRL: Federated Model Heterogeneous Matryoshka Representation Learning.

Yi, Yu, Ren, Wang, Liu, Li. NeurIPS 2024. https://arxiv.org/abs/2406.00488

Each client has a small shared model G, its own model F_k and a private projector P_k. The representation of G has d1
numbers and that of F_k has d2 > d1:

    R   = P_k [G_ex(x), F_ex(x)]  in R^d2                     R_c = the first d1 numbers of R
    loss = CE(G_head(R_c), y) + CE(F_head(R), y)              one backward pass for all
    G <- sum_{k in S} n_k / n G_k, extractor and header       only G is sent; F_head(R) predicts

    G        params["small.*"]          F_k, P_k    context.state: private.*, projector.*, head.*        d1   d1

Departures: none in the rule. Momentum, weight decay and clipping are those of `fit`. `aggregation` "last" reproduces a
fault of the released code as an ablation. There, the uploads of a round are references to one object, which the next
client overwrites. The "average" is therefore the last client's G, and published numbers may come from it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fml import SMALL, small_params
from consilium.algorithms.pfedafm import LastServer
from consilium.constraints import Count
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, setting
from consilium.errors import ConfigError
from consilium.models.cohort import SplitModel, initial
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import Supervised, tested, trained

__all__ = ["FedMRL", "Nested"]


@dataclass(frozen=True)
class FedMRL(Algorithm):
    """Nested representations of a small shared model and the client's own model.

    Args:
        d1: width of the small model's representation, >= 1 and at most the width of the clients' own models; None: a
            fifth of the cohort's width. A small model that is a custom function or an encoder keeps its own width.
        aggregation: "mean" by n_k, or "last": the last selected client wins, as in the released code.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    d1: Count | None = setting(None, "memory")
    aggregation: Literal["mean", "last"] = setting("mean", "server")

    def server(self, setup: CohortSetup) -> Server:
        params = small_params(self.narrow(setup))
        return (LastServer if self.aggregation == "last" else FedAvgServer)(setup, params=params)

    def client(self, setup: CohortSetup) -> Client:
        return FedMRLClient(setup, self.narrow(setup))

    def narrow(self, setup: CohortSetup) -> CohortSetup:
        """Return the setup in which extractors have the width d1, as the small model needs it.

        Raises:
            ConfigError: if the small model's representation is wider than that of a client's own model.
        """
        d1 = self.d1 or max(1, setup.model.width // 5)
        narrow_setup = replace(setup, model=replace(setup.model, width=d1))
        model, shape = narrow_setup.model, setup.shape
        small_width = model.width_of(model.small, shape)
        smallest_width = min(setup.model.width_of(name, shape) for name in model.architectures)
        if small_width > smallest_width:
            reason = (
                f"d1 is {d1}" if small_width == d1 else f"the representation of {model.small} has {small_width} numbers"
            )
            raise ConfigError(
                f"{reason}; it must be at most {smallest_width}, the width of the clients' own representations"
            )
        return narrow_setup


class FedMRLClient(Client):
    """A client that trains its own model, the projector and the small model together."""

    def __init__(self, setup: CohortSetup, narrow: CohortSetup):
        self.setup = setup
        self.narrow = narrow

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        scalars = trained(self.setup, model, context, partial(coarse_and_fine, supervised=self.setup.fit.cross_entropy))
        params = flatten(model)
        context.state.params = {key: t for key, t in params.items() if not key.startswith(SMALL)}
        return Payload({"params": {key: t for key, t in params.items() if key.startswith(SMALL)}}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(payload, context), context)

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        client_params = context.state.params or self._initial(context)
        return self.setup.split_model(
            lambda: self._nested(context), {**client_params, **payload.group("params")}, context
        )

    def _nested(self, context: ClientContext) -> "Nested":
        small_extractor = self.narrow.model.extractor(self.narrow.model.small, self.setup.shape)
        private_extractor = self.setup.model.extractor(context.info.architecture, self.setup.shape)
        return Nested(private_extractor, small_extractor, len(context.data.task.labels))

    def _initial(self, context: ClientContext) -> Params:
        initial_params = initial(lambda: self._nested(context), self.setup.seed, "FedMRL", context.info.architecture)
        client_params = {
            k if k.startswith("head.") else f"private.{k}": t for k, t in self.setup.own_params(context).items()
        }
        return {**{k: t for k, t in initial_params.items() if k.startswith("projector.")}, **client_params}


class Nested(nn.Module):
    """A module that projects the concatenated representations to R [B, d2].

    It also holds the small header, which reads the first d1 numbers of R.
    """

    def __init__(self, private: nn.Module, small: nn.Module, classes: int):
        super().__init__()
        self.private = private
        self.small = nn.ModuleDict({"extractor": small, "head": nn.Linear(small.width, classes)})
        self.projector = nn.Linear(small.width + private.width, private.width)
        self.width = private.width

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(torch.cat([self.small["extractor"](x), self.private(x)], dim=1))


def coarse_and_fine(model: SplitModel, batch: dict[str, Tensor], supervised: Supervised = F.cross_entropy) -> Tensor:
    """Return the CE of the small header on R_c plus the CE of the client's own header on R."""
    r, y, small_modules = model.backbone(batch["x"]), batch["labels"], model.backbone.small
    coarse_logits = small_modules["head"](r[:, : small_modules["extractor"].width])
    return supervised(coarse_logits, y) + supervised(model.head(r), y)
