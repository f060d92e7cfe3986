"""The engine that runs everybody in one process, one client after the other.

Lazy: a client's model exists while it works, and one reply is in memory at a time: it is emptied as soon as the
server asks for the next. With `strict`, every payload is turned into bytes and back on its way, as between machines.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from consilium.core import Client, ClientContext, ClientId, ClientInfo, Payload, Sampling, Scalar, Server, derive_seed
from consilium.data.task import Federation
from consilium.engine.checkpoint import ClientStore
from consilium.engine.codec import decode, encode
from consilium.engine.judge import objection, one_line
from consilium.engine.rounds import OWN, Engine, Progress, release, tested, told_of, trained

__all__ = ["LocalEngine"]


@dataclass
class LocalEngine(Engine):
    """Carries payloads between a server and its clients in this process, and meters them.

    Args:
        server, client: the two halves of a method.
        infos: all clients; federation: their data.
        store: where client states live between rounds.
        seed: of the run. device: where clients train. strict: through bytes.
        sampling: how many replies a round needs.
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
    sampling: Sampling = field(default_factory=Sampling)
    progress: Progress = lambda client, phase, done, total: None

    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        for client in sorted(tasks):
            try:
                reply, told = self._train(client, number, tasks.pop(client), record)
            except _Failed as failed:
                record["errors"][client] = str(failed)
                continue
            record["clients"][client] = told
            if told["rejected"] is None:
                yield client, reply
            release(reply)

    def _train(
        self, client: ClientId, number: int, payload: Payload, record: dict[str, Any]
    ) -> tuple[Payload, dict[str, Any]]:
        """One client's round: its reply, and what to record of it.

        Raises:
            _Failed: with an error of the client's own.
        """
        sent = self._carry(payload)
        record["bytes_sent"][client] = sent.nbytes
        context = self._context(client, number, "train")
        try:
            reply, seconds = trained(self.client, sent, context)
        except OWN as error:
            raise _Failed(_said(error)) from error
        rejected = objection(self.server, context.info, sent, reply)
        if rejected is None:
            self.store.save(client, context.state, number)
        reply = self._carry(reply)
        told = told_of(reply, context.info, rejected, seconds, sent.nbytes, reply.nbytes)
        return Payload(reply.groups, reply.scalars), told

    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        told = {}
        for done, info in enumerate(self.infos):
            self.progress(info.id, "test", done, len(self.infos))
            if self.server.unable(info) is None:
                delivered = self._carry(self.server.deliver(info))
                try:
                    reply = tested(self.client, delivered, self._context(info.id, number, "test"))
                except OWN as error:
                    record["untested"][info.id] = _said(error)
                    continue
                told[info.id] = self._carry(reply).scalars
        return told

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


class _Failed(Exception):
    """A client's training ended in an error of its own."""


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
