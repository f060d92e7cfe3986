"""FedKD: Communication-Efficient Federated Learning via Knowledge Distillation.

Wu, Wu, Lyu, Huang, Xie. Nature Communications 2022. https://arxiv.org/abs/2108.13323

Each client trains its own model (the mentor) and a copy of a small shared one (the mentee) together. The better both
models do, the more they learn from each other. Only the compressed change of the shared model is sent:

    L_d     = KL(p_other || p_self) / (CE_own + CE_small)                   adaptive mutual distillation
    L_h     = MSE(H_own, W H_small) / (CE_own + CE_small)                   adaptive hidden loss, of the representations
    L_own   = CE_own + L_d,own + L_h          L_small = CE_small + L_d,small + L_h
    up      G_k = small_k - small as received                               the sum of the client's gradient steps
    server  small <- small + sum_{k in S} n_k / n G_k
    down    small - small_0                                                 small_0: from the run's seed, known to all
    a matrix P [m, n] is sent as U [m, K], S [K], V [K, n], with the smallest K that keeps the energy
    T = T_s + (T_e - T_s) t:  sum_{k <= K} S_k^2 >= T sum_k S_k^2           t: share of the rounds that is over

    G, small - small_0   "params" for whole tensors, "factors" for U, S, V; small.*            own, W   context.state

Departures: the server sends the sum of all changes since the start and not the last change, because not every client
has received the earlier ones. `exchange="weights"` sends the weights themselves in both directions, as HtFLlib does;
this takes more values for the same energy. Means are by n_k. A matrix is sent whole if its factors would be larger. The
denominators act as weights: no gradient flows through them or through the other model's probabilities. The hidden loss
has no attention term, because these models have no attentions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvgServer
from consilium.algorithms.fml import SMALL, Pair, kl, pair_model, small_params
from consilium.constraints import Count, PositiveShare
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    Payload,
    Reveal,
    Scalar,
    Server,
    setting,
)
from consilium.errors import PayloadError
from consilium.models.cohort import SplitModel, initial
from consilium.moe.addressing import flatten
from consilium.params import Like, Params, checksum
from consilium.setup import CohortSetup
from consilium.training import Supervised, tested, trained

__all__ = ["FedKD", "compressed", "restored"]


@dataclass(frozen=True)
class FedKD(Algorithm):
    """Adaptive mutual distillation with a shared model that is sent as truncated singular values.

    Args:
        T_s: share of the energy that is kept at the start, in (0, 1].
        T_e: share of the energy that is kept at the end, in (0, 1].
        rounds: rounds over which T_s becomes T_e, >= 1; None: the rounds of the run.
        exchange: "changes" of the small model, as in the paper, or its "weights".
    """

    worlds: ClassVar[tuple[str, ...]] = ("cohort", "mixed")
    T_s: PositiveShare = setting(0.95, "server")
    T_e: PositiveShare = setting(0.98, "server")
    rounds: Count | None = setting(None, "server")
    exchange: Literal["changes", "weights"] = setting("changes", "free")

    def energy(self, round: int, rounds: int) -> float:
        """Return T, the share of the energy that is kept in a round.

        Args:
            round: number of the round, from 1.
            rounds: number of rounds of the run.
        """
        return self.T_s + (self.T_e - self.T_s) * min((round - 1) / (self.rounds or max(rounds, 1)), 1.0)

    def begun(self, setup: CohortSetup) -> tuple[Params, str]:
        """Return the parameters from which changes of the small model are counted, and their checksum.

        These are small_0 if `exchange` is "changes", else zeros.
        """
        base_params = small_params(setup)
        if self.exchange != "changes":
            base_params = {key: torch.zeros_like(t) for key, t in base_params.items()}
        return base_params, checksum(base_params)

    def server(self, setup: CohortSetup) -> Server:
        return FedKDServer(setup, self)

    def client(self, setup: CohortSetup) -> Client:
        return FedKDClient(setup, self)


class FedKDServer(Server):
    """A server that adds the mean change to the small model, or averages its weights."""

    def __init__(self, setup: CohortSetup, algorithm: FedKD):
        self.averaging = FedAvgServer(setup, params=small_params(setup))
        self.setup = setup
        self.algorithm = algorithm
        self.begun, self.mark = algorithm.begun(setup)
        self.round = 1
        self.told: tuple[Params, float, Payload] | None = None  # the last compressed params, their T, and the payload

    @property
    def params(self) -> Params:
        return self.averaging.params

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        self.round = round
        payload = self.deliver(clients[0])
        return {c.id: payload for c in self.setup.sampling.choose(clients, round, self.setup.seed)}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        sends_changes = self.algorithm.exchange == "changes"
        base_params = {key: torch.zeros_like(t) for key, t in self.params.items()} if sends_changes else self.params
        mean = self.setup.mean(base_params)
        for _, reply in replies:
            mean.add(restored(reply), reply.scalars["num_examples"])
        mean_result = mean.mean(base_params)
        self.averaging.params = plus(self.params, mean_result) if sends_changes else mean_result
        return mean.told()

    def deliver(self, client: ClientInfo) -> Payload:
        energy = self.algorithm.energy(self.round, self.setup.rounds)
        if self.told is None or self.told[0] is not self.params or self.told[1] != energy:  # one SVD for all clients
            groups, shapes = compressed(plus(self.params, self.begun, -1), energy)
            self.told = self.params, energy, Payload(groups, {"energy": energy, "begun": self.mark, **shapes})
        return self.told[2]

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        """Allow each tensor either whole or as three factors of any rank.

        `objection` checks that each tensor came in exactly one of these forms.
        """
        factors = {}
        for key, t in self.params.items():
            if t.ndim >= 2:
                shapes = {"u": (len(t), None), "s": (None,), "v": (None, t[0].numel())}
                factors |= {f"{key}/{x}": Like(shape, t.dtype, needed=False) for x, shape in shapes.items()}
        return {"params": {key: Like.of(t, needed=False) for key, t in self.params.items()}, "factors": factors}

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        if fault := misfit(reply, self.params):
            return fault
        return next((f"{key} is not finite" for key, t in restored(reply).items() if not t.isfinite().all()), None)

    def state(self) -> Payload:
        return Payload({"params": self.params}, {"round": self.round})

    def restore(self, state: Payload) -> None:
        self.averaging.restore(state)
        self.round = int(state.scalars["round"])


class FedKDClient(Client):
    """A client that trains both models, keeps its own and sends the compressed change of the shared one."""

    reveals: Mapping[str, Reveal] = {
        "factors": Reveal("update", "exact"), "shape *": Reveal("update", "exact"),
    }  # fmt: skip

    def __init__(self, setup: CohortSetup, algorithm: FedKD):
        self.setup = setup
        self.algorithm = algorithm

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        shared_params = self._small(payload)
        model = self._model(shared_params, context)
        scalars = trained(self.setup, model, context, partial(adaptive, supervised=self.setup.fit.cross_entropy))
        params = flatten(model)
        context.state.params = {key: t for key, t in params.items() if not key.startswith(SMALL)}
        small_tensors = {key: t for key, t in params.items() if key.startswith(SMALL)}
        if self.algorithm.exchange == "changes":
            small_tensors = plus(small_tensors, shared_params, -1)
        groups, shapes = compressed(small_tensors, float(payload.scalars["energy"]))
        return Payload(groups, {**scalars, **shapes})

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return tested(self.setup, self._model(self._small(payload), context), context)

    @cached_property
    def begun(self) -> tuple[Params, str]:
        """Return the result of `FedKD.begun`, computed once."""
        return self.algorithm.begun(self.setup)

    def _small(self, payload: Payload) -> Params:
        """Return the shared model that a payload describes.

        Raises:
            PayloadError: if the server's shared model starts from other weights, or if names or shapes differ from
                those of the shared model. Shapes are checked before any factors are multiplied.
        """
        base_params, mark = self.begun
        if payload.scalars["begun"] != mark:
            raise PayloadError(
                "the shared model begins otherwise here than at the server, by another version of torch or another "
                'experiment: install the same, or use FedKD(exchange="weights")'
            )
        if fault := misfit(payload, base_params):
            raise PayloadError(fault)
        return plus(base_params, restored(payload))

    def _model(self, small: Params, context: ClientContext) -> SplitModel:
        if not context.state.params:  # the client initialises W itself, from the run's seed
            cohort, shape = self.setup.model, self.setup.shape
            widths = (cohort.width_of(name, shape) for name in (cohort.small, context.info.architecture))
            w = initial(lambda: nn.Linear(*widths, bias=False), self.setup.seed, "FedKD", context.info.architecture)
            small = small | {"hidden.weight": w["weight"]}
        return pair_model(self.setup, small, context, Mentored)


class Mentored(Pair):
    """A pair of models with W, a linear map from the small representation to the client's own."""

    def __init__(self, private: nn.Module, small: nn.Module, classes: int):
        super().__init__(private, small, classes)
        self.hidden = nn.Linear(small.width, private.width, bias=False)


def adaptive(model: SplitModel, batch: dict[str, Tensor], supervised: Supervised = F.cross_entropy) -> Tensor:
    """Return L_own + L_small.

    The hidden loss is a part of both. It is added once, because its gradient reaches the weights of both models.
    """
    pair, y = model.backbone, batch["labels"]
    h_own, h_small = pair.private(batch["x"]), pair.small.extractor(batch["x"])
    own_logits, small_logits = model.head(h_own), pair.small.head(h_small)
    ce_own, ce_small = supervised(own_logits, y), supervised(small_logits, y)
    mutual = (
        kl(small_logits.detach(), own_logits)
        + kl(own_logits.detach(), small_logits)
        + F.mse_loss(pair.hidden(h_small), h_own)
    )
    return ce_own + ce_small + mutual / (ce_own + ce_small).detach()


def compressed(params: Params, energy: float) -> tuple[dict[str, Params], dict[str, Scalar]]:
    """Compress tensors by truncated SVD where this makes them smaller.

    A tensor [m, ...] of two or more dimensions is treated as a matrix [m, n]. K is the smallest rank that keeps the
    energy.

    Args:
        params: flat name -> tensor.
        energy: T, share of the sum of squared singular values to keep, in (0, 1].

    Returns:
        The groups "params" (whole tensors) and "factors" (`<key>/u` [m, K], `/s` [K], `/v` [K, n]), and the scalars
        "shape <key>" with the shapes of the factored tensors.
    """
    whole_params, factors, shapes = {}, {}, {}
    for key, tensor in params.items():
        if tensor.ndim >= 2:
            u, s, v = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
            cumulative_energy = s.double().square().cumsum(0)
            k = min(int((cumulative_energy < energy * cumulative_energy[-1]).sum()) + 1, len(s))
            if k * (len(u) + v.shape[1] + 1) < tensor.numel():
                factors |= {f"{key}/u": u[:, :k].contiguous(), f"{key}/s": s[:k].clone(), f"{key}/v": v[:k].clone()}
                shapes[f"shape {key}"] = list(tensor.shape)
                continue
        whole_params[key] = tensor
    return {"params": whole_params, "factors": factors}, shapes


def misfit(payload: Payload, params: Params) -> str | None:
    """Return why a payload is not a compressed form of `params`, or None if it is.

    The payload must hold the names and shapes of `params` in the format of `compressed`.
    """
    whole_params, factors = payload.group("params"), payload.group("factors")
    reported_shapes = {
        name.removeprefix("shape "): s for name, s in payload.scalars.items() if name.startswith("shape ")
    }
    if unknown_keys := sorted((reported_shapes.keys() | whole_params.keys()) - params.keys()):
        return f"{unknown_keys[0]} was not asked for: the shared model has no such parameter"
    for key, param in params.items():
        key_factors = [factors[f"{key}/{x}"] for x in "usv" if f"{key}/{x}" in factors]
        if (
            key in whole_params
            and not key_factors
            and key not in reported_shapes
            and whole_params[key].shape == param.shape
        ):
            continue
        if key in whole_params or len(key_factors) < 3 or reported_shapes.get(key) != list(param.shape):
            return f"params {key} is neither whole nor three factors and their shape"
        shapes, rank = [tuple(t.shape) for t in key_factors], len(key_factors[1]) if key_factors[1].ndim else 0
        if shapes != [(len(param), rank), (rank,), (rank, param[0].numel())]:
            return f"factors of {key} do not agree in ranks and shape: {shapes}"
    return None


def plus(params: Params, change: Params, sign: int = 1) -> Params:
    """Return params + sign * change, key by key."""
    return {key: t + sign * change[key] for key, t in params.items()}


def restored(payload: Payload) -> Params:
    """Return the parameters of a payload that `compressed` made."""
    params, factors = payload.group("params"), payload.group("factors")
    for name, shape in payload.scalars.items():
        if name.startswith("shape "):
            key = name.removeprefix("shape ")
            params[key] = (factors[f"{key}/u"] * factors[f"{key}/s"] @ factors[f"{key}/v"]).reshape(shape)
    return params
