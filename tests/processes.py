"""Processes of a test that never outlive it: each in a group of its own, ended with all its children."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@contextlib.contextmanager
def started(command, log, **environment):
    """A process with its output in the file `log`; on leaving, it and everything it started are gone."""
    with Path(log).open("ab") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, **environment},
            start_new_session=True,
            preexec_fn=_with_parent,
        )
    process.family = Family(process.pid)
    try:
        yield process
    finally:
        process.family.end()
        process.wait()


def _with_parent():
    """Even if the test itself is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Family:
    """A process and all it started, also those whose parent is gone: they carry a session's or a group's number."""

    def __init__(self, pid):
        self.pid = pid

    def members(self):
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            found = {p.pid: p for p in [root, *root.children(recursive=True)]}
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(p.pid) == self.pid and p.status() != psutil.STATUS_ZOMBIE:
                    found[p.pid] = p
        return found

    def signal(self, number):
        """The same signal to all at once: SIGKILL as when a machine goes down, SIGSTOP as when it stalls."""
        for p in self.members().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                p.send_signal(number)

    def end(self):
        """Ask once, then kill whoever is left."""
        members = self.members()
        for p in members.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                p.terminate()
        psutil.wait_procs(members.values(), timeout=10)
        for p in {**members, **self.members()}.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                p.send_signal(signal.SIGKILL)


def until(condition, seconds, what, process=None, log=None):
    """Wait for a condition, or fail with the end of the log."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        gone = process is not None and process.poll() is not None
        if time.monotonic() > end or (gone and not condition()):
            tail = Path(log).read_text(errors="replace")[-3000:] if log else ""
            raise AssertionError(f"{what}: {'it ended' if gone else f'not within {seconds} s'}\n{tail}")
        time.sleep(0.2)
    return found


def finished(process, seconds, log):
    """The exit code of a process that must end by itself."""
    until(lambda: process.poll() is not None, seconds, "the end", log=log)
    return process.returncode
