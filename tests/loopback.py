"""A Flower Grid in this process: real Messages, turned into their objects' bytes and back on both ways, as between
machines, and handed to the client's end, one after the other. Faults on demand."""

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

import consilium.engine.flower as flower
from consilium.engine.flower import client_app


def carried(message: Message) -> Message:
    """The message as it arrives: every object deflated to bytes, then the whole inflated from them."""
    contents = {key: thing.deflate() for key, thing in get_all_nested_objects(message).items()}
    identifier = message.object_id
    arrived = inflate_object_from_contents(identifier, contents)
    arrived.metadata.__dict__["_message_id"] = identifier
    return arrived


def in_place_of_ray(monkeypatch) -> "Loopback":
    """Runs with engine "flower" go over this Grid; three nodes, the partitions in no order."""
    made = Loopback([{"partition-id": i, "num-partitions": 3} for i in (2, 0, 1)])
    monkeypatch.setattr(flower, "simulation", lambda *_: nullcontext(made))
    return made


@dataclass
class Loopback(Grid):
    """Nodes with the numbers 100, 101, ...; node 100 + i has the i-th of `configs` as its node_config.

    Replies are made when they are asked for. `silent`: (message type, node) that never answers; `crashing`: answers
    with an error; `away`: nodes that are not connected; `restarts`: node -> how often it was restarted; `twice`:
    answers twice; `spoil`: (message type, node) -> what is done to the content of its reply.
    """

    configs: list[dict]
    silent: set = field(default_factory=set)
    crashing: set = field(default_factory=set)
    lost: set = field(default_factory=set)
    away: set = field(default_factory=set)
    restarts: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    twice: set = field(default_factory=set)
    spoil: dict = field(default_factory=dict)
    queue: dict = field(default_factory=dict)
    log: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    app = staticmethod(client_app)

    def __post_init__(self):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1

    def get_node_ids(self):
        return [100 + i for i in range(len(self.configs)) if 100 + i not in self.away]

    def get_nodes(self):
        return [
            SimpleNamespace(
                node_id=n, last_activated_at=str(self.restarts.get(n, 0)), public_key=self.keys.get(n, b"none")
            )
            for n in self.get_node_ids()
        ]

    def push_messages(self, messages):
        pushed = []
        for message in messages:
            arrived = carried(message)
            self.log.append((message.metadata.message_type, message.metadata.dst_node_id, message.metadata.ttl))
            self.queue[arrived.metadata.message_id] = arrived
            pushed.append(arrived.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids):
        with self.lock:  # clients train in this process, one at a time
            return self._pulled(message_ids)

    def _pulled(self, message_ids):
        replies = []
        for identifier in message_ids:
            message = self.queue[identifier]
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            if (kind, node) in self.silent:
                continue
            del self.queue[identifier]
            if (kind, node) in self.crashing:
                replies.append(
                    Message(Error(code=8, reason="Traceback ...\nThe process was killed."), reply_to=message)
                )
                continue
            context = Context(7, node, self.configs[node - 100], RecordDict(), {})
            reply = self.app(message, context)
            self.spoil.get((kind, node), lambda content: None)(reply.content)
            reply = carried(reply)
            if (kind, node) in self.lost:
                self.silent.add((kind, node))
                self.queue[identifier] = message
                continue
            replies += [reply] * (2 if (kind, node) in self.twice else 1)
        return replies

    set_run = run = create_message = send_and_receive = None
