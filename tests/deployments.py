"""Servers and sites as processes on loopback, on free ports, in a test's folder."""

import contextlib
import json
import os
import random
import shlex
import socket
import sys
from pathlib import Path

import processes


def free_port():
    """Below those that the system gives to outgoing connections, which could be given this one before it is used."""
    while True:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return found.getsockname()[1]


class Deployment(contextlib.ExitStack):
    """Starts `consilium` commands in `folder`; on leaving, none of their processes is left."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.port, self.count = Path(folder), free_port(), 0
        self.host, self.within = "127.0.0.1", []  # what sites call the server, and what commands are started by

    def start(self, arguments, **environment):
        """A `consilium` command, as text or list; returns (process, its log)."""
        self.count += 1
        words = shlex.split(arguments) if isinstance(arguments, str) else [str(part) for part in arguments]
        log = self.folder / f"{self.count:02d}-{words[0]}.log"
        script = (
            f"import os, sys; os.chdir({str(self.folder)!r}); from consilium.__main__ import main; sys.exit(main())"
        )
        command = [*self.within, sys.executable, "-c", script, *words]
        cache = os.environ.get("CONSILIUM_CACHE") or str(Path.home() / ".cache/consilium")  # of documentation, a minute
        home = {"HOME": str(self.folder), "FLWR_HOME": str(self.folder / "flwr"), "CONSILIUM_CACHE": cache}
        return self.enter_context(processes.started(command, log, **home | environment)), log

    def server(self, *arguments, sites, keys=True, listen="127.0.0.1"):
        secure = ["--certificates", "keys"] if keys else ["--insecure"]
        where = ["--sites", ",".join(sites), "--address", f"{listen}:{self.port}", "--wait", "3000"]
        return self.start(["server", *arguments, *where, *secure])

    def client(self, *arguments, name, keys=True):
        secure = ["--certificates", f"keys/{name}"] if keys else ["--insecure"]
        where = ["--name", name, "--server", f"{self.host}:{self.port}", "--state", f"state-{name}"]
        return self.start(["client", *arguments, *where, "--port", str(free_port()), *secure])

    def logs(self):
        tails = [f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(self.folder.rglob("*.log"))]
        return "\n".join(tails)

    def finished(self, process, seconds):
        with contextlib.suppress(AssertionError):
            processes.until(lambda: process.poll() is not None, seconds, "the end")
        assert process.poll() == 0, f"exit code {process.poll()}\n{self.logs()}"


def rounds(folder):
    """The records of a run so far."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
