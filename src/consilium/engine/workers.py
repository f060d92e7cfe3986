"""Worker processes of the local engine: a client each, on a core each, so that many small clients train side by side.

They are forked from the run's process when it is ready, so data and code are there without being read or sent again.
What they are sent and answer crosses a pipe as JSON, and memory that both see as the codec's bytes; what many clients
are sent, like the weights that all begin a round with, is written there once. A worker has one torch thread: on a busy
machine several threads in one process wait for each other, a client per core does not. What a client leaves on disk is
written beside the work of the next; when all have answered, it is there. The last clients begin with those that take
longest, so that all cores end together.
"""

import contextlib
import json
import mmap
import multiprocessing
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from consilium import errors
from consilium.core import ClientId, Payload
from consilium.engine.codec import Buffer, decode, parts
from consilium.engine.interrupt import end_with_parent
from consilium.engine.rounds import Progress
from consilium.errors import RoundError

__all__ = ["Later", "Work", "Workers", "at_once", "forked"]

Later = Callable[[Callable[[], object]], None]
"""Takes what may be done beside the work of the next client."""
Work = Callable[[str, ClientId, int, int, Payload, Callable[[int, int], None], Later], tuple[Payload, dict[str, Any]]]
"""(kind, client, round, version of its state, payload, progress, later) -> its answer, and what to tell, as JSON."""
AHEAD, ROOM = 2, 2**26
"""Clients per worker, and bytes of what they were sent, that may be at work or done before their turn to be merged: as
many as one of the two allows."""
MEMORY = 2**26
"""Bytes up to which a payload lies in memory that both sides see; larger ones go through the pipe."""
PAUSE = 0.2
"""Seconds between two messages of progress."""
SETTLE = "settle"
"""What a worker is told to have everything written, and answers when it is."""


def at_once(call: Callable[[], object]) -> None:
    """`Later` where there is no other thread."""
    call()


class Line:
    """One end of what joins the run's process and a worker.

    Args:
        pipe: for what is told, as JSON. out, into: memory that both see, which this end writes and reads.
    """

    def __init__(self, pipe: Connection, out: mmap.mmap, into: mmap.mmap):
        self.pipe, self.out, self.into = pipe, out, into

    def fileno(self) -> int:
        """To wait for."""
        return self.pipe.fileno()

    def send(self, told: Any, blob: Sequence[Buffer] = (), there: bool = False) -> None:
        """blob: in parts. there: it was the last that was sent."""
        size = sum(map(len, blob))
        if size <= len(self.out) and not there:
            self.out.seek(0)
            for part in blob:
                self.out.write(part)
        self.pipe.send_bytes(json.dumps([told, size]).encode())
        if size > len(self.out):
            self.pipe.send_bytes(b"".join(blob))

    def receive(self) -> tuple[Any, bytes]:
        """What was sent; the blob is a copy."""
        told, size = json.loads(self.pipe.recv_bytes())
        return told, self.into[:size] if size <= len(self.into) else self.pipe.recv_bytes()


class Workers:
    """Hands clients to whoever is free, and gives their answers in the order of the clients.

    Args:
        lines: one to each worker. processes: the workers.
    """

    def __init__(self, lines: list[Line], processes: list[multiprocessing.process.BaseProcess]):
        self.lines = lines
        self.processes = processes

    def each(
        self,
        kind: str,
        number: int,
        tasks: Iterable[tuple[ClientId, int, Payload]],
        progress: Progress,
        takes: Callable[[ClientId], float] = lambda client: 0.0,
    ) -> Iterator[tuple[ClientId, Payload, Payload, dict[str, Any]]]:
        """Have every client do its work; no more payloads and answers are in memory than `AHEAD` or `ROOM` allows.

        Args:
            kind, number: "train" or "evaluate", the round. tasks: (client, version of its state, what it is sent).
            takes: how long a client takes, in any unit.

        Yields:
            (client, what it was sent, its answer, what the worker tells), in the order of `tasks`.

        Raises:
            RoundError: if a worker ends before it has answered.
            CheckpointError: if what a client leaves could not be written.
        """
        tasks, idle, more, room = iter(tasks), list(self.lines), True, ROOM
        waiting: list[tuple[ClientId, int, Payload]] = []
        busy: dict[Line, ClientId] = {}
        last: Payload | None = None
        blob: list[Buffer] = []
        holding: set[Line] = set()  # who holds the blob of the last payload
        turns: deque[tuple[ClientId, Payload]] = deque()
        done: dict[ClientId, tuple[bytes, dict[str, Any]]] = {}
        while True:
            while more and (len(turns) < AHEAD * len(self.lines) or room > 0):
                if more := (task := next(tasks, None)) is not None:
                    waiting.append(task)
                    turns.append((task[0], task[2]))
                    room -= task[2].nbytes
            while idle and waiting:
                longest = 0 if more else max(range(len(waiting)), key=lambda place: takes(waiting[place][0]))
                client, version, payload = waiting.pop(longest)
                if not _same(payload, last):
                    last, blob, holding = payload, parts(payload), set()
                line = idle.pop()
                line.send([kind, client, number, version], blob, there=line in holding)
                holding.add(line)
                busy[line] = client
                if payload.nbytes > MEMORY:
                    last, blob = None, []
            if not turns:
                self._settle()
                return
            if (first := turns[0])[0] in done:
                turns.popleft()
                room += first[1].nbytes
                answer, told = done.pop(first[0])
                reply = decode(answer)
                del answer
                yield *first, reply, told
                del reply
                continue
            for line in wait(list(busy)):
                client = busy[line]
                told, answer = self._heard(line, f"of client {client}")
                if "progress" in told:
                    progress(client, "test" if kind == "evaluate" else kind, *told["progress"])
                    continue
                done[client] = answer, told
                idle.append(line)
                del busy[line], answer

    def _settle(self) -> None:
        """Wait until everything is written."""
        for line in self.lines:
            line.send([SETTLE])
        for line in self.lines:
            self._heard(line, "that wrote the states of clients")

    def _heard(self, line: Line, whose: str) -> tuple[dict[str, Any], bytes]:
        try:
            told, blob = line.receive()
        except (EOFError, OSError) as error:
            process = self.processes[self.lines.index(line)]
            process.join(5)
            raise RoundError(
                f"the worker process {whose} has ended with code {process.exitcode} (-9: killed, perhaps "
                "for want of memory); resume the run"
            ) from error
        if "raised" in told:
            name, text, trace = told["raised"]
            raise getattr(errors, name, RuntimeError)(text) from RuntimeError(f"in a worker process:\n{trace}")
        return told, blob


def _same(payload: Payload, other: Payload | None) -> bool:
    """Whether they hold the very same tensors, and equal scalars."""
    if other is None or payload.groups.keys() != other.groups.keys() or payload.scalars != other.scalars:
        return False
    pairs = [(params, other.groups[group]) for group, params in payload.groups.items()]
    return all(a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in pairs)


@contextmanager
def forked(count: int, work: Work) -> Iterator[Workers]:
    """So many worker processes, gone afterwards, also if this process is killed."""
    context = multiprocessing.get_context("fork")
    lines, processes = [], []
    try:
        for _ in range(count):
            (near, far), down, up = context.Pipe(), mmap.mmap(-1, MEMORY), mmap.mmap(-1, MEMORY)
            lines.append(Line(near, down, up))
            others = [line.pipe for line in lines]
            processes.append(context.Process(target=_serve, args=(Line(far, up, down), others, work), daemon=True))
            with warnings.catch_warnings():  # of threads, which are the progress bars' and hold no lock a worker needs
                warnings.simplefilter("ignore", DeprecationWarning)
                processes[-1].start()
            far.close()
        yield Workers(lines, processes)
    finally:
        for process in processes:
            process.terminate()
        for line, process in zip(lines, processes, strict=False):
            process.join()
            line.pipe.close()


def _serve(line: Line, others: list[Connection], work: Work) -> None:
    """A worker's life: one client after the other, until the run's process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the run's own decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(AttributeError, OSError):  # not on Linux: then the closed pipe is the sign
        end_with_parent(signal.SIGKILL)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PAUSE:
            last = now
            line.send({"progress": [done, total]})

    writer, left = ThreadPoolExecutor(1), deque[Future[object]]()
    calls: list[Callable[[], object]] = []

    def settle() -> None:
        while left:
            left.popleft().result()

    def later(call: Callable[[], object]) -> None:
        settle()  # what is written lies in memory until then: of one client at most
        calls.append(call)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            (kind, *task), blob = line.receive()
            try:
                if kind == SETTLE:
                    settle()
                    line.send({})
                    continue
                payload = decode(blob)
                del blob
                answer, told = work(kind, *task, payload, progress, later)
                del payload
            except Exception as error:
                line.send({"raised": [type(error).__name__, str(error), traceback.format_exc()]})
                return
            line.send(told, parts(answer))
            del answer
            while calls:  # not before: to begin with, writing holds up what else is done here
                left.append(writer.submit(calls.pop()))
