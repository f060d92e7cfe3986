"""The memory of a server's process: what is freed goes back to the system, or a model's worth of messages stays there.

Both are glibc's; with another libc they do nothing.
"""

import contextlib
import ctypes

__all__ = ["give_back", "give_back_at_once"]

M_MMAP_THRESHOLD = -3


def give_back_at_once() -> None:
    """From now on all pieces of 64 kB and more go back when they are freed. Left alone, glibc raises that bound up to
    32 MB as it sees larger ones go."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)


def give_back() -> None:
    """What has been freed so far, also small pieces between others that are in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
