"""A watchdog for Flower's program at a site: `python -m consilium.engine.again PROGRAM ARGUMENT ...`.

When its server answers with an internal error (a full disk, a locked database), Flower's SuperNode logs off and stops
working, but a thread of it keeps the process alive. The watchdog ends the process in that case and starts it again. The
watching process imports nothing large.
"""

import contextlib
import functools
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from consilium.engine.interrupt import end_with_parent
from consilium.logs import start_from_environment

__all__ = ["command"]

log = logging.getLogger("consilium.engine.again")  # not __name__: it runs as "__main__"

LOST = 75
"""Exit code of a program that has come to the end of its main thread."""
PAUSE = 5.0
"""Seconds to wait before the program is started again."""
GRACE = 0.25
"""Seconds that the program has to end by itself after a signal, before it is told to."""
TRIES = 60
"""Failures in a row that are allowed after an exit with `LOST`; the program fails as long as its server does."""
FIRST = 12
"""Failures in a row that are allowed at the start: for about a minute, a server takes a killed site for a connected
one."""


def command(program: Sequence[str]) -> list[str]:
    """Return the command to start in place of a Python program so that it is restarted when it fails."""
    return [sys.executable, "-m", "consilium.engine.again", *program]


def _once(program: list[str]) -> None:
    """Run a program in this process, and exit when its main thread ends, whatever its other threads do."""
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
    """Start a program until it exits with 0 or by a signal, and return its exit code.

    A signal to this process ends both. The program may fail `FIRST` times before its exit code is returned and, after
    an exit with `LOST`, `TRIES` times in a row.
    """
    start_from_environment()
    allowed_failures = FIRST

    def strike(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, strike)
    parent = functools.partial(end_with_parent, signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt):  # the signal may come between two starts
        return _started(program, parent, allowed_failures)
    return 130


def _started(program: list[str], parent: Callable[[], None], left: int) -> int:
    """Start the program as often as it may fail, and return its last exit code."""
    while True:
        process = subprocess.Popen(command(["--once", *program]), preexec_fn=parent)
        try:
            # Not `process.wait()`: interrupted at the wrong moment, it loses the exit code.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        except KeyboardInterrupt:
            return _end(process)
        code = process.wait()
        left = TRIES if code == LOST else left - 1
        if code <= 0 or left < 0:
            return code
        log.warning(f"{program[0]} has stopped working; it is started again in {PAUSE:g} s, {left} times more")
        time.sleep(PAUSE)


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process and return its exit code. After Ctrl-C, which reaches both processes, it ends by itself."""
    for end_harder, seconds in ((process.terminate, GRACE), (process.kill, 20.0)):
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            end_harder()
    return process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        _once(sys.argv[2:])
    sys.exit(_again(sys.argv[1:]))
