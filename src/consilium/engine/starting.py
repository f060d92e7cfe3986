"""A launcher for Flower's programs that may start slowly: `python -m consilium.engine.starting LOCK PROGRAM ...`.

Flower starts a `flwr-clientapp` for every message at a site, and a `flwr-serverapp` for a run at a server. It gives
each a token that lives for 30 seconds until the first request. When the token has expired, Flower starts another
process while the one before is still importing. On an overloaded machine, the processes then slow each other down
without end. A site and a server therefore run this launcher in place of the program. It does two things:

- It waits until no other process of the kind is starting, and gives up if that takes too long. `started` lets the next
  one start.
- From then until `started`, it sends Flower's heartbeats for the token, which lives for 60 seconds after each. Once the
  program has been imported, it sends its own.

This module imports nothing large.
"""

import fcntl
import http.client
import itertools
import os
import runpy
import shlex
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Heartbeat", "in_turn", "started", "write_program"]

LOCK = "CONSILIUM_STARTING"
"""Environment variable that holds the descriptor of a starting process's lock."""
PATIENCE = 15.0
"""Seconds for which a process waits for its turn: half of its token's life, so that the other half is left to start."""
LOST = 75
"""Exit code of a process that has given up."""
EVERY = 10.0
"""Seconds between two heartbeats."""
LONGEST = 900.0
"""Seconds after which a program that has not started gets no more heartbeats. It hangs, and another may be tried."""
BEAT = "/v1/runtime/send-task-heartbeat"
"""Path of Flower's Runtime API. The request and its answer are empty protobuf messages, so no library is needed."""


def write_program(folder: Path, name: str, program: str) -> None:
    """Write an executable `name` that starts a Python program in turn; its folder must come first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "consilium.engine.starting", str(folder / f".{name}.lock"), program]
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o700)


def in_turn(lock: Path, program: Sequence[str], patience: float = PATIENCE) -> int:
    """Run a Python program here as soon as no other process is starting; return `LOST` if that takes too long."""
    deadline = time.monotonic() + patience
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                print("another process of this program is still starting; this one gives up its turn", flush=True)
                return LOST
            time.sleep(0.1)
    os.environ[LOCK] = str(descriptor)
    if heartbeat := Heartbeat.of(program):
        threading.Thread(target=heartbeat.run, daemon=True).start()
    sys.argv = list(program)
    runpy.run_path(program[0], run_name="__main__")
    return 0


def started() -> None:
    """Let the next process start; call this once all imports are done."""
    if descriptor := os.environ.pop(LOCK, None):
        os.close(int(descriptor))


class Heartbeat:
    """A sender of heartbeats that keeps the token of a task alive while its process starts.

    Args:
        address: HOST:PORT of Flower's Runtime API.
        token: token of the task.
        certificates: file with the authorities that may have issued the API's certificate; None: plain HTTP.
    """

    def __init__(self, address: str, token: str, certificates: str | None) -> None:
        self.address, self.token, self.certificates = address, token, certificates

    @classmethod
    def of(cls, program: Sequence[str]) -> "Heartbeat | None":
        """Return the heartbeat for a program with the arguments that Flower gives it; None for any others."""
        options = dict(itertools.pairwise(program))
        token, address = options.get("--token"), options.get("--runtime-api-address")
        if not token or not address:
            return None
        return cls(address, token, None if "--insecure" in program else options.get("--root-certificates"))

    def run(self) -> None:
        """Send a heartbeat every `EVERY` seconds until `started`, for at most `LONGEST` seconds."""
        deadline = time.monotonic() + LONGEST
        while LOCK in os.environ and time.monotonic() < deadline:
            self.send()
            next_time = time.monotonic() + EVERY
            while LOCK in os.environ and time.monotonic() < next_time:
                time.sleep(0.2)

    def send(self) -> bool:
        """Send a heartbeat and return whether the API accepted it; the next one makes up for a failure."""
        try:
            if self.certificates is None:
                connection = http.client.HTTPConnection(self.address, timeout=EVERY)
            else:
                context = ssl.create_default_context(cafile=self.certificates)
                connection = http.client.HTTPSConnection(self.address, timeout=EVERY, context=context)
            try:
                headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
                connection.request("POST", BEAT, b"", {**headers, "flwr-task-token": self.token})
                return connection.getresponse().status == 200
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException):
            return False


if __name__ == "__main__":
    sys.exit(in_turn(Path(sys.argv[1]), sys.argv[2:]))
