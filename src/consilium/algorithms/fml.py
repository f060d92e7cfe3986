"""FML: Federated Mutual Learning.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu. https://arxiv.org/abs/2006.16765

Each client trains its own model together with a copy of a small shared one (the meme model). Each of the two learns
from the data and from the other's predictions:

    L_own  = alpha * CE(p_own)  + (1 - alpha) * KL(p_meme || p_own)      no gradient flows through the other's p
    L_meme = beta  * CE(p_meme) + (1 - beta)  * KL(p_own  || p_meme)
    meme <- sum_{k in S} n_k / n meme_k

    meme     params["small.*"], extractor and head: all that travels       own      context.state: private.*, head.*

Departures: none in the rule. The tables of the pFedMoE family say that this baseline "fails to converge", which is not
a property of the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.constraints import Share
from consilium.core import Algorithm, Client, ClientContext, Payload, Server, setting
from consilium.models.cohort import SplitModel, initial
from consilium.moe.addressing import flatten
from consilium.params import Params
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["FML", "Pair", "kl", "pair_model", "small_params"]

SMALL = "small."


@dataclass(frozen=True)
class FML(Algorithm):
    """Mutual distillation between a private model and a small shared one.

    Args:
        alpha: weight of the data in the private model's loss, in [0, 1].
        beta: weight of the data in the shared model's loss, in [0, 1].
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    alpha: Share = setting(0.5, "factor")
    beta: Share = setting(0.5, "factor")

    def server(self, setup: CohortSetup) -> Server:
        return FedAvgServer(setup, params=small_params(setup))

    def client(self, setup: CohortSetup) -> Client:
        return FMLClient(setup, self)


class FMLClient(Client):
    """A client that trains both models, keeps its own and sends the shared one."""

    def __init__(self, setup: CohortSetup, algorithm: FML):
        self.setup = setup
        self.alpha, self.beta = algorithm.alpha, algorithm.beta

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = pair_model(self.setup, payload.group("params"), context)
        scalars = trained(self.setup, model, context, self.objective)
        params = flatten(model)
        context.state.params = {key: t for key, t in params.items() if not key.startswith(SMALL)}
        return Payload({"params": {key: t for key, t in params.items() if key.startswith(SMALL)}}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, pair_model(self.setup, payload.group("params"), context), context)

    def objective(self, model: SplitModel, batch: dict[str, Tensor]) -> Tensor:
        """Return L_own + L_meme; neither loss has a gradient in the other's weights."""
        own_logits, meme_logits, y = model(batch)[0], model.backbone.small(batch["x"]), batch["labels"]
        loss_own = self.alpha * self.setup.fit.cross_entropy(own_logits, y) + (1 - self.alpha) * kl(
            meme_logits.detach(), own_logits
        )
        loss_meme = self.beta * self.setup.fit.cross_entropy(meme_logits, y) + (1 - self.beta) * kl(
            own_logits.detach(), meme_logits
        )
        return loss_own + loss_meme


class Pair(nn.Module):
    """A private extractor together with a small classifier [B, *S] -> [B, C].

    `forward` returns the private representation, which the model's own head reads.
    """

    def __init__(self, private: nn.Module, small: nn.Module, classes: int):
        super().__init__()
        self.private = private
        self.small = nn.Sequential()
        self.small.add_module("extractor", small)
        self.small.add_module("head", nn.Linear(small.width, classes))
        self.width = private.width

    def forward(self, x: Tensor) -> Tensor:
        return self.private(x)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of logits [B, C], mean over the batch."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def small_params(setup: CohortSetup) -> Params:
    """Return the initial shared classifier: `small.extractor.*`, `small.head.weight` [C, d] and `.bias` [C]."""
    width = setup.model.width_of(setup.model.small, setup.shape)
    head = initial(lambda: nn.Linear(width, setup.classes), setup.seed, "small head")
    return {f"{SMALL}extractor.{key}": t for key, t in setup.small_params().items()} | {
        f"{SMALL}head.{key}": t for key, t in head.items()
    }


def pair_model(
    setup: CohortSetup,
    small: Params,
    context: ClientContext,
    make: Callable[..., nn.Module] = Pair,
    kind: type[SplitModel] = SplitModel,
) -> SplitModel:
    """Return a model of the client's own extractor and head with the shared model next to them.

    Args:
        small: parameters of the shared model.
        make: called as `make(private, small, C)`; returns the backbone.
        kind: class of the model.
    """
    cohort, name = setup.model, context.info.architecture

    def backbone() -> nn.Module:
        small_extractor = cohort.extractor(cohort.small, setup.shape)
        return make(cohort.extractor(name, setup.shape), small_extractor, len(context.data.task.labels))

    if not (client_params := context.state.params):
        client_params = {
            k if k.startswith("head.") else f"private.{k}": t for k, t in setup.own_params(context).items()
        }
    return setup.split_model(backbone, {**client_params, **small}, context, kind)
