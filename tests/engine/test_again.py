"""A program that stops working without ending is started again; one that ends, ends."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from consilium.engine import again


@pytest.fixture(autouse=True)
def _logs(monkeypatch):
    """A site's command sets the level for the processes that it starts."""
    monkeypatch.setenv("CONSILIUM_LOG_LEVEL", "info")


PROGRAM = """
import os, sys, threading, time
from functools import partial
from pathlib import Path
folder = Path(sys.argv[1])
calls = len(list(folder.glob("call-*")))
(folder / f"call-{calls}-{os.getpid()}").touch()
threading.Thread(target=time.sleep, args=(600,)).start()
if sys.argv[2] == "work":
    time.sleep(600)
codes = sys.argv[2].split(",")
sys.exit(int(codes[calls]) if codes[calls] else None)
"""


@pytest.fixture
def started(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "calls").mkdir()
    code = "import sys; from consilium.engine import again; again.PAUSE, again.FIRST, again.TRIES = 0.1, 1, 2\n"
    code += "sys.exit(again._again(sys.argv[1:]))"
    found = []

    def start(how):
        command = [sys.executable, "-c", code, tmp_path / "program.py", tmp_path / "calls", how]
        words, heeded = [str(part) for part in command], partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        # Ctrl-C counts there also where this process was started in the background, which ignores it.
        found.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=heeded))
        return found[-1], tmp_path / "calls"

    yield start
    for process in found:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [("7,7,7", 2, 7), ("7,0", 2, 0), ("0", 1, 0), (",,0", 3, 0), (",7,7,,0", 5, 0), (",7,7,7,7,7", 4, 7)],
    ids=["a mistake", "not yet taken", "an end", "twice lost", "lost while the server is not well", "lost for good"],
)
def test_started_again_until_it_ends_by_itself(started, codes, starts, code):
    """Its other thread would have kept the process for ten minutes. It may fail once at first, twice in a row later."""
    process, calls = started(codes)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and len(list(calls.iterdir())) == starts
    assert said.count("has stopped working; it is started again") == starts - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_both_end_together(started, number):
    process, calls = started("work")
    end = time.monotonic() + 60
    while not (there := list(calls.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    child = int(there[0].name.split("-")[2])
    os.kill(process.pid, number)
    process.wait(30)
    _, left = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=30)
    assert not left and len(list(calls.iterdir())) == 1


def test_the_watching_process_is_small():
    """It lives as long as the site takes part."""
    code = "import consilium.engine.again, sys; print('torch' in sys.modules, 'flwr' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
    assert again.command(["x", "y"])[1:] == ["-m", "consilium.engine.again", "x", "y"]


def test_ctrl_c_between_two_starts_is_no_traceback(tmp_path):
    """While it waits to start the program again, and while the program runs."""
    (tmp_path / "program.py").write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(3)")
    for seconds, says in (("0", b"it is started again"), ("600", b"")):
        command = again.command([str(tmp_path / "program.py"), seconds])
        heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heeded, start_new_session=True
        )
        try:
            if says:
                assert says in process.stdout.readline()
            else:
                until = time.monotonic() + 30
                while len(psutil.Process(process.pid).children()) < 1 and time.monotonic() < until:
                    time.sleep(0.1)
                time.sleep(3)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert b"Traceback" not in errors and process.returncode == 130
