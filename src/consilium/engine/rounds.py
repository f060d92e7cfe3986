"""A round, whoever carries the payloads: what the server half is asked, and what is recorded of it.

`Engine` is the surface that a run needs: `round(number, test)`. An engine says how replies come back (`_replies`) and
how delivered models are scored (`_test`). What a client does in a round is `trained` and `tested`, in this process or
at the far end of a wire. Every reply is judged (`judge`) before the server half sees it; one that is rejected leaves
no trace but its line in the record, and the client's state stays what it was.

Every selected client is accounted for once: its reply was accepted, it answered with an error, its reply was rejected,
or it is missing (`ledger`). With fewer accepted replies than the quorum the round is abandoned: the server half, which
merges replies as they come, is restored to what `state` said before the round, and no client's state counts.
"""

import math
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

from consilium.core import (
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ClientState,
    Payload,
    Sampling,
    Scalar,
    Server,
    derive_seed,
)
from consilium.disclosure import disclosed
from consilium.engine.checkpoint import ClientStore
from consilium.engine.judge import MEASURES, check_sent, number, numbers
from consilium.errors import BudgetError, DataError, PayloadError, RoundError
from consilium.escape import one_line
from consilium.params import finite
from consilium.privacy import Privacy
from consilium.training import seeded

__all__ = ["OWN", "Engine", "Progress", "ledger", "nobody", "release", "tested", "told_of", "trained"]

OWN = (BudgetError, DataError, PayloadError)
"""Errors of one client, of its data, its device or what it was sent: the round goes on without it. Others end all."""

BEST = "engine/best/"
"""Begins the names of a client's best model among what survives a round on it."""
PRIVATE = "engine/private/"
"""Begins the names of what a client's model has for itself, see `ClientContext.private`."""

REPORTED = 100
"""Numbers of a method's own ("report/...") that the record takes of one reply."""

Progress = Callable[[ClientId, str, int, int], None]
"""Called with (client, "train" or "test", steps done, steps in all)."""


class Engine(ABC):
    """Carries payloads between a server and its clients, and meters them.

    Attributes:
        server: the server half. infos: all clients.
        store: which state of each client counts, and where states lie, if they lie here.
        sampling: how many replies a round needs. progress: see `Progress`.
    """

    server: Server
    infos: Sequence[ClientInfo]
    store: ClientStore
    sampling: Sampling
    progress: Progress

    @cached_property
    def clients(self) -> dict[ClientId, ClientInfo]:
        """All clients by their ids, in the order of `infos`."""
        return {info.id: info for info in self.infos}

    @abstractmethod
    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        """Accepted replies in client-id order; fills `record["bytes_sent"]` (bytes), `record["clients"]` by `told_of`,
        `record["errors"]` and `record["missing"]`, `record["late"]` and `record["duplicate"]`."""

    @abstractmethod
    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        """What every able client tells of its delivered model, `score` at least; fills `record["untested"]`."""

    def round(self, number: int, test: bool, benched: Collection[ClientId] = ()) -> dict[str, Any]:
        """Run one round; `test`: score the delivered model of every able client on its test data afterwards.

        Args:
            benched: clients that are not selected.

        Returns:
            The round's record: who took part, bytes, seconds, scores. See docs/run-directory.md. If it is "abandoned",
            nothing has changed but seconds.

        Raises:
            BudgetError: if no client can hold what the method sends.
            RoundError: if all clients are benched.
        """
        start = time.perf_counter()
        before, versions = _copied(self.server.state()), dict(self.store.versions)
        unable = {c.id: lack for c in self.infos if (lack := self.server.unable(c))}
        infos = [c for c in self.infos if c.id not in benched]
        tasks = self.server.configure(number, infos) if infos else {}
        able = any(info.id not in unable for info in infos)  # and nobody drawn, as may be under Poisson sampling
        if not tasks and not able and benched:
            raise RoundError(f"nobody is left to train: benched are {', '.join(sorted(benched))}; see events.jsonl")
        if not tasks and not able:
            raise BudgetError(nobody(unable))
        record: dict[str, Any] = {
            "round": number,
            "stage": self.server.stage,
            "selected": sorted(tasks),
            "unable": unable,
            "benched": sorted(benched),
            "bytes_sent": {},
            "errors": {},
            "missing": {},
            "late": {},
            "duplicate": {},
            "untested": {},
            "clients": {},
        }
        metrics = self.server.aggregate(number, self._replies(number, tasks, record))
        record["ledger"] = ledger(record)
        record["abandoned"] = self._short(record) or _broken(self.server.state(), before)
        if record["abandoned"]:
            self.server.events()  # of what is undone; those from before the round are part of its state
            self.server.restore(before)
            self.store.versions = versions
            metrics = {}
        del before
        aggregated = time.perf_counter()
        test = test and not record["abandoned"]
        told = _scored(self._test(number, record), record) if test else {}
        scores = {client: float(scalars["score"]) for client, scalars in told.items()} if test else None
        measures = {
            name: {c: _plain(scalars[name]) for c, scalars in told.items() if name in scalars} for name in MEASURES
        }
        return record | {
            "test": scores,
            "scores": self._by_task(scores) if scores is not None else None,
            **{name: values for name, values in measures.items() if values},
            **({"recall": recall} if (recall := _recalls(told)) else {}),
            **_measured(record, start, aggregated),
            "experts_mean": _experts(self.server),
            "server": {name: _plain(value) for name, value in metrics.items()},
        }

    def _short(self, record: Mapping[str, Any]) -> str | None:
        """Why the round does not count; None: enough replies were accepted."""
        ok, selected = record["ledger"]["ok"], len(record["selected"])
        if ok >= (quorum := self.sampling.quorum(selected)):
            return None
        rejected = {c: told["rejected"] for c, told in record["clients"].items() if told["rejected"]}
        reasons = {**record["missing"], **record["errors"], **rejected}
        some = "; ".join(f"{client}: {reason}" for client, reason in sorted(reasons.items())[:2])
        return (
            f"{ok} of {selected} selected clients counted, needed are {quorum} (sampling.min_clients "
            f"{self.sampling.min_clients}, sampling.min_fraction {self.sampling.min_fraction:g}): {some or 'no others'}"
        )

    def _by_task(self, scores: Mapping[ClientId, float]) -> dict[str, float]:
        """Mean over the clients of each task, and the mean over the tasks."""
        tasks: dict[str, list[float]] = {}
        for info in self.infos:
            if info.id in scores:
                tasks.setdefault(info.task, []).append(scores[info.id])
        means = {task: sum(values) / len(values) for task, values in sorted(tasks.items())}
        return {**means, "mean": sum(means.values()) / len(means)} if means else {}


def trained(client: Client, payload: Payload, context: ClientContext, privacy: Privacy) -> tuple[Payload, float]:
    """Train one client; return what leaves it of its reply (`disclosure`), and the wall seconds it took.

    Args:
        privacy: the settings that hold at the client's site.

    Raises:
        PayloadError: for a payload that no client can start from, or a reply with something that is not declared.
    """
    start = time.perf_counter()
    check_sent(payload)
    with _apart(context), seeded(derive_seed(context.seed, "train")):  # whatever draws from torch's own generator
        reply = _a_payload(client.train(payload, context), client, "train")
    return disclosed(reply, client, privacy), time.perf_counter() - start


def _a_payload(reply: Any, client: Client, method: str) -> Payload:
    if not isinstance(reply, Payload):
        raise PayloadError(f"{type(client).__name__}.{method} returned {type(reply).__name__}, not a Payload")
    return reply


def tested(client: Client, payload: Payload, context: ClientContext, privacy: Privacy) -> tuple[Payload, Payload]:
    """Score the model that one client was delivered.

    Args:
        privacy: the settings that hold at the client's site.

    Returns:
        What leaves the client of its answer (`disclosure`), and the answer itself, for the site's own record.

    Raises:
        PayloadError: for a payload that no client can start from, or an answer with something that is not declared.
    """
    check_sent(payload)
    with _apart(context), seeded(derive_seed(context.seed, "evaluate")):
        answer = _a_payload(client.evaluate(payload, context), client, "evaluate")
    return disclosed(answer, client, privacy), answer


@contextmanager
def _apart(context: ClientContext) -> Iterator[None]:
    """Keep a client's best model, and what its model has for itself, in its state, out of the method's sight."""
    context.best, context.private = taken(context.state, BEST), taken(context.state, PRIVATE)
    try:
        yield
    finally:
        state = context.state
        for prefix, kept in ((BEST, context.best), (PRIVATE, context.private)):
            state.params = {**state.params, **{f"{prefix}{key}": tensor for key, tensor in kept.params.items()}}
            state.scalars = {**state.scalars, **{f"{prefix}{key}": value for key, value in kept.scalars.items()}}


def taken(state: ClientState, prefix: str) -> ClientState:
    """Move what begins with a prefix out of a state, and return it without the prefix."""
    kept = ClientState()
    for mine, out in ((state.params, kept.params), (state.scalars, kept.scalars)):
        for key in [key for key in mine if key.startswith(prefix)]:
            out[key.removeprefix(prefix)] = mine.pop(key)
    return kept


def told_of(
    reply: Payload,
    info: ClientInfo,
    rejected: str | None,
    seconds: float,
    bytes_down: int,
    bytes_up: int,
    diverged: bool = False,
) -> dict[str, Any]:
    """Return the record of one client's round.

    Args:
        seconds: of its training, validation included. diverged: whether its loss or weights are not finite.
    """
    told = numbers(reply.scalars)
    evaluate = min(told.get("seconds_evaluate", 0.0), seconds)
    reported = ((key, value) for key, value in reply.scalars.items() if key.startswith("report/") and number(value))
    report = {
        one_line(key[7:107]): float(value) if isinstance(value, float) else value
        for key, value in islice(reported, REPORTED)
    }
    return {
        "rejected": rejected,
        **({"diverged": True} if diverged else {}),
        "train_loss": told.get("train_loss"),
        "validation": told.get("validation"),
        "examples": info.num_examples,
        "steps": told.get("steps"),
        "experts": told.get("experts"),
        "cut": told.get("cut"),
        **{name: told.get(name) for name in MEASURES if name in reply.scalars},
        "peak_bytes_model": told.get("footprint"),
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


def ledger(record: Mapping[str, Any]) -> dict[str, int]:
    """The round in numbers, of which selected = ok + error + rejected + missing; late and duplicate replies, which
    count for nothing, and the bytes of all payloads stand apart.

    Raises:
        RuntimeError: if a selected client is not accounted for, or twice: a fault of the engine or of the method, whose
            `aggregate` must take every reply.
    """
    selected, clients = record["selected"], record["clients"]
    accounted = sorted([*clients, *record["errors"], *record["missing"]])
    if accounted != selected:
        raise RuntimeError(f"round {record['round']} selected {selected}, accounted for are {accounted}")
    rejected = sum(told["rejected"] is not None for told in clients.values())
    return {
        "selected": len(selected),
        "sent": len(record["bytes_sent"]),
        "ok": len(clients) - rejected,
        "error": len(record["errors"]),
        "rejected": rejected,
        "missing": len(record["missing"]),
        "late": sum(len(rounds) for rounds in record["late"].values()),
        "duplicate": sum(record["duplicate"].values()),
        "bytes": sum(record["bytes_sent"].values()) + sum(told["bytes_up"] for told in clients.values()),
    }


def _copied(state: Payload) -> Payload:
    """The state in dictionaries of its own: a server may go on to change those that it gave."""
    return Payload({group: dict(params) for group, params in state.groups.items()}, dict(state.scalars))


def _broken(state: Payload, before: Payload) -> str | None:
    """Return why a state must not be committed, naming what is not finite in it; None if all of it is finite.

    A tensor that the round did not replace has been looked at before.
    """
    wrong = [
        f"{group} {key}"
        for group, params in state.groups.items()
        for key, tensor in params.items()
        if tensor is not before.groups.get(group, {}).get(key) and not finite(tensor)
    ]
    for name, value in state.scalars.items():
        items = value if isinstance(value, list) else [value]
        wrong += [f"scalar {name}"] * any(isinstance(item, float) and not math.isfinite(item) for item in items)
    if not wrong:
        return None
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return one_line(
        f"the server's new state is not finite ({', '.join(wrong[:3])}{more}); the state before the round is kept. "
        "Lower the learning rates, or look for a client that sends huge numbers"
    )


def _scored(
    told: Mapping[ClientId, Mapping[str, Scalar]], record: dict[str, Any]
) -> dict[ClientId, Mapping[str, Scalar]]:
    """Who has told a score within 0..1; the others are noted as untested."""
    silent = {
        client: one_line(f"its score is {scalars['score']!r}" if "score" in scalars else "its answer has no score")
        for client, scalars in told.items()
        if not number(scalars.get("score"), 0, 1)
    }
    record["untested"] |= silent
    return {client: scalars for client, scalars in told.items() if client not in silent}


def _recalls(told: Mapping[ClientId, Mapping[str, Scalar]]) -> dict[ClientId, dict[str, float]]:
    """Return client -> label -> share of its test examples of the label that were recognised, where clients tell it."""
    found = {}
    for client, scalars in told.items():
        values = ((key, v) for key, v in scalars.items() if key.startswith("recall ") and number(v, 0, 1))
        if own := {one_line(key[7:107]): float(v) for key, v in islice(values, REPORTED) if isinstance(v, int | float)}:
            found[client] = own
    return found


def _measured(record: Mapping[str, Any], start: float, aggregated: float) -> dict[str, Any]:
    """Bytes, seconds and memory of a round. start, aggregated: `perf_counter` when it began, and when testing did."""
    now, clients = time.perf_counter(), record["clients"].values()
    train = sum(c["seconds"]["train"] for c in clients)
    evaluate = sum(c["seconds"]["evaluate"] for c in clients) + now - aggregated
    return {
        "bytes_down": sum(c["bytes_down"] for c in clients),
        "bytes_up": sum(c["bytes_up"] for c in clients),
        "seconds": {
            "round": now - start,
            "train": train,
            "evaluate": evaluate,
            "engine": max(now - start - train - evaluate, 0.0),
        },
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _experts(server: Server) -> float | None:
    counts = [sum(len(ids) for ids in held.values()) for held in (server.structure() or {}).values()]
    return sum(counts) / len(counts) if counts else None


def _plain(value: Any) -> Any:
    """None for what is no finite number."""
    return value if number(value) else None
