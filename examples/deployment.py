"""Deployment on loopback: a server and two sites, each a process of its own with its own file, without TLS.

    python examples/deployment.py FOLDER [further flags of the experiment ...]

Between machines leave --insecure out and use `consilium certificates`: docs/deployment.md.
"""

import socket
import subprocess
import sys
from pathlib import Path

import consilium

SITES = ("north", "south")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_notes(path: Path, site: str) -> Path:
    pets = {"cat": "purrs", "dog": "barks"}
    rows = [f"{site} {i} the {pet} {verb},{pet},{site}\n" for i in range(12) for pet, verb in pets.items()]
    path.write_text("text,label,site\n" + "".join(rows))
    return path


def main(folder: Path, flags: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    consilium_ = [sys.executable, "-m", "consilium"]
    common = ["fedmoe-text", "--insecure", "--rounds", "2", "--name", "loopback", *flags]
    server = subprocess.Popen(
        [*consilium_, "server", *common, "--sites", ",".join(SITES), "--address", address, "--out", str(folder)]
    )
    sites = []
    for site in SITES:
        own = ["--name", site, "--server", address, "--state", str(folder / site), "--port", str(free_port())]
        data = ["--data.path", str(write_notes(folder / f"{site}.csv", site)), "--data.client", "site"]
        command = [*consilium_, "client", "fedmoe-text", "--insecure", "--rounds", "2", *flags, *own, *data]
        with (folder / f"{site}.log").open("w") as log:
            sites.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        if server.wait():
            raise SystemExit("the server failed")
        print("scores:", consilium.load_run(folder / "loopback").scores)
    finally:
        for process in (server, *sites):
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "loopback"), sys.argv[2:])
