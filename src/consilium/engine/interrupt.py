"""Interrupts that are not lost, and child processes that do not outlive their parent.

Python swallows a KeyboardInterrupt in a destructor or in the callback of a weak reference, and a library that is
interrupted half-way may raise an error of its own.
"""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["end_with_parent", "interruptible"]


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Run a block that SIGINT or SIGTERM ends, even if the KeyboardInterrupt is swallowed inside it.

    The signals are covered in the main thread, and only where Python's own `default_int_handler` would answer them.

    Yields:
        A function to call now and then; it raises KeyboardInterrupt if a signal came and was swallowed.

    Raises:
        KeyboardInterrupt: if a signal came, even if a library swallowed it or raised another error.
    """
    got_signal = False

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal got_signal
        got_signal = True
        raise KeyboardInterrupt

    def check() -> None:
        if got_signal:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = [
        candidate
        for candidate in (signal.SIGINT, signal.SIGTERM)
        if in_main_thread and signal.getsignal(candidate) is signal.default_int_handler
    ]
    for number in signals:
        signal.signal(number, strike)
    try:
        yield check
        check()
    except Exception as error:
        if got_signal:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in signals:
            signal.signal(number, signal.default_int_handler)


def end_with_parent(number: signal.Signals) -> None:
    """Have this new process receive a signal when its parent ends, however the parent ends; Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


_PR_SET_PDEATHSIG = 1
