"""A roster of the clients behind Flower's nodes.

A client is identified by its partition or its site's name, never by Flower's number for the node. A node is asked for
it when it is new or was restarted. If sites have keys, which Flower checks with every request of a node, the key
identifies the node's site, and a node that gives another site's name is refused.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from consilium.core import ClientId, Scalar
from consilium.engine.flower.described import checked_name
from consilium.engine.flower.patience import Patient
from consilium.engine.judge import number as is_number
from consilium.errors import PayloadError, RoundError
from consilium.escape import one_line

log = logging.getLogger(__name__)

__all__ = ["Roster", "arrivals", "ask", "failed"]


@dataclass
class Roster:
    """The clients behind Flower's nodes.

    Args:
        names: partition number -> client id, of a simulation; (): a node gives its site's name.
        keys: a node's public key (PEM) -> its site; nodes with other keys are ignored. {}: no keys.
        poll: seconds between looks for answers.
        patience: seconds that a node has to identify itself.
    """

    grid: Grid | Patient
    names: Sequence[ClientId] = ()
    keys: Mapping[bytes, ClientId] = field(default_factory=dict)
    poll: float = 0.05
    patience: float = 180.0
    known: dict[tuple[int, str], ClientId] = field(default_factory=dict)
    """(Node, time of its last activation) -> client, "" if refused; a node that was restarted is asked again."""
    owners: dict[int, ClientId] = field(default_factory=dict)
    """Node -> the site that has its key."""
    refused: dict[ClientId, str] = field(default_factory=dict)
    """Site -> the reason why its node is refused."""
    news: dict[ClientId, str] = field(default_factory=dict)
    """Entries of `refused` that no record contains yet."""

    def __post_init__(self) -> None:
        self.grid = Patient(self.grid)

    def strangers(self) -> dict[int, tuple[int, str]]:
        """Return the connected nodes that have not identified themselves, with their keys in `known`."""
        return {node: key for node, key in self._online().items() if key not in self.known}

    def enter(self, node: int, key: tuple[int, str], name: ClientId) -> bool:
        """Note the name that a node gives; return False if the node has another site's key.

        Such a node is refused until it is restarted.
        """
        owner = self.owners.get(node, name)
        self.known[key] = name if name == owner else ""
        self.refused.pop(owner, None)
        if name != owner:
            self.refused[owner] = self.news[owner] = one_line(f"its node says that it is {name}, with {owner}'s key")
            log.warning(f"site {owner} is refused: {self.refused[owner]}")
        return name == owner

    def nodes(self) -> dict[ClientId, int]:
        """Return client id -> node for the nodes that are connected now.

        Raises:
            RoundError: if two nodes give the same name.
        """
        strangers = self.strangers()
        for node, reply in ask(self.grid, list(strangers), "name", {}, self.patience, self.poll):
            try:
                self.enter(node, strangers[node], self._name(reply))
            except PayloadError as error:
                log.warning(f"a node does not say who it is: {error}")
        nodes_by_client: dict[ClientId, int] = {}
        for node, key in self._online().items():
            if not (name := self.known.get(key)):
                continue
            if name in nodes_by_client:
                raise RoundError(f"two nodes say that they are {name}; give every site a name of its own")
            nodes_by_client[name] = node
        return nodes_by_client

    def _online(self) -> dict[int, tuple[int, str]]:
        online = [node for node in self.grid.get_nodes() if not self.keys or node.public_key in self.keys]
        self.owners |= {node.node_id: self.keys[node.public_key] for node in online if self.keys}
        return {node.node_id: (node.node_id, node.last_activated_at) for node in online}

    def _name(self, reply: Message) -> ClientId:
        if reason := failed(reply):
            raise PayloadError(reason)
        identity = reply.content.config_records.get("engine", {})
        partition = identity.get("partition")
        if is_number(partition, 0, len(self.names) - 1, int):
            return self.names[partition]
        return checked_name(identity.get("name"))


def ask(
    grid: Patient, nodes: Sequence[int], what: str, told: Mapping[str, Scalar], seconds: float, poll: float
) -> Iterator[tuple[int, Message]]:
    """Send every node the same small query, and yield (node, reply) as they arrive within `seconds`.

    Flower matches a reply to a message by the message's id, a hash of its content. The nonce, here and in every round's
    messages, keeps the id secret from other sites, which may have been sent the same content.
    """
    message_ids = {}
    for node in nodes:
        content = RecordDict({"engine": ConfigRecord({**told, "nonce": secrets.token_hex(16)})})
        message = Message(content, dst_node_id=node, message_type=f"query.{what}", ttl=seconds)
        for identifier in grid.push_messages([message]):
            message_ids[node] = identifier
    for node, reply in arrivals(grid, message_ids, time.monotonic() + seconds, poll):
        yield node, reply


def arrivals(grid: Patient, sent: dict[Any, str], end: float, poll: float) -> Iterator[tuple[Any, Message]]:
    """Yield replies one at a time as they arrive until `end` (of time.monotonic).

    Messages that are then left in `sent` were never answered. A reply is released before the next is fetched. A message
    may be answered twice.
    """
    while sent:
        has_reply = False
        for key, identifier in list(sent.items()):
            replies = grid.pull_message(identifier)
            while replies:
                has_reply = True
                sent.pop(key, None)
                yield key, replies.pop(0)
        if time.monotonic() > end:
            return
        if not has_reply:
            time.sleep(poll)


def failed(reply: Message) -> str | None:
    """Return the error in a reply, in one line; None: it has none."""
    if reply.has_error():
        return one_line(f"error {reply.error.code}: {_last_line(reply.error.reason)}")
    if "failed" not in reply.content:
        return None
    record = reply.content["failed"]
    return one_line(record.get("reason") if isinstance(record, ConfigRecord) else "") or "unknown"


def _last_line(text: str) -> str:
    return next((line for line in reversed((text or "").strip().splitlines()) if line.strip()), "unknown")
