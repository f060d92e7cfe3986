"""The engine that carries payloads over a Flower Grid: one message per client, with a deadline for the answer.

`roster` identifies the clients behind the nodes. Replies are taken one at a time as they arrive, stored in files until
the round is closed, and merged in the order of the clients' ids, so the result does not depend on which client was
fast. A message lives until the round's deadline. A client that has not answered by then is missing. If it answers
within the next `LATE` rounds, its answer is recorded there as late and discarded, like every answer of a client after
its first. An answer is recorded with the reason if it is an error, is not a reply of this protocol, or belongs to
another round. None of these stops the round.
"""

import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from consilium.core import ClientId, ClientInfo, Payload, Sampling, Scalar, Server
from consilium.engine import codec
from consilium.engine.checkpoint import ClientStore
from consilium.engine.flower.heap import give_back
from consilium.engine.flower.held import Held
from consilium.engine.flower.records import PROTOCOL, blobs_of, payload_in, stamp, to_record, unpacked
from consilium.engine.flower.roster import Roster, arrivals, failed
from consilium.engine.judge import SECONDS, objection
from consilium.engine.judge import number as is_number
from consilium.engine.rounding import restored, travelling
from consilium.engine.rounds import Engine, Progress, release, told_of
from consilium.errors import PayloadError, shown
from consilium.escape import one_line
from consilium.experiment import Wire
from consilium.moe.budget import bytes_of, human
from consilium.params import Like

__all__ = ["FlowerEngine", "within"]

LATE = 3
"""Number of later rounds in which an overdue answer is still looked for."""
WORDS = 4_000_000
"""Largest size in bytes of a reply's scalars, which wait in memory for their turn."""
NOBODY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors that Flower's own server returns in place of an answer that never came."""


def within(cap: str, record: RecordDict, client: ClientId) -> int:
    """Return the bytes of a message's blobs, which cross the wire along with some hundred bytes of Flower's own.

    Raises:
        PayloadError: if the blobs are larger, before compression, than the cap.
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
    """A reply that waits for its turn: its blobs are in files, decompressed, and the rest is in memory."""

    files: dict[str, Path] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    told: dict[str, Scalar] = field(default_factory=dict)
    size: int = 0
    rejected: str | None = None

    def payload(self) -> Payload:
        return payload_in(self.files, self.scalars)


@dataclass
class FlowerEngine(Engine):
    """An engine that carries payloads between a server half here and client halves behind a Grid.

    Args:
        server: the server half.
        infos: all clients.
        roster: the Grid, and the clients behind its nodes.
        store: the version of each client's state that counts; the states themselves lie with the clients.
        wire: deadline, cap.
        told: metadata in every message to a client: the experiment, the run.
        folder: folder for replies that wait for their turn, in a subfolder that is removed after every round, and for
            "sent", the weights that clients hold if only changes are sent to them.
        progress: see `Progress`; a client is one step.
        sampling: settings for the number of replies that a round needs.
    """

    server: Server
    infos: Sequence[ClientInfo]
    roster: Roster
    store: ClientStore
    wire: Wire
    told: Mapping[str, Scalar]
    folder: Path
    progress: Progress = lambda client, phase, done, total: None
    sampling: Sampling = field(default_factory=Sampling)
    held: Held = field(init=False)
    overdue: dict[str, tuple[ClientId, int]] = field(default_factory=dict)
    """Message that was not answered in time -> the client it went to, its round."""

    def __post_init__(self) -> None:
        self.held = Held(self.folder / "sent")

    def round(self, number: int, test: bool, benched: Collection[ClientId] = ()) -> dict[str, Any]:
        """Run a round, see `Engine.round`; the record also has the clients with a "refused" node, and the reasons."""
        record, news = super().round(number, test, benched), self.roster.news
        self.roster.news = {}
        give_back()  # frees the model that this round has replaced, in small tensors
        return record | ({"refused": news} if news else {})

    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        with tempfile.TemporaryDirectory(prefix=".replies-", dir=self.folder) as inbox:
            parked_replies = self._exchange("train", number, tasks, record, Path(inbox))
            for client in sorted(parked_replies):
                reply, client_record = self._take(
                    client, number, parked_replies.pop(client), tasks[client], record["bytes_sent"][client]
                )
                record["clients"][client] = client_record
                if client_record["rejected"] is None:
                    yield client, reply
                release(reply)
                give_back()

    def _take(
        self, client: ClientId, number: int, parked: _Parked, sent: Payload, down: int
    ) -> tuple[Payload, dict[str, Any]]:
        """Read a reply from its files, and return it with its record.

        The version of the client's state that counts from now on is noted.
        """
        metadata, info = parked.told, self.clients[client]
        if self.wire.send != "exact":
            sent = self.held.sent(client, number, sent)
        try:
            reply = restored(parked.payload(), sent.group("params"))
            rejection = parked.rejected or one_line(metadata.get("rejected") or "")
            rejection = rejection or objection(self.server, info, sent, reply)
            for name, expected_value in stamp({**self.told, "round": number}).items():
                if not rejection and metadata.get(name) != expected_value:
                    rejection = one_line(
                        f"it answers {name} {shown(metadata.get(name))}, this is {name} {shown(expected_value)}"
                    )
        except PayloadError as error:
            reply, rejection = Payload(), one_line(error)
        if rejection is None:
            self.store.count(client, number, bool(metadata.get("kept")))
        seconds = metadata["seconds"] if is_number(metadata.get("seconds"), 0, SECONDS) else 0.0
        reset_entry = {"state_reset": one_line(metadata["reset"])} if metadata.get("reset") else {}
        has_diverged = bool(metadata.get("rejected"))  # the client's end rejects nothing else
        return reply, told_of(reply, info, rejection, seconds, down, parked.size, has_diverged) | reset_entry

    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        deliveries = _Deliveries(
            self.server, {c: info for c, info in self.clients.items() if self.server.unable(info) is None}
        )
        test_record = {key: {} for key in ("bytes_sent", "errors", "missing", "late", "duplicate")}
        with tempfile.TemporaryDirectory(prefix=".replies-", dir=self.folder) as inbox:
            parked_replies = self._exchange("evaluate", number, deliveries, test_record, Path(inbox))
        record["untested"] |= {**test_record["missing"], **test_record["errors"]}
        return {client: parked_replies[client].scalars for client in sorted(parked_replies)}

    def _exchange(
        self, kind: str, number: int, tasks: Mapping[ClientId, Payload], noted: dict[str, Any], inbox: Path
    ) -> dict[ClientId, _Parked]:
        """Send every client its payload and gather the answers until the deadline.

        Returns:
            Client -> its reply in files. `noted`, a record, lists all other clients.
        """
        nodes = self.roster.nodes()
        deadline, enough_replies = time.monotonic() + self.wire.deadline, self.wire.enough if kind == "train" else 0
        message_ids = self._send(kind, number, tasks, nodes, noted)
        parked_replies: dict[ClientId, _Parked] = {}
        resend_clients: set[ClientId] = set()
        for client, reply in arrivals(self.roster.grid, message_ids, deadline, self.roster.poll):
            if client in parked_replies or client in noted["errors"] or client in noted["missing"]:
                noted["duplicate"][client] = noted["duplicate"].get(client, 0) + 1
            elif reply.has_content() and "resend" in reply.content and client not in resend_clients:
                resend_clients.add(client)
                message_ids |= self._send(kind, number, {client: tasks[client]}, nodes, noted, whole=True)
            else:
                self.progress(client, "test" if kind == "evaluate" else "train", len(parked_replies) + 1, len(tasks))
                if reason := failed(reply):
                    is_missing = reply.has_error() and reply.error.code in NOBODY
                    noted["missing" if is_missing else "errors"][client] = reason
                else:
                    parked_replies[client] = _park(
                        reply, inbox / client, bytes_of(self.wire.cap), self._expected(kind, client, tasks)
                    )
            del reply  # before the next is fetched
            give_back()
            if 0 < enough_replies <= len(parked_replies):
                break
        has_enough = 0 < enough_replies <= len(parked_replies)
        late_reason = (
            f"the round had {enough_replies} answers before (wire.enough)" if has_enough else "no answer within {:g} s"
        )
        noted["missing"] |= dict.fromkeys(message_ids, late_reason.format(self.wire.deadline))
        if kind == "train":
            self._late(number, noted)
            self.overdue |= {identifier: (client, number) for client, identifier in message_ids.items()}
        return parked_replies

    def _expected(
        self, kind: str, client: ClientId, tasks: Mapping[ClientId, Payload]
    ) -> Mapping[str, Mapping[str, Like]]:
        """Return the tensors that a reply may bring, group -> name; a score brings none."""
        if kind == "evaluate":
            return {}
        return travelling(self.server.expects(self.clients[client], tasks[client]), self.wire.reply)

    def _late(self, number: int, noted: dict[str, Any]) -> None:
        """Note the clients that have now answered a message of an earlier round or attempt; no such answer counts."""
        for identifier, (client, sent_round) in list(self.overdue.items()):
            for reply in self.roster.grid.pull_message(identifier):
                self.overdue.pop(identifier, None)
                if not reply.has_error():
                    noted["late"].setdefault(client, []).append(sent_round)
            if number - sent_round >= LATE:
                self.overdue.pop(identifier, None)

    def _send(
        self,
        kind: str,
        number: int,
        tasks: Mapping[ClientId, Payload],
        nodes: Mapping[ClientId, int],
        noted: dict[str, Any],
        whole: bool = False,
    ) -> dict[ClientId, str]:
        """Send one message per client, and return client -> message id.

        Messages are built, handed over and released one after the other.

        Args:
            whole: send whole weights, never a change of what the client holds.
        """
        message_ids: dict[ClientId, str] = {}
        for client in sorted(tasks):
            if client not in nodes:
                noted["missing"][client] = self.roster.refused.get(client, "not connected")
                continue
            payload, base, hold = tasks[client], "", kind == "train" and self.wire.send != "exact"
            if hold and whole:
                self.held.save(client, payload.group("params"), number)
            elif hold:
                payload, base = self.held.change(client, number, payload, self.wire.send)
            message = self._message(kind, number, client, nodes[client], payload, {"base": base, "hold": hold})
            size = within(self.wire.cap, message.content, client) + noted["bytes_sent"].get(client, 0)
            for identifier in self.roster.grid.push_messages([message]):
                if identifier:
                    message_ids[client], noted["bytes_sent"][client] = identifier, size
            if client not in message_ids:
                noted["missing"][client] = "its message was not taken"
            del message  # before the next is built
            give_back()
        return message_ids

    def _message(
        self, kind: str, number: int, client: ClientId, node: int, payload: Payload, more: Mapping[str, Scalar]
    ) -> Message:
        metadata = {
            **self.told,
            **more,
            "nonce": secrets.token_hex(16),
            "protocol": PROTOCOL,
            "client": client,
            "round": number,
            "version": self.store.versions.get(client, 0),
            "deadline": float(self.wire.deadline),
            "cap": self.wire.cap,
            "reply": self.wire.reply,
            "zstd": self.wire.zstd,
        }
        content = to_record(payload, metadata, self.wire.zstd)
        return Message(content, dst_node_id=node, message_type=kind, ttl=self.wire.deadline, group_id=str(number))


@dataclass
class _Deliveries(Mapping[ClientId, Payload]):
    """A mapping of clients to the models that they would deploy, cut on lookup so that one is in memory at a time."""

    server: Server
    infos: Mapping[ClientId, ClientInfo]

    def __getitem__(self, client: ClientId) -> Payload:
        return self.server.deliver(self.infos[client])

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _park(reply: Message, folder: Path, cap: int, expected: Mapping[str, Mapping[str, Like]]) -> _Parked:
    """Write a reply's blobs to files.

    A reply is parked as rejected, and nothing of it is kept, if it is not of this protocol, brings anything that is not
    expected, or exceeds `cap` bytes or the expected size, compressed or not.
    """
    try:
        blobs, scalars, metadata = blobs_of(reply.content)
        if (scalar_bytes := sum(len(record.deflate()) for record in reply.content.config_records.values())) > WORDS:
            raise PayloadError(f"the reply's scalars are {human(scalar_bytes)}; at most {human(WORDS)} are allowed")
        folder.mkdir(exist_ok=True)
        files = {}
        for i, (group, blob, bounds) in enumerate(unpacked(blobs, cap, expected)):
            codec.check(blob, bounds)
            files[group] = folder / str(i)
            files[group].write_bytes(blob)
    except PayloadError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return _Parked(rejected=one_line(error))
    return _Parked(files, scalars, metadata, sum(map(len, blobs.values())))
