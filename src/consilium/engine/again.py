"""Keeps Flower's program at a site working: `python -m consilium.engine.again PROGRAM ARGUMENT ...`.

When its server answers with an error of its own (its disk is full, its database locked), Flower's SuperNode logs off
and works no more, but its process stays, for a thread of it does. Here it ends in that case, and is started again.
The process that watches imports nothing large.
"""

import contextlib
import functools
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from consilium.engine.interrupt import end_with_parent

__all__ = ["command"]

LOST = 75
"""Exit code of a program that has come to the end of its main thread."""
PAUSE = 5.0
"""Seconds before it is started again."""
TRIES = 60
"""Times that it may then fail in a row, as it does while its server is not yet well."""
FIRST = 12
"""Times that it may fail at the start: for a minute a server takes a site that was killed for one that is there."""


def command(program: Sequence[str]) -> list[str]:
    """What to start in place of a Python program, for it to be started again."""
    return [sys.executable, "-m", "consilium.engine.again", *program]


def _once(program: list[str]) -> None:
    """Run a program in this process, which ends with its main thread, whatever other threads do."""
    sys.argv, code = program, None
    try:
        runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(LOST if code is None else code if isinstance(code, int) else 1)


def _again(program: list[str]) -> int:
    """Start a program until it ends well, or by a signal; a signal to this process ends both. It may fail `FIRST` times
    before its code counts, and once it was `LOST`, `TRIES` times in a row."""
    left = FIRST

    def strike(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, strike)
    parent = functools.partial(end_with_parent, signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt):  # between two starts
        return _started(program, parent, left)
    return 130


def _started(program: list[str], parent: Callable[[], None], left: int) -> int:
    """Start it, as often as it may fail; returns its last exit code."""
    while True:
        process = subprocess.Popen(command(["--once", *program]), preexec_fn=parent)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                return process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()
        left = TRIES if code == LOST else left - 1
        if code <= 0 or left < 0:
            return code
        print(f"{program[0]} has stopped working; it is started again in {PAUSE:g} s, {left} times more", flush=True)
        time.sleep(PAUSE)


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        _once(sys.argv[2:])
    sys.exit(_again(sys.argv[1:]))
