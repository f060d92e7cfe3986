"""Worker processes of the local engine: a client each, on a core each, so that many small clients train side by side.

They are forked from the run's process when it is ready, so data and code are there without being read or sent again.
What they are sent and answer crosses a pipe as the codec's bytes and JSON. A worker has one torch thread: on a busy
machine several threads in one process wait for each other, a client per core does not. What a client leaves on disk is
written beside the work of the next; when all have answered, it is there. The last clients begin with those that take
longest, so that all cores end together.
"""

import contextlib
import json
import multiprocessing
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from consilium import errors
from consilium.core import ClientId, Payload
from consilium.engine.codec import decode, encode
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
PAUSE = 0.2
"""Seconds between two messages of progress."""
SETTLE = "settle"
"""What a worker is told to have everything written, and answers when it is."""


def at_once(call: Callable[[], object]) -> None:
    """`Later` where there is no other thread."""
    call()


class Workers:
    """Hands clients to whoever is free, and gives their answers in the order of the clients.

    Args:
        pipes: one to each worker. processes: the workers.
    """

    def __init__(self, pipes: list[Connection], processes: list[multiprocessing.process.BaseProcess]):
        self.pipes = pipes
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
        tasks, idle, more, room = iter(tasks), list(self.pipes), True, ROOM
        waiting: list[tuple[ClientId, int, Payload]] = []
        busy: dict[Connection, ClientId] = {}
        turns: deque[tuple[ClientId, Payload]] = deque()
        done: dict[ClientId, tuple[Payload, dict[str, Any]]] = {}
        while True:
            while more and (len(turns) < AHEAD * len(self.pipes) or room > 0):
                if more := (task := next(tasks, None)) is not None:
                    waiting.append(task)
                    turns.append((task[0], task[2]))
                    room -= task[2].nbytes
            while idle and waiting:
                longest = 0 if more else max(range(len(waiting)), key=lambda place: takes(waiting[place][0]))
                client, version, payload = waiting.pop(longest)
                pipe = idle.pop()
                _send(pipe, [kind, client, number, version], payload)
                busy[pipe] = client
            if not turns:
                self._settle()
                return
            if (first := turns[0])[0] in done:
                turns.popleft()
                room += first[1].nbytes
                yield *first, *done.pop(first[0])
                continue
            for pipe in wait(list(busy)):
                client = busy[pipe]
                told = self._heard(pipe, f"of client {client}")
                if "progress" in told:
                    progress(client, "test" if kind == "evaluate" else kind, *told["progress"])
                    continue
                done[client] = decode(pipe.recv_bytes()), told
                idle.append(pipe)
                del busy[pipe]

    def _settle(self) -> None:
        """Wait until everything is written."""
        for pipe in self.pipes:
            pipe.send_bytes(json.dumps([SETTLE]).encode())
        for pipe in self.pipes:
            self._heard(pipe, "that wrote the states of clients")

    def _heard(self, pipe: Connection, whose: str) -> dict[str, Any]:
        try:
            told = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            process = self.processes[self.pipes.index(pipe)]
            process.join(5)
            raise RoundError(
                f"the worker process {whose} has ended with code {process.exitcode} (-9: killed, perhaps "
                "for want of memory); resume the run"
            ) from error
        if "raised" in told:
            name, text, trace = told["raised"]
            raise getattr(errors, name, RuntimeError)(text) from RuntimeError(f"in a worker process:\n{trace}")
        return told


@contextmanager
def forked(count: int, work: Work) -> Iterator[Workers]:
    """So many worker processes, gone afterwards, also if this process is killed."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for _ in range(count):
            pipe, far = context.Pipe()
            pipes.append(pipe)
            processes.append(context.Process(target=_serve, args=(far, list(pipes), work), daemon=True))
            with warnings.catch_warnings():  # of threads, which are the progress bars' and hold no lock a worker needs
                warnings.simplefilter("ignore", DeprecationWarning)
                processes[-1].start()
            far.close()
        yield Workers(pipes, processes)
    finally:
        for process in processes:
            process.terminate()
        for pipe, process in zip(pipes, processes, strict=False):
            process.join()
            pipe.close()


def _serve(pipe: Connection, others: list[Connection], work: Work) -> None:
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
            pipe.send_bytes(json.dumps({"progress": [done, total]}).encode())

    writer, left = ThreadPoolExecutor(1), deque[Future[object]]()

    def settle() -> None:
        while left:
            left.popleft().result()

    def later(call: Callable[[], object]) -> None:
        settle()  # what is written lies in memory until then: of one client at most
        left.append(writer.submit(call))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            kind, *task = json.loads(pipe.recv_bytes())
            payload = Payload() if kind == SETTLE else decode(pipe.recv_bytes())
            try:
                if kind == SETTLE:
                    settle()
                    pipe.send_bytes(b"{}")
                    continue
                answer, told = work(kind, *task, payload, progress, later)
                del payload
            except Exception as error:
                raised = [type(error).__name__, str(error), traceback.format_exc()]
                pipe.send_bytes(json.dumps({"raised": raised}).encode())
                return
            _send(pipe, told, answer)
            del answer


def _send(pipe: Connection, told: Any, payload: Payload) -> None:
    pipe.send_bytes(json.dumps(told).encode())
    pipe.send_bytes(encode(payload))
