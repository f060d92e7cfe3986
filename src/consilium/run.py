"""`run` turns an experiment into a run directory, `resume` continues one.

runs/<name>/
  config.json       the resolved experiment, library versions, git revision, status
  partition.json    who holds what data
  metrics.jsonl     one record per round, with its ledger       events.jsonl   what happened to whom
  structure.jsonl   who holds which experts        summary.json   the result
  completions.json  what models write, if asked for
  checkpoints/  clients/  report.html
"""

import difflib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from consilium import disclosure
from consilium.completions import completions
from consilium.core import ClientId, ClientInfo, Server
from consilium.data.simple import simple_scores
from consilium.data.task import Federation
from consilium.data.tensor import on_device
from consilium.engine.account import Account
from consilium.engine.checkpoint import (
    ClientStore,
    append_json,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    write_atomic,
)
from consilium.engine.interrupt import interruptible
from consilium.engine.judge import BENCH, tally
from consilium.engine.judge import number as is_number
from consilium.engine.local import LocalEngine
from consilium.engine.rounds import Engine, nobody
from consilium.engine.structure import NAME as STRUCTURE
from consilium.engine.structure import OLD as OLD_STRUCTURE
from consilium.engine.structure import StructureLog, convert, fold
from consilium.engine.workers import forked
from consilium.errors import BudgetError, CheckpointError, ConfigError, DataError, RoundError, first_line
from consilium.experiment import Experiment, differences, from_json, to_json
from consilium.inside import open_here, refuse_links
from consilium.machine import free_memory
from consilium.models.cohort import Cohort
from consilium.moe.budget import bytes_of, human
from consilium.moe.build import ModelSource
from consilium.params import checksum
from consilium.setup import Fit, Setup

__all__ = ["Watch", "check", "read_config", "read_structure", "records", "resume", "run", "serve"]

FAILED = 3
"""A run stops after so many abandoned rounds in a row."""
GRACE = 60.0
"""Seconds for which a deployment's server waits for the one before, whose SuperLink was killed, to notice and end."""
SITES = {"type": "sites"}
"""What a deployment's run says of its data."""
MAY_CHANGE = ("rounds", "workers", "wire.deadline", "data.path", "model.path")
"""Fields that a run may be resumed with other values of; what lies at the paths must be the same."""

VERSIONED = (
    "consilium",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr",
    "flwr-datasets",
    "safetensors",
    "numpy",
)


class Watch(Protocol):
    """What a caller may follow a run with; see `consilium.__main__` for the one with progress bars."""

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None: ...

    def step(self, client: str, phase: str, done: int, total: int) -> None: ...

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None: ...


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run directory.

    Raises:
        CheckpointError: if the folder is not a run, or holds a link.
    """
    refuse_links(folder)
    inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    if inside and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is a comparison; name one of its runs: {', '.join(inside)}")
    try:
        config = json.loads((folder / "config.json").read_text())
        experiment, status = config["experiment"], config["status"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(_no_run(folder, error)) from error
    return {**config, "experiment": experiment, "status": status}


def _no_run(folder: Path, error: Exception) -> str:
    """Return why a folder is no run, with the runs that may have been meant."""
    if folder.is_dir():
        return f"{folder} is not a run directory: config.json {type(error).__name__}"
    near = [path for path in (Path("runs") / folder.name, folder.parent / "runs" / folder.name) if path.is_dir()]
    others = [path.parent for path in [*folder.parent.glob("*/config.json"), *Path("runs").glob("*/config.json")]]
    near += [path for path in others if path.name in difflib.get_close_matches(folder.name, [p.name for p in others])]
    return f"{folder} is not a run directory: it does not exist" + (f"; did you mean {near[0]}?" if near else "")


def check(experiment: Experiment) -> None:
    """Find what keeps an experiment from running, without running it: data, model and memory.

    Raises:
        ConsiliumError: saying what.
    """
    _Prepared.of(experiment)


def prepare(experiment: Experiment) -> "_Prepared":
    """Return an experiment with its clients known, its budgets worked out and its server half built.

    Raises:
        ConsiliumError: if it cannot be run, saying why.
    """
    return _Prepared.of(experiment)


def run(experiment: Experiment, folder: Path | str, watch: Watch | None = None) -> dict[str, Any]:
    """Run an experiment in a new directory and return its summary.

    Everything that can be wrong with the experiment is found before anything is written.

    Raises:
        ConfigError: if the folder already holds a run, or the experiment cannot be run.
    """
    folder = Path(folder)
    _refuse_run(folder)
    return _new(_Prepared.of(experiment), folder, watch)


def resume(folder: Path | str, watch: Watch | None = None) -> dict[str, Any]:
    """Continue an interrupted run from its newest checkpoint, to the same bits as a run never interrupted.

    A finished run is left as it is.

    Raises:
        CheckpointError: if the folder is not a run, is in use, or its data, its model or its settings have changed; the
            message says how. Of settings, `MAY_CHANGE` may.
    """
    folder = Path(folder)
    if read_config(folder).get("data") == SITES:
        raise CheckpointError(f"{folder} is the run of a deployment: start `consilium server` again to continue it")
    return _continue(folder, watch, _Prepared.of)


def check_same(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return config.json of a run that is of this experiment, apart from what may change.

    Raises:
        ConfigError: if the folder holds another experiment, or a finished run of another number of rounds.
    """
    config = read_config(folder)
    before = from_json(config["experiment"])
    if changed := differences(before, experiment, MAY_CHANGE):
        raise ConfigError(f"{folder} holds another experiment ({changed}); choose another --name or --out")
    if config["status"] == "finished" and before.rounds != experiment.rounds:
        raise ConfigError(
            f"{folder} is finished after {before.rounds} rounds and does not go on to {experiment.rounds}: choose "
            "another --name or --out for a run of its own"
        )
    return config


def serve(
    experiment: Experiment,
    folder: Path,
    grid: Any,
    sites: Sequence[str],
    wait: float,
    watch: Watch | None = None,
    keys: Mapping[bytes, str] | None = None,
    came: Callable[[ClientId], None] | None = None,
) -> dict[str, Any]:
    """Run an experiment over a deployment's Grid, or go on with it where `folder` holds its run.

    Args:
        grid: Flower's. sites: the clients' names; all must be connected within `wait` seconds to begin or go on.
        keys: whose a public key is (`certificates.owners`); a site whose key is another's is refused. None: no keys.
        came: called with the name of each site when it has connected.

    Raises:
        ConfigError: if the folder holds another experiment.
        RoundError: if a site is not there, or too few answer.
    """
    from consilium.engine.flower import Roster

    roster = Roster(grid, poll=1.0, keys=keys or {})
    if not (folder / "config.json").exists():
        prepared = _Prepared.across(experiment, roster, sites, wait, uuid.uuid4().hex, came)
        return _new(prepared, folder, watch)
    check_same(folder, experiment)
    token = str(_read_json(folder / "partition.json").get("run"))
    return _continue(folder, watch, lambda _: _Prepared.across(experiment, roster, sites, wait, token, came), GRACE)


def _new(prepared: "_Prepared", folder: Path, watch: Watch | None) -> dict[str, Any]:
    _check_room(folder, prepared)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    before = set(folder.iterdir()) if not missing else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
    with _locked(folder):
        _refuse_run(folder)  # another process may have been quicker
        remove_unfinished(folder)
        try:
            _write_json(folder / "partition.json", prepared.partition)
            return _rounds(prepared, folder, watch)
        except (CheckpointError, RoundError):
            raise
        except Exception:
            if not any((folder / name).exists() for name in ("metrics.jsonl", "privacy.jsonl", "checkpoints")):
                _remove(folder, before, missing)
            raise


def _remove(folder: Path, before: set[Path], made: Sequence[Path]) -> None:
    """Remove what a run that never began has left: all but what was there before, and the folders that it made."""
    for path in set(folder.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in made:
        with suppress(OSError):  # something else is in it
            path.rmdir()


def _continue(
    folder: Path, watch: Watch | None, prepare: Callable[[Experiment], "_Prepared"], grace: float = 0.0
) -> dict[str, Any]:
    """Go on with a run. `grace`: seconds to wait for another process that has it."""
    read_config(folder)
    with _locked(folder, grace):
        config = read_config(folder)
        if config["status"] == "finished" and (folder / "summary.json").exists():
            return _read_json(folder / "summary.json")
        begun = _read_json(folder / "partition.json")
        fingerprint = begun.get("fingerprint")
        prepared = prepare(from_json(config["experiment"]))
        now = prepared.partition["fingerprint"]
        if fingerprint != now:
            raise CheckpointError(
                f"the data has changed since the run began (fingerprint {now[:12]}, "
                f"was {str(fingerprint)[:12]}): other packages or another file; start a new run"
            )
        for client, told in prepared.partition["clients"].items():
            before, threads = begun["clients"][client].get("threads"), told.get("threads")
            if before != threads:
                warnings.warn(
                    f"site {client} trained with {before} torch threads, now with {threads}: perhaps to other bits",
                    stacklevel=2,
                )
        remove_unfinished(folder)
        _check_room(folder, prepared)
        prepared.former += config.get("former_versions", [])
        return _rounds(prepared, folder, watch)


def _check_unchanged(begun: Mapping[str, Any], prepared: "_Prepared") -> None:
    """Compare what the rounds so far were made with, as their checkpoint says, with what is to go on.

    Raises:
        CheckpointError: for another setting or model. Other versions of packages are a warning.
    """
    if not begun:  # by a version that did not say
        return
    if changed := differences(from_json(begun["experiment"]), prepared.experiment, MAY_CHANGE):
        raise CheckpointError(
            f"the run was begun with other settings: {changed}; put them back in config.json, or start a new run "
            f"(only {', '.join(MAY_CHANGE)} may change)"
        )
    if begun.get("data", data := prepared.partition["fingerprint"]) != data:
        raise CheckpointError(
            f"the data has changed since the run began (fingerprint {data[:12]}, was {begun['data'][:12]}), and "
            "partition.json with it; start a new run"
        )
    if begun["model"].startswith("sha256:"):
        raise CheckpointError(
            f"the run was begun by an earlier version ({begun['versions'].get('consilium')}), whose fingerprint of the "
            "model left out files such as the chat template: it cannot be compared; resume it with that version, or "
            "start a new run"
        )
    if begun["model"] != (model := prepared.experiment.model.fingerprint):
        raise CheckpointError(
            f"the model has changed since the run began ({model[:19]}, was {begun['model'][:19]}): other "
            "weights, configuration, tokenizer or template; start a new run"
        )
    now = _versions()
    other = {name: version for name, version in begun["versions"].items() if now.get(name) != version}
    if other:
        told = ", ".join(f"{name} {version} (now {now.get(name)})" for name, version in other.items())
        warnings.warn(f"the run was begun with {told}: it goes on, but perhaps to other bits", stacklevel=2)
        prepared.former += [other] if other not in prepared.former else []


def _check_room(folder: Path, prepared: "_Prepared") -> None:
    """Raise ConfigError unless the memory has room for the model twice, and the disk for three checkpoints.

    Twice: the mean, taken in float64, then a checkpoint's bytes without and with their checksum. Three: two that are
    kept, and one being written; those that are there already need no more.
    """
    size = prepared.server.state().nbytes
    if (free := free_memory()) < 2 * size:
        raise ConfigError(
            f"this machine has {human(free)} of memory free, merging and saving the model take {human(2 * size)} "
            "beside it: end other programs, or take a smaller model"
        )
    need = 3 * size - sum(path.stat().st_size for path in folder.glob("checkpoints/*.safetensors"))
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < need:
        raise ConfigError(
            f"{there} has {human(free)} free, three checkpoints take {human(need)}: free space, or choose another --out"
        )


def _refuse_run(folder: Path) -> None:
    if (folder / "config.json").exists() or any(folder.glob("checkpoints/*.safetensors")):
        raise ConfigError(f"{folder} already holds a run: resume it, or choose another --name or --out")
    if any(folder.glob("*/config.json")):
        raise ConfigError(f"{folder} holds a comparison of runs; choose another --name or --out")


@dataclass
class _Prepared:
    """An experiment with its clients known, its budgets worked out and its server half built: ready to run.

    Args:
        partition: who holds what, as partition.json says it. metrics: task -> metric.
        federation: the clients' data, where it is here. roster: who is behind Flower's nodes, where it is not.
        former: versions of packages with which earlier parts of the run were made, where they differ.
    """

    experiment: Experiment
    infos: tuple[ClientInfo, ...]
    setup: Setup
    server: Server
    partition: dict[str, Any]
    metrics: dict[str, str]
    federation: Federation | None = None
    roster: Any = None
    former: list[dict[str, str]] = field(default_factory=list)

    @property
    def begun(self) -> dict[str, Any]:
        """What every checkpoint says of the run it is of, see `_check_unchanged`."""
        return {
            "experiment": to_json(self.experiment),
            "model": self.experiment.model.fingerprint,
            "data": self.partition["fingerprint"],
            "versions": _versions(),
        }

    @classmethod
    def of(cls, experiment: Experiment) -> "_Prepared":
        """Of data that is read here."""
        torch.set_num_threads(experiment.threads)
        _check_device(experiment.device)
        if experiment.engine == "flower" and importlib.util.find_spec("flwr") is None:
            raise ConfigError("engine flower needs the package flwr: pip install 'consilium[simulation]'")
        if isinstance(experiment.model, ModelSource):
            _ = experiment.model.location  # refuses a model that is not there before data is read
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
        labels = [(data.task.name, data.task.labels) for data in federation.clients.values()]
        partition = federation.partition()
        for info in infos:
            partition["clients"][info.id]["memory_bytes"] = info.memory_bytes
            if info.architecture:
                partition["clients"][info.id]["architecture"] = info.architecture
        metrics = {data.task.name: str(data.task.metric) for data in federation.clients.values()}
        return cls._built(experiment, infos, labels, partition, metrics, federation=federation)

    @classmethod
    def across(
        cls,
        experiment: Experiment,
        roster: Any,
        sites: Sequence[str],
        wait: float,
        token: str,
        came: Callable[[ClientId], None] | None = None,
    ) -> "_Prepared":
        """Of what the sites tell; their data stays where it is. `token`: names the run to the sites' states."""
        from consilium.engine.flower import PROTOCOL, describe, one_cohort

        torch.set_num_threads(experiment.threads)
        told = {"experiment": json.dumps(to_json(experiment)), "heads": "{}", "run": token}
        told |= {"model": experiment.model.fingerprint, "protocol": PROTOCOL}
        found = describe(roster, sites, told, wait, came)
        infos = tuple(
            ClientInfo(site, int(d["sizes"][0]), str(d["task"]), int(d["memory_bytes"]) or None, str(d["architecture"]))
            for site, d in found.items()
        )
        labels = [(str(d["task"]), d["labels"]) for d in found.values()]
        clients = {
            site: {
                "task": d["task"],
                "labels": list(d["labels"]),
                "sizes": dict(zip(("train", "validation", "test"), d["sizes"], strict=True)),
                "memory_bytes": int(d["memory_bytes"]) or None,
                "threads": int(d["threads"]),
                **({"architecture": str(d["architecture"])} if d["architecture"] else {}),
            }
            for site, d in found.items()
        }
        prints = json.dumps({site: d["fingerprint"] for site, d in found.items()})
        partition = {
            "clients": clients,
            "skipped": {},
            "fingerprint": hashlib.sha256(prints.encode()).hexdigest(),
            "run": token,
        }
        shape: tuple[int, ...] = ()
        if isinstance(experiment.model, Cohort):
            shape = one_cohort(found)
            partition["shape"] = list(shape)
        metrics = {str(d["task"]): str(d["metric"]) for d in found.values()}
        return cls._built(experiment, infos, labels, partition, metrics, shape=shape, roster=roster)

    @classmethod
    def _built(
        cls,
        experiment: Experiment,
        infos: tuple[ClientInfo, ...],
        labels: Iterable[tuple[str, Iterable[str]]],
        partition: dict[str, Any],
        metrics: dict[str, str],
        shape: tuple[int, ...] = (),
        federation: Federation | None = None,
        roster: Any = None,
    ) -> "_Prepared":
        setup = experiment.setup(labels, infos, federation.shape if federation else shape)
        if roster is not None and isinstance(experiment.model, Cohort):  # whose architectures the sites have chosen
            chosen = tuple(info.architecture for info in infos)
            setup = replace(setup, model=replace(experiment.model, architectures=chosen))
        for data in federation.clients.values() if federation else ():
            setup.check_data(data)
        if experiment.sampling.min_clients > len(infos):
            raise ConfigError(
                f"sampling.min_clients is {experiment.sampling.min_clients}, there are {len(infos)} clients"
            )
        reached = (
            min(setup.cohort, len({info.task for info in infos})) if setup.sampling.distinct_tasks else setup.cohort
        )
        if (needed := experiment.merging.needs) > reached:
            raise ConfigError(
                f"merging.rule {experiment.merging.rule} with {experiment.merging.attackers} attackers needs {needed} "
                f"contributors, but a round of this federation has at most {reached}: nothing would ever change; add "
                "clients, or choose another rule"
            )
        Account(None, experiment, len(infos)).check(0)
        disclosure.check(experiment.algorithm.client(setup), experiment.privacy)
        server = experiment.algorithm.server(setup)
        unable = {c.id: lack for c in infos if (lack := server.unable(c))}
        # A method that fits its models to the clients may find work even where nobody can hold the full one.
        if len(unable) == len(infos) and not server.configure(1, infos):
            raise BudgetError(nobody(unable))
        return cls(experiment, infos, setup, server, partition, metrics, federation, roster)

    @contextmanager
    def engine(self, folder: Path, store: ClientStore, progress: Callable[..., None]) -> Iterator[Engine]:
        """What carries the payloads, as long as the rounds go on."""
        experiment = self.experiment
        if self.roster is None and experiment.engine == "local":
            device, count = torch.device(experiment.device), min(experiment.at_once, len(self.infos))
            processes = count if device.type == "cpu" else 1
            engine = LocalEngine(
                server=self.server,
                client=experiment.algorithm.client(self.setup),
                infos=self.infos,
                federation=on_device(self.federation, device),
                store=store,
                seed=experiment.seed,
                device=device,
                strict=experiment.strict,
                sampling=self.setup.sampling,
                progress=progress,
                together=count if processes == 1 else 1,
                privacy=experiment.privacy,
            )
            with forked(processes, engine.work) if processes > 1 else nullcontext() as engine.workers:
                yield engine
            return
        from consilium.engine.flower import FlowerEngine, Roster, simulation

        with nullcontext() if self.roster is not None else simulation(experiment, len(self.infos)) as grid:
            names = [info.id for info in self.infos]
            roster = self.roster or Roster(grid, names, patience=experiment.wire.deadline)
            told = {
                "experiment": json.dumps(to_json(experiment)),
                "heads": json.dumps(self.setup.heads),
                "run": str(self.partition.get("run", "")),
                "model": experiment.model.fingerprint,
                "folder": str(store.folder.absolute()),
                "seed": experiment.seed,
            }
            wire, sampling = experiment.wire, self.setup.sampling
            yield FlowerEngine(self.server, self.infos, roster, store, wire, told, folder, progress, sampling)


def _rounds(prepared: _Prepared, folder: Path, watch: Watch | None) -> dict[str, Any]:
    """The rounds that are left, then the summary; the status says how it ended."""
    try:
        with interruptible() as check:
            summary = _all_rounds(prepared, folder, watch, check)
    except KeyboardInterrupt:
        _write_config(folder, "interrupted", prepared)
        raise
    if prepared.experiment.completions and prepared.federation is not None:
        clients = [info for info in prepared.infos if info.id in prepared.federation.clients]
        of = prepared.setup, prepared.server, clients, prepared.federation, prepared.experiment.completions
        _write_json(folder / "completions.json", {"completions": completions(*of)})
    _write_json(folder / "summary.json", summary)
    _write_config(folder, "finished", prepared)
    return summary


def _all_rounds(prepared: _Prepared, folder: Path, watch: Watch | None, check: Callable[[], None]) -> dict[str, Any]:
    experiment, server = prepared.experiment, prepared.server
    first, writing, versions = 1, 0.0, {}
    if (found := load_checkpoint(folder / "checkpoints")) is not None:
        _check_unchanged(found.begun, prepared)
        server.restore(found.server)
        first, versions = found.round + 1, found.versions
    del found
    _write_config(folder, "running", prepared)
    store = ClientStore(folder / "clients", versions)
    _truncate(folder, first)
    structure, begun = StructureLog(folder / STRUCTURE, _lines(folder / STRUCTURE)), prepared.begun
    account = Account(folder, experiment, len(prepared.infos))
    account.check(first - 1)
    if watch:
        watch.started(experiment, prepared.setup, prepared.federation, first)

    def progress(client: ClientId, phase: str, done: int, total: int) -> None:
        check()
        if watch:
            watch.step(client, phase, done, total)

    strikes: dict[ClientId, int] = {}
    best: dict[str, Any] | None = None
    for line in _lines(folder / "metrics.jsonl"):
        tally(strikes, line)
        best = _best(best, line, prepared.infos)
    with prepared.engine(folder, store, progress) as engine:
        number, failed = first, 0
        while number <= experiment.rounds and account.affords(1):
            last = number == experiment.rounds or not account.affords(2)
            test = number % experiment.evaluate_every == 0 or last
            account.charge(number)
            record = engine.round(number, test, [client for client, n in strikes.items() if n >= BENCH])
            record |= account.told()
            for key in ("engine", "round"):  # a record cannot hold the time it takes to write it: the next one does
                record["seconds"][key] += writing
            start = time.perf_counter()
            events = _events(record, server, strikes)
            _record(folder, number, record, events, server, structure)
            if not record["abandoned"]:
                best = _best(best, record, prepared.infos)
                save_checkpoint(
                    folder / "checkpoints", number, server.state(), store, begun, best["round"] if best else 0
                )
            writing = time.perf_counter() - start
            if watch:
                watch.rounded(record, events)
            if hopeless := _hopeless(record, experiment):
                raise RoundError(hopeless)
            number, failed = (number, failed + 1) if record["abandoned"] else (number + 1, 0)
            if failed == FAILED:
                raise RoundError(
                    f"round {number} was abandoned {FAILED} times in a row: {record['abandoned']}; look at the "
                    "clients, then resume the run"
                )
    return _summary(prepared, folder, store, writing) | {"best": best} | account.told()


def _hopeless(record: Mapping[str, Any], experiment: Experiment) -> str | None:
    """Return why a round would fail again if it were repeated: training diverged at every client; else None."""
    clients = record["clients"].values()
    if not clients or len(clients) < len(record["selected"]) or not all(told.get("diverged") for told in clients):
        return None
    largest, rate = _suspected_rate(experiment)
    where = f"all {len(clients)} clients" if len(clients) > 1 else "the only client"
    return (
        f"the loss became NaN at {where}: the learning rate ({largest} {rate}) is probably too high; start a "
        "new run with a lower one"
    )


def _suspected_rate(experiment: Experiment) -> tuple[str, float]:
    """Return the name and value of the clients' learning rate that is the most above its default."""
    found = []
    for prefix, settings in (("fit", experiment.fit), ("algorithm", experiment.algorithm)):
        for setting in fields(settings):
            name, value = setting.name, getattr(settings, setting.name)
            client = name in ("lr", "head_lr") or name.startswith("eta")
            if client and name not in ("eta_s", "eta_g") and value:  # those are the server's
                found.append((value / (setting.default or Fit.lr), f"{prefix}.{name}", value))
    _, name, value = max(found, key=lambda item: item[0])
    return name, value


def _best(best: dict[str, Any] | None, record: Mapping[str, Any], infos: Sequence[ClientInfo]) -> dict[str, Any] | None:
    """The round with the best validation so far, its number and score; None: no method's client has told one.

    The score is the mean over the tasks of what the clients told whose replies count, of the models as they had trained
    them. Test data has no say in it. A method's next stage starts anew: its models are other ones.
    """
    tasks: dict[str, list[float]] = {}
    for info in infos:
        told = record["clients"].get(info.id)
        if told and not told["rejected"] and told["validation"] is not None and not record.get("abandoned"):
            tasks.setdefault(info.task, []).append(told["validation"])
    if not tasks:
        return best
    score = sum(sum(values) / len(values) for values in tasks.values()) / len(tasks)
    if best and best["stage"] == record["stage"] and score <= best["validation"]:
        return best
    return {"round": record["round"], "stage": record["stage"], "validation": score}


def _events(record: Mapping[str, Any], server: Server, strikes: dict[ClientId, int]) -> list[dict[str, Any]]:
    """What happened in a round: the method's events, who is benched by it (`strikes`: see `tally`), who is refused."""
    abandoned = {"abandoned": True} if record["abandoned"] else {}
    benched = [
        {"event": "benched", "client": client, "reason": reason, **abandoned}
        for client, reason in tally(strikes, record).items()
    ]
    refused = [{"event": "refused", "client": c, "reason": why} for c, why in record.get("refused", {}).items()]
    own = [] if abandoned else server.events()
    return [{"round": record["round"], **event} for event in [*own, *benched, *refused]]


def _record(
    folder: Path, number: int, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]], server: Server,
    structure: StructureLog,
) -> None:  # fmt: skip
    """Write what a round left, before its checkpoint commits it; a redone round writes it anew."""
    append_json(folder / "metrics.jsonl", record)
    for event in events:
        append_json(folder / "events.jsonl", event)
    if not record["abandoned"]:
        structure.add(number, server)


def _truncate(folder: Path, first: int) -> None:
    """Drop what rounds after the last commit wrote."""
    if (old := folder / OLD_STRUCTURE).exists():
        convert(old, first)
    for name in ("metrics.jsonl", "events.jsonl", STRUCTURE):
        path = folder / name
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            told = [_told(path, number, line, len(lines)) for number, line in enumerate(lines, 1)]
            kept = [line for line, what in zip(lines, told, strict=True) if what and _before(what, first)]
            write_atomic(path, b"".join(kept))
    if (found := [record["round"] for record in records(folder)]) != list(range(1, first)):
        raise CheckpointError(
            f"{folder / 'metrics.jsonl'} tells of the rounds {found}, committed are 1 to {first - 1}: a part of it is "
            "lost; put the file back"
        )


def _told(path: Path, number: int, line: bytes, last: int) -> dict[str, Any] | None:
    """What a line of a .jsonl file tells; None: the torn last line of a killed run.

    Raises:
        CheckpointError: for any other line that cannot be read.
    """
    try:
        return _record_in(path, number, line)
    except CheckpointError:
        if number == last:
            return None
        raise


def _record_in(path: Path, number: int, line: bytes | str) -> dict[str, Any]:
    """Return the record in one line, with its "round" as an integer."""
    try:
        told = json.loads(line)
        return {**told, "round": int(told["round"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}:{number} cannot be read ({type(error).__name__}); put the file back") from error


def _before(told: Mapping[str, Any], first: int) -> bool:
    """Whether what a line tells is past: of a round that was committed, or an abandoned one of the round to come."""
    return told["round"] < first or (told["round"] == first and bool(told.get("abandoned")))


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The rounds in metrics.jsonl, without those that were abandoned and tried again."""
    return (record for record in _lines(folder / "metrics.jsonl") if not record.get("abandoned"))


def read_structure(folder: Path) -> dict[str, Any]:
    """Return who holds which experts, as `engine.structure.fold` does; also of a run of an earlier version."""
    old = folder / OLD_STRUCTURE
    if old.exists() and not (folder / STRUCTURE).exists():
        return fold([]) | _read_json(old)
    return fold(_lines(folder / STRUCTURE))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file of rounds, without the torn last one of a killed run.

    Raises:
        CheckpointError: for a line that cannot be read.
    """
    if not path.exists():
        return
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _record_in(path, number, line)


def _summary(prepared: _Prepared, folder: Path, store: ClientStore, writing: float) -> dict[str, Any]:
    """The result of all rounds. `writing`: seconds that the last round's files took."""
    rounds = list(records(folder))
    tested = [record for record in rounds if record["test"] is not None]
    if not tested:
        raise RoundError(
            f"the budget of privacy ended before a round counted and was scored; see {folder}/privacy.jsonl"
        )
    last, infos, server = tested[-1], prepared.infos, prepared.server
    held = server.structure() or {}
    tasks = {}
    for task in sorted({info.task for info in infos}):
        members = [info.id for info in infos if info.task == task and info.id in last["test"]]
        tasks[task] = {"metric": prepared.metrics[task], "score": last["scores"].get(task), "clients": len(members)}
    away = prepared.roster is not None  # states stay at the sites
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
            "peak_bytes_model": peaks.get(info.id) or None,
            "reason": f"cannot hold the model: {lack}" if lack else None,
            "state": checksum(store.load(info.id).params) if info.id in store.versions and not away else None,
        }
    counts = [r["experts_mean"] for r in rounds if r["experts_mean"] is not None]
    seconds = {
        key: sum(_plausible(r["seconds"][key]) for r in rounds) for key in ("round", "train", "evaluate", "engine")
    }
    return {
        "algorithm": type(prepared.experiment.algorithm).__name__,
        "name": prepared.experiment.name,
        "seed": prepared.experiment.seed,
        "rounds": len(rounds),
        "tasks": tasks,
        "mean": last["scores"].get("mean"),
        **_papers_metric(rounds),
        **({"simple": simple} if (simple := _simple(prepared)) else {}),
        "clients": clients,
        "coverage": f"{len(last['test'])}/{len(infos)}",
        "skipped": dict(prepared.partition["skipped"]),
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


def _simple(prepared: _Prepared) -> dict[str, Any] | None:
    """Return the scores of a simple model; None in a deployment, whose data is elsewhere, and where none are told."""
    if prepared.federation is None or prepared.experiment.privacy.scores != "exact":
        return None
    return simple_scores(prepared.federation)


def _papers_metric(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the pFedMoE family reports, for runs of a cohort: in each round the mean over the clients that took part of
    their test accuracy before aggregation; of all rounds the best. It is optimistic: chosen by the test data."""
    key = "test before aggregation"
    means = [
        sum(told) / len(told)
        for record in rounds
        if (told := [_plausible(c["report"][key]) for c in record["clients"].values() if key in c.get("report", {})])
    ]
    return {"best_round_before_aggregation": max(means)} if means else {}


def _plausible(value: float) -> float:
    """Return the value, or 0 if it is so large that only a lying client can have reported it.

    Replies are bounded now, but a run that was begun before they were may hold such numbers.
    """
    return value if is_number(value, 0, 1e100) else 0.0


def _write_config(folder: Path, status: str, prepared: _Prepared) -> None:
    _write_json(
        folder / "config.json",
        {
            "format": 1,
            "status": status,
            "experiment": to_json(prepared.experiment),
            "versions": _versions(),
            **({"former_versions": prepared.former} if prepared.former else {}),
            "git": _git(),
            "data": prepared.federation.source if prepared.federation else SITES,
        },
    )


def _versions() -> dict[str, str]:
    """Of the packages that a run's bits may depend on."""
    return {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
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
        if name.startswith(("cuda", "gpu")) and not torch.cuda.is_available():
            raise ConfigError(f"device is {name!r}, but this machine has no CUDA GPU; use --device cpu") from error
        if name.startswith("gpu"):
            raise ConfigError(f"device is {name!r}; a GPU is called cuda, or cuda:N of several") from error
        raise ConfigError(f"device {name!r} cannot be used ({first_line(error)}); use cpu, cuda or cuda:N") from error


@contextmanager
def _locked(folder: Path, grace: float = 0.0) -> Iterator[None]:
    """One process at a time in a run directory; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: if there is another after so many seconds of grace, or if a part of the directory is a link:
            what is written and removed there would be so elsewhere.
    """
    refuse_links(folder)
    with open_here(folder / ".lock", os.O_WRONLY | os.O_CREAT, "wb") as file:
        end = time.monotonic() + grace
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise CheckpointError(f"{folder} is in use by another process") from error
            time.sleep(0.1)
        yield


class _Callable(ModuleType):
    """This module is `consilium.run`, and so is the function: `consilium.run(experiment, folder)` calls it."""

    __call__ = staticmethod(run)


sys.modules[__name__].__class__ = _Callable
