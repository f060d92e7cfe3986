"""Flower's programs start one at a time, one that waits too long does not start, and a token lives while one starts."""

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from consilium.engine import starting

PROGRAM = """
import os, sys, time
from pathlib import Path
from consilium.engine import starting
log = Path(sys.argv[1])
def note(what):
    with log.open("a") as file:
        file.write(f"{what} {os.getpid()} {time.monotonic()}\\n")
note("begins")
time.sleep(float(sys.argv[2]))
note("started")
starting.started()
time.sleep(float(sys.argv[3]))
note("ends")
"""


def start(tmp_path, name, *arguments):
    """Write a program into a folder of its own, once, and start it as Flower does."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    starting.write_program(tmp_path / "bin", name, str(script))
    return subprocess.Popen([tmp_path / "bin" / name, tmp_path / "log", *arguments], stdout=subprocess.DEVNULL)


def events(tmp_path):
    found = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return [(float(when), what, pid) for what, pid, when in found]


def test_one_at_a_time_starts_and_several_work(tmp_path):
    processes = [start(tmp_path, "app", "0.2", "1.5") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    found = sorted(events(tmp_path))
    steps = [what for _, what, _ in found if what != "ends"]
    assert steps == ["begins", "started"] * 3  # never two that have begun and are not there
    assert {pid for *_, pid in found} == {str(process.pid) for process in processes}
    last = max(when for when, what, _ in found if what == "started")
    assert min(when for when, what, _ in found if what == "ends") > last - 1.5


def test_who_waits_too_long_gives_up_and_the_next_may_start(tmp_path):
    code = "import sys; from pathlib import Path; from consilium.engine import starting;"
    code += "sys.exit(starting.in_turn(Path(sys.argv[1]), [sys.argv[2]], 0.3))"
    (tmp_path / "nothing.py").write_text("")
    first = start(tmp_path, "app", "30", "0")
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    waiting = [sys.executable, "-c", code, tmp_path / "bin/.app.lock", tmp_path / "nothing.py"]
    second = subprocess.run(waiting, capture_output=True, text=True, timeout=60)
    assert second.returncode == starting.LOST and "gives up its turn" in second.stdout
    first.kill()  # the lock goes with a process, however it ends
    first.wait()
    assert subprocess.run(waiting, timeout=60).returncode == 0


def test_started_without_a_lock_is_nothing(monkeypatch):
    monkeypatch.delenv(starting.LOCK, raising=False)
    starting.started()


def test_the_program_is_written_for_its_user_alone(tmp_path):
    (tmp_path / "echo.py").write_text("import sys; print(*sys.argv[1:])")
    starting.write_program(tmp_path / "a b", "app", str(tmp_path / "echo.py"))
    path = Path(tmp_path / "a b" / "app")
    assert path.stat().st_mode & 0o777 == 0o700
    assert subprocess.run([path, "x y"], capture_output=True, text=True, timeout=60).stdout == "x y\n"


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.fixture
def api():
    """(address, beats): a stand-in for Flower's Runtime API that notes the path and token of each request."""
    beats = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            beats.append((self.path, self.headers["flwr-task-token"], self.headers["content-type"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", beats
    server.shutdown()
    server.server_close()


def test_a_token_is_kept_alive_until_the_program_has_started(tmp_path, api, monkeypatch):
    """As Flower calls it. The program takes 1.5 s to start: heartbeats at 0, 0.4, 0.8, ... and none after that."""
    address, beats = api
    monkeypatch.setattr(starting, "EVERY", 0.4)
    script = tmp_path / "program.py"
    script.write_text(
        "import time; from consilium.engine import starting\n"
        "time.sleep(1.5); starting.started(); time.sleep(1); print('done')\n"
    )
    arguments = [str(script), "--runtime-api-address", address, "--token", "t1", "--insecure", "--parent-pid", "1"]
    before = sys.argv
    try:
        assert starting.in_turn(tmp_path / "lock", arguments) == 0
    finally:
        sys.argv = before
    assert 2 <= len(beats) <= 5
    assert set(beats) == {("/v1/runtime/send-task-heartbeat", "t1", "application/protobuf")}
    assert starting.LOCK not in os.environ


def test_a_heartbeat_goes_to_whoever_flower_names():
    heartbeat = starting.Heartbeat.of(
        ["flwr-clientapp", "--runtime-api-address", "127.0.0.1:1", "--token", "t", "--root-certificates", "ca"]
    )
    assert (heartbeat.address, heartbeat.token, heartbeat.certificates) == ("127.0.0.1:1", "t", "ca")
    plain = starting.Heartbeat.of(["p", "--runtime-api-address", "127.0.0.1:1", "--token", "t", "--insecure"])
    assert plain.certificates is None
    assert starting.Heartbeat.of(["p", "--help"]) is None
    assert not plain.send()  # nobody is there: the next one makes up for it
    assert not heartbeat.send()  # no such certificate


def test_a_program_that_hangs_gets_no_heartbeats_for_ever(api, monkeypatch):
    address, beats = api
    monkeypatch.setattr(starting, "EVERY", 0.2)
    monkeypatch.setattr(starting, "LONGEST", 0.5)
    monkeypatch.setenv(starting.LOCK, "0")
    starting.Heartbeat(address, "t", None).run()
    assert 2 <= len(beats) <= 3
