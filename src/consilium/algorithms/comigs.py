"""CoMiGS: On-Device Collaborative Language Modeling via a Mixture of Generalists and Specialists.

Fan, Messmer, Doikov, Jaggi. ICML 2025. https://arxiv.org/abs/2409.13931; code github.com/epfml/CoMiGS

The model is frozen. Next to each target layer are adapters: "general", which is averaged over the clients, and
specialists, which never leave a client. A private router weighs the adapters per token. It is trained on rows that the
adapters are not trained on:

    g = softmax(V x), top k;   y = W0 x + s sum_e g_e B_e A_e x            loss + balance J sum_e P_e f_e
    adapters   on training rows, V fixed        V   on held-out rows, adapters fixed       (bi-level, alternating)
    general <- sum_k n_k / n general_k

    general   <layer>.pairs.general.*, the only tensors that are sent, apart from head rows
    specialists, V   context.state: <layer>.pairs.s<i>.*, <layer>.route

Departures: the adapters are on query and value projections; the authors adapt the feed-forward layers of GPT-2. The
held-out rows are the last `held_out` of the training rows, so that the validation score stays fair; the authors use the
validation split. V is trained for `router_epochs` after the epochs of the adapters; the authors alternate every 30
steps. The authors' scale in the forward pass differs from that of their FlexLoRA baseline; here it is alpha / r
everywhere. Their published perplexities are for GPT-2 with 4 clients and can only be compared on that model. The claim
that can be checked here is half the traffic of averaging all adapters.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.mixed import MixedModels, own_adapters
from consilium.constraints import Count, Factor, Few, Scale, Width
from consilium.core import Algorithm, Client, ClientContext, ClientInfo, Payload, Server, derive_seed, setting
from consilium.moe.mixtures import Mixing, initial_pair, initial_route
from consilium.params import Params
from consilium.setup import MixtureSetup

__all__ = ["CoMiGS"]

GENERAL = "general"


@dataclass(frozen=True)
class CoMiGS(Algorithm):
    """A generalist adapter for all, specialists and a router for each client.

    Args:
        r: rank of the adapters, >= 1.
        alpha: the scale of an adapter is alpha / r.
        specialists: number of private adapters of a client, >= 1.
        top_k: adapters that a token uses, >= 1.
        balance: weight of the load-balance loss.
        held_out: share of the training rows on which only the router is trained, in [0.01, 0.9].
        router_epochs: epochs of the router over these rows, >= 1.
        targets: names of the adapted layers; (): query and value projections.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    r: Width = setting(8, "memory")
    alpha: Scale = setting(16.0, "factor")
    specialists: Few = setting(1, "memory")
    top_k: Few = setting(2, "memory")
    balance: Factor = setting(0.01, "factor")
    held_out: Annotated[float, Interval(ge=0.01, le=0.9)] = setting(0.1, "factor")
    router_epochs: Count = setting(1, "epochs")
    targets: tuple[str, ...] = setting((), "free")

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Return the names of the specialists."""
        return tuple(f"s{i}" for i in range(self.specialists))

    def models(self, setup: MixtureSetup) -> MixedModels:
        """Return the object that builds and trains the models of clients."""
        own_adapters(setup, "CoMiGS")
        mixing = Mixing(self.r, self.alpha / self.r, self.top_k, "rows", self.targets)
        return MixedModels(setup, mixing, (), self.balance)

    def server(self, setup: MixtureSetup) -> Server:
        return CoMiGSServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return CoMiGSClient(setup, self)


class CoMiGSServer(FedAvgServer):
    """A server that averages the generalist."""

    def __init__(self, setup: MixtureSetup, algorithm: CoMiGS):
        self.models, self.pairs = algorithm.models(setup), 1 + algorithm.specialists
        params = setup.zero_heads()
        for path, (x, y) in self.models.paths.items():
            a, b = initial_pair(x, y, algorithm.r, _rng(setup, path, GENERAL))
            params |= {f"{path}.pairs.{GENERAL}.a": a, f"{path}.pairs.{GENERAL}.b": b}
        super().__init__(setup, params=params)

    def unable(self, client: ClientInfo) -> str | None:
        return self.models.lacks(client, self.pairs)


class CoMiGSClient(Client):
    """A client that sends the generalist and keeps its specialists and router."""

    def __init__(self, setup: MixtureSetup, algorithm: CoMiGS):
        self.setup, self.algorithm, self.models = setup, algorithm, algorithm.models(setup)

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        params = {**self._private(context), **payload.group("params")}
        slots, models = (GENERAL, *self.algorithm.specialist_names), self.models
        rows = models.rows(context)
        router_row_count = max(1, round(self.algorithm.held_out * len(rows)))
        adapter_rows = range(max(len(rows) - router_row_count, 1))
        model = models.build(params, context, slots, frozen=lambda key: key.endswith(".route"))
        model_fit, _ = models.train(model, context, rows=adapter_rows, assessed=False)
        trained_params = models.flatten(model, model_fit.masters)
        router = models.build(trained_params, context, slots, frozen=lambda key: not key.endswith(".route"))
        router_context = replace(context, seed=derive_seed(context.seed, "router"))
        router_fit, scalars = models.train(
            router,
            router_context,
            epochs=self.algorithm.router_epochs,
            rows=range(len(rows) - router_row_count, len(rows)),
            heads=False,
        )
        flat_params = models.flatten(router, router_fit.masters)
        shared_params = {key: t for key, t in flat_params.items() if key in payload.group("params")}
        context.state.params = {
            key: t for key, t in flat_params.items() if key not in shared_params and not key.startswith("head.")
        }
        return Payload(
            {"params": shared_params},
            {**scalars, "train_loss": model_fit.loss, "steps": model_fit.steps + router_fit.steps},
        )

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        params = {**self._private(context), **payload.group("params")}
        return self.models.score(params, context, (GENERAL, *self.algorithm.specialist_names))

    def _private(self, context: ClientContext) -> Params:
        """Return the client's specialists and router, or the common initial ones before its first training."""
        if context.state.params:
            return context.state.params
        private_params: Params = {}
        for path, (x, y) in self.models.paths.items():
            for name in self.algorithm.specialist_names:
                a, b = initial_pair(x, y, self.algorithm.r, _rng(self.setup, path, name))
                private_params |= {f"{path}.pairs.{name}.a": a, f"{path}.pairs.{name}.b": b}
            private_params[f"{path}.route"] = initial_route(
                1 + self.algorithm.specialists, x, _rng(self.setup, path, "route")
            )
        return private_params


def _rng(setup: MixtureSetup, path: str, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(setup.seed, "CoMiGS", path, name))
