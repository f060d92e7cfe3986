"""Control of a server's heap: freed memory is returned to the system, or that of many messages would stay allocated.

Both functions call glibc; with another libc they do nothing.
"""

import contextlib
import ctypes

__all__ = ["give_back", "give_back_at_once"]

M_MMAP_THRESHOLD = -3


def give_back_at_once() -> None:
    """Have all blocks of 64 kB and more returned to the system when they are freed, from now on.

    By default, glibc raises that threshold up to 32 MB as it sees larger blocks freed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)


def give_back() -> None:
    """Return all memory freed so far to the system, including small blocks between others that are in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
