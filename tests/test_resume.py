"""A run that is killed at any moment and resumed ends with the bits and the records of one that never was."""

import fcntl
import hashlib
import json
import random
import re
import shutil
import signal

import pytest
import runs
import tiny
from forkserver import ForkServer

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.errors import CheckpointError
from consilium.experiment import to_json
from consilium.loop import resume, run
from consilium.prepare import Prepared

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


def outcome(folder):
    """What the run has left, with the SHA-256 of its last checkpoint's file, and no litter."""
    assert not list(folder.rglob("*.tmp"))
    newest = max(folder.glob("checkpoints/round-*"))
    return runs.outcome(folder) | {"file": hashlib.sha256(newest.read_bytes()).hexdigest()}


def until_done(server, experiment, folder):
    status, _, _ = server.job(experiment, folder)
    assert status == 0
    return outcome(folder)


@pytest.mark.parametrize(
    ("algorithm", "wanted"),
    [
        (FedMoE(stage1_epochs=1), 12),
        (SCAFFOLD(), 8),
        pytest.param(FedMoE(stage1_epochs=1), 40, marks=pytest.mark.slow),
        pytest.param(SCAFFOLD(), 60, marks=pytest.mark.slow),
    ],
    ids=["FedMoE", "SCAFFOLD", "FedMoE 40", "SCAFFOLD 60"],
)
def test_killed_at_random_moments(server, tmp_path, algorithm, wanted):
    """Twenty kills of real methods, or a hundred, one of them with client state. A chain: up to three kills within what
    is left of the run, then to its end."""
    saved = to_json(runs.experiment(runs.table(tmp_path), algorithm, model=tiny.source(num_experts=4)))
    server.job(saved, tmp_path / "first", fork=False)
    status, seconds, _ = server.job(saved, tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    assert status == 0 and whole["status"] == "finished" and len(whole["metrics"]) == 3
    assert outcome(tmp_path / "first") == whole
    rng = random.Random(type(algorithm).__name__)
    kills, rounds = 0, set()
    for chain in range(4 * wanted):  # some come too late: a machine that has become faster
        folder = tmp_path / f"chain-{chain}"
        for _ in range(3):
            status, _, _ = server.job(saved, folder, after=rng.uniform(0.02, 0.9) * seconds)
            kills += status == KILLED
            if status == 0:
                seconds *= 0.9
                break
            rounds.add(reached := len(list(folder.glob("checkpoints/round-*"))))
            seconds *= 1 if reached else 1.2  # a machine that has become slower
        resumed = until_done(server, saved, folder)
        assert resumed["summary"]["weights"] == whole["summary"]["weights"]
        assert resumed == whole
        if kills >= wanted:
            break
    assert kills >= wanted
    assert len(rounds) > 1  # not all before the first checkpoint


def test_killed_at_every_operation_that_makes_a_write_last(server, tmp_path):
    """A toy method with server state, client state, structure and events; two rounds, killed once in every write, and
    before every fsync, rename and removal; every third resumed run is killed again."""
    saved = to_json(runs.experiment(runs.table(tmp_path), rounds=2))
    saved["algorithm"] = {"type": "Toy"}
    whole = until_done(server, saved, tmp_path / "whole")
    assert [len(whole[name]) for name in ("metrics", "events")] == [2, 4]
    assert set(whole["structure"]["rounds"]) == {"1", "2"}
    _, _, operations = server.job(saved, tmp_path / "count")
    assert operations > 50
    for n in range(1, operations + 1):
        folder = tmp_path / str(n)
        assert server.job(saved, folder, at=n)[0] == KILLED
        if n % 3 == 0:
            server.job(saved, folder, at=5 + n // 3)
        assert until_done(server, saved, folder) == whole, f"killed at operation {n} of {operations}"


# --- in this process: stopped by hand, spoilt, in use --------------------------------------------------------------


class Stop:
    """A watch that presses Ctrl-C at one moment."""

    def __init__(self, moment, round=1, phase=""):
        self.moment, self.round, self.phase, self.now = moment, round, phase, 1

    def started(self, *_):
        self.press("started")

    def step(self, client, phase, done, total):
        self.press("step", phase)

    def rounded(self, record, events):
        self.press("rounded")
        self.now += 1

    def press(self, moment, phase=""):
        if (moment, self.now, phase) == (self.moment, self.round, self.phase):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A SCAFFOLD experiment of three rounds with its outcome."""
    folder = tmp_path_factory.mktemp("short")
    experiment = runs.experiment(runs.table(folder), "SCAFFOLD", model=tiny.source(num_experts=4))
    run(experiment, folder / "whole")
    return experiment, runs.outcome(folder / "whole"), folder / "whole"


@pytest.fixture(scope="module")
def stopped(short, tmp_path_factory):
    """The same, interrupted when its last round was written but the summary was not."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(short[0], folder, Stop("rounded", 3))
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def everything(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def status(folder):
    return json.loads((folder / "config.json").read_text())["status"]


@pytest.mark.parametrize(
    "stop",
    [Stop("started"), Stop("step", 2, "train"), Stop("step", 2, "test"), Stop("rounded", 1)],
    ids=["before round 1", "training", "testing", "between rounds"],
)
def test_ctrl_c_leaves_a_resumable_run(short, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(short[0], tmp_path / "run", stop)
    assert status(tmp_path / "run") == "interrupted"
    assert not (tmp_path / "run/summary.json").exists()
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "run", Stop("started"))
    assert status(tmp_path / "run") == "interrupted"
    resume(tmp_path / "run")
    assert runs.outcome(tmp_path / "run") == short[1]


def test_stopped_before_the_summary(short, copy):
    summary = resume(copy)
    assert summary["weights"] == short[1]["summary"]["weights"]
    assert runs.outcome(copy) == short[1]


@pytest.mark.parametrize("spoilt", [b"", b"torn", None], ids=["empty", "torn", "one bit"])
def test_a_broken_newest_checkpoint_is_passed_over(short, copy, spoilt, caplog):
    """Also the client states that the older checkpoint names are still there."""
    newest = copy / "checkpoints/round-00003.safetensors"
    blob = newest.read_bytes()
    newest.write_bytes(bytes([*blob[:-9], blob[-9] ^ 1, *blob[-8:]]) if spoilt is None else spoilt)
    resume(copy)
    assert re.search(r"round-00003\.safetensors.*continuing from round-00002\.safetensors", caplog.text)
    assert runs.outcome(copy) == short[1]


def test_no_checkpoint_can_be_read(copy):
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .*round-00003.*round-00002"):
        resume(copy)


def test_resuming_a_finished_run_changes_nothing(short, tmp_path):
    folder = shutil.copytree(short[2], tmp_path / "run")
    before = everything(folder)
    assert resume(folder) == json.loads((folder / "summary.json").read_text())
    assert everything(folder) == before


def test_a_run_in_use_is_refused_at_once(copy, monkeypatch):
    monkeypatch.setattr(Prepared, "of", lambda _: pytest.fail("the data was read before the lock was tried"))
    before = everything(copy)
    with (copy / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="in use by another process"):
            resume(copy)
    assert everything(copy) == before


def test_changed_data_is_refused(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    data = shutil.copy(config["experiment"]["data"]["path"], tmp_path / "other.jsonl")
    data.write_text(data.read_text().replace("purrs", "sleeps", 1))
    config["experiment"]["data"]["path"] = str(data)
    (copy / "config.json").write_text(json.dumps(config))
    before = everything(copy)
    with pytest.raises(CheckpointError, match=r"data has changed .*fingerprint \w{12}, was \w{12}"):
        resume(copy)
    assert everything(copy).keys() == before.keys() and status(copy) == "interrupted"


@pytest.mark.parametrize("content", [None, "", "[]", "3", "{}", '{"experiment": {}}'])
def test_what_is_not_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        resume(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["config.json"])
    with pytest.raises(CheckpointError, match="is not a run directory"):
        resume(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["partition.json", "clients/site-0/round-*.safetensors"])
def test_a_lost_file_is_named(copy, name):
    (copy / "checkpoints/round-00003.safetensors").unlink()  # a round is left to do
    for path in copy.glob(name):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"partition\.json|site-0"):
        resume(copy)
