"""A network that can be cut: a proxy between two ports of loopback, and a link between two network namespaces."""

import contextlib
import shutil
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path


class Proxy:
    """Passes on what comes to its port, until so many bytes have: then every connection is reset, and none is taken.

    Use as a context manager. `sent`: bytes that clients have sent so far.
    """

    def __init__(self, port):
        self.to, self.sent, self.left, self.sockets = port, 0, None, []
        self.lock = threading.Lock()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listening.close()
        self._reset()

    def cut_after(self, size):
        """Reset everything when clients have sent so many bytes more."""
        with self.lock:
            self.left = size
        if not size:
            self._reset()

    @property
    def cut(self):
        return self.left == 0

    def heal(self):
        with self.lock:
            self.left = None

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                self.sockets.append(near)
                if self.cut:
                    self._reset()
                    continue
                far = socket.create_connection(("127.0.0.1", self.to))
                self.sockets.append(far)
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, near, far, up):
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 14):
                if up:
                    with self.lock:
                        data = data if self.left is None else data[: self.left]
                        self.left = None if self.left is None else self.left - len(data)
                        self.sent += len(data)
                far.sendall(data)
                if up and self.cut:
                    self._reset()
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _reset(self):
        """As a router does that forgets a connection: the other side gets RST."""
        with self.lock:
            ends, self.sockets = self.sockets, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Namespaces(contextlib.ExitStack):
    """Two network namespaces with a link between them, which nobody else sees: a machine and one that is cut off.

    `here`, `there`: what to start a command with, to have it in one of them. `address`: of the first, for the second.
    """

    address = "10.213.0.1"

    def __enter__(self):
        self.one = self._made("unshare", "-rn")
        self.here = self._enter(self.one)
        self.two = self._made(*self.here, "unshare", "-n")
        self.there = self._enter(self.two)
        for command in (
            [*self.here, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", str(self.two)],
            [*self.here, "ip", "address", "add", f"{self.address}/24", "dev", "up0"],
            [*self.there, "ip", "address", "add", "10.213.0.2/24", "dev", "down0"],
            [*self.there, "ip", "link", "set", "down0", "up"],
            *([*where, "ip", "link", "set", "lo", "up"] for where in (self.here, self.there)),
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        self.link("up")
        return self

    def link(self, what):
        """Put the link "down" or "up"."""
        subprocess.run([*self.here, "ip", "link", "set", "up0", what], check=True)

    def _made(self, *command):
        process = subprocess.Popen([*command, "sleep", "infinity"])
        self.callback(process.wait)
        self.callback(process.kill)
        end = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":  # then the namespace is as it shall be
            if process.poll() is not None or time.monotonic() > end:
                raise OSError(f"{' '.join(command)} is not allowed")
            time.sleep(0.05)
        return process.pid

    @staticmethod
    def _enter(pid):
        return ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]


def why_no_namespaces():
    """Why this machine cannot have them; "": it can."""
    for program in ("unshare", "nsenter", "ip"):
        if not shutil.which(program):
            return f"no program {program}"
    try:
        with Namespaces():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not permitted: {getattr(error, 'stderr', '') or error}"
