"""The engine that carries payloads over a Flower Grid: every client gets a message of its own, and has until the
round's deadline to answer.

A client is its partition or its site's name, asked for whenever a node is new or was restarted, never Flower's number
for the node. Replies are taken one at a time as they arrive, lie in a file until the round is closed, and are merged
in the order of the clients' ids, so the result does not depend on who was fast. A message lives until the deadline
and is asked after only in its own round: what comes later enters no round. Who has not answered, or answered with an
error, is recorded with the reason; a round with fewer answers than the quorum is tried again, `ATTEMPTS` in all.
"""

import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from consilium.core import ClientId, ClientInfo, Payload, Scalar, Server
from consilium.engine.checkpoint import ClientStore
from consilium.engine.flower.records import blobs_of, payload_of, to_record
from consilium.engine.rounding import restored
from consilium.engine.rounds import Engine, Progress, diverged, release, told_of
from consilium.errors import PayloadError, RoundError
from consilium.experiment import Wire
from consilium.moe.budget import bytes_of, human

__all__ = ["ATTEMPTS", "FlowerEngine", "Roster", "ask", "within"]

ATTEMPTS = 3


@dataclass
class Roster:
    """Who is behind Flower's nodes.

    Args:
        names: partition number -> client id, of a simulation; (): a node says its site's name.
        poll: seconds between looks for answers. patience: seconds that a node has to say who it is.
    """

    grid: Grid
    names: Sequence[ClientId] = ()
    poll: float = 0.05
    patience: float = 180.0
    known: dict[tuple[int, str], ClientId] = field(default_factory=dict)
    """(Node, when it was last activated) -> client: a node that was restarted is asked again."""

    def strangers(self) -> dict[int, tuple[int, str]]:
        """Nodes that are connected and have not said who they are, with their keys in `known`."""
        return {node: key for node, key in self._online().items() if key not in self.known}

    def nodes(self) -> dict[ClientId, int]:
        """Client id -> node, of the nodes that are connected now.

        Raises:
            RoundError: if two nodes say the same name.
        """
        strangers = self.strangers()
        for node, reply in ask(self.grid, list(strangers), "name", {}, self.patience, self.poll):
            try:
                self.known[strangers[node]] = self._name(reply)
            except PayloadError as error:
                warnings.warn(f"a node does not say who it is: {error}", stacklevel=2)
        found: dict[ClientId, int] = {}
        for node, key in self._online().items():
            if (name := self.known.get(key)) is None:
                continue
            if name in found:
                raise RoundError(f"two nodes say that they are {name}; give every site a name of its own")
            found[name] = node
        return found

    def _online(self) -> dict[int, tuple[int, str]]:
        return {node.node_id: (node.node_id, node.last_activated_at) for node in self.grid.get_nodes()}

    def _name(self, reply: Message) -> ClientId:
        told = _checked(reply)["engine"]
        if "partition" in told and int(told["partition"]) < len(self.names):
            return self.names[int(told["partition"])]
        if "name" in told:
            return str(told["name"])
        raise PayloadError(f"it answers {dict(told)}")


def ask(
    grid: Grid, nodes: Sequence[int], what: str, told: Mapping[str, Scalar], seconds: float, poll: float
) -> Iterator[tuple[int, Message]]:
    """Send every node the same small query; yields (node, reply) as they arrive, within so many seconds."""
    content = {"engine": ConfigRecord(dict(told))}
    sent = {}
    for node in nodes:
        message = Message(RecordDict(dict(content)), dst_node_id=node, message_type=f"query.{what}", ttl=seconds)
        for identifier in grid.push_messages([message]):
            sent[node] = identifier
    for node, reply in _arrivals(grid, sent, time.monotonic() + seconds, poll):
        yield node, reply


def _arrivals(grid: Grid, sent: dict[Any, str], end: float, poll: float) -> Iterator[tuple[Any, Message]]:
    """Replies one at a time, as they arrive until `end` (of time.monotonic); what is still in `sent` then never came.

    A reply is released before the next is fetched.
    """
    while sent:
        found = False
        for key, identifier in list(sent.items()):
            for reply in grid.pull_messages([identifier]):
                found = True
                del sent[key]
                yield key, reply
                del reply
            if time.monotonic() > end and not found:
                return
        if time.monotonic() > end:
            return
        if not found:
            time.sleep(poll)


def within(cap: str, record: RecordDict, client: ClientId) -> int:
    """Bytes of a message's blobs: what crosses the wire, apart from some hundred bytes of Flower's own.

    Raises:
        PayloadError: if they are more, before compression, than may be sent.
    """
    arrays = record.array_records["payload"].values()
    size = sum(array.shape[0] for array in arrays)
    if size > bytes_of(cap):
        raise PayloadError(
            f"the payload of client {client} is {human(size)}, more than wire.cap {cap}: raise wire.cap, or send less "
            "(fewer experts, a smaller model, model.dtype bfloat16, wire.reply int8)"
        )
    return sum(len(array.data) for array in arrays)


@dataclass
class _Parked:
    """A reply that waits for its turn: its blobs in files, the rest here."""

    files: dict[str, Path]
    scalars: dict[str, Scalar]
    told: dict[str, Scalar]
    size: int

    def payload(self, cap: int) -> Payload:
        return payload_of(((group, path.read_bytes()) for group, path in self.files.items()), self.scalars, cap)


@dataclass
class FlowerEngine(Engine):
    """Carries payloads between a server half here and client halves behind a Grid.

    Args:
        server: the server half. infos: all clients.
        roster: the Grid, and who is behind its nodes.
        store: which state of each client counts; the states themselves lie with the clients.
        wire: deadline, quorum, cap.
        told: what every message tells the client's end: the experiment, the run.
        folder: where replies wait for their turn, in a folder that goes after every round.
        progress: see `Progress`; a client is one step.
    """

    server: Server
    infos: Sequence[ClientInfo]
    roster: Roster
    store: ClientStore
    wire: Wire
    told: Mapping[str, Scalar]
    folder: Path
    progress: Progress = lambda client, phase, done, total: None

    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        with tempfile.TemporaryDirectory(prefix=".replies-", dir=self.folder) as inbox:
            for attempt in range(1, ATTEMPTS + 1):
                missing: dict[ClientId, str] = {}
                arrived, down = self._exchange("train", number, tasks, missing, Path(inbox))
                if len(arrived) >= self.wire.quorum:
                    break
                if attempt == ATTEMPTS:
                    raise RoundError(_too_few(number, len(arrived), self.wire.quorum, missing))
            record["missing"] |= missing
            for client in sorted(arrived):
                reply, told = self._take(client, number, arrived.pop(client), tasks[client], down[client])
                record["clients"][client] = told
                if told["rejected"] is None:
                    yield client, reply
                release(reply)

    def _take(
        self, client: ClientId, number: int, parked: _Parked, sent: Payload, down: int
    ) -> tuple[Payload, dict[str, Any]]:
        """A reply out of its files, and what to record; notes which state of the client counts from now on."""
        told, info = parked.told, next(c for c in self.infos if c.id == client)
        try:
            reply = restored(parked.payload(bytes_of(self.wire.cap)), sent.group("params"))
            rejected = str(told.get("rejected") or "") or diverged(reply)
        except PayloadError as error:
            reply, rejected = Payload(), str(error)
        if rejected is None and told.get("kept"):
            self.store.versions[client] = number
        elif rejected is None:
            self.store.versions.pop(client, None)
        return reply, told_of(reply, info, rejected, float(told.get("seconds", 0.0)), down, parked.size)

    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        able = _Deliveries(self.server, [info for info in self.infos if self.server.unable(info) is None])
        with tempfile.TemporaryDirectory(prefix=".replies-", dir=self.folder) as inbox:
            arrived, _ = self._exchange("evaluate", number, able, record["untested"], Path(inbox))
        told = {client: arrived[client].scalars for client in sorted(arrived)}
        silent = [client for client, scalars in told.items() if not _is_score(scalars.get("score"))]
        record["untested"] |= dict.fromkeys(silent, "its answer has no score")
        return {client: scalars for client, scalars in told.items() if client not in silent}

    def _exchange(
        self, kind: str, number: int, tasks: Mapping[ClientId, Payload], missing: dict[ClientId, str], inbox: Path
    ) -> tuple[dict[ClientId, _Parked], dict[ClientId, int]]:
        """Send every client its payload and gather the answers until the deadline.

        Returns:
            Client -> its reply in files, and client -> bytes sent. `missing` is filled: who did not answer, and why.
        """
        nodes = self.roster.nodes()
        end = time.monotonic() + self.wire.deadline
        sent, down = self._send(kind, number, tasks, nodes, missing)
        arrived: dict[ClientId, _Parked] = {}
        for client, reply in _arrivals(self.roster.grid, sent, end, self.roster.poll):
            self.progress(client, "test" if kind == "evaluate" else "train", len(arrived) + 1, len(tasks))
            try:
                arrived[client] = _park(reply, inbox / client)
            except PayloadError as error:
                missing[client] = str(error)
        missing |= {client: f"no answer within {self.wire.deadline:g} s" for client in sent}
        return arrived, down

    def _send(
        self,
        kind: str,
        number: int,
        tasks: Mapping[ClientId, Payload],
        nodes: Mapping[ClientId, int],
        missing: dict[ClientId, str],
    ) -> tuple[dict[ClientId, str], dict[ClientId, int]]:
        """One message per client, built and handed over one after the other: client -> its id, client -> bytes."""
        sent: dict[ClientId, str] = {}
        down: dict[ClientId, int] = {}
        for client in sorted(tasks):
            if client not in nodes:
                missing[client] = "not connected"
                continue
            told = {
                **self.told,
                "client": client,
                "round": number,
                "version": self.store.versions.get(client, 0),
                "deadline": self.wire.deadline,
                "cap": self.wire.cap,
                "reply": self.wire.reply,
                "zstd": self.wire.zstd,
            }
            content = to_record(tasks[client], told, self.wire.zstd)
            down[client] = within(self.wire.cap, content, client)
            message = Message(
                content, dst_node_id=nodes[client], message_type=kind, ttl=self.wire.deadline, group_id=str(number)
            )
            for identifier in self.roster.grid.push_messages([message]):
                if identifier:
                    sent[client] = identifier
            if client not in sent:
                missing[client] = "its message was not taken"
        return sent, down


@dataclass
class _Deliveries(Mapping[ClientId, Payload]):
    """Client -> the model it would deploy, cut when it is looked up: one is in memory at a time."""

    server: Server
    infos: Sequence[ClientInfo]

    def __getitem__(self, client: ClientId) -> Payload:
        return self.server.deliver(next(info for info in self.infos if info.id == client))

    def __iter__(self) -> Iterator[ClientId]:
        return (info.id for info in self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _is_score(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _park(reply: Message, folder: Path) -> _Parked:
    """Write a reply's blobs to files.

    Raises:
        PayloadError: saying why the reply is none.
    """
    blobs, scalars, told = blobs_of(_checked(reply))
    folder.mkdir(exist_ok=True)
    files = {}
    for i, (group, blob) in enumerate(blobs.items()):
        files[group] = folder / str(i)
        files[group].write_bytes(blob)
    return _Parked(files, scalars, told, sum(map(len, blobs.values())))


def _checked(reply: Message) -> RecordDict:
    """A reply's content.

    Raises:
        PayloadError: if it is an error, with its reason in one line.
    """
    if reply.has_error():
        raise PayloadError(f"error {reply.error.code}: {_last_line(reply.error.reason)}")
    if "failed" in reply.content:
        raise PayloadError(str(reply.content["failed"]["reason"]))
    return reply.content


def _last_line(text: str) -> str:
    return next((line for line in reversed((text or "").strip().splitlines()) if line.strip()), "unknown")


def _too_few(number: int, arrived: int, quorum: int, missing: Mapping[ClientId, str]) -> str:
    reasons = Counter(missing.values()).most_common(2)
    why = "; ".join(f"{next(c for c, r in missing.items() if r == reason)}: {reason}" for reason, _ in reasons)
    return (
        f"round {number} had {arrived} answers in {ATTEMPTS} attempts, wire.quorum is {quorum} ({why}): look at the "
        "sites, then resume the run"
    )
