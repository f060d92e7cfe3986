"""pFedMoE: Data-Level Personalization with Mixture of Experts for Model-Heterogeneous Personalized Federated Learning.

Yi, Yu, Ren, Zhang, Wang, Liu, Li. https://arxiv.org/abs/2402.01350

Client k has its own model, which consists of an extractor F_k and a header. All clients share a small extractor G of
one architecture. A private gate mixes the two representations, sample by sample. Header, both extractors and gate learn
in one backward pass.

    [a_G, a_F] = H(x; phi_k)              a_G + a_F = 1, H reads the flattened raw input
    R = a_G G(x; theta) + a_F F_k(x; omega_k),   y = head_k(R)
    theta <- sum_{k in S} n_k / n theta_k        theta is all that ever travels

    theta    params["shared.*"]       omega_k  context.state: private.*, head.*     phi_k  context.state: gate.*
    eta_theta, eta_omega, eta_phi     learning rates of the three                   m      hidden units of the gate

The gate: norm of the input -> Linear(S, m) -> norm -> sigmoid -> Linear(m, 2) -> softmax. The paper does not state m:
64 keeps the gate smaller than the extractors. The norms of the paper (`norm="batch"`) are a switchable norm of the
input, a batch norm of the m units and a batch norm of the two logits. The paper describes the order of norm and
activation in two ways. A norm after the softmax would break the sum of 1, so here every norm comes before its
activation.

Texts are rows of token ids, which a gate cannot read as numbers. For texts, the gate must read the two representations
(`gate_input="features"`), and "raw" is refused.

With `norm="batch"`, the last norm gives the gate's logits unit variance, whatever the output of the layer before it. An
untrained gate would therefore mix at random, anywhere from 0.02 to 0.98. To avoid this, the weight of that norm starts
at 0: the gate starts at a_G = a_F = 1/2 and learns how far to move from there. The paper does not say how the gate
starts.

Departures: the norms are layer norms by default. With batch norms the gate of a client with few examples varies from
example to example for no reason (a_G = 0.4 ± 0.2 within a client of two classes, where its mean serves the test data as
well), and the client's other layers learn more slowly: on ten clients of two classes the scores stay 1 to 3 points
below those with layer norms, and single clients fall by 20 points and more between two evaluations
(docs/experiments.md). A batch of one example has no batch statistics and is normalised by the running ones. Extractors
of unequal width are joined by a private linear projection of G(x) (`join.*`); the paper has equal widths. With "layer"
or "group" norms the gate's last norm is left out, because over two numbers it would keep only their sign. Options
switch off the parts that the paper adds (static mixing; the shared extractor alone; all parts private, which is a local
model with as many parameters), or let the gate read the two representations instead of the input.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from consilium.algorithms.fedavg import FedAvgServer
from consilium.constraints import Count, Rate
from consilium.core import Algorithm, Client, ClientContext, Payload, Reveal, Scalar, Server, setting
from consilium.errors import ConfigError
from consilium.models.cohort import ARCHITECTURES, SplitModel, initial, real_rows
from consilium.moe.addressing import flatten, select
from consilium.params import Params, nbytes
from consilium.scoring import even, evened, read_batches
from consilium.setup import CohortSetup
from consilium.training import tested, trained

__all__ = ["Gate", "Mixture", "pFedMoE"]

SHARED = "shared."
SMALL = 2**25
"""Largest size, in bytes, at which a model's initial weights, and the model itself, are kept for the next client."""


@dataclass(frozen=True)
class pFedMoE(Algorithm):
    """A private model, one small shared extractor, and a gate that mixes them per sample.

    Args:
        eta_theta: learning rate of the shared extractor, > 0; None: fit.lr.
        eta_omega: learning rate of the client's own extractor and header, > 0; None: fit.lr.
        eta_phi: learning rate of the gate, > 0; None: fit.lr.
        m: hidden units of the gate, >= 1.
        mixing: "gate"; "static", 0.5 and 0.5; "shared", the shared extractor alone; "local", the gate with all parts
            private and nothing sent: a local model with as many parameters.
        norm: norm of the gate: "layer" or "group" (4 groups), which do not depend on other examples; "batch", as in the
            paper.
        gate_input: input of the gate: "raw", the flattened example; "features", both representations (texts need it).
        deploy: theta that a client predicts with: "aggregated", the server's newest; "trained", its own after its last
            training, which the paper's code scores and which needs no delivery.
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    eta_theta: Rate | None = setting(None, "lr")
    eta_omega: Rate | None = setting(None, "lr")
    eta_phi: Rate | None = setting(None, "lr")
    m: Count = setting(64, "memory")
    mixing: Literal["gate", "static", "shared", "local"] = setting("gate", "free")
    norm: Literal["batch", "layer", "group"] = setting("layer", "free")
    gate_input: Literal["raw", "features"] = setting("raw", "free")
    deploy: Literal["aggregated", "trained"] = setting("aggregated", "free")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "group" and self.m % GROUPS:
            raise ConfigError(f"m is {self.m}; with group norms it must be a multiple of {GROUPS}")

    def server(self, setup: CohortSetup) -> Server:
        if setup.shape == () and self.gate_input == "raw" and self.mixing in ("gate", "local"):
            raise ConfigError(
                "the gate cannot read the raw input of texts, which is token ids; use --algorithm.gate-input features"
            )
        theta = {} if self.mixing == "local" else _prefixed(SHARED, setup.small_params())
        return FedAvgServer(setup, params=theta)

    def client(self, setup: CohortSetup) -> Client:
        return PFedMoEClient(setup, self)

    def rates(self, lr: float) -> dict[str, float]:
        """Return the learning rates by prefix of a parameter's path."""
        eta_theta, eta_omega, eta_phi = (rate or lr for rate in (self.eta_theta, self.eta_omega, self.eta_phi))
        return {SHARED: eta_theta, "gate.": eta_phi, "": eta_omega}


class PFedMoEClient(Client):
    """A client that keeps its own model and gate in its state, and sends back only the shared extractor."""

    reveals: Mapping[str, Reveal] = {"report/gate *": Reveal("labels")}

    def __init__(self, setup: CohortSetup, algorithm: pFedMoE):
        self.setup = setup
        self.algorithm = algorithm
        self.begun: dict[Hashable, Params] = {}  # kind -> a client's initial parameters
        self.used: dict[Hashable, SplitModel] = {}  # kind -> a model to reuse, which its client no longer needs

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model = self._model(payload, context)
        scalars = trained(self.setup, model, context, rates=self.algorithm.rates(self.setup.fit.lr))
        if self.algorithm.mixing in ("gate", "local"):
            scalars |= gate_by_class(model, self.setup, context)
        shared_params, private_params = {}, {}
        for key, tensor in flatten(model).items():
            is_shared = key.startswith(SHARED) and self.algorithm.mixing != "local"
            (shared_params if is_shared else private_params)[key] = tensor
        self._done(model, context)
        context.state.params = (
            {**private_params, **shared_params} if self.algorithm.deploy == "trained" else private_params
        )
        return Payload({"params": shared_params} if shared_params else {}, scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        client_params = context.state.params if self.algorithm.deploy == "trained" else {}
        model = self._model(Payload({"params": payload.group("params") | client_params}), context)
        reply = tested(self.setup, model, context)
        self._done(model, context)
        return reply

    def _model(self, payload: Payload, context: ClientContext) -> SplitModel:
        """Build the model from the received G and the client's own parameters, either kept or initial."""
        client_params = context.state.params or self._initial(context)
        params, spare_model = {**client_params, **payload.group("params")}, self.used.pop(_kind(context), None)
        return self.setup.split_model(lambda: self._mixture(context), params, context, used=spare_model)

    def _done(self, model: SplitModel, context: ClientContext) -> None:
        """Keep a small model for the next client of its kind, as making another takes as long as half a step.

        Do so only for architectures that are known to have no state but their parameters, and not while other clients
        work on the same device (`context.meet`).
        """
        is_builtin = {context.info.architecture, self.setup.model.small} <= ARCHITECTURES.keys()
        if is_builtin and context.meet is None and nbytes(model.parameters()) <= SMALL:
            self.used[_kind(context)] = model

    def _mixture(self, context: ClientContext) -> "Mixture":
        cohort, shape = self.setup.model, self.setup.shape
        shared = cohort.extractor(cohort.small, shape)
        private = cohort.extractor(context.info.architecture, shape)
        return Mixture(shared, private, math.prod(shape), self.algorithm)

    def _initial(self, context: ClientContext) -> Params:
        """Return the initial F_k and header of every method, the server's initial G, and an initial gate and `join`."""
        setup, kind = self.setup, _kind(context)
        if kind in self.begun:
            return self.begun[kind]
        setup.admit_small(lambda: self._mixture(context), context)
        client_params = select(setup.initial_params(context.info), context.data.task.name)
        heads = {key: t for key, t in client_params.items() if key.startswith("head.")}
        mixture = initial(lambda: self._mixture(context), setup.seed, "pFedMoE", context.info.architecture)
        params = {k: t for k, t in mixture.items() if not k.startswith((SHARED, "private."))}
        params |= _prefixed("private.", {key: t for key, t in client_params.items() if key not in heads})
        params |= _prefixed(SHARED, setup.small_params()) | heads
        if nbytes(params.values()) <= SMALL:
            self.begun[kind] = params
        return params


class Mixture(nn.Module):
    """An extractor made of two, R = a_G G(x) + a_F F(x): [B, *S] -> [B, d], where d is the width of F.

    Args:
        shared: G.
        private: F.
        inputs: numbers in one example, S.
        algorithm: the settings.
    """

    rowwise = True

    def __init__(self, shared: nn.Module, private: nn.Module, inputs: int, algorithm: pFedMoE):
        super().__init__()
        self.shared = shared
        self.private = private
        self.width = private.width
        self.mixing = algorithm.mixing
        self.features = algorithm.gate_input == "features"
        if shared.width != private.width:
            self.join = nn.Linear(shared.width, private.width)
        if self.mixing in ("gate", "local"):
            self.gate = Gate(2 * self.width if self.features else inputs, algorithm.m, algorithm.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)[0]

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return R [B, d] and the gate's weights [a_G, a_F] [B, 2]; the weights are None without a gate."""
        g = self.shared(x)
        if self.shared.width != self.width:
            g = self.join(g)
        if self.mixing == "shared":
            return g, None
        f = self.private(x)
        if self.mixing == "static":
            return 0.5 * g + 0.5 * f, None
        a = self.gate(torch.cat([g, f], dim=1) if self.features else x.flatten(1))
        return a[:, :1] * g + a[:, 1:] * f, a

    def weights(self, x: Tensor) -> Tensor:
        """Return the gate's weights [a_G, a_F] [B, 2], and compute only the parts of the model that the gate reads."""
        return self.mix(x)[1] if self.features else self.gate(x.flatten(1))


class Gate(nn.Module):
    """The gate H: [B, S] -> weights [B, 2] that sum to 1 in every row, with a norm before each activation.

    Args:
        inputs: S, numbers that the gate reads per example.
        m: hidden units.
        norm: see `pFedMoE`.
    """

    rowwise = True

    def __init__(self, inputs: int, m: int, norm: str):
        super().__init__()
        self.norm0 = SwitchableNorm(inputs) if norm == "batch" else nn.LayerNorm(inputs)
        self.linear1 = nn.Linear(inputs, m)
        self.norm1 = {
            "batch": lambda: BatchNorm(m),
            "layer": lambda: nn.LayerNorm(m),
            "group": lambda: nn.GroupNorm(GROUPS, m),
        }[norm]()
        self.linear2 = nn.Linear(m, 2)
        self.norm2 = BatchNorm(2) if norm == "batch" else nn.Identity()
        if norm == "batch":  # Start at weights 1/2 and 1/2, and learn the scale of the logits.
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.linear1(self.norm0(x))).sigmoid()
        return self.norm2(self.linear2(hidden)).softmax(dim=1)


GROUPS = 4


def moments(norm: nn.Module, x: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [S] of the real rows of x [B, S]; move the running ones of `norm` towards them.

    If a padded batch has only one real row, which has no batch statistics, return the running ones.

    Args:
        norm: module with `running_mean`, `running_var` and `momentum`.
        x: the batch.
        unbiased: whether the running variance moves towards the unbiased variance.
    """
    if (real_B := real_rows()) is None:
        mean, n, degrees = x.mean(0), len(x), max(len(x) - 1, 1)
        var = (x - mean).square().mean(0)  # This is several times as fast as torch's var.
    else:
        real_B1, n = real_B[:, None], real_B.sum()
        degrees = (n - 1).clamp(min=1)
        mean = torch.where(real_B1, x, 0).sum(0) / n
        var = torch.where(real_B1, x - mean, 0).square().sum(0) / n
        mean, var = torch.where(n > 1, mean, norm.running_mean), torch.where(n > 1, var, norm.running_var)
    with torch.no_grad():
        target_var = var * n / degrees if unbiased else var
        norm.running_mean += (mean - norm.running_mean) * norm.momentum
        norm.running_var += (target_var - norm.running_var) * norm.momentum
    return mean, var


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a single example, and for everything in evaluation."""

    rowwise = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (real_rows() is None and len(x) > 1):
            return super().forward(x)
        if real_rows() is None:
            running_stats = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, *running_stats, self.weight, self.bias, eps=self.eps)
        mean, var = moments(self, x, unbiased=True)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class SwitchableNorm(nn.Module):
    """Switchable normalisation (Luo et al., https://arxiv.org/abs/1806.10779) for vectors [B, S].

    Mean and variance are learned convex mixtures of those over the example and those over the batch. For a single
    example, and in evaluation, the running statistics replace those over the batch.
    """

    rowwise = True

    def __init__(self, inputs: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(inputs))
        self.bias = nn.Parameter(torch.zeros(inputs))
        self.mean_weight = nn.Parameter(torch.ones(2))
        self.var_weight = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(inputs))
        self.register_buffer("running_var", torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training and (len(x) > 1 or real_rows() is not None):
            mean, var = moments(self, x)
        (own_mean_weight, batch_mean_weight), (own_var_weight, batch_var_weight) = (
            self.mean_weight.softmax(0),
            self.var_weight.softmax(0),
        )
        own_mean = x.mean(1, keepdim=True)
        mean = own_mean_weight * own_mean + batch_mean_weight * mean
        var = own_var_weight * (x - own_mean).square().mean(1, keepdim=True) + (batch_var_weight * var + self.eps)
        return torch.addcmul(self.bias, (x - mean) * var.rsqrt(), self.weight)


def gate_by_class(model: SplitModel, setup: CohortSetup, context: ClientContext) -> Mapping[str, Scalar]:
    """Return the mean weight a_G of the shared extractor over the validation examples of each class, for the record."""
    data = setup.encode(context, context.data.validation)
    prepare = even if evened(model, context) else dict
    model.eval()
    with torch.inference_mode(), setup.fit.lowered(context.device):
        batches = read_batches(data, setup.evaluation_rows, context)
        pairs = [(model.backbone.weights(prepare(b)["x"])[: len(b["labels"]), 0], b["labels"]) for b in batches]
    a_B, y_B = map(torch.cat, zip(*pairs, strict=True))
    return {f"report/gate {model.labels[c]}": a_B[y_B == c].mean().item() for c in y_B.unique().tolist()}


def _kind(context: ClientContext) -> Hashable:
    """Return the kind of a client.

    Clients of one kind start with the same weights and can reuse each other's models.
    """
    return context.info.architecture, context.data.task.name, context.data.task.labels


def _prefixed(prefix: str, params: Mapping[str, Tensor]) -> Params:
    return {prefix + key: tensor for key, tensor in params.items()}
