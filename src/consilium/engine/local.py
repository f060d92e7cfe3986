"""The engine that runs everybody on this machine: one client after the other in this process, or with `workers` several
side by side, a process each.

Lazy: a client's model exists while it works, and without workers one reply is in memory at a time: it is emptied as
soon as the server asks for the next. With `strict`, and always between processes, every payload is turned into bytes
and back on its way, as between machines. The results are the same to the bit, whoever worked where.
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
    """Carries payloads between a server and its clients in this process, and meters them.

    Args:
        server, client: the two halves of a method.
        infos: all clients; federation: their data.
        store: where client states live between rounds.
        seed: of the run. device: where clients train. strict: through bytes.
        sampling: how many replies a round needs.
        progress: see `Progress`.
        workers: processes that do `work`, see `forked`; None: this one does.
        together: clients that work in step in this process, see `meeting`; 1: one after the other.
        privacy: what clients may tell.
        pace: architecture -> seconds of training per example, as last told.
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
        for client, sent, reply, told in self._each("train", number, jobs):
            record["bytes_sent"][client] = sent.nbytes
            if failed := told.get("failed"):
                record["errors"][client] = failed
                continue
            info = self.clients[client]
            rejected = objection(self.server, info, sent, reply)
            if rejected is None:
                self.store.count(client, number, told["kept"])
            else:
                self.store.drop(client, number - 1, number + 1)
            lost = rejected is not None and diverged(reply) is not None
            record["clients"][client] = told_of(reply, info, rejected, told["seconds"], sent.nbytes, reply.nbytes, lost)
            self.pace[info.architecture] = told["seconds"] / max(info.num_examples, 1)
            reply = Payload(reply.groups, reply.scalars)  # which `release` may empty
            if rejected is None:
                yield client, reply
            release(reply)

    def _test(self, number: int, record: dict[str, Any]) -> dict[ClientId, Mapping[str, Scalar]]:
        told = {}
        for client, _, reply, said in self._each("evaluate", number, self._deliveries()):
            if failed := said.get("failed"):
                record["untested"][client] = failed
            else:
                told[client] = reply.scalars
        return told

    def _deliveries(self) -> Iterator[tuple[ClientId, Payload]]:
        """(Client, the model it would deploy) of all that can hold one, cut when it is their turn."""
        for done, info in enumerate(self.infos):
            self.progress(info.id, "test", done, len(self.infos))
            if self.server.unable(info) is None:
                yield info.id, self.server.deliver(info)

    def _each(
        self, kind: str, number: int, jobs: Iterable[tuple[ClientId, Payload]]
    ) -> Iterator[tuple[ClientId, Payload, Payload, dict[str, Any]]]:
        """(Client, what it was sent, its answer, what `work` tells), one at a time in the order of `jobs`."""
        tasks = ((client, self.store.versions.get(client, 0), payload) for client, payload in jobs)
        if self.workers is not None:
            yield from self.workers.each(kind, number, tasks, self.progress, self._takes)
            return
        while True:
            some = deque((client, v, self._carry(payload)) for client, v, payload in islice(tasks, self.together))
            if not some:
                return
            answers = deque(self._at_once(kind, number, some))
            while some:
                (client, _, sent), (answer, told) = some.popleft(), answers.popleft()
                yield client, sent, self._carry(answer), told
                del sent, answer

    def _takes(self, client: ClientId) -> float:
        """About how many seconds a client works; of an architecture that has not worked yet, more than of others."""
        info = self.clients[client]
        return info.num_examples * self.pace.get(info.architecture, 1.0)

    def _at_once(
        self, kind: str, number: int, some: Collection[tuple[ClientId, int, Payload]]
    ) -> list[tuple[Payload, dict[str, Any]]]:
        """What `work` says of each of these clients: (client, version of its state, what it is sent)."""
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
        """What a client does in a round, in this process or a worker's.

        Args:
            kind: "train" or "evaluate". version: the round of its state that counts, 0: it has none.
            later: is given the writing of its state, which waits for the disk.

        Returns:
            The reply, and {"failed"}: an error of the client's own, or {"seconds", "kept"}: of training, and whether it
            leaves a state under this round, which does not count yet.
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
        left = (client, context.state, number)
        if meet:
            meet(self._kept, left)
        else:
            later(partial(self.store.write, *left))
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
    """The answer of a client that has worked in step with others, with its share of the seconds that all took."""
    if "seconds" not in told:
        return reply, told
    part = float(reply.scalars.get("seconds_evaluate", 0.0)) / told["seconds"]
    scalars = {**reply.scalars, "seconds_evaluate": part * seconds}
    return Payload(reply.groups, scalars), {**told, "seconds": seconds}
