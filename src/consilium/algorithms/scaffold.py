"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. ICML 2020. https://arxiv.org/abs/1910.06378

Algorithm 1: y_i <- y_i - eta_l * (g_i(y_i) - c_i + c); c_i+ <- c_i - c + (x - y_i) / (K eta_l) (option II);
x <- x + eta_g / |S| * sum (y_i - x); c <- c + 1/N * sum (c_i+ - c_i).

    x, y_i   params                      c      group "control" down      c_i    context.state.params
    eta_l    SCAFFOLD.eta_l              eta_g  SCAFFOLD.eta_g            N      able clients; a head row's: see below

Departures: c_i+ is computed as the mean of the K raw gradients g_i(y_i). Under plain SGD this equals option II exactly
(unroll the sum), and it stays defined with gradient clipping. Momentum and weight decay would break the identity, so
`fit.momentum` and `fit.weight_decay` must be 0. `fit.clip` applies to g_i - c_i + c, which is not in the paper; use
`fit.clip 0` for the paper's method. The clients' optimiser is SGD whatever `fit.optimizer` says, so compare also with
FedAvg at `fit.optimizer sgd`. Keys that a client does not hold (heads of other tasks) are left out of every sum. The
server does not know which client has which label, so N of a head row counts the clients that have sent the row so far.
With a larger N, c would not be the mean of the c_i, and it would cancel most of that row's gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.constraints import Rate, Scale
from consilium.core import (
    Algorithm,
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    Payload,
    Reveal,
    Server,
    experts_from_scalars,
    setting,
)
from consilium.errors import ConfigError
from consilium.moe.addressing import pack, parameters, select, table, unpack
from consilium.moe.model import TaskModel
from consilium.params import Like, Params, WeightedMean
from consilium.setup import Setup
from consilium.training import Correct, local_round, local_test

__all__ = ["SCAFFOLD"]

REFERENCES = 3  # c, c_i and the running sum of gradients, in addition to the trained weights


@dataclass(frozen=True)
class SCAFFOLD(Algorithm):
    """Federated averaging with control variates.

    Args:
        eta_l: learning rate of the clients' SGD, > 0; the heads' rate is eta_l * fit.head_lr / fit.lr.
        eta_g: learning rate of the server, > 0.
        experts: see FedAvg.
    """

    merges: ClassVar[bool] = False
    eta_l: Rate = setting(0.1, "lr")
    eta_g: Scale = setting(1.0, "server")
    experts: int | Literal["all", "fit"] = setting("all", "server")
    dense: ClassVar[bool] = True

    def server(self, setup: Setup) -> Server:
        return ScaffoldServer(self._sgd(setup), self)

    def client(self, setup: Setup) -> Client:
        return ScaffoldClient(self._sgd(setup))

    def _sgd(self, setup: Setup) -> Setup:
        """Return the set-up with the method's own optimiser, so that the memory model counts this optimiser.

        Raises:
            ConfigError: if momentum or weight decay is not 0.
        """
        for name in ("momentum", "weight_decay"):
            if value := getattr(setup.fit, name):
                raise ConfigError(f"fit.{name} is {value:g}; with SCAFFOLD it must be 0")
        head_lr = setup.fit.head_lr / setup.fit.lr * self.eta_l
        return replace(setup, fit=replace(setup.fit, optimizer="sgd", lr=self.eta_l, head_lr=head_lr))


class ScaffoldServer(Server):
    """A server that samples clients and sends weights as FedAvg does, and control variates in addition."""

    def __init__(self, setup: Setup, algorithm: SCAFFOLD):
        expert_ids = common_experts(setup, algorithm.experts, references=REFERENCES)
        self.averaging = FedAvgServer(setup, expert_ids, references=REFERENCES)
        self.eta_g = algorithm.eta_g
        self.control: Params = {key: torch.zeros_like(t) for key, t in self.params.items()}
        self.able = sum(self.unable(client) is None for client in setup.clients)
        self.senders: dict[str, set[ClientId]] = {}

    @property
    def params(self) -> Params:
        return self.averaging.params

    def unable(self, client: ClientInfo) -> str | None:
        return self.averaging.unable(client)

    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        tasks = {client.id: client.task for client in clients}
        return {
            client: Payload(
                {**payload.groups, "control": select(self.control, tasks[client], self.averaging.held)},
                payload.scalars,
            )
            for client, payload in self.averaging.configure(round, clients).items()
        }

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean, sums = WeightedMean(), {}
        old_counts = {key: len(clients) for key, clients in self.senders.items()}
        for client, reply in replies:
            mean.add(reply.group("params"), 1.0)
            for key, delta in reply.group("control").items():
                sums[key] = sums.get(key, 0) + delta.double()
                if key.startswith("head."):
                    self.senders.setdefault(key, set()).add(client)
        for key, average in mean.mean(self.params).items():
            step = average.double() - self.params[key].double()
            self.params[key] = (self.params[key].double() + self.eta_g * step).to(average.dtype)
        for key, step in sums.items():
            n = len(self.senders[key]) if key in self.senders else self.able
            # c is the mean over `old_count` clients so far.
            old_count = old_counts.get(key, 0) if key in self.senders else n
            self.control[key] = ((self.control[key].double() * old_count + step) / n).to(self.control[key].dtype)
        return {}

    def deliver(self, client: ClientInfo) -> Payload:
        return self.averaging.deliver(client)

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        """Return the tensors that a reply must have; control variates exist only for keys that the client trains."""
        control = {key: Like.of(t, needed=False) for key, t in sent.group("control").items()}
        return {**super().expects(client, sent), "control": control}

    def state(self) -> Payload:
        senders = {f"senders {key}": sorted(clients) for key, clients in self.senders.items()}
        return Payload({"params": self.params, "control": self.control}, senders)

    def restore(self, state: Payload) -> None:
        self.averaging.params = state.group("params")
        self.control = state.group("control")
        self.senders = {key.partition(" ")[2]: set(clients) for key, clients in state.scalars.items()}


class ScaffoldClient(Client):
    """A client that steps along g - c_i + c and keeps c_i in its state."""

    reveals: Mapping[str, Reveal] = {"control": Reveal("update", "exact")}

    def __init__(self, setup: Setup):
        self.setup = setup

    def train(self, payload: Payload, context: ClientContext) -> Payload:
        expert_ids = experts_from_scalars(payload.scalars)
        c_i = {k: torch.zeros_like(t) for k, t in payload.group("params").items()} | context.state.params
        variates = Controlled(payload.group("control"), c_i)

        def correct(model: TaskModel) -> Correct:
            return variates.attach(model, expert_ids)

        model, reply = local_round(self.setup, payload, context, correct, references=REFERENCES)
        new_c_i = {k: t.clone() for k, t in unpack(table(model, expert_ids), variates.mean_gradient()).items()}
        # Send the dtype that was received: some modules change theirs, e.g. Switch's routers are float32 after a run.
        control = {key: (new_c_i[key] - c_i[key]).to(payload.groups["control"][key].dtype) for key in new_c_i}
        context.state.params = new_c_i
        return Payload({**reply.groups, "control": control}, reply.scalars)

    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        return local_test(self.setup, payload, context)


class Controlled:
    """A gradient correction that adds c - c_i to each gradient and keeps the running sum of the raw gradients."""

    def __init__(self, c: Params, c_i: Params):
        self.c, self.c_i = c, c_i
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def attach(self, model: TaskModel, held) -> Correct:
        trainable = {path for path, p in parameters(model).items() if p.requires_grad}
        names = {path: name for path, name in table(model, held).items() if path in trainable}
        names = {path: name for path, name in names.items() if isinstance(name, tuple) or name in self.c_i}
        c, c_i = pack(names, self.c), pack(names, self.c_i)
        shift = {path: (c[path] - c_i[path]) for path in c}

        def correct(trainable: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
            self.steps += 1
            for path, p in trainable.items():
                if path not in shift:  # A private parameter has no control variate, see `fit.lora.rule`.
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                total = self.sums.setdefault(path, torch.zeros_like(p, dtype=torch.float32))
                total.add_(p.grad)
                p.grad.add_(shift[path].to(p.device))

        return correct

    def mean_gradient(self) -> dict[str, torch.Tensor]:
        """Return path -> mean raw gradient over the K steps."""
        return {path: (total / self.steps).cpu() for path, total in self.sums.items()}
