"""`run` turns an experiment into a run directory, `resume` continues one.

runs/<name>/
  config.json       the resolved experiment, library versions, git revision, status
  partition.json    who holds what data
  metrics.jsonl     one record per round           events.jsonl   what happened to whom
  structure.json    who holds which experts        summary.json   the result
  checkpoints/  clients/  report.html
"""

import fcntl
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from consilium.core import ClientInfo, Server
from consilium.data.task import Federation
from consilium.engine.checkpoint import (
    ClientStore,
    append_json,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from consilium.engine.local import LocalEngine, nobody
from consilium.errors import BudgetError, CheckpointError, ConfigError, DataError
from consilium.experiment import Experiment, from_json, to_json
from consilium.moe.budget import bytes_of
from consilium.params import checksum
from consilium.training import Setup

__all__ = ["Watch", "check", "read_config", "records", "resume", "run"]

VERSIONED = (
    "consilium",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr-datasets",
    "safetensors",
    "numpy",
)


class Watch(Protocol):
    """What a caller may follow a run with; see `consilium.__main__` for the one with progress bars."""

    def started(self, experiment: Experiment, setup: Setup, federation: Federation, first: int) -> None: ...

    def step(self, client: str, phase: str, done: int, total: int) -> None: ...

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None: ...


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run directory.

    Raises:
        CheckpointError: if the folder is not a run.
    """
    inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    if inside and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is a comparison; name one of its runs: {', '.join(inside)}")
    try:
        config = json.loads((folder / "config.json").read_text())
        experiment, status = config["experiment"], config["status"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a run directory: config.json {type(error).__name__}") from error
    return {**config, "experiment": experiment, "status": status}


def check(experiment: Experiment) -> None:
    """Find what keeps an experiment from running, without running it: data, model and memory.

    Raises:
        ConsiliumError: saying what.
    """
    _Prepared.of(experiment)


def run(experiment: Experiment, folder: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Run an experiment in a new directory and return its summary.

    Everything that can be wrong with the experiment is found before anything is written.

    Raises:
        ConfigError: if the folder already holds a run, or the experiment cannot be run.
    """
    _refuse_run(folder)
    prepared = _Prepared.of(experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
    with _locked(folder):
        _refuse_run(folder)  # another process may have been quicker
        _write_json(folder / "partition.json", prepared.partition())
        _write_config(folder, experiment, "running", prepared)
        return _rounds(prepared, folder, watch)


def resume(folder: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Continue an interrupted run from its newest checkpoint, to the same bits as a run never interrupted.

    A finished run is left as it is.

    Raises:
        CheckpointError: if the folder is not a run, is in use, or its data has changed.
    """
    read_config(folder)
    with _locked(folder):
        config = read_config(folder)
        if config["status"] == "finished":
            return _read_json(folder / "summary.json")
        fingerprint = _read_json(folder / "partition.json").get("fingerprint")
        prepared = _Prepared.of(from_json(config["experiment"]))
        if fingerprint != prepared.federation.fingerprint:
            raise CheckpointError(
                f"the data has changed since the run began (fingerprint {prepared.federation.fingerprint[:12]}, "
                f"was {str(fingerprint)[:12]}): other packages or another file; start a new run"
            )
        _write_config(folder, prepared.experiment, "running", prepared)
        return _rounds(prepared, folder, watch)


def _refuse_run(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} already holds a run: resume it, or choose another --name or --out")
    if any(folder.glob("*/config.json")):
        raise ConfigError(f"{folder} holds a comparison of runs; choose another --name or --out")


@dataclass
class _Prepared:
    """An experiment with its data read, its budgets worked out and both halves built: ready to run."""

    experiment: Experiment
    federation: Federation
    infos: tuple[ClientInfo, ...]
    setup: Setup
    server: Server

    @classmethod
    def of(cls, experiment: Experiment) -> "_Prepared":
        torch.set_num_threads(experiment.threads)
        _check_device(experiment.device)
        federation = experiment.data.load(experiment.seed)
        if not federation.clients:
            raise DataError("no client has any data")
        infos = tuple(
            ClientInfo(
                id=client,
                num_examples=len(data.train),
                task=data.task.name,
                memory_bytes=bytes_of(experiment.memory[i % len(experiment.memory)]) if experiment.memory else None,
                architecture=experiment.model.architecture(i),
            )
            for i, (client, data) in enumerate(federation.clients.items())
        )
        heads: dict[str, set[str]] = {}
        for data in federation.clients.values():
            if data.task.form != experiment.model.form:
                raise ConfigError(
                    f"task {data.task.name} is {data.task.form}, the model is set up for {experiment.model.form}"
                )
            if data.task.labels:
                heads.setdefault(data.task.name, set()).update(data.task.labels)
        setup = Setup(
            model=experiment.model,
            fit=experiment.fit,
            sampling=experiment.sampling,
            seed=experiment.seed,
            heads={task: tuple(sorted(labels)) for task, labels in sorted(heads.items())},
            clients=infos,
            shape=federation.shape,
        )
        server = experiment.algorithm.server(setup)
        unable = {c.id: lack for c in infos if (lack := server.unable(c))}
        # A method that fits its models to the clients may find work even where nobody can hold the full one.
        if len(unable) == len(infos) and not server.configure(1, infos):
            raise BudgetError(nobody(unable))
        return cls(experiment, federation, infos, setup, server)

    def partition(self) -> dict[str, Any]:
        partition = self.federation.partition()
        for info in self.infos:
            partition["clients"][info.id]["memory_bytes"] = info.memory_bytes
            if info.architecture:
                partition["clients"][info.id]["architecture"] = info.architecture
        return partition


def _rounds(prepared: _Prepared, folder: Path, watch: Watch | None) -> dict[str, Any]:
    """The rounds that are left, then the summary; the status says how it ended."""
    try:
        summary = _all_rounds(prepared, folder, watch)
    except KeyboardInterrupt:
        _write_config(folder, prepared.experiment, "interrupted", prepared)
        raise
    _write_json(folder / "summary.json", summary)
    _write_config(folder, prepared.experiment, "finished", prepared)
    return summary


def _all_rounds(prepared: _Prepared, folder: Path, watch: Watch | None) -> dict[str, Any]:
    experiment, server = prepared.experiment, prepared.server
    store = ClientStore(folder / "clients")
    first, writing = 1, 0.0
    if (found := load_checkpoint(folder / "checkpoints")) is not None:
        last, state, store.versions = found
        server.restore(state)
        first = last + 1
    structure = _truncate(folder, first)
    engine = LocalEngine(
        server=server,
        client=experiment.algorithm.client(prepared.setup),
        infos=prepared.infos,
        federation=prepared.federation,
        store=store,
        seed=experiment.seed,
        device=torch.device(experiment.device),
        strict=experiment.strict,
        progress=watch.step if watch else lambda *_: None,
    )
    if watch:
        watch.started(experiment, prepared.setup, prepared.federation, first)
    for number in range(first, experiment.rounds + 1):
        test = number % experiment.evaluate_every == 0 or number == experiment.rounds
        record = engine.round(number, test)
        for key in ("engine", "round"):  # a record cannot hold the time it takes to write it: the next one does
            record["seconds"][key] += writing
        start = time.perf_counter()
        events = [{"round": number, **event} for event in server.events()]
        _record(folder, number, record, events, server, structure)
        save_checkpoint(folder / "checkpoints", number, server.state(), store)
        writing = time.perf_counter() - start
        if watch:
            watch.rounded(record, events)
    return _summary(prepared, folder, store, writing)


def _record(folder: Path, number: int, record, events, server: Server, structure: dict[str, Any]) -> None:
    """Write what a round left, before its checkpoint commits it; a redone round writes it anew."""
    append_json(folder / "metrics.jsonl", record)
    for event in events:
        append_json(folder / "events.jsonl", event)
    held = server.structure()
    if held is None:
        return
    held = {c: {block: list(ids) for block, ids in blocks.items()} for c, blocks in held.items()}
    latest = next(reversed(structure["rounds"].values()), None)
    if held != latest:
        structure["rounds"][str(number)] = held
    structure["usage"] = server.usage()
    structure["blocks"] = dict(server.setup.model.counts)
    _write_json(folder / "structure.json", structure)


def _truncate(folder: Path, first: int) -> dict[str, Any]:
    """Drop what rounds after the last commit wrote; returns the structure record to go on with."""
    for name in ("metrics.jsonl", "events.jsonl"):
        path = folder / name
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _before(line, first)]
            write_atomic(path, "".join(kept).encode())
    path = folder / "structure.json"
    structure = {"blocks": {}, "rounds": {}, "usage": {}}
    if path.exists():
        structure = json.loads(path.read_text())
        structure["rounds"] = {r: held for r, held in structure["rounds"].items() if int(r) < first}
    return structure


def _before(line: str, first: int) -> bool:
    try:
        return json.loads(line)["round"] < first
    except json.JSONDecodeError:  # the torn last line of a killed run
        return False


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The rounds in metrics.jsonl."""
    with (folder / "metrics.jsonl").open() as file:
        yield from map(json.loads, file)


def _summary(prepared: _Prepared, folder: Path, store: ClientStore, writing: float) -> dict[str, Any]:
    """The result of all rounds. `writing`: seconds that the last round's files took."""
    rounds = list(records(folder))
    last, infos, server = rounds[-1], prepared.infos, prepared.server
    held = server.structure() or {}
    tasks = {}
    for task in sorted({info.task for info in infos}):
        members = [info.id for info in infos if info.task == task and info.id in last["test"]]
        metric = next(d.task.metric for d in prepared.federation.clients.values() if d.task.name == task)
        tasks[task] = {"metric": metric, "score": last["scores"].get(task), "clients": len(members)}
    peaks: dict[str, int] = {}
    for record in rounds:
        for client, values in record["clients"].items():
            peaks[client] = max(peaks.get(client, 0), values["peak_bytes_model"] or 0)
    clients = {}
    for info in infos:
        lack = server.unable(info)
        clients[info.id] = {
            "task": info.task,
            "test": last["test"].get(info.id),
            "memory_bytes": info.memory_bytes,
            "experts": [len(ids) for ids in held[info.id].values()] if info.id in held else None,
            "peak_bytes_model": peaks.get(info.id) or None,  # of a family without a memory model: none
            "reason": f"cannot hold the model: {lack}" if lack else None,
            "state": checksum(store.load(info.id).params) if info.id in store.versions else None,
        }
    counts = [r["experts_mean"] for r in rounds if r["experts_mean"] is not None]
    seconds = {key: sum(r["seconds"][key] for r in rounds) for key in ("round", "train", "evaluate", "engine")}
    return {
        "algorithm": type(prepared.experiment.algorithm).__name__,
        "name": prepared.experiment.name,
        "seed": prepared.experiment.seed,
        "rounds": len(rounds),
        "tasks": tasks,
        "mean": last["scores"].get("mean"),
        **_papers_metric(rounds),
        "clients": clients,
        "coverage": f"{len(last['test'])}/{len(infos)}",
        "skipped": dict(prepared.federation.skipped),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "seconds": {
            "total": seconds["round"] + writing,
            "train": seconds["train"],
            "evaluate": seconds["evaluate"],
            "engine": seconds["engine"] + writing,
        },
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "experts": {"start": counts[0], "end": counts[-1]} if counts else None,
        "weights": checksum(server.params),
    }


def _papers_metric(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the pFedMoE family reports, for runs of a cohort: in each round the mean over the clients that took part of
    their test accuracy before aggregation; of all rounds the best. It is optimistic: chosen by the test data."""
    key = "test before aggregation"
    means = [
        sum(told) / len(told)
        for record in rounds
        if (told := [c["report"][key] for c in record["clients"].values() if key in c.get("report", {})])
    ]
    return {"best_round_before_aggregation": max(means)} if means else {}


def _write_config(folder: Path, experiment: Experiment, status: str, prepared: _Prepared) -> None:
    _write_json(
        folder / "config.json",
        {
            "format": 1,
            "status": status,
            "experiment": to_json(experiment),
            "versions": {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()},
            "git": _git(),
            "data": prepared.federation.source,
        },
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); start a new run") from error


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False).encode())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git() -> str | None:
    """Revision of the source tree the package runs from; None where it is installed, also inside another's tree."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 else None


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); use cpu, cuda or cuda:N") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a run directory; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{folder} is in use by another process") from error
        yield
