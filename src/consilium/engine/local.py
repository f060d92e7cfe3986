"""The engine that runs all clients on this machine.

Clients run one after the other in this process or, with `workers`, several side by side in a process each.

A client's model exists only while the client works. Without workers, one reply is in memory at a time, and it is
emptied as soon as the server asks for the next. With `strict`, and always between processes, every payload is converted
to bytes and back on its way, as between machines. The results are bit-identical, whichever process a client runs in.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch

from consilium.core import (
    Client,
    ClientContext,
    ClientId,
    ClientInfo,
    ClientState,
    Meet,
    Payload,
    Sampling,
    Scalar,
    Server,
    derive_seed,
)
from consilium.data.task import Federation
from consilium.engine.checkpoint import ClientStore
from consilium.engine.codec import decode, encode
from consilium.engine.judge import diverged, objection
from consilium.engine.meeting import in_step
from consilium.engine.rounds import OWN, Engine, Progress, release, tested, told_of, trained
from consilium.engine.workers import Later, Workers, at_once
from consilium.escape import one_line
from consilium.privacy import Privacy

__all__ = ["LocalEngine"]


@dataclass
class LocalEngine(Engine):
    """An engine that carries payloads between a server and its clients in this process, and meters them.

    Args:
        server: the server half of a method.
        client: the client half of the method.
        infos: all clients.
        federation: the clients' data.
        store: storage of the client states between rounds.
        seed: seed of the run.
        device: device that clients train on.
        strict: convert every payload to bytes and back.
        sampling: settings for the number of replies that a round needs.
        progress: see `Progress`.
        workers: processes that do `work`, see `forked`; None: this process does it.
        together: number of clients that work in step in this process, see `meeting`; 1: one after the other.
        privacy: settings for what clients may disclose.
        pace: architecture -> seconds of training per example, as last reported.
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
    workers: Workers | None = None
    together: int = 1
    privacy: Privacy = field(default_factory=Privacy)
    pace: dict[str, float] = field(default_factory=dict)

    def _replies(
        self, number: int, tasks: dict[ClientId, Payload], record: dict[str, Any]
    ) -> Iterator[tuple[ClientId, Payload]]:
        jobs = ((client, tasks.pop(client)) for client in sorted(tasks))
        for client, payload, reply, report in self._each("train", number, jobs):
            record["bytes_sent"][client] = payload.nbytes
            if error := report.get("failed"):
                record["errors"][client] = error
                continue
            info = self.clients[client]
            rejection = objection(self.server, info, payload, reply)
            if rejection is None:
                self.store.count(client, number, report["kept"])
            else:
                self.store.drop(client, number - 1, number + 1)
            has_diverged = rejection is not None and diverged(reply) is not None
            record["clients"][client] = told_of(
                reply, info, rejection, report["seconds"], payload.nbytes, reply.nbytes, has_diverged
            )
            self.pace[info.architecture] = report["seconds"] / max(info.num_examples, 1)
            reply = Payload(reply.groups, reply.scalars)  # `release` may empty this one
            if rejection is None:
                yield client, reply
            release(reply)

    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        scalars_by_client = {}
        for client, _, reply, report in self._each("evaluate", number, self._deliveries()):
            if error := report.get("failed"):
                record["untested"][client] = error
            else:
                scalars_by_client[client] = reply.scalars
        return scalars_by_client

    def _deliveries(self) -> Iterator[tuple[ClientId, Payload]]:
        """Yield (client, the model that it would deploy) for all clients that can hold one, each cut on request."""
        for count, info in enumerate(self.infos):
            self.progress(info.id, "test", count, len(self.infos))
            if self.server.unable(info) is None:
                yield info.id, self.server.deliver(info)

    def _each(
        self, kind: str, number: int, jobs: Iterable[tuple[ClientId, Payload]]
    ) -> Iterator[tuple[ClientId, Payload, Payload, dict[str, Any]]]:
        """Yield (client, payload sent, answer, report of `work`), one at a time in the order of `jobs`."""
        tasks = ((client, self.store.versions.get(client, 0), payload) for client, payload in jobs)
        if self.workers is not None:
            yield from self.workers.each(kind, number, tasks, self.progress, self._takes)
            return
        while True:
            batch = deque(
                (client, version, self._carry(payload)) for client, version, payload in islice(tasks, self.together)
            )
            if not batch:
                return
            answers = deque(self._at_once(kind, number, batch))
            while batch:
                (client, _, sent_payload), (answer, report) = batch.popleft(), answers.popleft()
                yield client, sent_payload, self._carry(answer), report
                del sent_payload, answer

    def _takes(self, client: ClientId) -> float:
        """Return about how many seconds a client works.

        An architecture that has not worked yet counts one second per example, which is more than the others.
        """
        info = self.clients[client]
        return info.num_examples * self.pace.get(info.architecture, 1.0)

    def _at_once(
        self, kind: str, number: int, some: Collection[tuple[ClientId, int, Payload]]
    ) -> list[tuple[Payload, dict[str, Any]]]:
        """Return the answer and the report of `work` for each of these clients.

        Args:
            some: (client, version of its state, payload that it is sent) of each client.
        """
        phase = "test" if kind == "evaluate" else kind

        def call(client: ClientId, version: int, payload: Payload, meet: Meet | None) -> tuple[Payload, dict[str, Any]]:
            step = partial(self.progress, client, phase)
            return self.work(kind, client, number, version, payload, step, meet=meet)

        if len(some) == 1:
            return [call(*some[0], meet=None)]
        start = time.perf_counter()
        answers = in_step([partial(call, *task) for task in some])
        return [_shared(*answer, (time.perf_counter() - start) / len(some)) for answer in answers]

    def work(
        self,
        kind: str,
        client: ClientId,
        number: int,
        version: int,
        payload: Payload,
        progress: Callable[[int, int], None],
        later: Later = at_once,
        meet: Meet | None = None,
    ) -> tuple[Payload, dict[str, Any]]:
        """Do the work of a client in a round, in this process or in a worker's.

        Args:
            kind: "train" or "evaluate".
            version: round of the client's state that counts; 0: it has none.
            later: called with the write of the client's state, which waits for the disk.

        Returns:
            The reply and a report. The report is {"failed"} with an error of the client's own, {} after an evaluation,
            or {"seconds", "kept"} after training: its duration, and whether the client leaves a state under this round.
            That state does not count yet.
        """
        self.store.count(client, version, kept=version > 0)
        context = ClientContext(
            info=self.clients[client],
            data=self.federation.clients[client],
            device=self.device,
            seed=derive_seed(self.seed, "client", number, client),
            state=meet(self._loaded, client) if meet else self.store.load(client),
            progress=progress,
            meet=meet,
            round=number,
        )
        try:
            if kind == "evaluate":
                return tested(self.client, payload, context, self.privacy)[0], {}
            reply, seconds = trained(self.client, payload, context, self.privacy)
        except OWN as error:
            return Payload(), {"failed": one_line(f"{type(error).__name__}: {error}")}
        write_args = (client, context.state, number)
        if meet:
            meet(self._kept, write_args)
        else:
            later(partial(self.store.write, *write_args))
        return reply, {"seconds": seconds, "kept": not context.state.empty}

    def _loaded(self, clients: Sequence[ClientId]) -> list[ClientState]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.store.load, clients))

    def _kept(self, left: Sequence[tuple[ClientId, ClientState, int]]) -> list[bool]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.store.write, *zip(*left, strict=True)))

    def _carry(self, payload: Payload) -> Payload:
        return decode(encode(payload)) if self.strict else payload


def _shared(reply: Payload, told: dict[str, Any], seconds: float) -> tuple[Payload, dict[str, Any]]:
    """Return the answer of a client that worked in step with others, with its share of the seconds that all took."""
    if "seconds" not in told:
        return reply, told
    share = float(reply.scalars.get("seconds_evaluate", 0.0)) / told["seconds"]
    scalars = {**reply.scalars, "seconds_evaluate": share * seconds}
    return Payload(reply.groups, scalars), {**told, "seconds": seconds}
