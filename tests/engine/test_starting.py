"""Client processes of a site start one at a time, and one that waits too long does not start at all."""

import subprocess
import sys
import time
from pathlib import Path

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
    program = tmp_path / "python"
    if not program.exists():
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        program.chmod(0o700)
        starting.write_program(tmp_path / "bin", name, str(program))
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
    code += "sys.exit(starting.in_turn(Path(sys.argv[1]), ['/bin/true'], 0.3))"
    first = start(tmp_path, "app", "30", "0")
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    waiting = [sys.executable, "-c", code, tmp_path / "bin/.app.lock"]
    second = subprocess.run(waiting, capture_output=True, text=True, timeout=60)
    assert second.returncode == starting.LOST and "gives up its turn" in second.stdout
    first.kill()  # the lock goes with a process, however it ends
    first.wait()
    assert subprocess.run(waiting, timeout=60).returncode == 0


def test_started_without_a_lock_is_nothing(monkeypatch):
    monkeypatch.delenv(starting.LOCK, raising=False)
    starting.started()


def test_the_program_is_written_for_its_user_alone(tmp_path):
    starting.write_program(tmp_path / "a b", "app", "/bin/echo")
    path = Path(tmp_path / "a b" / "app")
    assert path.stat().st_mode & 0o777 == 0o700
    assert subprocess.run([path, "x y"], capture_output=True, text=True, timeout=60).stdout == "x y\n"
