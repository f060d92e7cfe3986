"""Worker processes of the local engine, one per core, so that many small clients train side by side.

Each worker runs one client at a time. Workers are forked from the run's process when it is ready, so they have its data
and code without reading or sending anything again. Messages cross a pipe as JSON, and payloads cross shared memory as
the codec's bytes. A payload that many clients receive, like the weights that all begin a round with, is written there
once. A worker has one torch thread: on a busy machine, several threads in one process wait for each other, while one
client per core does not. A client's state is written to disk while the next client works, and all states are written
when all clients have answered. Of the last clients, those that take longest begin first, so that all cores finish
together.
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
"""A function that takes a call, which may be made while the next client works."""
Work = Callable[[str, ClientId, int, int, Payload, Callable[[int, int], None], Later], tuple[Payload, dict[str, Any]]]
"""(kind, client, round, version of its state, payload, progress, later) -> its answer, and a report as JSON."""
AHEAD, ROOM = 2, 2**26
"""Limits on the clients that are at work, or wait for their turn to be merged: clients per worker, and bytes that they
were sent. The limit that allows more clients applies."""
MEMORY = 2**26
"""Largest payload in bytes that goes through shared memory; larger ones go through the pipe."""
PAUSE = 0.2
"""Seconds between two progress messages."""
SETTLE = "settle"
"""The message that has a worker finish all writes; the worker answers when they are done."""


def at_once(call: Callable[[], object]) -> None:
    """Make a call at once: the `Later` of a process that has no other thread."""
    call()


class Line:
    """One end of the connection between the run's process and a worker.

    Args:
        pipe: pipe for messages as JSON.
        out: shared memory that this end writes.
        into: shared memory that this end reads.
    """

    def __init__(self, pipe: Connection, out: mmap.mmap, into: mmap.mmap):
        self.pipe, self.out, self.into = pipe, out, into

    def fileno(self) -> int:
        """Return the file descriptor to wait for."""
        return self.pipe.fileno()

    def send(self, told: Any, blob: Sequence[Buffer] = (), there: bool = False) -> None:
        """Send a message and a blob.

        Args:
            blob: the bytes in parts.
            there: whether the blob is the last one that was sent, which need not be written again.
        """
        size = sum(map(len, blob))
        if size <= len(self.out) and not there:
            self.out.seek(0)
            for part in blob:
                self.out.write(part)
        self.pipe.send_bytes(json.dumps([told, size]).encode())
        if size > len(self.out):
            self.pipe.send_bytes(b"".join(blob))

    def receive(self) -> tuple[Any, bytes]:
        """Return the message and the blob that were sent; the blob is a copy."""
        message, size = json.loads(self.pipe.recv_bytes())
        return message, self.into[:size] if size <= len(self.into) else self.pipe.recv_bytes()


class Workers:
    """A pool of workers that gives clients to free workers, and returns their answers in the order of the clients.

    Args:
        lines: one connection to each worker.
        processes: the workers.
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
            kind: "train" or "evaluate".
            number: number of the round.
            tasks: (client, version of its state, payload that it is sent) of each client.
            takes: how long a client takes, in any unit.

        Yields:
            (client, payload that it was sent, its answer, the worker's report), in the order of `tasks`.

        Raises:
            RoundError: if a worker ends before it has answered.
            CheckpointError: if a client's state could not be written.
        """
        tasks, idle_lines, has_more, room = iter(tasks), list(self.lines), True, ROOM
        waiting_tasks: list[tuple[ClientId, int, Payload]] = []
        clients_by_line: dict[Line, ClientId] = {}
        last_payload: Payload | None = None
        blob: list[Buffer] = []
        blob_holders: set[Line] = set()  # lines that hold the blob of the last payload
        turns: deque[tuple[ClientId, Payload]] = deque()
        results: dict[ClientId, tuple[bytes, dict[str, Any]]] = {}
        while True:
            while has_more and (len(turns) < AHEAD * len(self.lines) or room > 0):
                if has_more := (task := next(tasks, None)) is not None:
                    waiting_tasks.append(task)
                    turns.append((task[0], task[2]))
                    room -= task[2].nbytes
            while idle_lines and waiting_tasks:
                index = (
                    0 if has_more else max(range(len(waiting_tasks)), key=lambda place: takes(waiting_tasks[place][0]))
                )
                client, version, payload = waiting_tasks.pop(index)
                if not _same(payload, last_payload):
                    last_payload, blob, blob_holders = payload, parts(payload), set()
                line = idle_lines.pop()
                line.send([kind, client, number, version], blob, there=line in blob_holders)
                blob_holders.add(line)
                clients_by_line[line] = client
                if payload.nbytes > MEMORY:
                    last_payload, blob = None, []
            if not turns:
                self._settle()
                return
            if (turn := turns[0])[0] in results:
                turns.popleft()
                room += turn[1].nbytes
                answer, report = results.pop(turn[0])
                reply = decode(answer)
                del answer
                yield *turn, reply, report
                del reply
                continue
            for line in wait(list(clients_by_line)):
                client = clients_by_line[line]
                report, answer = self._heard(line, f"of client {client}")
                if "progress" in report:
                    progress(client, "test" if kind == "evaluate" else kind, *report["progress"])
                    continue
                results[client] = answer, report
                idle_lines.append(line)
                del clients_by_line[line], answer

    def _settle(self) -> None:
        """Wait until the workers have written everything."""
        for line in self.lines:
            line.send([SETTLE])
        for line in self.lines:
            self._heard(line, "that wrote the states of clients")

    def _heard(self, line: Line, whose: str) -> tuple[dict[str, Any], bytes]:
        try:
            message, blob = line.receive()
        except (EOFError, OSError) as error:
            process = self.processes[self.lines.index(line)]
            process.join(5)
            raise RoundError(
                f"the worker process {whose} has ended with code {process.exitcode} (-9: killed, perhaps "
                "for want of memory); resume the run"
            ) from error
        if "raised" in message:
            name, text, trace = message["raised"]
            raise getattr(errors, name, RuntimeError)(text) from RuntimeError(f"in a worker process:\n{trace}")
        return message, blob


def _same(payload: Payload, other: Payload | None) -> bool:
    """Return whether two payloads hold the very same tensors and equal scalars."""
    if other is None or payload.groups.keys() != other.groups.keys() or payload.scalars != other.scalars:
        return False
    pairs = [(params, other.groups[group]) for group, params in payload.groups.items()]
    return all(a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in pairs)


@contextmanager
def forked(count: int, work: Work) -> Iterator[Workers]:
    """Fork `count` worker processes that end with the block, also if this process is killed."""
    context = multiprocessing.get_context("fork")
    lines, processes = [], []
    try:
        for _ in range(count):
            (near_pipe, far_pipe), down_memory, up_memory = context.Pipe(), mmap.mmap(-1, MEMORY), mmap.mmap(-1, MEMORY)
            lines.append(Line(near_pipe, down_memory, up_memory))
            open_pipes = [line.pipe for line in lines]
            processes.append(
                context.Process(
                    target=_serve, args=(Line(far_pipe, up_memory, down_memory), open_pipes, work), daemon=True
                )
            )
            # The warning is about threads; those of the progress bars hold no lock that a worker needs.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                processes[-1].start()
            far_pipe.close()
        yield Workers(lines, processes)
    finally:
        for process in processes:
            process.terminate()
        for line, process in zip(lines, processes, strict=False):
            process.join()
            line.pipe.close()


def _serve(line: Line, others: list[Connection], work: Work) -> None:
    """Serve one client after the other until the run's process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the run's process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(AttributeError, OSError):  # outside Linux, the closed pipe ends the worker
        end_with_parent(signal.SIGKILL)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    last_time = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_time
        if (now := time.monotonic()) - last_time >= PAUSE:
            last_time = now
            line.send({"progress": [done, total]})

    writer, pending_writes = ThreadPoolExecutor(1), deque[Future[object]]()
    calls: list[Callable[[], object]] = []

    def settle() -> None:
        while pending_writes:
            pending_writes.popleft().result()

    def later(call: Callable[[], object]) -> None:
        settle()  # so that at most one client's state waits in memory
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
                answer, report = work(kind, *task, payload, progress, later)
                del payload
            except Exception as error:
                line.send({"raised": [type(error).__name__, str(error), traceback.format_exc()]})
                return
            line.send(report, parts(answer))
            del answer
            while calls:  # only after the answer: the start of a write blocks this thread
                pending_writes.append(writer.submit(calls.pop()))
