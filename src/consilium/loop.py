"""The loop over the rounds.

`run` turns an experiment into a run directory, `resume` continues one, and `serve` runs over sites on machines of their
own.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from consilium.completions import completions
from consilium.core import ClientId, Server
from consilium.data.task import Federation
from consilium.engine.account import Account
from consilium.engine.checkpoint import ClientStore, load_checkpoint, remove_unfinished, save_checkpoint
from consilium.engine.interrupt import interruptible
from consilium.engine.judge import BENCH, tally
from consilium.engine.rounds import Engine
from consilium.errors import CheckpointError, ConfigError, RoundError
from consilium.experiment import Experiment, differences, from_json, to_json
from consilium.fit import Fit
from consilium.machine import free_memory
from consilium.moe.budget import human
from consilium.prepare import MAY_CHANGE, Prepared, check_data_unchanged, check_unchanged
from consilium.rundir import SITES, RunDirectory
from consilium.setup import Setup
from consilium.summary import best_round, summarise
from consilium.versions import git_revision, versions

__all__ = ["Watch", "check_same", "resume", "run", "serve"]

FAILED = 3
"""Number of abandoned rounds in a row after which a run stops."""
GRACE = 60.0
"""Seconds that a deployment's server waits for the previous server to end after its SuperLink was killed."""


class Watch(Protocol):
    """An object that follows a run; `watch.Terminal` shows progress bars."""

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None: ...

    def step(self, client: str, phase: str, done: int, total: int) -> None: ...

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None: ...


def run(experiment: Experiment, folder: Path | str, watch: Watch | None = None) -> dict[str, Any]:
    """Run an experiment in a new directory and return its summary.

    The experiment is validated completely before anything is written.

    Raises:
        ConfigError: if the folder already holds a run, or the experiment cannot be run.
    """
    directory = RunDirectory(Path(folder))
    directory.refuse_a_second_run()
    return _begin(Prepared.of(experiment), directory, watch)


def resume(folder: Path | str, watch: Watch | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Continue an interrupted run from its newest checkpoint; the result is bit-identical to an uninterrupted run.

    A finished run is left as it is, unless more rounds are asked for.

    Args:
        rounds: number of rounds of the whole run; None: as many as it began with.

    Raises:
        CheckpointError: if the folder is not a run, is in use, or its data, its model or its settings have changed; the
            message says how. Only the settings in `MAY_CHANGE` may change.
    """
    directory = RunDirectory(Path(folder))
    if directory.config().get("data") == SITES:
        raise CheckpointError(f"{folder} is the run of a deployment: start `consilium server` again to continue it")
    return _continue(directory, watch, Prepared.of, rounds=rounds)


def check_same(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return config.json of a run after checking that it is a run of this experiment, apart from what may change.

    Raises:
        ConfigError: if the folder holds another experiment, or a finished run of another number of rounds.
    """
    config = RunDirectory(folder).config()
    before = from_json(config["experiment"])
    if changes := differences(before, experiment, MAY_CHANGE):
        raise ConfigError(f"{folder} holds another experiment ({changes}); choose another --name or --out")
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
    """Run an experiment over a deployment's Grid, or resume it if `folder` holds its run.

    Args:
        grid: Flower's grid.
        sites: the clients' names; all must be connected within `wait` seconds to begin or resume.
        keys: public key -> its owner (`certificates.owners`); a site with another owner's key is refused. None: no
            keys.
        came: called with the name of each site when it has connected.

    Raises:
        ConfigError: if the folder holds another experiment.
        RoundError: if a site is not there, or too few answer.
    """
    from consilium.engine.flower import Roster

    roster = Roster(grid, poll=1.0, keys=keys or {})
    directory = RunDirectory(folder)
    if not directory.exists():
        prepared = Prepared.across(experiment, roster, sites, wait, uuid.uuid4().hex, came)
        return _begin(prepared, directory, watch)
    check_same(folder, experiment)
    token = str(directory.partition().get("run"))
    return _continue(directory, watch, lambda _: Prepared.across(experiment, roster, sites, wait, token, came), GRACE)


def _begin(prepared: Prepared, directory: RunDirectory, watch: Watch | None) -> dict[str, Any]:
    """Start a new run."""
    _check_room(directory.path, prepared)
    with directory.created():
        remove_unfinished(directory.path)
        directory.write("partition.json", prepared.partition)
        return _run_rounds(prepared, directory, watch)


def _continue(
    directory: RunDirectory,
    watch: Watch | None,
    prepare: Callable[[Experiment], Prepared],
    grace: float = 0.0,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Continue a run.

    Args:
        grace: seconds to wait for another process that has locked the directory.
        rounds: number of rounds of the whole run; None: as many as it began with.
    """
    directory.config()
    with directory.locked(grace):
        config = directory.config()
        experiment = from_json(config["experiment"])
        summary = directory.summary() if config["status"] == "finished" else None
        if rounds is not None:
            if rounds < (done := sum(1 for _ in directory.rounds())):
                raise ConfigError(f"--rounds is {rounds}; the run has {done} rounds, and can only go on to more")
            experiment = replace(experiment, rounds=rounds)
        if summary is not None and rounds in (None, summary["rounds"]):
            return summary
        partition = directory.partition()
        prepared = prepare(experiment)
        check_data_unchanged(partition, prepared)
        remove_unfinished(directory.path)
        _check_room(directory.path, prepared)
        prepared.former += config.get("former_versions", [])
        return _run_rounds(prepared, directory, watch)


def _check_room(folder: Path, prepared: Prepared) -> None:
    """Raise ConfigError unless memory has room for the model twice, and the disk for three checkpoints.

    Memory must hold the model twice because the mean is taken in float64, and because a checkpoint's bytes exist
    without and with their checksum. The disk must hold three checkpoints: two are kept while one is written.
    Checkpoints that exist already are subtracted.
    """
    size = prepared.server.state().nbytes
    if (free := free_memory()) < 2 * size:
        raise ConfigError(
            f"this machine has {human(free)} of memory free, merging and saving the model take {human(2 * size)} "
            "beside it: end other programs, or take a smaller model"
        )
    need = 3 * size - sum(path.stat().st_size for path in folder.glob("checkpoints/*.safetensors"))
    root = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(root).free
    if free < need:
        raise ConfigError(
            f"{root} has {human(free)} free, three checkpoints take {human(need)}: free space, or choose another --out"
        )


def _run_rounds(prepared: Prepared, directory: RunDirectory, watch: Watch | None) -> dict[str, Any]:
    """Run the remaining rounds and write the summary; the status in config.json records how the run ended."""
    try:
        with interruptible() as check:
            summary = _Rounds(prepared, directory, watch, check).run()
    except KeyboardInterrupt:
        _write_config(directory, "interrupted", prepared)
        raise
    federation, completion_count = prepared.federation, prepared.experiment.completions
    if completion_count and federation is not None:
        clients = [info for info in prepared.infos if info.id in federation.clients]
        texts = completions(prepared.setup, prepared.server, clients, federation, completion_count)
        directory.write("completions.json", {"completions": texts})
    directory.write("summary.json", summary)
    _write_config(directory, "finished", prepared)
    return summary


class _Rounds:
    """The rounds of a run, from the newest checkpoint on."""

    def __init__(
        self, prepared: Prepared, directory: RunDirectory, watch: Watch | None, check: Callable[[], None]
    ) -> None:
        """Restore the server and drop everything that no checkpoint committed.

        Args:
            check: raises KeyboardInterrupt after Ctrl-C; called at every training step.
        """
        self.prepared, self.directory, self.watch, self.check = prepared, directory, watch, check
        experiment, server, folder = prepared.experiment, prepared.server, directory.path
        self.first, versions_of_states = 1, {}
        if (checkpoint := load_checkpoint(folder / "checkpoints")) is not None:
            check_unchanged(checkpoint.begun, prepared)
            server.restore(checkpoint.server)
            self.first, versions_of_states = checkpoint.round + 1, checkpoint.versions
        del checkpoint
        _write_config(directory, "running", prepared)
        self.store = ClientStore(folder / "clients", versions_of_states)
        directory.truncate(self.first)
        self.structure, self.begun = directory.structure_log(), prepared.begun
        self.account = Account(folder, experiment, len(prepared.infos))
        self.account.check(self.first - 1)
        self.strikes: dict[ClientId, int] = {}
        self.best: dict[str, Any] | None = None
        self.writing = 0.0
        """Seconds spent on writing the files of the last round."""
        for record in directory.attempts():
            tally(self.strikes, record)
            self.best = best_round(self.best, record, prepared.infos)

    def run(self) -> dict[str, Any]:
        """Run the remaining rounds and return the summary."""
        experiment, account = self.prepared.experiment, self.account
        if self.watch:
            self.watch.started(experiment, self.prepared.setup, self.prepared.federation, self.first)
        with self.prepared.engine(self.directory.path, self.store, self._progress) as engine:
            number, failures = self.first, 0
            while number <= experiment.rounds and account.affords(1):
                record = self._one(engine, number)
                if reason := _hopeless(record, experiment):
                    raise RoundError(reason)
                number, failures = (number, failures + 1) if record["abandoned"] else (number + 1, 0)
                if failures == FAILED:
                    raise RoundError(
                        f"round {number} was abandoned {FAILED} times in a row: {record['abandoned']}; look at the "
                        "clients, then resume the run"
                    )
        summary = summarise(self.prepared, self.directory, self.store, self.writing)
        return summary | {"best": self.best} | account.told()

    def _progress(self, client: ClientId, phase: str, done: int, total: int) -> None:
        self.check()
        if self.watch:
            self.watch.step(client, phase, done, total)

    def _one(self, engine: Engine, number: int) -> dict[str, Any]:
        """Run one round, commit it and return its record."""
        experiment, server = self.prepared.experiment, self.prepared.server
        is_last_round = number == experiment.rounds or not self.account.affords(2)
        test = number % experiment.evaluate_every == 0 or is_last_round
        self.account.charge(number)
        record = engine.round(number, test, [client for client, n in self.strikes.items() if n >= BENCH])
        record |= self.account.told()
        for key in ("engine", "round"):  # a record cannot hold its own writing time: the next one does
            record["seconds"][key] += self.writing
        start = time.perf_counter()
        events = _events(record, server, self.strikes)
        self.directory.append(record, events, server, self.structure)
        if not record["abandoned"]:
            self.best = best_round(self.best, record, self.prepared.infos)
            best_number = self.best["round"] if self.best else 0
            save_checkpoint(
                self.directory.path / "checkpoints", number, server.state(), self.store, self.begun, best_number
            )
        self.writing = time.perf_counter() - start
        if self.watch:
            self.watch.rounded(record, events)
        return record


def _write_config(directory: RunDirectory, status: str, prepared: Prepared) -> None:
    config = {
        "format": 1,
        "status": status,
        "experiment": to_json(prepared.experiment),
        "versions": versions(),
        **({"former_versions": prepared.former} if prepared.former else {}),
        "git": git_revision(),
        "data": prepared.federation.source if prepared.federation else SITES,
    }
    directory.write("config.json", config)


def _hopeless(record: Mapping[str, Any], experiment: Experiment) -> str | None:
    """Return why a retry of a round would fail again (training diverged at every client), or None."""
    clients = record["clients"].values()
    if not clients or len(clients) < len(record["selected"]) or not all(report.get("diverged") for report in clients):
        return None
    setting, rate = _suspected_rate(experiment)
    extent = f"all {len(clients)} clients" if len(clients) > 1 else "the only client"
    return (
        f"the loss became NaN at {extent}: the learning rate ({setting} {rate}) is probably too high; start a "
        "new run with a lower one"
    )


def _suspected_rate(experiment: Experiment) -> tuple[str, float]:
    """Return the name and value of the clients' learning rate that exceeds its default the most."""
    candidates = []
    for prefix, settings in (("fit", experiment.fit), ("algorithm", experiment.algorithm)):
        for setting in fields(settings):
            name, value = setting.name, getattr(settings, setting.name)
            is_client_rate = name in ("lr", "head_lr") or name.startswith("eta")
            if is_client_rate and name not in ("eta_s", "eta_g") and value:  # these two are the server's
                candidates.append((value / (setting.default or Fit.lr), f"{prefix}.{name}", value))
    _, name, value = max(candidates, key=lambda item: item[0])
    return name, value


def _events(record: Mapping[str, Any], server: Server, strikes: dict[ClientId, int]) -> list[dict[str, Any]]:
    """Return the events of a round: the method's own, clients that it benched, and clients that were refused.

    Args:
        strikes: number of rejected replies of each client so far, see `tally`.
    """
    abandoned_flag = {"abandoned": True} if record["abandoned"] else {}
    bench_events = [
        {"event": "benched", "client": client, "reason": reason, **abandoned_flag}
        for client, reason in tally(strikes, record).items()
    ]
    refusals = [{"event": "refused", "client": c, "reason": cause} for c, cause in record.get("refused", {}).items()]
    server_events = [] if abandoned_flag else server.events()
    return [{"round": record["round"], **event} for event in [*server_events, *bench_events, *refusals]]
