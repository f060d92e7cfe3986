"""What this process may have of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consilium import machine
from consilium.errors import ConfigError


def test_cores_are_those_that_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nfrom consilium import machine\n"
    code += "print(machine.cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and machine.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("group", "free"),
    [({}, 5_120_000), ({"memory.max": "max"}, 5_120_000), ({"memory.max": "1", "memory.current": "9"}, 0),
     ({"memory.max": "3000000", "memory.current": "1000000"}, 2_000_000)],
)  # fmt: skip
def test_free_memory_is_the_machines_or_what_its_group_leaves(tmp_path, monkeypatch, group, free):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "cgroup").mkdir()
    for name, text in group.items():
        (tmp_path / "cgroup" / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / Path(path).name)
    assert machine.free_memory() == free
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\n")
    with pytest.raises(ConfigError, match="MemAvailable"):
        machine.free_memory()
