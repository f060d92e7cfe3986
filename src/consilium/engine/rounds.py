"""A round, whoever carries the payloads: what the server half is asked, and what is recorded of it.

`Engine` is the surface that a run needs: `round(number, test)`. An engine says how replies come back (`_replies`) and
how delivered models are scored (`_test`). What a client does in a round is `trained` and `tested`, in this process or
at the far end of a wire. A reply with a number that is not finite is not given to the server, and the client's state
stays what it was: one client that diverged would undo all others.
"""

import math
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from consilium.core import Client, ClientContext, ClientId, ClientInfo, Payload, Scalar, Server, derive_seed
from consilium.engine.checkpoint import ClientStore
from consilium.errors import BudgetError, PayloadError
from consilium.training import seeded

__all__ = ["Engine", "Progress", "diverged", "nobody", "release", "tested", "told_of", "trained"]

Progress = Callable[[ClientId, str, int, int], None]
"""Called with (client, "train" or "test", steps done, steps in all)."""

REPORTED = ("train_loss", "validation", "steps", "experts", "footprint", "cut")


class Engine(ABC):
    """Carries payloads between a server and its clients, and meters them.

    Attributes:
        server: the server half. infos: all clients.
        store: which state of each client counts, and where states lie, if they lie here.
        progress: see `Progress`.
    """

    server: Server
    infos: Sequence[ClientInfo]
    store: ClientStore
    progress: Progress

    @abstractmethod
    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        """Replies in client-id order; fills `record["clients"]` by `told_of` and `record["missing"]`."""

    @abstractmethod
    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        """What every able client tells of its delivered model, `score` at least; fills `record["untested"]`."""

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
            "missing": {},
            "untested": {},
            "clients": {},
        }
        metrics = self.server.aggregate(number, self._replies(number, tasks, record))
        aggregated = time.perf_counter()
        told = self._test(number, record) if test else {}
        scores = {client: float(scalars["score"]) for client, scalars in told.items()} if test else None
        perplexity = {c: _plain(scalars["perplexity"]) for c, scalars in told.items() if "perplexity" in scalars}
        tested = time.perf_counter() - aggregated
        clients = record["clients"].values()
        train = sum(c["seconds"]["train"] for c in clients)
        evaluate = sum(c["seconds"]["evaluate"] for c in clients)
        whole = time.perf_counter() - start
        structure = self.server.structure()
        counts = [sum(len(ids) for ids in held.values()) for held in (structure or {}).values()]
        record |= {
            "test": scores,
            "scores": self._by_task(scores) if scores is not None else None,
            **({"perplexity": perplexity} if perplexity else {}),
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

    def _by_task(self, scores: Mapping[ClientId, float]) -> dict[str, float]:
        """Mean over the clients of each task, and the mean over the tasks."""
        tasks: dict[str, list[float]] = {}
        for info in self.infos:
            if info.id in scores:
                tasks.setdefault(info.task, []).append(scores[info.id])
        means = {task: sum(values) / len(values) for task, values in sorted(tasks.items())}
        return {**means, "mean": sum(means.values()) / len(means)} if means else {}


def trained(client: Client, payload: Payload, context: ClientContext) -> tuple[Payload, float]:
    """One client's training: its reply, and the wall seconds it took."""
    start = time.perf_counter()
    with seeded(derive_seed(context.seed, "train")):  # whatever draws from torch's own generator
        reply = client.train(payload, context)
    return reply, time.perf_counter() - start


def tested(client: Client, payload: Payload, context: ClientContext) -> Payload:
    """One client's score of the model it was delivered."""
    with seeded(derive_seed(context.seed, "evaluate")):
        return client.evaluate(payload, context)


def told_of(
    reply: Payload, info: ClientInfo, rejected: str | None, seconds: float, bytes_down: int, bytes_up: int
) -> dict[str, Any]:
    """What is recorded of one client's round. `seconds`: of its training, validation included."""
    told = {key: _plain(reply.scalars.get(key)) for key in REPORTED}
    evaluate = float(reply.scalars.get("seconds_evaluate", 0.0))
    report = {key[7:]: _plain(value) for key, value in reply.scalars.items() if key.startswith("report/")}
    return {
        "rejected": rejected,
        "train_loss": told["train_loss"],
        "validation": told["validation"],
        "examples": info.num_examples,
        "steps": told["steps"],
        "experts": told["experts"],
        "cut": told["cut"],
        **({"perplexity": _plain(reply.scalars["perplexity"])} if "perplexity" in reply.scalars else {}),
        "peak_bytes_model": told["footprint"],
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
        "seconds": {"train": seconds - evaluate, "evaluate": evaluate},
        **({"report": report} if report else {}),
    }


def release(reply: Payload) -> None:
    """Empty a reply whose turn is over: the server's loop still names it while the next one is fetched."""
    object.__setattr__(reply, "groups", _RELEASED)


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
