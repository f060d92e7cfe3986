"""A round of training in any engine: the calls of the server half, and the record of the round.

`Engine` is the interface that a run needs: `round(number, test)`. An engine defines how replies come back (`_replies`)
and how delivered models are scored (`_test`). `trained` and `tested` do a client's work in a round, in this process or
at the far end of a wire. Every reply is judged (`judge`) before the server half sees it. A rejected reply leaves no
trace but its line in the record, and the client's state is unchanged.

Every selected client is accounted for once (`ledger`): its reply was accepted, it answered with an error, its reply was
rejected, or it is missing. If fewer replies are accepted than the quorum, the round is abandoned. The server half
merges replies as they come, so it is then restored to its `state` before the round, and no client's new state counts.
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
"""Errors of a single client: of its data, its device or what it was sent. The round goes on without that client. All
other errors end the run."""

BEST = "engine/best/"
"""Prefix for a client's best model in the state that survives a round."""
PRIVATE = "engine/private/"
"""Prefix for the private parts of a client's model in its state, see `ClientContext.private`."""

REPORTED = 100
"""Largest number of a method's own values ("report/...") that the record takes from one reply."""

Progress = Callable[[ClientId, str, int, int], None]
"""A callback, called with (client, "train" or "test", steps done, steps in all)."""


class Engine(ABC):
    """An engine that carries payloads between a server and its clients, and meters them.

    Attributes:
        server: the server half.
        infos: all clients.
        store: the version of each client's state that counts, and the location of the states if they lie here.
        sampling: settings for the number of replies that a round needs.
        progress: see `Progress`.
    """

    server: Server
    infos: Sequence[ClientInfo]
    store: ClientStore
    sampling: Sampling
    progress: Progress

    @cached_property
    def clients(self) -> dict[ClientId, ClientInfo]:
        """Return all clients by their ids, in the order of `infos`."""
        return {info.id: info for info in self.infos}

    @abstractmethod
    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        """Yield accepted replies in client-id order.

        Fill `record["bytes_sent"]` (bytes), `record["clients"]` by `told_of`, `record["errors"]`, `record["missing"]`,
        `record["late"]` and `record["duplicate"]`.
        """

    @abstractmethod
    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        """Return what every able client reports on its delivered model, at least `score`; fill `record["untested"]`."""

    def round(self, number: int, test: bool, benched: Collection[ClientId] = ()) -> dict[str, Any]:
        """Run one round and return its record.

        Args:
            test: afterwards, score the delivered model of every able client on its test data.
            benched: clients that are not selected.

        Returns:
            The round's record: participants, bytes, seconds, scores. See docs/run-directory.md. A round that is
            "abandoned" takes time and changes nothing else.

        Raises:
            BudgetError: if no client can hold what the method sends.
            RoundError: if clients are benched and none of the others can train.
        """
        start = time.perf_counter()
        state_before, versions = _copied(self.server.state()), dict(self.store.versions)
        lacks_by_client = {c.id: lack for c in self.infos if (lack := self.server.unable(c))}
        infos = [c for c in self.infos if c.id not in benched]
        tasks = self.server.configure(number, infos) if infos else {}
        # Poisson sampling may draw no client at all.
        has_able_client = any(info.id not in lacks_by_client for info in infos)
        if not tasks and not has_able_client and benched:
            raise RoundError(f"nobody is left to train: benched are {', '.join(sorted(benched))}; see events.jsonl")
        if not tasks and not has_able_client:
            raise BudgetError(nobody(lacks_by_client))
        record: dict[str, Any] = {
            "round": number,
            "stage": self.server.stage,
            "selected": sorted(tasks),
            "unable": lacks_by_client,
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
        record["abandoned"] = self._short(record) or _broken(self.server.state(), state_before)
        if record["abandoned"]:
            self.server.events()  # drops the events of the undone round; earlier ones are part of `state_before`
            self.server.restore(state_before)
            self.store.versions = versions
            metrics = {}
        del state_before
        aggregation_end = time.perf_counter()
        test = test and not record["abandoned"]
        scalars_by_client = _scored(self._test(number, record), record) if test else {}
        scores = {client: float(scalars["score"]) for client, scalars in scalars_by_client.items()} if test else None
        measures = {
            name: {c: _plain(scalars[name]) for c, scalars in scalars_by_client.items() if name in scalars}
            for name in MEASURES
        }
        return record | {
            "test": scores,
            "scores": self._by_task(scores) if scores is not None else None,
            **{name: values for name, values in measures.items() if values},
            **({"recall": recall} if (recall := _recalls(scalars_by_client)) else {}),
            **_measured(record, start, aggregation_end),
            "experts_mean": _experts(self.server),
            "server": {name: _plain(value) for name, value in metrics.items()},
        }

    def _short(self, record: Mapping[str, Any]) -> str | None:
        """Return why the round does not count; None: enough replies were accepted."""
        ok_count, selected_count = record["ledger"]["ok"], len(record["selected"])
        if ok_count >= (quorum := self.sampling.quorum(selected_count)):
            return None
        rejections = {c: entry["rejected"] for c, entry in record["clients"].items() if entry["rejected"]}
        reasons = {**record["missing"], **record["errors"], **rejections}
        examples = "; ".join(f"{client}: {reason}" for client, reason in sorted(reasons.items())[:2])
        return (
            f"{ok_count} of {selected_count} selected clients counted, needed are {quorum} (sampling.min_clients "
            f"{self.sampling.min_clients}, sampling.min_fraction {self.sampling.min_fraction:g}): "
            f"{examples or 'no others'}"
        )

    def _by_task(self, scores: Mapping[ClientId, float]) -> dict[str, float]:
        """Return the mean score over the clients of each task, and the mean over the tasks."""
        tasks: dict[str, list[float]] = {}
        for info in self.infos:
            if info.id in scores:
                tasks.setdefault(info.task, []).append(scores[info.id])
        means = {task: sum(values) / len(values) for task, values in sorted(tasks.items())}
        return {**means, "mean": sum(means.values()) / len(means)} if means else {}


def trained(client: Client, payload: Payload, context: ClientContext, privacy: Privacy) -> tuple[Payload, float]:
    """Train one client; return the reply as it may leave the client (`disclosure`), and the wall-clock seconds.

    Args:
        privacy: the settings that hold at the client's site.

    Raises:
        PayloadError: for a payload that no client can start from, or for a reply with undeclared content.
    """
    start = time.perf_counter()
    check_sent(payload)
    with _apart(context), seeded(derive_seed(context.seed, "train")):  # for draws from torch's own generator
        reply = _a_payload(client.train(payload, context), client, "train")
    return disclosed(reply, client, privacy), time.perf_counter() - start


def _a_payload(reply: Any, client: Client, method: str) -> Payload:
    if not isinstance(reply, Payload):
        raise PayloadError(f"{type(client).__name__}.{method} returned {type(reply).__name__}, not a Payload")
    return reply


def tested(client: Client, payload: Payload, context: ClientContext, privacy: Privacy) -> tuple[Payload, Payload]:
    """Score the model that was delivered to one client.

    Args:
        privacy: the settings that hold at the client's site.

    Returns:
        The answer as it may leave the client (`disclosure`), and the full answer for the site's own record.

    Raises:
        PayloadError: for a payload that no client can start from, or for an answer with undeclared content.
    """
    check_sent(payload)
    with _apart(context), seeded(derive_seed(context.seed, "evaluate")):
        answer = _a_payload(client.evaluate(payload, context), client, "evaluate")
    return disclosed(answer, client, privacy), answer


@contextmanager
def _apart(context: ClientContext) -> Iterator[None]:
    """Keep a client's best model, and the private parts of its model, in its state but hidden from the method."""
    context.best, context.private = taken(context.state, BEST), taken(context.state, PRIVATE)
    try:
        yield
    finally:
        state = context.state
        for prefix, entries in ((BEST, context.best), (PRIVATE, context.private)):
            state.params = {**state.params, **{f"{prefix}{key}": tensor for key, tensor in entries.params.items()}}
            state.scalars = {**state.scalars, **{f"{prefix}{key}": value for key, value in entries.scalars.items()}}


def taken(state: ClientState, prefix: str) -> ClientState:
    """Move the entries with a prefix out of a state, and return them without the prefix."""
    entries = ClientState()
    for source, target in ((state.params, entries.params), (state.scalars, entries.scalars)):
        for key in [key for key in source if key.startswith(prefix)]:
            target[key.removeprefix(prefix)] = source.pop(key)
    return entries


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
        seconds: duration of its training, including validation.
        diverged: whether its loss or weights are not finite.
    """
    valid_numbers = numbers(reply.scalars)
    evaluate_seconds = min(valid_numbers.get("seconds_evaluate", 0.0), seconds)
    reported_items = (
        (key, value) for key, value in reply.scalars.items() if key.startswith("report/") and number(value)
    )
    report = {
        one_line(key[7:107]): float(value) if isinstance(value, float) else value
        for key, value in islice(reported_items, REPORTED)
    }
    return {
        "rejected": rejected,
        **({"diverged": True} if diverged else {}),
        "train_loss": valid_numbers.get("train_loss"),
        "validation": valid_numbers.get("validation"),
        "examples": info.num_examples,
        "steps": valid_numbers.get("steps"),
        "experts": valid_numbers.get("experts"),
        "cut": valid_numbers.get("cut"),
        **{name: valid_numbers.get(name) for name in MEASURES if name in reply.scalars},
        "peak_bytes_model": valid_numbers.get("footprint"),
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
        "seconds": {"train": seconds - evaluate_seconds, "evaluate": evaluate_seconds},
        **({"report": report} if report else {}),
    }


def release(reply: Payload) -> None:
    """Empty a reply that has been merged; the server's loop still refers to it while the next one is fetched."""
    object.__setattr__(reply, "groups", _RELEASED)


class _Released(dict):
    """The groups of a released reply, which raise an error when they are read."""

    def get(self, *_: Any) -> Any:
        raise PayloadError("this reply was released: `aggregate` merges each reply before it asks for the next")


_RELEASED = _Released()


def nobody(unable: Mapping[ClientId, str]) -> str:
    """Return the message for a federation in which no client can take part.

    Args:
        unable: client -> the reason.
    """
    client, lack = next(iter(unable.items()), ("?", "unknown"))
    return f"no client can hold the model: {len(unable)} are unable, e.g. {client} {lack}; give more memory"


def ledger(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the counts of a round, in which selected = ok + error + rejected + missing.

    Late and duplicate replies do not count. They are listed separately, as are the bytes of all payloads.

    Raises:
        RuntimeError: if a selected client is not accounted for, or more than once. This is a fault of the engine, or of
            the method if its `aggregate` does not take every reply.
    """
    selected_ids, clients = record["selected"], record["clients"]
    accounted_ids = sorted([*clients, *record["errors"], *record["missing"]])
    if accounted_ids != selected_ids:
        raise RuntimeError(f"round {record['round']} selected {selected_ids}, accounted for are {accounted_ids}")
    rejected_count = sum(entry["rejected"] is not None for entry in clients.values())
    return {
        "selected": len(selected_ids),
        "sent": len(record["bytes_sent"]),
        "ok": len(clients) - rejected_count,
        "error": len(record["errors"]),
        "rejected": rejected_count,
        "missing": len(record["missing"]),
        "late": sum(len(rounds) for rounds in record["late"].values()),
        "duplicate": sum(record["duplicate"].values()),
        "bytes": sum(record["bytes_sent"].values()) + sum(entry["bytes_up"] for entry in clients.values()),
    }


def _copied(state: Payload) -> Payload:
    """Return the state in new dictionaries, because a server may go on to change those that it returned."""
    return Payload({group: dict(params) for group, params in state.groups.items()}, dict(state.scalars))


def _broken(state: Payload, before: Payload) -> str | None:
    """Return why a state must not be committed, naming the values that are not finite; None: all are finite.

    A tensor that the round did not replace has been checked before.
    """
    bad_names = [
        f"{group} {key}"
        for group, params in state.groups.items()
        for key, tensor in params.items()
        if tensor is not before.groups.get(group, {}).get(key) and not finite(tensor)
    ]
    for name, value in state.scalars.items():
        items = value if isinstance(value, list) else [value]
        bad_names += [f"scalar {name}"] * any(isinstance(item, float) and not math.isfinite(item) for item in items)
    if not bad_names:
        return None
    suffix = f" and {len(bad_names) - 3} more" if len(bad_names) > 3 else ""
    return one_line(
        f"the server's new state is not finite ({', '.join(bad_names[:3])}{suffix}); the state before the round is "
        "kept. Lower the learning rates, or look for a client that sends huge numbers"
    )


def _scored(
    told: Mapping[ClientId, Mapping[str, Scalar]], record: dict[str, Any]
) -> dict[ClientId, Mapping[str, Scalar]]:
    """Return the clients that reported a score within 0..1, with their scalars; note the others as untested."""
    reasons = {
        client: one_line(f"its score is {scalars['score']!r}" if "score" in scalars else "its answer has no score")
        for client, scalars in told.items()
        if not number(scalars.get("score"), 0, 1)
    }
    record["untested"] |= reasons
    return {client: scalars for client, scalars in told.items() if client not in reasons}


def _recalls(told: Mapping[ClientId, Mapping[str, Scalar]]) -> dict[ClientId, dict[str, float]]:
    """Return client -> label -> recall: the share of the client's test examples of the label that were recognised.

    Clients that do not report it are left out.
    """
    recalls = {}
    for client, scalars in told.items():
        values = ((key, v) for key, v in scalars.items() if key.startswith("recall ") and number(v, 0, 1))
        if client_recalls := {
            one_line(key[7:107]): float(v) for key, v in islice(values, REPORTED) if isinstance(v, int | float)
        }:
            recalls[client] = client_recalls
    return recalls


def _measured(record: Mapping[str, Any], start: float, aggregated: float) -> dict[str, Any]:
    """Return the bytes, seconds and memory of a round.

    Args:
        start: `perf_counter` when the round began.
        aggregated: `perf_counter` when testing began.
    """
    now, clients = time.perf_counter(), record["clients"].values()
    train_seconds = sum(entry["seconds"]["train"] for entry in clients)
    evaluate_seconds = sum(entry["seconds"]["evaluate"] for entry in clients) + now - aggregated
    return {
        "bytes_down": sum(entry["bytes_down"] for entry in clients),
        "bytes_up": sum(entry["bytes_up"] for entry in clients),
        "seconds": {
            "round": now - start,
            "train": train_seconds,
            "evaluate": evaluate_seconds,
            "engine": max(now - start - train_seconds - evaluate_seconds, 0.0),
        },
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _experts(server: Server) -> float | None:
    counts = [sum(len(ids) for ids in ids_by_block.values()) for ids_by_block in (server.structure() or {}).values()]
    return sum(counts) / len(counts) if counts else None


def _plain(value: Any) -> Any:
    """Return a value if it is a finite number, else None."""
    return value if number(value) else None
