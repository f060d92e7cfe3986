"""Logging of runs to TensorBoard, MLflow and Weights & Biases; each is an extra of the package.

A `Tracking` is a `loop.Watch`. `tracking.json` in the run directory stores each tool's name of the run and the last
round that was logged to it. A resumed run therefore continues the same tracked run: missing rounds are logged from
metrics.jsonl, and none is logged twice. Nothing is sent over a network unless the tool's own variables say so
(MLFLOW_TRACKING_URI, WANDB_MODE=online).

    tensorboard  <run>/tensorboard                 tensorboard --logdir runs
    mlflow       mlflow.db next to the runs        mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
    wandb        <run>/wandb, offline              wandb sync runs/NAME/wandb/offline-run-*

Measures of a round: scores/<task>, test/<client>, validation/<client>, loss/<client>, loss/mean, experts/<client>,
experts/mean, bytes/down, bytes/up, bytes/total (so far), seconds/round, /train, /evaluate, /engine, memory/process.
"""

import contextlib
import importlib.util
import json
import os
import re
import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from consilium.data.task import Federation
from consilium.engine.checkpoint import write_atomic
from consilium.errors import ConfigError
from consilium.escape import one_line
from consilium.experiment import Experiment, flat_fields, to_json
from consilium.inside import refuse_links
from consilium.rundir import RunDirectory
from consilium.setup import Setup

__all__ = ["TRACKERS", "Tracking", "measures", "named", "parameters"]

FILE = "tracking.json"
PROJECT = "consilium"


def parameters(experiment: Experiment) -> dict[str, bool | int | float | str]:
    """Return the experiment as flat hyper-parameters, named like the command's flags: "algorithm.K", "fit.lr"."""
    values = flat_fields(to_json(experiment))
    return {name: v if isinstance(v, bool | int | float | str) else json.dumps(v) for name, v in values.items()}


def measures(record: Mapping[str, Any], spent: int) -> dict[str, float]:
    """Return a round's measures by name.

    Args:
        spent: bytes of all rounds up to and including this one.
    """
    values: dict[str, float | None] = {f"scores/{task}": score for task, score in (record["scores"] or {}).items()}
    values |= {f"test/{client}": score for client, score in (record["test"] or {}).items()}
    losses = []
    for client, report in record["clients"].items():
        values |= {f"validation/{client}": report["validation"], f"loss/{client}": report["train_loss"]}
        values |= {f"experts/{client}": report["experts"]}
        losses += [] if report["train_loss"] is None else [report["train_loss"]]
    values |= {"loss/mean": statistics.fmean(losses) if losses else None, "experts/mean": record["experts_mean"]}
    values |= {"bytes/down": record["bytes_down"], "bytes/up": record["bytes_up"], "bytes/total": spent}
    values |= {f"seconds/{part}": seconds for part, seconds in record["seconds"].items()}
    values["memory/process"] = record["peak_rss_bytes"]
    return {one_line(name, 200): float(value) for name, value in values.items() if value is not None}


class Tracker(Protocol):
    """A tracking tool.

    Attributes:
        token: JSON with which the tool finds the run again; {} for a run that it does not know yet.
    """

    token: dict[str, Any]

    def __init__(self, folder: Path, experiment: Experiment, token: dict[str, Any]) -> None: ...

    def log(self, number: int, values: Mapping[str, float]) -> None: ...

    def artefact(self, path: Path) -> None: ...

    def close(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files below the run directory; the configuration is under HPARAMS, the report's path under TEXT."""

    def __init__(self, folder: Path, experiment: Experiment, token: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.token = token or {"folder": "tensorboard"}
        if not token:
            for part in hparams(parameters(experiment), {"scores/mean": 0.0}):
                self.writer.file_writer.add_summary(part)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, number)
        self.writer.flush()

    def artefact(self, path: Path) -> None:
        self.writer.add_text("report", str(path.resolve()))

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflow:
    """A run of the experiment "consilium" in MLFLOW_TRACKING_URI, or in a database next to the run directories."""

    def __init__(self, folder: Path, experiment: Experiment, token: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
        self.client = MlflowClient(token.get("uri") or uri)
        if not token:
            project = self.client.get_experiment_by_name(PROJECT)
            artifacts = (folder.resolve().parent / "mlartifacts").as_uri()
            experiment_id = (
                project.experiment_id
                if project
                else self.client.create_experiment(PROJECT, artifact_location=artifacts)
            )
            run = self.client.create_run(experiment_id, run_name=experiment.name)
            token = {"uri": uri, "run": run.info.run_id}
            params = [Param(key, str(value)) for key, value in parameters(experiment).items()]
            for start in range(0, len(params), 100):  # the server limits the number per request
                self.client.log_batch(token["run"], params=params[start : start + 100])
        else:
            self.client.update_run(token["run"], status="RUNNING")
        self.token = token

    def log(self, number: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(re.sub(r"[^\w./ :-]", "_", name), v, now, number) for name, v in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.token["run"], metrics=metrics[start : start + 1000])

    def artefact(self, path: Path) -> None:
        self.client.log_artifact(self.token["run"], str(path))

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.token["run"], "FINISHED" if finished else "KILLED")


class WandB:
    """A run of the project "consilium", offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, experiment: Experiment, token: dict[str, Any]) -> None:
        import wandb

        self.token = token or {"run": uuid.uuid4().hex[:8]}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=experiment.name,
            id=self.token["run"],
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=dict(parameters(experiment)),
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )

    def log(self, number: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=number)

    def artefact(self, path: Path) -> None:
        self.run.save(str(path.resolve()), base_path=str(path.resolve().parent), policy="now")

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WandB, "wandb"),
}
"""Name of a tool, and of its extra -> the tracker and the package that it needs."""


def named(text: str) -> list[str]:
    """Parse the names of trackers in `--track`, e.g. "tensorboard,mlflow".

    Raises:
        ConfigError: for an unknown one, or one whose package is not installed.
    """
    names = list(dict.fromkeys(text.split(","))) if text else []
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track names {name!r}; allowed are {', '.join(TRACKERS)}, separated by commas")
        if importlib.util.find_spec(TRACKERS[name][1]) is None:
            raise ConfigError(f"--track {name} needs its package: pip install 'consilium[{name}]'")
    return names


class Tracking:
    """A `loop.Watch` that logs a run to the named tools; as a context, it closes their runs on exit.

    Args:
        names: keys of `TRACKERS`; the tools in tracking.json are added.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        refuse_links(folder)
        self.folder, self.trackers, self.finished = folder, {}, False
        state_path = folder / FILE
        try:
            self.state = json.loads(state_path.read_text()) if state_path.is_file() else {}
            self.names = named(",".join(dict.fromkeys([*self.state, *names])))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{state_path} cannot be read ({type(error).__name__}); remove it to track anew"
            ) from error
        self.trackers: dict[str, Tracker] = {}
        self.spent = 0

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None:
        for name in self.names:
            state = self.state.setdefault(name, {"token": {}, "round": 0})
            self.trackers[name] = TRACKERS[name][0](self.folder, experiment, state["token"])
            state["token"] = self.trackers[name].token
        self._save()
        for record in RunDirectory(self.folder).rounds():
            if record["round"] < first:
                self.rounded(record, [])

    def step(self, client: str, phase: str, done: int, total: int) -> None: ...

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        if record.get("abandoned"):  # an abandoned round does not count and is retried
            return
        self.spent += record["bytes_down"] + record["bytes_up"]
        values = measures(record, self.spent)
        for name, tracker in self.trackers.items():
            if record["round"] > self.state[name]["round"]:
                tracker.log(record["round"], values)
                self.state[name]["round"] = record["round"]
        self._save()

    def report(self, path: Path) -> None:
        """Mark the run as finished, and log its report."""
        self.finished = True
        for tracker in self.trackers.values():
            tracker.artefact(path)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.ExitStack() as stack:  # an error in one of them must not keep the others open
            for tracker in self.trackers.values():
                stack.callback(tracker.close, self.finished)

    def _save(self) -> None:
        if self.names:
            write_atomic(self.folder / FILE, json.dumps(self.state, indent=1).encode())
