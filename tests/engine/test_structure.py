"""structure.jsonl: what a round changed is appended; all lines together say what structure.json said."""

import json
import random
from types import SimpleNamespace

import pytest
import runs
from test_resume import Stop

from consilium.algorithms.randommoe import RandomMoE
from consilium.engine.structure import StructureLog, fold
from consilium.errors import CheckpointError
from consilium.loop import resume, run
from consilium.rundir import RunDirectory


class Server:
    """Client c of 20 holds one expert more in each round in which round % 20 == c."""

    setup = SimpleNamespace(model=SimpleNamespace(counts={"block": 64}))

    def __init__(self):
        self.held = {f"client-{i}": {"block": (i,)} for i in range(20)}
        self.asked = {}

    def step(self, number):
        name = f"client-{number % 20}"
        self.held[name] = {"block": (*self.held[name]["block"], 20 + number // 20)}
        self.asked[name] = {"block": [round(random.Random(number).uniform(0.1, 0.9), 6)] * 64}

    def structure(self):
        return self.held

    def usage(self):
        return self.asked

    def trained(self):
        return {}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_grows_by_what_changes(tmp_path):
    """Rewritten whole it was O(rounds^2) bytes; now a round costs the same at the end as at the beginning."""
    server, path, sizes, told = Server(), tmp_path / "structure.jsonl", [0], {}
    log = StructureLog(path, [])
    for number in range(1, 401):
        server.step(number)
        log.add(number, server)
        sizes.append(path.stat().st_size)
        told[str(number)] = {c: {b: list(ids) for b, ids in held.items()} for c, held in server.held.items()}
    assert sizes[-1] - sizes[-21] < 1.2 * (sizes[22] - sizes[2])
    assert fold(lines(path)) == {"blocks": {"block": 64}, "rounds": told, "usage": server.asked, "trained": {}}
    log.add(401, server)  # nothing has changed
    assert path.stat().st_size == sizes[-1]


def test_going_on_writes_what_a_run_never_interrupted_does(tmp_path):
    server, whole = Server(), StructureLog(tmp_path / "whole.jsonl", [])
    for number in range(1, 31):
        server.step(number)
        whole.add(number, server)
    server, path = Server(), tmp_path / "parts.jsonl"
    for number in range(1, 31):
        server.step(number)
        StructureLog(path, lines(path) if path.exists() else []).add(number, server)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_client_that_holds_nothing_any_more(tmp_path):
    server, log = Server(), StructureLog(tmp_path / "s.jsonl", [])
    log.add(1, server)
    del server.held["client-3"]
    log.add(2, server)
    assert "client-3" not in fold(lines(tmp_path / "s.jsonl"))["rounds"]["2"]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its structure.json is read, and resumed from."""
    experiment = runs.experiment(runs.table(tmp_path), RandomMoE(), memory=runs.memory(3, 2))
    run(experiment, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "old", Stop("rounded", round=2))
    before = RunDirectory(tmp_path / "old").structure()
    assert set(before["rounds"]) == {"1"} and before["blocks"]
    (tmp_path / "old/structure.json").write_text(json.dumps(before))
    (tmp_path / "old/structure.jsonl").unlink()
    assert RunDirectory(tmp_path / "old").structure() == before
    resume(tmp_path / "old")
    assert RunDirectory(tmp_path / "old").structure() == RunDirectory(tmp_path / "whole").structure()
    assert not (tmp_path / "old/structure.json").exists()


def test_a_broken_one_of_an_earlier_version_is_named(tmp_path):
    experiment = runs.experiment(runs.table(tmp_path), RandomMoE(), memory=runs.memory(3, 2))
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "old", Stop("rounded", round=1))
    (tmp_path / "old/structure.jsonl").unlink()
    for text in ("{", "[1]", '{"rounds": {"x": 1}}', "[" * 10**5):
        (tmp_path / "old/structure.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"structure\.json cannot be read"):
            resume(tmp_path / "old")
