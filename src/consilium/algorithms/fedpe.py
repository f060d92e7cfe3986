"""FedPE-style pruning and expanding of small models.

This follows the title of: Adaptive Model Pruning-Expanding for Federated Learning on Mobile Devices. IEEE Transactions
on Mobile Computing 23(11), 2024. No text, code, equation or number of this paper could be obtained. The method below is
therefore ours, and no published result can be compared with it. Related methods with sources are HeteroFL and FedRolex.

Client k has a sub-network: some units of every hidden layer. In each round in which it takes part:

    importance   s <- 0.9 s + 0.1 * mean over batches of |w . dL/dw|, summed over the weight and bias of a unit
    prune        drop the lowest units of every layer, a fraction rho_t = rho (1 + cos(pi t / T)) / 2; keep at least one
    expand       add the absent units with the highest importance to other clients, as long as the sub-network has no
                 more parameters than its budget
    gate         if the validation score has fallen by more than eps since the change, undo the change and halve the
                 client's rho
    server       every parameter becomes the mean over the clients that have it, by n_k; without any it keeps its value

    units   scalars "units/<layer>"    s   group "saliency": layer -> [units held]    budget   `shares`, as HeteroFL

The server chooses the units from the importances and validation scores that the clients send. `expand` False prunes
only, and `rho` 0 expands only. With `rho` 0 and `shares` 1 the method is FedAvg.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilium.algorithms.heterofl import HeteroFL, SubNetClient, SubNetServer, Units, units_from, window
from consilium.constraints import Fraction, Share
from consilium.core import Client, ClientContext, ClientId, ClientInfo, Payload, Reveal, Server, setting
from consilium.models.narrow import params_of
from consilium.moe.addressing import flatten
from consilium.params import Like
from consilium.setup import Setup
from consilium.training import trained

__all__ = ["FedPE", "expanded", "pruned"]

FORGET = 0.9
"""Weight of a unit's previous importance in the moving average."""


@dataclass(frozen=True)
class FedPE(HeteroFL):
    """Sub-networks that lose unimportant units and gain important ones.

    Args:
        shares: see HeteroFL; the budget of a client is the number of parameters of its sub-network there.
        rho: largest fraction of a layer's units that is pruned in a round, in [0, 1).
        eps: largest fall of the validation score for which a change is kept, in [0, 1].
        expand: whether pruned room is filled again.
    """

    rho: Fraction = setting(0.2, "server")
    eps: Share = setting(0.01, "server")
    expand: bool = setting(True, "server")

    def reads(self) -> frozenset[str]:
        return frozenset({"importances", "validation scores"})

    def server(self, setup: Setup) -> Server:
        return FedPEServer(setup, self)

    def client(self, setup: Setup) -> Client:
        return FedPEClient(setup)


def pruned(importance: Mapping[str, Mapping[int, float]], fraction: float) -> Units:
    """Return the units of every layer without the least important `fraction`; at least one unit stays.

    The number of pruned units is rounded down. Of two equal units, the one with the higher number is pruned first.

    Args:
        importance: layer -> unit -> importance.
        fraction: share of the units of each layer to prune, in [0, 1).
    """
    units = {}
    for layer, unit_importance in importance.items():
        order = sorted(unit_importance, key=lambda unit: (-unit_importance[unit], unit))
        units[layer] = sorted(order[: max(1, len(order) - int(fraction * len(order)))])
    return units


def expanded(units: Units, others: Mapping[str, Mapping[int, float]], size: Any, budget: int) -> Units:
    """Add the units that matter most to other clients, as long as `size(units)` <= budget.

    The importance of a unit is divided by the mean of its layer, so that layers can be compared.

    Args:
        units: layer -> units of the client.
        others: layer -> unit -> importance to the other clients.
        size: function that returns the number of parameters of a sub-network with given units.
        budget: largest number of parameters.

    Returns:
        Layer -> units, ascending.
    """
    new_units = {layer: list(ids) for layer, ids in units.items()}
    candidates = []
    for layer, unit_importance in others.items():
        mean = sum(unit_importance.values()) / max(len(unit_importance), 1) or 1.0
        candidates += [(s / mean, layer, unit) for unit, s in unit_importance.items() if unit not in new_units[layer]]
    for _, layer, unit in sorted(candidates, key=lambda item: (-item[0], item[1], item[2])):
        candidate = {**new_units, layer: sorted([*new_units[layer], unit])}
        if size(candidate) <= budget:
            new_units = candidate
    return new_units


class FedPEServer(SubNetServer):
    """A server that chooses the units of clients by importance.

    Attributes:
        held: client -> layer -> its units.
        known: client -> layer -> unit -> s.
        judged: client -> the validation score and the units before its last change, and its factor on rho.
    """

    def __init__(self, setup: Setup, algorithm: FedPE):
        super().__init__(setup, algorithm)
        self.held: dict[ClientId, Units] = {
            c: {link.name: window(link.units, share, 1, "static") for link in self.links[:-1]}
            for c, share in self.share.items()
        }
        self.budget = {c: params_of(self.links, units) for c, units in self.held.items()}
        self.known: dict[ClientId, dict[str, dict[int, float]]] = {}
        self.judged: dict[ClientId, dict[str, Any]] = {}
        self.log: list[dict[str, Any]] = []

    def units(self, client: ClientId) -> Units:
        return self.held[client]

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        saliency = {layer: Like((len(ids),), torch.float32, least=0) for layer, ids in units_from(sent).items()}
        return {**super().expects(client, sent), "saliency": saliency}

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        return None if "validation" in reply.scalars else "validation is missing"

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        validation_scores: dict[ClientId, float] = {}

        def noted() -> Iterable[tuple[ClientId, Payload]]:
            for client, reply in replies:
                self._note(client, reply.group("saliency"))
                validation_scores[client] = float(reply.scalars["validation"])
                yield client, reply

        self.params = self.merged(noted())
        for client in sorted(validation_scores):
            self._change(client, validation_scores[client], round)
        self.round = round + 1
        parameter_counts = [params_of(self.links, units) for units in self.held.values()]
        return {"parameters": sum(parameter_counts) / max(len(parameter_counts), 1)}

    def _note(self, client: ClientId, importance: Mapping[str, Tensor]) -> None:
        """Update the moving averages of a client's importances; a unit that is new starts at the reported value."""
        old_importance, new_importance = self.known.get(client, {}), {}
        for layer, ids in self.held[client].items():
            old_values = old_importance.get(layer, {})
            new_importance[layer] = {
                u: FORGET * old_values[u] + (1 - FORGET) * s if u in old_values else s
                for u, s in zip(ids, importance[layer].tolist(), strict=True)
            }
        self.known = self.known | {client: new_importance}

    def _change(self, client: ClientId, validation: float, round: int) -> None:
        """Undo the client's last change if its validation score fell too far; otherwise prune and expand."""
        algorithm, judgement = self.algorithm, self.judged.get(client, {"factor": 1.0})
        event = None
        if "units" in judgement and validation < judgement["score"] - algorithm.eps:
            units, judgement, event = judgement["units"], {"factor": judgement["factor"] / 2}, "rollback"
        else:
            horizon = max(self.setup.rounds, 1)
            decay = (1 + math.cos(math.pi * min(round / horizon, 1.0))) / 2 if self.setup.rounds else 1.0
            units = pruned(self.known[client], algorithm.rho * judgement["factor"] * decay)
            if algorithm.expand:
                units = expanded(units, self._others(client), lambda u: params_of(self.links, u), self.budget[client])
            if units != self.held[client]:
                old_count, new_count = (sum(map(len, u.values())) for u in (self.held[client], units))
                judgement = {**judgement, "score": validation, "units": self.held[client]}
                event = "grow" if new_count >= old_count else "shrink"
        if event:
            self.log.append({"event": event, "client": client, "experts": sum(map(len, units.values()))})
        self.held, self.judged = self.held | {client: units}, self.judged | {client: judgement}

    def _others(self, client: ClientId) -> dict[str, dict[int, float]]:
        """Return layer -> unit -> mean importance to the other clients that have the unit."""
        importances: dict[str, dict[int, list[float]]] = {link.name: {} for link in self.links[:-1]}
        for other in sorted(self.known.keys() - {client}):
            for layer, unit_values in self.known[other].items():
                for unit, s in unit_values.items():
                    importances[layer].setdefault(unit, []).append(s)
        return {
            layer: {u: sum(s) / len(s) for u, s in unit_values.items()} for layer, unit_values in importances.items()
        }

    def events(self) -> list[dict[str, Any]]:
        log, self.log = self.log, []
        return log

    def state(self) -> Payload:
        importances = {
            c: {layer: list(unit_values.items()) for layer, unit_values in layers.items()}
            for c, layers in self.known.items()
        }
        record = {"held": self.held, "known": importances, "judged": self.judged, "log": self.log, "round": self.round}
        return Payload({"params": self.params}, {"pe": json.dumps(record)})

    def restore(self, state: Payload) -> None:
        self.params, record = state.group("params"), json.loads(str(state.scalars["pe"]))
        self.held, self.judged, self.log, self.round = (record[k] for k in ("held", "judged", "log", "round"))
        self.known = {
            c: {layer: {int(u): s for u, s in unit_values} for layer, unit_values in layers.items()}
            for c, layers in record["known"].items()
        }


class FedPEClient(SubNetClient):
    """A client that trains its sub-network and measures the importance of each unit."""

    reveals: Mapping[str, Reveal] = {
        "saliency": Reveal("usage", "exact"),
        "validation": Reveal("score", "less"),
    }

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        model, layers = self.build(payload, context), units_from(payload)
        sums, batches = {layer: torch.zeros(len(ids)) for layer, ids in layers.items()}, 0

        def measure(trainable: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
            nonlocal batches
            batches += 1
            for layer, total in sums.items():
                for leaf in ("weight", "bias"):
                    p = trainable[f"{layer}.{leaf}"]
                    total += (p.detach() * p.grad).reshape(len(p), -1).sum(1).abs().cpu()

        scalars = trained(self.setup, model, context, correct=measure)
        saliency = {layer: total / max(batches, 1) for layer, total in sums.items()}
        return Payload({"params": flatten(model), "saliency": saliency}, scalars)
