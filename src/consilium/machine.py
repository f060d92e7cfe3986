"""Resources of this machine that the process may use, and silencing of its libraries."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from consilium.errors import ConfigError

__all__ = ["cores", "free_memory", "memory_bytes", "quietly"]


def cores() -> int:
    """Return the number of cores that this process may run on, >= 1; a container or `taskset` can limit it."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Return the bytes that processes can allocate without swapping, on the machine and in its control group (v2).

    Raises:
        ConfigError: if the machine does not report it.
    """
    entries = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    free_bytes = [1024 * int(words[1]) for words in entries if words[0] == "MemAvailable:"]
    if not free_bytes:
        raise ConfigError("/proc/meminfo does not tell MemAvailable: this Linux is too old")
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit ("max"), or no such control group
        free_bytes.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free_bytes), 0)


def memory_bytes(device: str) -> int:
    """Return the bytes of memory of a device: a GPU ("cuda:0"), or this machine within its control group (v2)."""
    if device.startswith("cuda"):
        import torch  # imported here because a command that only asks for the cores should not wait for it

        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # no limit ("max"), or no such control group
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' progress bars and warnings; the loading code checks what matters about a model itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
