"""Flower's own simulation runtime: Ray's worker processes, in a process of their own so that nothing is left here."""

import dataclasses
import json
import sys

import pytest
import runs
import tiny
from processes import finished, started

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.experiment import to_json
from consilium.run import run

pytest.importorskip("ray")

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import psutil
from consilium.experiment import from_json
from consilium.run import run

class Watch:
    def started(self, *_): pass
    def step(self, *_): pass
    def rounded(self, record, events):
        workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ClientApp")]
        print("workers", len(workers), flush=True)
        if record["round"] == 1 and "kill" in sys.argv:
            workers[-1].send_signal(signal.SIGKILL)
            print("killed", workers[-1].pid, flush=True)

run(from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), Watch())
"""


def simulated(experiment, folder, *more, seconds=1800):
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "experiment.json").write_text(json.dumps(to_json(dataclasses.replace(experiment, engine="flower"))))
    command = [sys.executable, folder / "script.py", folder / "experiment.json", folder / "run", *more]
    with started(command, folder / "log", TMPDIR="/tmp") as process:
        assert finished(process, seconds, folder / "log") == 0, (folder / "log").read_text()[-3000:]
    return runs.outcome(folder / "run")


def weights(outcome):
    return outcome["summary"]["weights"], {c: told["state"] for c, told in outcome["summary"]["clients"].items()}


def test_two_stages_and_usage_through_ray(tmp_path):
    """FedMoE sends params, router rows and usage, and different sub-MoEs; in bfloat16."""
    model = tiny.source(num_experts=4, dtype="bfloat16")
    made = runs.experiment(
        runs.table(tmp_path), FedMoE(stage1_epochs=1), model=model, memory=runs.memory(8, 2), rounds=2, evaluate_every=2
    )
    run(made, tmp_path / "local")
    local, over = runs.outcome(tmp_path / "local"), simulated(made, tmp_path / "ray")
    assert weights(over) == weights(local)
    assert over["structure"] == local["structure"] and over["events"] == local["events"]
    assert [m["test"] for m in over["metrics"]] == [m["test"] for m in local["metrics"]]
    assert [m["missing"] for m in over["metrics"]] == [{}, {}]


def test_a_dead_worker_comes_back(tmp_path):
    """SCAFFOLD sends params and control variates and keeps state. Flower puts a dead worker back among the idle ones
    and takes it first: without restarts every later message would fail. While it starts again its client is missing."""
    made = runs.experiment(
        runs.table(tmp_path), SCAFFOLD(), model=tiny.source(num_experts=4), rounds=24, evaluate_every=24
    )
    over = simulated(made, tmp_path / "ray", "kill")
    log = (tmp_path / "ray/log").read_text()
    assert "killed" in log
    missing = [{**m["missing"], **m["errors"]} for m in over["metrics"]]
    assert missing[0] == {} == missing[-1] and all(len(names) <= 1 for names in missing)
    if not any(missing):
        run(made, tmp_path / "local")
        assert weights(over) == weights(runs.outcome(tmp_path / "local"))
