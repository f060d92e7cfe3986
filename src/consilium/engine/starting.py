"""Starts Flower's client program at a site, one process at a time: `python -m consilium.engine.starting LOCK PROGRAM`.

Flower starts a `flwr-clientapp` for every message, gives it a token that lives for 30 seconds until its first request,
and starts the next one when the token has expired, while the one before still imports. On an overloaded machine, where
that takes longer, the processes slow each other down without end. So a site puts this in the place of the program: it
waits until no other process of the site is starting, and gives up while there is still time for the next one. The lock
is passed on to the program, and `started` releases it as soon as everything is imported.

This module imports nothing large.
"""

import fcntl
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["in_turn", "started", "write_program"]

LOCK = "CONSILIUM_STARTING"
"""Environment variable: the descriptor of the lock that a starting process holds."""
PATIENCE = 15.0
"""Seconds for which a process waits for its turn: half of its token's life, so that the other half is left to start."""
LOST = 75
"""Exit code of a process that has given up."""


def write_program(folder: Path, name: str, program: str) -> None:
    """Write an executable `name` into a folder that starts the program in turn; put the folder first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "consilium.engine.starting", str(folder / f".{name}.lock"), program]
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o700)


def in_turn(lock: Path, program: Sequence[str], patience: float = PATIENCE) -> int:
    """Become the program as soon as no other process is starting; return `LOST` if that takes too long."""
    end = time.monotonic() + patience
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                print("another client process of this site is still starting; this one gives up its turn", flush=True)
                return LOST
            time.sleep(0.1)
    os.set_inheritable(held, True)
    os.execve(program[0], list(program), {**os.environ, LOCK: str(held)})


def started() -> None:
    """Let the next process start: this one has imported what it needs."""
    if held := os.environ.pop(LOCK, None):
        os.close(int(held))


if __name__ == "__main__":
    sys.exit(in_turn(Path(sys.argv[1]), sys.argv[2:]))
