"""Ctrl-C that is not lost: Python swallows a KeyboardInterrupt in a destructor or in a weak reference's callback,
and a library that is interrupted half-way may end in an error of its own. And processes that do not outlive theirs."""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["end_with_parent", "interruptible"]


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Work that a signal ends, wherever it strikes; yields what to call now and then, in case it was swallowed.

    Covers SIGINT and SIGTERM where Python's own `default_int_handler` would answer, in the main thread.

    Raises:
        KeyboardInterrupt: if a signal came, whatever became of it.
    """
    asked = False

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    ours = [s for s in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(s) is signal.default_int_handler]
    for number in ours:
        signal.signal(number, strike)
    try:
        yield check
        check()
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler)


def end_with_parent(number: signal.Signals) -> None:
    """In a new process: this signal comes when the parent ends, however it ends. Linux alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


_PR_SET_PDEATHSIG = 1
