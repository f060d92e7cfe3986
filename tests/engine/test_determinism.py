# ruff: noqa: F401, F811  fixtures of another file
"""Same seed, same bits: whatever the order of answers, in merging whatever the number of threads, in training whatever
number the machine or OMP_NUM_THREADS would choose. Through bytes and after resuming: `test_registry`, `test_flower`,
`test_resume`.

In training torch's kernels do sum otherwise on two threads than on one, wherever threads share what is summed over: the
gradients of the weights of convolutions, of layer_norm, and of a linear layer over many rows; sums of more than 32,768
numbers. So how many is a setting of the run, 1 unless told, and it is not resumed with another number (`test_durable`).
"""

import dataclasses
import itertools
import json
import os
import sys

import processes
import pytest
import runs
import tiny
import torch
from test_flower import bits_of, data, grid, toys

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.experiment import Wire, to_json
from consilium.params import WeightedMean, checksum, finite


def test_any_order_of_answers_gives_the_same_bits_and_records(toys, grid, tmp_path, monkeypatch):
    """All six orders in which three clients can answer, and the same run in this process."""
    made = dataclasses.replace(toys, rounds=2, wire=Wire(deadline=60))
    local = bits_of(tmp_path / "local", dataclasses.replace(made, engine="local", strict=True))
    real, seen = grid.pull_messages, []
    for order in itertools.permutations((100, 101, 102)):

        def pull(identifiers, order=order):
            (identifier,) = identifiers
            kind, node = (getattr(grid.queue[identifier].metadata, key) for key in ("message_type", "dst_node_id"))
            waiting = [m.metadata.dst_node_id for m in grid.queue.values() if m.metadata.message_type == kind]
            if node != min(waiting, key=order.index):
                return []
            seen.append((kind, node))
            return real(identifiers)

        monkeypatch.setattr(grid, "pull_messages", pull)
        assert bits_of(tmp_path / "".join(map(str, order)), made) == local
        assert [node for kind, node in seen if kind == "train"] == [*order] * 2
        seen.clear()


RUNS = """
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
if sys.argv[2] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from consilium.experiment import from_json
from consilium.loop import resume, run
root, out = Path(sys.argv[1]), Path(sys.argv[1], sys.argv[2])
made = {name: from_json(saved) for name, saved in json.loads((root / "made.json").read_text()).items()}
for name, experiment in made.items():
    run(experiment, out / name)
def rounded(record, events):
    if record["round"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "1":
    resume(root / "2/killed")
else:
    run(made["two"], out / "killed", SimpleNamespace(started=lambda *_: None, step=lambda *_: None, rounded=rounded))
"""


def test_neither_omp_num_threads_nor_the_cores_decide_the_bits(data, tmp_path):
    """The same experiments in a process with OMP_NUM_THREADS=2, and in one with 1 on a single core, which then goes on
    with a run that the first was killed in. With one thread, with two, and a cohort, whose workers follow the cores."""
    made = {
        "one": runs.experiment(data, SCAFFOLD(), model=tiny.source(num_experts=4)),
        "two": runs.experiment(data, SCAFFOLD(), model=tiny.source(num_experts=4), threads=2),
        "cohort": runs.of_world("cohort", data, FedAvg()),
    }
    saved = {name: to_json(experiment) for name, experiment in made.items()}
    (tmp_path / "made.json").write_text(json.dumps(saved))
    path = os.pathsep.join(p for p in sys.path if p)
    for threads, code in (("2", -9), ("1", 0)):
        log = tmp_path / f"{threads}.log"
        command = [sys.executable, "-c", RUNS, tmp_path, threads]
        with processes.started(command, log, OMP_NUM_THREADS=threads, PYTHONPATH=path) as process:
            assert processes.finished(process, 300, log) == code, log.read_text()
    for name in made:
        assert runs.outcome(tmp_path / "1" / name) == runs.outcome(tmp_path / "2" / name)
    assert runs.outcome(tmp_path / "2/killed") == runs.outcome(tmp_path / "1/two")
    newest = "checkpoints/round-00003.safetensors"
    assert (tmp_path / "2/killed" / newest).read_bytes() == (tmp_path / "1/two" / newest).read_bytes()


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_merging_of_large_tensors_by_one_thread_or_two(threads):
    """A million numbers, which torch does split between threads: the mean is of each number alone."""
    rng = torch.Generator().manual_seed(0)
    replies = [{"w": torch.randn(1_000_000, generator=rng)} for _ in range(5)]
    found = []
    for n in (1, 2):
        threads(n)
        mean = WeightedMean()
        for weight, reply in enumerate(replies, 1):
            assert finite(reply["w"])
            mean.add(reply, weight)
        found.append(checksum(mean.mean(replies[0])))
    assert found[0] == found[1]
