"""FLAME and UB-SMoE: fewer active experts per token on weak devices, instead of smaller ranks or models.

FLAME: Towards Federated Fine-Tuning Large Language Models Through Adaptive SMoE. Le, Chen, Zheng, Ho, Khoa, Nguyen,
Hwang. 2025. https://arxiv.org/abs/2506.16600
UB-SMoE: 2026. https://arxiv.org/abs/2605.16690 (no code)

    client k of FLAME     every token uses k_k of the K experts that the full model uses;  out = s_k MoE(x), s_k private
    server                expert e <- sum_k w_ke x_ke / sum_k w_ke,   w_ke = n_k (a_ke / S_k)^t;  other keys by n_k
    UB-SMoE               in training, the router favours experts that are used less: logit + reach tanh(u* / u - 1)
                          among the N largest logits; an expert that no token reached gets as its gradient k_k / E times
                          the mean gradient of the others

    a_ke   group "served", validation tokens that expert e computed     S_k   tokens: sum_e a_ke / k_k
    s_k    context.private "scale/<block>", one per layer               u     usage, with momentum `zeta`

This saves computation, not memory: all experts stay resident. `experts` "memory" saves both: each device holds as many
of the publicly most used experts as fit, and larger sets contain the smaller ones (as in NestedMoE).

What is ours: s_k is per layer. a_ke is counted on validation rows; a site's privacy settings may withhold it, and then
t must be 0. Unless `k` sets it, k_k is in proportion to a device's memory, as there is no budget of computation. The
equations of UB-SMoE were not at hand, so the form of its gradient is ours, and so is the uniform usage at the start of
every round; it merges by n_k. Routers that choose by more than the largest values of a softmax (Switch, DeepSeek) are
left unchanged, and in Switch K is 1.

Every client is scored at its own k_k, and a second time with the server's unchanged model at the full K ("full_k"):
published low-end scores collapse where only one of the two is given. Compare with UB-SMoE's published accuracies on
OLMoE-1B-7B and Commonsense-15K (low-end 0.3936, high-end 0.5240) on such a model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.constraints import Few, Fraction
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ExpertMap,
    ExpertSet,
    Payload,
    Reveal,
    Server,
    experts_from_scalars,
    setting,
)
from consilium.moe.active import SCALE, activate, add_scales, balance_routing, fill_gradients, scales_of
from consilium.moe.addressing import expert_of, router_row_of
from consilium.moe.layers import most
from consilium.moe.model import TaskModel
from consilium.moe.routing import shares
from consilium.params import Like
from consilium.setup import MixtureSetup
from consilium.training import Correct, local_round, local_test

__all__ = ["FLAME", "UBSMoE"]

MOST = 2**40
"""Largest token count of one expert that the server accepts from a client."""
KEPT = "scale/"


@dataclass(frozen=True)
class FLAME(Algorithm):
    """Fewer active experts, a learned scale, and averages weighted by activation.

    Args:
        k: active experts per token, cycled over the clients in the order of their ids; (): in proportion to a device's
            memory, with the full number where the device could train all experts.
        t: temperature of the weights by activation, >= 0; 0: weights n_k.
        scale: whether the output of the experts has a learned scale.
        experts: experts per layer: "all", a number or "fit", see FedAvg; "memory": as many as each device has room for.
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    k: tuple[Few, ...] = setting((), "server")
    t: Annotated[float, Interval(ge=0, le=10)] = setting(1.0, "server")
    scale: bool = setting(True, "free")
    experts: int | Literal["all", "fit", "memory"] = setting("all", "server")

    def reads(self) -> frozenset[str]:
        return frozenset({"usage"} if self.t else ())

    def server(self, setup: MixtureSetup) -> Server:
        return FlameServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FlameClient(setup, self)

    def prepare(self, model: TaskModel) -> None:
        """Change a live model in place before it is trained."""

    def correct(self, model: TaskModel, held: ExpertSet | None, k: int) -> Correct | None:
        """Return a function that changes the gradients after each backward pass, or None."""
        return None


@dataclass(frozen=True)
class UBSMoE(FLAME):
    """Fewer active experts, balanced routing, and gradients for experts that no token reached.

    Args:
        k: see FLAME.
        t: see FLAME.
        scale: see FLAME.
        experts: see FLAME.
        candidates: number of a token's experts that routing may favour (N); 0: twice the number of active experts.
        reach: the largest change of a logit, >= 0.
        zeta: momentum of the usage, in [0, 1).
        pseudo: factor on the gradients of experts that no token reached, in addition to k / E, >= 0.
    """

    t: Annotated[float, Interval(ge=0, le=10)] = setting(0.0, "server")
    scale: bool = setting(False, "free")
    candidates: Annotated[int, Interval(ge=0, le=1e4)] = setting(0, "free")
    reach: Annotated[float, Interval(ge=0, le=1e3)] = setting(1.0, "factor")
    zeta: Fraction = setting(0.9, "factor")
    pseudo: Annotated[float, Interval(ge=0, le=1e3)] = setting(1.0, "factor")

    def prepare(self, model: TaskModel) -> None:
        balance_routing(model, self.candidates, self.reach, self.zeta)

    def correct(self, model: TaskModel, held: ExpertSet | None, k: int) -> Correct | None:
        experts = max(len(ids) for ids in held.values()) if held else int(getattr(model.config, model.family.number))
        return fill_gradients(model, held, self.pseudo * k / experts) if self.pseudo else None


class FlameServer(FedAvgServer):
    """A FedAvg server that sends each client its k and weights experts by activation."""

    def __init__(self, setup: MixtureSetup, algorithm: FLAME):
        by_memory = algorithm.experts == "memory"
        super().__init__(setup, None if by_memory else common_experts(setup, algorithm.experts))
        self.algorithm = algorithm
        clients = sorted(setup.clients, key=lambda c: c.id)
        self.map: ExpertMap = {c.id: _nested(setup, c) for c in clients} if by_memory else {}
        self.k = {client.id: self._active(client, index) for index, client in enumerate(clients)}
        self.served: dict[ClientId, dict[str, Tensor]] = {}

    def _active(self, client: ClientInfo, place: int) -> int:
        """Return k_k, the active experts per token of a client."""
        setup, active_counts = self.setup, self.algorithm.k
        full_k = int(getattr(setup.model.config, "num_experts_per_tok", 1))
        if active_counts:
            return min(active_counts[place % len(active_counts)], full_k)
        if client.memory_bytes is None:
            return full_k
        share = client.memory_bytes / setup.footprint(setup.model.counts).total
        return max(1, round(full_k * min(share, 1.0)))

    def held_by(self, client: ClientInfo) -> ExpertSet | None:
        return self.map.get(client.id, self.held)

    def deliver(self, client: ClientInfo) -> Payload:
        payload = super().deliver(client)
        return Payload(payload.groups, {**payload.scalars, "k": self.k[client.id]})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        counts = {block: Like((n,), torch.int64, 0, MOST) for block, n in self.setup.model.counts.items()}
        return {**super().expects(client, sent), **({"served": counts} if self.algorithm.t else {})}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = self.setup.mean(self.params, round)
        for client, reply in replies:
            self.served[client] = reply.group("served")
            mean.add(reply.group("params"), activation_weight(reply, self.k[client], self.algorithm.t))
        self.params = mean.mean(self.params)
        return {"active": sum(self.k.values()) / max(len(self.k), 1), **mean.told()}

    def structure(self) -> ExpertMap | None:
        return dict(self.map) or None

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        usage_by_client = {client: shares(counts) for client, counts in self.served.items() if counts}
        return {
            client: {block: p_E.tolist() for block, p_E in usage_by_block.items()}
            for client, usage_by_block in usage_by_client.items()
        }

    def state(self) -> Payload:
        served_counts = {
            f"{client}/{block}": n_E
            for client, counts_by_block in self.served.items()
            for block, n_E in counts_by_block.items()
        }
        return Payload({"params": self.params, "served": served_counts})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        self.served = {}
        for key, counts in state.group("served").items():
            client, _, block = key.partition("/")
            self.served.setdefault(client, {})[block] = counts


def activation_weight(reply: Payload, k: int, t: float) -> float | Callable[[str], float]:
    """Return the weights of a reply by flat name: w_ke for the tensors and router rows of expert e, n_k for others.

    w_ke = n_k (a_ke / S_k)^t, see the module. With t = 0 the result is the number n_k.
    """
    n_k, served_counts = float(reply.scalars["num_examples"]), reply.group("served")
    if not t:
        return n_k
    tokens = {block: max(float(n_E.sum()) / k, 1.0) for block, n_E in served_counts.items()}

    def weight(key: str) -> float:
        place = expert_of(key) or router_row_of(key)
        if place is None:
            return n_k
        block, e = place
        return n_k * min(float(served_counts[block][e]) / tokens[block], 1.0) ** t

    return weight


def _nested(setup: MixtureSetup, client: ClientInfo) -> ExpertSet:
    """Return the publicly most used experts, as many per layer as the device has room for."""
    return most(setup.public_usage("common experts"), setup.sub_moe_counts(client))


class FlameClient(Client):
    """A client that trains with its own number of active experts."""

    def __init__(self, setup: MixtureSetup, algorithm: FLAME):
        self.setup, self.algorithm = setup, algorithm
        self.reveals: Mapping[str, Reveal] = {
            **({"served": Reveal("usage", "exact")} if algorithm.t else {}),
            "full_k": Reveal("score"),
            "full_k_bits_per_byte": Reveal("score"),
        }

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        k, expert_ids, algorithm = int(payload.scalars["k"]), experts_from_scalars(payload.scalars), self.algorithm

        def prepare(model: TaskModel) -> None:
            self._own(k, context, model)
            algorithm.prepare(model)

        correct = (
            partial(algorithm.correct, held=expert_ids, k=k)
            if isinstance(algorithm, UBSMoE) and algorithm.pseudo
            else None
        )
        needs_usage = bool(algorithm.t)
        model, reply = local_round(self.setup, payload, context, correct, usage=needs_usage, prepare=prepare)
        if algorithm.scale:
            scales = {f"{KEPT}{block}": value for block, value in scales_of(model).items()}
            context.private.params = {**context.private.params, **scales}
        params = {key: t for key, t in reply.group("params").items() if not key.endswith(f".{SCALE}")}
        groups = {"params": params, **({"served": reply.group("served")} if needs_usage else {})}
        return Payload(groups, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        reply = local_test(self.setup, payload, context, partial(self._own, int(payload.scalars["k"]), context))
        full_reply = local_test(self.setup, payload, context)
        full_scores = {"full_k": full_reply.scalars["score"]}
        if "bits_per_byte" in full_reply.scalars:
            full_scores["full_k_bits_per_byte"] = full_reply.scalars["bits_per_byte"]
        seconds = reply.scalars["seconds_evaluate"] + full_reply.scalars["seconds_evaluate"]
        return Payload(scalars={**reply.scalars, **full_scores, "seconds_evaluate": seconds})

    def _own(self, k: int, context: ClientContext, model: TaskModel) -> None:
        """Apply the client's k and scales to a model in place."""
        activate(model, k)
        if self.algorithm.scale:
            private_items = context.private.params.items()
            add_scales(model, {key.removeprefix(KEPT): t for key, t in private_items if key.startswith(KEPT)})
