"""The engine that runs everybody in one process, one client after the other.

Lazy: a client's model exists while it works, and one reply is in memory at a time: it is emptied as soon as the
server asks for the next. With `strict`, every payload is turned into bytes and back on its way, as between machines.
A reply with a number that is not finite is not given to the server, and the client's state stays what it was: one
client that diverged would undo all others.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from consilium.core import Client, ClientContext, ClientId, ClientInfo, Payload, Server, derive_seed
from consilium.data.task import Federation
from consilium.engine.checkpoint import ClientStore
from consilium.engine.codec import decode, encode
from consilium.errors import BudgetError, PayloadError
from consilium.training import seeded

__all__ = ["LocalEngine", "Progress", "nobody"]

Progress = Callable[[ClientId, str, int, int], None]
"""Called with (client, "train" or "test", steps done, steps in all)."""

REPORTED = ("train_loss", "validation", "steps", "experts", "footprint")


@dataclass
class LocalEngine:
    """Carries payloads between a server and its clients in this process, and meters them.

    Args:
        server, client: the two halves of a method.
        infos: all clients; federation: their data.
        store: where client states live between rounds.
        seed: of the run. device: where clients train. strict: through bytes.
        progress: see `Progress`.
    """

    server: Server
    client: Client
    infos: Sequence[ClientInfo]
    federation: Federation
    store: ClientStore
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strict: bool = False
    progress: Progress = lambda client, phase, done, total: None

    def round(self, number: int, test: bool) -> dict[str, Any]:
        """Run one round; `test`: score the delivered model of every able client on its test data afterwards.

        Returns:
            The round's record: who took part, bytes, seconds, scores. See docs/run-directory.md.

        Raises:
            BudgetError: if no client can hold what the method sends.
        """
        start = time.perf_counter()
        unable = {c.id: lack for c in self.infos if (lack := self.server.unable(c))}
        tasks = self.server.configure(number, self.infos)
        if not tasks:
            raise BudgetError(nobody(unable))
        record: dict[str, Any] = {
            "round": number,
            "stage": self.server.stage,
            "selected": sorted(tasks),
            "unable": unable,
            "clients": {},
        }
        metrics = self.server.aggregate(number, self._replies(number, tasks, record["clients"]))
        aggregated = time.perf_counter()
        scores = self._test(number) if test else None
        tested = time.perf_counter() - aggregated
        clients = record["clients"].values()
        train = sum(c["seconds"]["train"] for c in clients)
        evaluate = sum(c["seconds"]["evaluate"] for c in clients)
        whole = time.perf_counter() - start
        structure = self.server.structure()
        counts = [sum(len(ids) for ids in held.values()) for held in (structure or {}).values()]
        record |= {
            "test": scores,
            "scores": self._by_task(scores) if scores else None,
            "bytes_down": sum(c["bytes_down"] for c in clients),
            "bytes_up": sum(c["bytes_up"] for c in clients),
            "seconds": {
                "round": whole,
                "train": train,
                "evaluate": evaluate + tested,
                "engine": max(whole - train - evaluate - tested, 0.0),
            },
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "experts_mean": sum(counts) / len(counts) if counts else None,
            "server": metrics,
        }
        return record

    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], records: dict[ClientId, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        for client in sorted(tasks):
            reply, records[client] = self._train(client, number, tasks.pop(client))
            if records[client]["rejected"] is None:
                yield client, reply
            # The server's loop still names this reply while the next client trains.
            object.__setattr__(reply, "groups", _RELEASED)

    def _train(self, client: ClientId, number: int, payload: Payload) -> tuple[Payload, dict[str, Any]]:
        """One client's round: its reply, and what to record of it."""
        sent = self._carry(payload)
        context = self._context(client, number, "train")
        start = time.perf_counter()
        with seeded(derive_seed(context.seed, "train")):  # whatever draws from torch's own generator
            reply = self.client.train(sent, context)
        seconds = time.perf_counter() - start
        rejected = diverged(reply)
        if rejected is None:
            self.store.save(client, context.state, number)
        reply = self._carry(reply)
        told = {key: _plain(reply.scalars.get(key)) for key in REPORTED}
        evaluate = float(reply.scalars.get("seconds_evaluate", 0.0))
        report = {key[7:]: _plain(v) for key, v in reply.scalars.items() if key.startswith("report/")}
        return Payload(reply.groups, reply.scalars), {
            "rejected": rejected,
            "train_loss": told["train_loss"],
            "validation": told["validation"],
            "examples": context.info.num_examples,
            "steps": told["steps"],
            "experts": told["experts"],
            "peak_bytes_model": told["footprint"],
            "bytes_down": sent.nbytes,
            "bytes_up": reply.nbytes,
            "seconds": {"train": seconds - evaluate, "evaluate": evaluate},
            **({"report": report} if report else {}),
        }

    def _test(self, number: int) -> dict[ClientId, float]:
        scores = {}
        for done, info in enumerate(self.infos):
            self.progress(info.id, "test", done, len(self.infos))
            if self.server.unable(info) is None:
                context = self._context(info.id, number, "test")
                with seeded(derive_seed(context.seed, "evaluate")):
                    reply = self.client.evaluate(self._carry(self.server.deliver(info)), context)
                scores[info.id] = float(self._carry(reply).scalars["score"])
        return scores

    def _context(self, client: ClientId, number: int, phase: str) -> ClientContext:
        def steps(done: int, total: int) -> None:
            self.progress(client, phase, done, total)

        info = next(c for c in self.infos if c.id == client)
        return ClientContext(
            info=info,
            data=self.federation.clients[client],
            device=self.device,
            seed=derive_seed(self.seed, "client", number, client),
            state=self.store.load(client),
            progress=steps,
        )

    def _carry(self, payload: Payload) -> Payload:
        return decode(encode(payload)) if self.strict else payload

    def _by_task(self, scores: Mapping[ClientId, float]) -> dict[str, float]:
        """Mean over the clients of each task, and the mean over the tasks."""
        tasks: dict[str, list[float]] = {}
        for info in self.infos:
            if info.id in scores:
                tasks.setdefault(info.task, []).append(scores[info.id])
        means = {task: sum(values) / len(values) for task, values in sorted(tasks.items())}
        return {**means, "mean": sum(means.values()) / len(means)} if means else {}


class _Released(dict):
    """Groups of a reply whose turn is over."""

    def get(self, *_: Any) -> Any:
        raise PayloadError("this reply was released: `aggregate` merges each reply before it asks for the next")


_RELEASED = _Released()


def nobody(unable: Mapping[ClientId, str]) -> str:
    """The message for a federation in which no client can take part; `unable`: client -> why."""
    client, lack = next(iter(unable.items()), ("?", "unknown"))
    return f"no client can hold the model: {len(unable)} are unable, e.g. {client} {lack}; give more memory"


def diverged(reply: Payload) -> str | None:
    """The first value of a reply that is not finite, tensors and training loss; None if all are."""
    for group, tensors in reply.groups.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{group} {key} is not finite"
    loss = reply.scalars.get("train_loss")
    return f"train_loss is {loss}" if isinstance(loss, float) and not math.isfinite(loss) else None


def _plain(value: Any) -> Any:
    """None for what strict JSON cannot say: the loss of a training that diverged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
