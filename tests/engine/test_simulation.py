"""Flower's own simulation runtime: Ray's worker processes, in a process of their own so that nothing is left here.

A start of Ray costs as much as twenty short runs: all methods go through one. Those with something of their own on the
wire or in the clients' states go always; the others with -m slow, `test_flower` sends them all."""

import dataclasses
import ipaddress
import json
import sys

import pytest
import runs
import tiny
from processes import finished, started

from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import Algorithm, Sampling
from consilium.experiment import to_json
from consilium.loop import run

pytest.importorskip("ray")

METHODS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}
CASES = [
    (name, world, dtype)
    for name, cls in METHODS.items()
    for world in cls.worlds
    for dtype in (("float32", "bfloat16") if world == "moe" else ("float32",))
]
"""Every method of the registry in every world it is for; the small models are float32 alone."""
ALWAYS = ("FedMoE", "HFedMoE", "AffinityMoE", "FedAMoLE", "SCAFFOLD", "FedProto", "FedPE", "pFedMoE")

SCRIPT = """
import contextlib, json, signal, sys
from pathlib import Path
import psutil
import consilium.engine.flower as flower
from consilium.experiment import from_json
from consilium.loop import run

class Watch:
    def started(self, *_): pass
    def step(self, *_): pass
    def rounded(self, record, events):
        workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ClientApp")]
        if record["round"] == 1 and "kill" in sys.argv:
            workers[-1].send_signal(signal.SIGKILL)
            print("killed", workers[-1].pid, flush=True)

def listening():
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return [(p.name(), c.laddr.ip) for p in family for c in p.net_connections("inet") if c.status == "LISTEN"]

folder = Path(sys.argv[1])
jobs = json.loads((folder / "jobs.json").read_text())
with flower.simulation(from_json(jobs[0]), 3) as grid:  # messages bring their experiment: one Ray is enough for all
    flower.simulation = lambda *_: contextlib.nullcontext(grid)
    for i, job in enumerate(jobs):
        run(from_json(job), folder / str(i), Watch())
    (folder / "listening.json").write_text(json.dumps(listening()))
"""


def simulated(experiments, folder, *more, seconds=1800):
    """Run the experiments, of three clients each, one after the other with one Ray; returns their folders."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    jobs = [to_json(dataclasses.replace(made, engine="flower")) for made in experiments]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    equal = {"TMPDIR": "/tmp", "RAY_worker_niceness": "0"}  # Ray's workers are nice by 15, and starve on a busy machine
    with started([sys.executable, folder / "script.py", folder, *more], folder / "log", **equal) as process:
        assert finished(process, seconds, folder / "log") == 0, (folder / "log").read_text()[-3000:]
    return [folder / str(i) for i in range(len(jobs))]


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """Case -> its experiment, of the cases that were asked for."""
    asked = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {call.params["case"] for call in asked if call is not None}
    data = runs.table(tmp_path_factory.mktemp("data"))
    some = {"sampling": Sampling(3), "evaluate_every": 2}
    return {case: runs.of_world(case[1], data, METHODS[case[0]](), case[2], **some) for case in CASES if case in asked}


@pytest.fixture(scope="module")
def through_ray(made, tmp_path_factory):
    """Case -> the folder of its run through Ray; None -> the folder of all."""
    folder = tmp_path_factory.mktemp("simulation") / "ray"
    return dict(zip(made, simulated(made.values(), folder), strict=True)) | {None: folder}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case[0] in ALWAYS else pytest.mark.slow, id=":".join(case)) for case in CASES],
)
def test_every_method_gives_the_same_bits_in_process_through_bytes_and_through_ray(case, made, through_ray, tmp_path):
    """Weights, states at the clients, scores, structures, events: all that a run leaves but seconds and bytes."""
    run(made[case], tmp_path / "local")
    run(dataclasses.replace(made[case], strict=True), tmp_path / "strict")
    over = runs.bits(through_ray[case])
    assert runs.bits(tmp_path / "local") == over == runs.bits(tmp_path / "strict")
    assert [m["ledger"]["ok"] for m in over["metrics"]] == [len(m["selected"]) for m in over["metrics"]] > [0, 0]


def test_every_method_is_among_them():
    assert {name for name, *_ in CASES} == {name for name, cls in METHODS.items() if cls.worlds} == set(METHODS)
    assert {"FedMoE", "HFedMoE", "pFedMoE", "FedAvg"} <= set(METHODS)


def test_nobody_else_can_talk_to_the_workers(through_ray):
    """Ray has no authentication: all that it listens on is loopback."""
    found = json.loads((through_ray[None] / "listening.json").read_text())
    assert {"gcs_server", "raylet", "ray::ClientAppActor"} <= {name for name, _ in found}
    for name, address in found:
        ip = ipaddress.ip_address(address)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, f"{name} listens on {address}"


def weights(folder):
    summary = runs.outcome(folder)["summary"]
    return summary["weights"], {c: told["state"] for c, told in summary["clients"].items()}


def test_a_dead_worker_comes_back(tmp_path):
    """SCAFFOLD sends params and control variates and keeps state. Flower puts a dead worker back among the idle ones
    and takes it first: without restarts every later message would fail. While it starts again its client is missing."""
    made = runs.experiment(
        runs.table(tmp_path), SCAFFOLD(), model=tiny.source(num_experts=4), rounds=24, evaluate_every=24
    )
    (over,) = simulated([made], tmp_path / "ray", "kill")
    assert "killed" in (tmp_path / "ray/log").read_text()
    missing = [{**m["missing"], **m["errors"]} for m in runs.outcome(over)["metrics"]]
    assert missing[0] == {} == missing[-1] and all(len(names) <= 1 for names in missing)
    if not any(missing):
        run(made, tmp_path / "local")
        assert weights(over) == weights(tmp_path / "local")
