# ruff: noqa: F401, F811  fixtures of another file
"""A run goes on as it was begun or says what has changed; a full disk, and what it must not cost."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import runs
from test_resume import Stop, copy, everything, short, stopped

from consilium.core import ClientInfo
from consilium.errors import CheckpointError, ConfigError
from consilium.loop import resume, run
from consilium.summary import best_round

# --- resumed as it was begun ----------------------------------------------------------------------------------------


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["experiment"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["fit"].update(lr=0.5), "fit.lr was 0.001, is 0.5"),
        (lambda e: e.update(threads=2), "threads was 1, is 2"),
        (lambda e: e["fit"]["lora"].update(rank=2), "fit.lora.rank was 0, is 2"),
        (lambda e: e.update(algorithm={"type": "FedAvg"}), "algorithm was 'SCAFFOLD', is 'FedAvg'"),
        (lambda e: e["wire"].update(reply="int8"), "wire.reply was 'exact', is 'int8'"),
        (lambda e: e.update(evaluate_every=2), "evaluate_every was 1, is 2"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(copy, change, said):
    edit(copy, change)
    before = everything(copy)
    with pytest.raises(CheckpointError, match="the run was begun with other settings") as told:
        resume(copy)
    assert f"settings: {said};" in str(told.value)
    assert "only rounds, workers, wire.deadline, data.path, model.path may change" in str(told.value)
    assert everything(copy) == before


def test_what_may_change(short, copy, tmp_path):
    """More rounds, another deadline, other workers, the same data and model elsewhere: as if begun so."""
    data = shutil.copy(short[0].data.path, tmp_path / "moved.jsonl")
    model = shutil.copytree(short[0].model.path, tmp_path / "model")

    def change(experiment):
        experiment["wire"]["deadline"] = 9.0
        experiment["data"]["path"], experiment["model"]["path"] = str(data), str(model)
        experiment["rounds"], experiment["workers"] = 4, 2

    edit(copy, change)
    resume(copy)
    longer = dataclasses.replace(short[0], rounds=4)
    run(longer, tmp_path / "longer")
    assert runs.outcome(copy)["summary"]["weights"] == runs.outcome(tmp_path / "longer")["summary"]["weights"]


def test_another_model_under_the_same_path_is_refused(short, copy, tmp_path):
    model = shutil.copytree(short[0].model.path, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    edit(copy, lambda experiment: experiment["model"].update(path=str(model)))
    with pytest.raises(CheckpointError, match=r"the model has changed since the run began \(files:\w{13}, was files"):
        resume(copy)


def test_other_versions_are_told_and_recorded(short, copy, monkeypatch, caplog):
    from consilium import loop, prepare

    real = prepare.versions()
    for module in (loop, prepare):
        monkeypatch.setattr(module, "versions", lambda: real | {"torch": "99.0"})
    resume(copy)
    assert f"begun with torch {real['torch']} (now 99.0): it" in caplog.text
    assert json.loads((copy / "config.json").read_text())["former_versions"] == [{"torch": real["torch"]}]


def test_the_best_round_by_validation_is_kept(short):
    """SCAFFOLD's clients tell the score on their validation data after training; ties go to the earlier round."""
    records, best = short[1]["metrics"], short[1]["summary"]["best"]
    told = [[c["validation"] for c in record["clients"].values()] for record in records]
    means = [sum(values) / len(values) for values in told]
    assert best == {"round": means.index(max(means)) + 1, "stage": "", "validation": max(means)}
    there = {int(path.name[6:11]) for path in (short[2] / "checkpoints").iterdir()}
    assert there == {2, 3, best["round"]}


def record(round, stage="", rejected=None, **validation):
    told = {c: {"validation": v, "rejected": rejected} for c, v in validation.items()}
    return {"round": round, "stage": stage, "clients": told}


def test_the_best_by_hand():
    """Mean over the tasks of the means over their clients; another stage begins anew; test data has no say."""
    infos = [ClientInfo("a", 1, "x"), ClientInfo("b", 1, "x"), ClientInfo("c", 1, "y")]
    best = best_round(None, record(1, a=0.5, b=0.7, c=0.2), infos)
    assert best == {"round": 1, "stage": "", "validation": pytest.approx(0.4)}
    assert best_round(best, record(2, a=0.39), infos) == best == best_round(best, record(2, a=0.4), infos)
    assert (
        best_round(best, record(2, a=0.9, rejected="bad"), infos) == best == best_round(best, record(2, a=None), infos)
    )
    assert best_round(best, record(2, a=0.9) | {"abandoned": "few"}, infos) == best
    assert best_round(best, record(2, "two", c=0.1), infos) == {"round": 2, "stage": "two", "validation": 0.1}


# --- a full disk ----------------------------------------------------------------------------------------------------


class After(Stop):
    """A watch that does something when a round is written."""

    def __init__(self, round, work):
        super().__init__("")
        self.after, self.work = round, work

    def rounded(self, record, events):
        if record["round"] == self.after:
            self.work()


@contextlib.contextmanager
def files_of_at_most(size):
    """No file of this process may grow beyond so many bytes: what a quota does, for anybody and anywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [20_000, 100], ids=["checkpoint", "metrics"])
def test_a_write_that_fails_is_loud_and_costs_nothing(short, tmp_path, size):
    """In round 3; what round 2 left is whole, nothing half-written lies about, and the run goes on to the same bits."""
    folder = tmp_path / "run"
    with (
        files_of_at_most(size) as begin,
        pytest.raises(CheckpointError, match=r"cannot be written \([\d,]+ bytes: File too large\); what was saved"),
    ):
        run(short[0], folder, After(2, begin))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-1] == "round-00002.safetensors"
    assert not list(folder.rglob("*.tmp"))
    assert [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()][:2] == [1, 2]
    resume(folder)
    assert runs.outcome(folder) == short[1]


FILLED = """
import sys, torch
from pathlib import Path
from consilium.core import Payload
from consilium.engine.checkpoint import ClientStore, load_checkpoint, save_checkpoint
from consilium.errors import CheckpointError
folder, reached = Path(sys.argv[1]), 0
for round in range(1, 100):
    state = Payload({"params": {"w": torch.full((4_000 * round,), float(round))}})
    try:
        save_checkpoint(folder / "c", round, state, ClientStore(folder / "s"))
    except CheckpointError as error:
        assert "No space left on device" in str(error), error
        break
    reached = round
found = load_checkpoint(folder / "c")
assert found.round == reached >= 2 and (found.server.group("params")["w"] == reached).all()
assert not list(folder.rglob("*.tmp"))
for path in (folder / "c").iterdir():
    path.unlink()
save_checkpoint(folder / "c", 100, Payload({"params": {"w": torch.ones(4_000)}}), ClientStore(folder / "s"))
print("reached", reached)
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 300 kB in a namespace of its own, and checkpoints that grow until they do not fit."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system in a namespace of its own (unshare -rm)")
    mount = 'mount -t tmpfs -o size=300k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", tmp_path, sys.executable, FILLED], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("reached"), done.stderr


def test_a_run_does_not_begin_where_three_checkpoints_have_no_room(short, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    with pytest.raises(ConfigError, match=r"has 100\.0 kB free, three checkpoints take .*: free space, or choose"):
        run(short[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_where_the_memory_is_too_small(short, tmp_path, monkeypatch):
    monkeypatch.setattr("consilium.loop.free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"has 1\.0 kB of memory free, merging and saving the model take [\d.]+ .B "):
        run(short[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_process_left_is_removed(copy, short):
    litter = [copy / "checkpoints/.round-00004.safetensors.tmp", copy / "clients/site-0/.round-00004.safetensors.tmp"]
    litter += [copy / ".config.json.tmp", copy / ".replies-abc/site-0/0"]
    for path in litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    resume(copy)
    assert not any(path.exists() for path in litter) and not (copy / ".replies-abc").exists()
    assert runs.outcome(copy) == short[1]


# --- a run directory that is not as it was left ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda lines: [lines[0][:9] + "#" + lines[0][10:], *lines[1:]],
            r"metrics\.jsonl:1 cannot be read \(JSON",
        ),
        (lambda lines: ["7\n", *lines[1:]], r"metrics\.jsonl:1 cannot be read \(TypeError"),
        (lambda lines: lines[1:], r"tells of the rounds \[2, 3\], committed are 1 to 3"),
        (lambda lines: [*lines[:1], *lines], r"tells of the rounds \[1, 1, 2, 3\]"),
        (lambda lines: [], r"tells of the rounds \[\], committed are 1 to 3: a part of it is lost"),
    ],
    ids=["a broken line", "no record", "a lost line", "a line twice", "empty"],
)
def test_records_that_are_lost_are_missed(copy, spoil, said):
    """Who is benched and which round is the best follow from them: the run would go on to other bits."""
    path = copy / "metrics.jsonl"
    path.write_text("".join(spoil(path.read_text().splitlines(keepends=True))))
    with pytest.raises(CheckpointError, match=said):
        resume(copy)


def test_a_broken_structure_is_named(copy):
    (copy / "structure.jsonl").write_text('{\n{"round": 1}\n')
    with pytest.raises(CheckpointError, match=r"structure\.jsonl:1 cannot be read"):
        resume(copy)


def test_other_data_with_its_own_partition_is_refused(short, copy, tmp_path):
    """The checkpoint says what the run was begun with, whatever the files beside it say."""
    data = tmp_path / "other.jsonl"
    data.write_text(short[0].data.path.read_text().replace("purrs", "sleeps", 1))
    run(dataclasses.replace(short[0], data=dataclasses.replace(short[0].data, path=data)), tmp_path / "other")
    shutil.copy(tmp_path / "other/partition.json", copy)
    edit(copy, lambda experiment: experiment["data"].update(path=str(data)))
    with pytest.raises(CheckpointError, match=r"data has changed .* and partition\.json with it"):
        resume(copy)


def test_a_summary_that_is_lost_is_made_again(short, tmp_path):
    folder = shutil.copytree(short[2], tmp_path / "run")
    (folder / "summary.json").unlink()
    resume(folder)
    assert runs.outcome(folder) == short[1]


def test_checkpoints_without_a_config_are_still_a_run(short, copy):
    """Of another experiment, they would be what a new one went on with."""
    (copy / "config.json").unlink()
    before = everything(copy)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(short[0], copy)
    assert everything(copy) == before


@pytest.mark.parametrize("name", ["checkpoints", "clients/site-0", "metrics.jsonl", ".lock"])
def test_nothing_is_written_through_a_link(short, copy, tmp_path, name):
    outside = tmp_path / "outside"
    if (copy / name).exists():
        (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link"):
        resume(copy)
    assert everything(tmp_path) == before
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        (copy / "config.json").unlink()
        shutil.rmtree(outside, ignore_errors=True)
        for path in copy.glob("checkpoints/*"):
            path.unlink()
        run(short[0], copy)


def test_room_for_what_is_still_to_come(short, copy, monkeypatch):
    """Two checkpoints are there: a disk with room for one more is enough to go on."""
    size = next((copy / "checkpoints").iterdir()).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size))
    resume(copy)
    assert runs.outcome(copy) == short[1]
