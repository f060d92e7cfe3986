"""Flux: merged experts where a device does not train, and exploration of the experts that it trains.

After: Flux, federated fine-tuning of mixtures of experts on devices. EuroSys 2026. https://arxiv.org/abs/2508.19078 (no
code; equations were not at hand, so the forms below are ours)

Device k has room for c_k experts per layer (`spread` distributes them over the layers). It trains c_k - 1 experts. All
others are merged into one expert, which is frozen and serves their tokens:

    merged expert = sum_e u_e x_e / sum_e u_e over the experts that are not trained, u the client's usage (at first the
                  public usage)
    its router row = the same mean of their rows; both take the id of the merged expert with the largest usage
    utility       of an expert: the mean over batches of the norm of its gradient, smoothed with momentum 1/2
    choice        a share `explore` of the places goes to the experts that the client has trained least often (ties at
                  random), the rest by utility; the utility of a never trained expert is its usage on the same scale
    server        trunk, trained experts and their rows: means by n_k over the clients that trained them

    u         group "demand", from the last participation ("stale profiling")   utility    group "utility": block -> [E]

What is ours: all forms. Profiling is not quantised. The server has the weights and does the merging, so that a device
downloads only what it holds. Unlike a choice of experts per batch, this also saves memory in the forward pass.
The published 4.75 times shorter time to accuracy is against offloading and quantisation on real devices, which is not
measured here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilium.algorithms.fedavg import FedAvgServer
from consilium.constraints import PositiveShare, Share
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ExpertMap,
    Payload,
    Reveal,
    Server,
    derive_seed,
    experts_from_scalars,
    setting,
)
from consilium.errors import ConfigError
from consilium.moe.addressing import expert_of, router_row_of, table
from consilium.moe.model import TaskModel
from consilium.moe.routing import shares
from consilium.params import Like, Params
from consilium.setup import MixtureSetup
from consilium.training import Correct, local_round, local_test

__all__ = ["Flux", "chosen_experts", "merged_expert"]

MOST = 2**40
MERGED = "merged/"
"""Prefix of scalars: block -> the id under which the merged expert travels; -1: there is none."""


@dataclass(frozen=True)
class Flux(Algorithm):
    """Trained experts chosen by explored utility, and one merged expert for all others.

    Args:
        explore: share of the trained experts that are chosen because the client trained them least often, in [0, 1].
        share: share of a client's memory that its sub-model may use, in (0, 1].
    """

    worlds: ClassVar[tuple[str, ...]] = ("moe",)
    explore: Share = setting(0.25, "server")
    share: PositiveShare = setting(1.0, "server")

    def reads(self) -> frozenset[str]:
        return frozenset({"usage", "gradients of experts"})

    def server(self, setup: MixtureSetup) -> Server:
        return FluxServer(setup, self)

    def client(self, setup: MixtureSetup) -> Client:
        return FluxClient(setup)


def merged_expert(params: Mapping[str, Tensor], block: str, ids: Sequence[int], usage_E: Tensor) -> Params:
    """Return the mean of experts and of their router rows, weighted by usage, under the name of the most used one.

    The mean is unweighted where none of the experts is used.

    Args:
        params: flat parameters of the whole model.
        block: block of the experts.
        ids: the experts to merge.
        usage_E: usage of all experts of the block.
    """
    weight_N = usage_E[list(ids)].double()
    weight_N = weight_N / weight_N.sum() if float(weight_N.sum()) > 0 else torch.full_like(weight_N, 1 / len(ids))
    expert_id = ids[int(weight_N.argmax())]
    merged_params = {}
    for infix in ("experts", "router"):
        prefix = f"{block}.{infix}.{expert_id}."
        for key in [key for key in params if key.startswith(prefix)]:
            stack = [params[f"{block}.{infix}.{e}.{key[len(prefix) :]}"].double() for e in ids]
            merged_params[key] = sum(w * t for w, t in zip(weight_N.tolist(), stack, strict=True)).to(params[key].dtype)
    return merged_params


def chosen_experts(utility_E: Tensor, tried_E: Tensor, n: int, explore: float, rng: torch.Generator) -> tuple[int, ...]:
    """Return n expert ids, ascending: the round(explore n) least trained ones, then the best of the rest by utility.

    Args:
        utility_E: utility of each expert; the lower id wins a tie.
        tried_E: rounds in which each expert was trained; ties are broken at random.
        n: number of experts.
        explore: see `Flux`.
        rng: generator for the ties.
    """
    order = torch.randperm(len(tried_E), generator=rng)
    least_trained_ids = order[tried_E[order].argsort(stable=True)][: round(explore * n)].tolist()
    other_ids = [e for e in utility_E.argsort(descending=True, stable=True).tolist() if e not in least_trained_ids]
    return tuple(sorted([*least_trained_ids, *other_ids[: n - len(least_trained_ids)]]))


class FluxServer(FedAvgServer):
    """A server that holds all experts and, per client, usage, utilities and training counts of the experts.

    Attributes:
        map: client -> block -> the experts that it trains.
    """

    def __init__(self, setup: MixtureSetup, algorithm: Flux):
        if setup.fit.lora.rank:
            raise ConfigError(f"fit.lora.rank is {setup.fit.lora.rank}; Flux merges whole experts: set it to 0")
        super().__init__(setup)
        self.algorithm = algorithm
        public_usage = setup.public_usage("no usage")
        self.usage_of: dict[ClientId, dict[str, Tensor]] = {}
        self.public = {block: p_E.double() / float(p_E.sum()) for block, p_E in public_usage.items()}
        self.utility: dict[ClientId, dict[str, Tensor]] = {}
        self.tried: dict[ClientId, dict[str, Tensor]] = {}
        self.room = {c.id: setup.fitting(c, share=algorithm.share) for c in setup.clients}
        self.map: dict[ClientId, dict[str, tuple[int, ...]]] = {}
        for client in setup.clients:
            self._choose(client.id, 0)

    def _choose(self, client: ClientId, round: int) -> None:
        """Choose the experts that a client trains next."""
        expert_ids, counts = {}, self.setup.model.counts
        for block, room in self.room[client].items():
            total = counts[block]
            usage_E = self.usage_of.get(client, self.public)[block]
            rounds_E = self.tried.get(client, {}).get(block, torch.zeros(total))
            past_utility_E = self.utility.get(client, {}).get(block, torch.zeros(total))
            scale = float(past_utility_E.max()) / float(usage_E.max()) if float(past_utility_E.max()) > 0 else 1.0
            utility_E = torch.where(rounds_E > 0, past_utility_E.double(), usage_E * scale)
            rng = torch.Generator().manual_seed(derive_seed(self.setup.seed, "Flux", client, block, round))
            trained_count = room if room >= total else max(room - 1, 1)
            expert_ids[block] = chosen_experts(utility_E, rounds_E, trained_count, self.algorithm.explore, rng)
        self.map = self.map | {client: expert_ids}

    def unable(self, client: ClientInfo) -> str | None:
        return self.setup.lacks(client, self.setup.least)

    def deliver(self, client: ClientInfo) -> Payload:
        usage, params, expert_ids = self.usage_of.get(client.id, self.public), dict(self.params), {}
        merged_scalars = {}
        for block, trained_ids in self.map[client.id].items():
            other_ids = [e for e in range(self.setup.model.counts[block]) if e not in trained_ids]
            expert_ids[block], merged_scalars[f"{MERGED}{block}"] = trained_ids, -1
            if other_ids and len(trained_ids) < self.room[client.id][block]:
                expert_params = merged_expert(self.params, block, other_ids, usage[block])
                params |= expert_params
                place = next(place for key in expert_params if (place := expert_of(key)))[1]
                expert_ids[block], merged_scalars[f"{MERGED}{block}"] = tuple(sorted([*trained_ids, place])), place
        payload = self.setup.sub_moe(params, client.task, expert_ids, client)
        return Payload(payload.groups, {**payload.scalars, **merged_scalars})

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        params = super().expects(client, sent)["params"]
        counts = self.setup.model.counts.items()
        return {
            "params": {key: like for key, like in params.items() if not _is_merged(key, sent)},
            "demand": {block: Like((n,), torch.int64, 0, MOST) for block, n in counts},
            "utility": {block: Like((n,), torch.float32, 0) for block, n in counts},
        }

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean, clients = self.setup.mean(self.params, round), []
        for client, reply in replies:
            mean.add(reply.group("params"), reply.scalars["num_examples"])
            self.usage_of = self.usage_of | {client: shares(reply.group("demand"))}
            self._follow(client, reply.group("utility"))
            clients.append(client)
        self.params = mean.mean(self.params)
        for client in clients:
            self._choose(client, round)
        return mean.told()

    def _follow(self, client: ClientId, told: Params) -> None:
        """Update the utilities and training counts of the experts that a client has trained."""
        utility, rounds = {}, {}
        for block, trained_ids in self.map[client].items():
            total = self.setup.model.counts[block]
            mask_E = torch.zeros(total, dtype=torch.bool)
            mask_E[list(trained_ids)] = True
            old_utility_E = self.utility.get(client, {}).get(block, torch.zeros(total))
            old_rounds_E = self.tried.get(client, {}).get(block, torch.zeros(total))
            new_utility_E = torch.where(old_rounds_E > 0, (old_utility_E + told[block]) / 2, told[block])
            utility[block], rounds[block] = (
                torch.where(mask_E, new_utility_E, old_utility_E),
                old_rounds_E + mask_E.float(),
            )
        self.utility, self.tried = self.utility | {client: utility}, self.tried | {client: rounds}

    def structure(self) -> ExpertMap:
        return dict(self.map)

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        return {
            client: {block: p_E.tolist() for block, p_E in usage_by_block.items()}
            for client, usage_by_block in self.usage_of.items()
        }

    def state(self) -> Payload:
        tables = {"usage": self.usage_of, "utility": self.utility, "tried": self.tried}
        groups = {
            name: {
                f"{client}/{block}": t
                for client, tensors_by_block in tensors_by_client.items()
                for block, t in tensors_by_block.items()
            }
            for name, tensors_by_client in tables.items()
        }
        return Payload({"params": self.params, **groups}, {"flux": json.dumps(self.map)})

    def restore(self, state: Payload) -> None:
        super().restore(state)
        tables: list[dict[ClientId, dict[str, Any]]] = []
        for name in ("usage", "utility", "tried"):
            tensors_by_client: dict[ClientId, dict[str, Any]] = {}
            for key, tensor in state.group(name).items():
                client, _, block = key.partition("/")
                tensors_by_client.setdefault(client, {})[block] = tensor
            tables.append(tensors_by_client)
        self.usage_of, self.utility, self.tried = tables
        experts_by_client = json.loads(str(state.scalars["flux"]))
        self.map = {
            client: {block: tuple(ids) for block, ids in ids_by_block.items()}
            for client, ids_by_block in experts_by_client.items()
        }


def _is_merged(key: str, sent: Payload) -> bool:
    """Return True if a flat name belongs to a merged expert or to its router row."""
    place = expert_of(key) or router_row_of(key)
    return place is not None and sent.scalars.get(f"{MERGED}{place[0]}") == place[1]


class FluxClient(Client):
    """A client that trains its experts except the merged ones, and sends usage and utilities."""

    reveals: Mapping[str, Reveal] = {
        "demand": Reveal("usage", "exact"),
        "utility": Reveal("usage", "exact"),
    }

    def __init__(self, setup: MixtureSetup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        counts, expert_ids = self.setup.model.counts, experts_from_scalars(payload.scalars)
        sums = {block: torch.zeros(n) for block, n in counts.items()}
        batches = 0

        def make(model: TaskModel) -> Correct:
            names = table(model, expert_ids)

            def correct(trainable: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
                nonlocal batches
                batches += 1
                squares = {block: torch.zeros(n) for block, n in counts.items()}
                for path, p in trainable.items():
                    for i, key in enumerate((names[path],) if isinstance(names[path], str) else names[path]):
                        place = expert_of(key) or router_row_of(key)
                        if place is None or p.grad is None:
                            continue
                        grad = (
                            p.grad
                            if isinstance(names[path], str)
                            else p.grad.select(int(len(p) == 1 < len(names[path])), i)
                        )
                        if _is_merged(key, payload):
                            grad.zero_()
                        elif expert_of(key):
                            squares[place[0]][place[1]] += float(grad.float().square().sum())
                for block, square_E in squares.items():
                    sums[block] += square_E.sqrt()

            return correct

        _, reply = local_round(self.setup, payload, context, make, usage=True)
        params = {key: t for key, t in reply.group("params").items() if not _is_merged(key, payload)}
        utility = {block: total / max(batches, 1) for block, total in sums.items()}
        return Payload({"params": params, "demand": reply.group("demand"), "utility": utility}, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)
