"""Runs in TensorBoard, MLflow and Weights & Biases: what arrives there, and that a resumed run goes on in it."""

import dataclasses
import importlib.util
import json

import pytest
import runs

from consilium import tracking
from consilium.errors import ConfigError
from consilium.loop import resume, run
from consilium.tracking import TRACKERS, Tracking, measures, named, parameters

MISSING = {n: importlib.util.find_spec(package) is None for n, (_, package) in TRACKERS.items()}


def needs(name):
    return pytest.mark.skipif(MISSING[name], reason=f"the extra {name!r} is not installed")


class Memory:
    """A tool that remembers what it was told."""

    kept: dict = {}  # noqa: RUF012 - of a test, emptied by its fixture

    def __init__(self, folder, experiment, token):
        self.token = token or {"run": f"run-{len(self.kept)}"}
        self.told = self.kept.setdefault(self.token["run"], [])

    def log(self, number, values):
        self.told.append((number, values))

    def artefact(self, path):
        self.told.append(path.name)

    def close(self, finished):
        self.told.append("finished" if finished else "stopped")


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(TRACKERS, "memory", (Memory, "json"))
    monkeypatch.setattr(Memory, "kept", {})
    return Memory.kept


class Stop(Tracking):
    """Ctrl-C right after a round's checkpoint, before the tools are told of it."""

    def rounded(self, record, events):
        if record["round"] == 2:
            raise KeyboardInterrupt
        super().rounded(record, events)


def test_parameters_are_named_like_flags(tmp_path):
    told = parameters(runs.experiment(tmp_path / "a.csv", memory=("1MB", "2MB")))
    assert told["algorithm"] == "FedAvg" and told["fit.batch_size"] == 4 and told["sampling.clients_per_round"] == 2
    assert told["memory"] == '["1MB", "2MB"]' and told["data.path"] == str(tmp_path / "a.csv")
    assert all(isinstance(value, bool | int | float | str) for value in told.values())


def test_measures_of_a_round_by_hand():
    client = {"validation": 0.5, "train_loss": 2.0, "experts": 3}
    record = {
        "scores": {"animal": 0.25, "mean": 0.25}, "test": {"a": 0.25, "b": None}, "experts_mean": 3.0,
        "clients": {"a": client, "b": {**client, "train_loss": 4.0}, "c": {**client, "train_loss": None}},
        "bytes_down": 10, "bytes_up": 20, "seconds": {"round": 1.5}, "peak_rss_bytes": 7,
    }  # fmt: skip
    assert measures(record, 90) == {
        "scores/animal": 0.25, "scores/mean": 0.25, "test/a": 0.25, "loss/a": 2.0, "loss/b": 4.0, "loss/mean": 3.0,
        **{f"validation/{c}": 0.5 for c in "abc"}, **{f"experts/{c}": 3.0 for c in "abc"}, "experts/mean": 3.0,
        "bytes/down": 10.0, "bytes/up": 20.0, "bytes/total": 90.0, "seconds/round": 1.5, "memory/process": 7.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("tensorboard,tensorbored", "allowed are tensorboard, mlflow, wandb"), (",", "names ''"),
     ("absent", "pip install 'consilium\\[absent\\]'")],
)  # fmt: skip
def test_what_is_refused(monkeypatch, text, message):
    if text == "absent":
        monkeypatch.setitem(TRACKERS, "absent", (Memory, "a_package_that_nobody_has"))
    elif MISSING["tensorboard"] and "tensorboard," in text:
        monkeypatch.setitem(TRACKERS, "tensorboard", (Memory, "json"))
    with pytest.raises(ConfigError, match=message):
        named(text)


def test_a_resumed_run_goes_on_in_the_same_tracked_run(memory, tmp_path):
    """The round that no tool was told of is told when it goes on, without --track; none is told twice."""
    cell, folder = runs.experiment(runs.table(tmp_path)), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Stop(folder, ["memory"]) as first:
        run(cell, folder, first)
    assert [n if isinstance(n, str) else n[0] for n in memory["run-0"]] == [1, "stopped"]
    with Tracking(folder) as second:
        summary = resume(folder, second)
        second.report(folder / "config.json")
    assert list(memory) == ["run-0"]
    told = memory["run-0"]
    assert [n if isinstance(n, str) else n[0] for n in told] == [1, "stopped", 2, 3, "config.json", "finished"]
    assert told[3][1]["bytes/total"] == summary["bytes_up"] + summary["bytes_down"]
    assert told[3][1]["scores/mean"] == summary["mean"]


def test_a_run_without_trackers_writes_nothing(tmp_path):
    cell = runs.experiment(runs.table(tmp_path), rounds=1)
    with Tracking(tmp_path / "run") as watch:
        run(cell, tmp_path / "run", watch)
    assert not (tmp_path / "run" / tracking.FILE).exists()


def tracked(name, tmp_path):
    """Two sittings of one run; its folder and summary."""
    cell, folder = dataclasses.replace(runs.experiment(runs.table(tmp_path)), name="tracked"), tmp_path / "runs/tracked"
    with pytest.raises(KeyboardInterrupt), Stop(folder, [name]) as first:
        run(cell, folder, first)
    with Tracking(folder) as second:
        summary = resume(folder, second)
        second.report(folder / "config.json")
    return folder, summary


@needs("tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, summary = tracked("tensorboard", tmp_path)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scores = events.Scalars("scores/mean")
    assert [e.step for e in scores] == [1, 2, 3] and scores[-1].value == pytest.approx(summary["mean"])
    assert {f"test/site-{n}" for n in range(3)} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert str(folder / "config.json").encode() in events.Tensors("report/text_summary")[0].tensor_proto.string_val[0]


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, summary = tracked("mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    kind = client.get_experiment_by_name("consilium")
    (found,) = client.search_runs([kind.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "tracked"
    assert found.data.params["fit.batch_size"] == "4" and found.data.params["algorithm"] == "FedAvg"
    history = client.get_metric_history(found.info.run_id, "scores/mean")
    assert [(m.step) for m in history] == [1, 2, 3] and history[-1].value == pytest.approx(summary["mean"])
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["config.json"]


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path, monkeypatch):
    """Offline: two parts of one run lie in the run directory, for `wandb sync`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, _ = tracked("wandb", tmp_path)
    token = json.loads((folder / tracking.FILE).read_text())["wandb"]
    parts = sorted((folder / "wandb").glob(f"offline-run-*-{token['token']['run']}"))
    assert len(parts) >= 1 and token["round"] == 3
    assert any((part / "files/config.json").is_file() for part in parts)
