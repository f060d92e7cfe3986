"""Display of runs on a terminal: progress bars, a line per client and per round; also for several runs at once."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from consilium.core import Algorithm
from consilium.data.names import renamed
from consilium.data.task import Federation
from consilium.engine.checkpoint import write_atomic
from consilium.errors import ConfigError, ConsiliumError
from consilium.escape import one_line, print_line, terminal
from consilium.experiment import Experiment, from_json, to_json
from consilium.inside import open_here, refuse_links
from consilium.loop import Watch
from consilium.machine import cores, free_memory
from consilium.moe.budget import MemoryModel, bytes_of, human
from consilium.prepare import prepare
from consilium.rundir import RunDirectory
from consilium.setup import Setup

__all__ = ["Comparison", "JsonLines", "Several", "Terminal", "at_a_time"]

LIBRARIES = 900_000_000
"""Resident bytes of a process that has imported torch and transformers and read a recipe's data."""


def at_a_time(experiments: Sequence[Experiment]) -> int:
    """Return how many runs fit this machine's cores and free memory, each in its own process; at least 1.

    A process holds the libraries, four times the model (the server's, the mean that it forms, a checkpoint being
    written, the client's being built) and what the largest client needs to train by the memory model.
    """
    core_limit = cores() // max(e.threads for e in experiments)
    return max(1, min(core_limit, int(0.9 * free_memory()) // max(map(_process_bytes, experiments))))


def _process_bytes(experiment: Experiment) -> int:
    if not experiment.model.shared:  # small models
        return LIBRARIES
    labels = [("task", ("a", "b") if experiment.model.form == "classification" else ())]
    setup, memory = experiment.setup(labels), MemoryModel.of(experiment.model)
    model = memory.params(memory.counts) * experiment.model.torch_dtype.itemsize
    client = setup.footprint(memory.counts).total
    if experiment.memory:
        client = min(client, max(map(bytes_of, experiment.memory)))
    return LIBRARIES + 4 * model + client


@dataclass
class Terminal:
    """A watch that prints one run: a header, a line per client and per round, and progress bars.

    If the console is no terminal (a pipe, a log file, a notebook), it prints one line per round. Bars are for
    terminals, and for notebooks that have ipywidgets; rich honours NO_COLOR.
    """

    console: Console
    _bars: Progress | None = None
    _tasks: dict[str, Any] = field(default_factory=dict)
    _cut: set[str] = field(default_factory=set)
    _names: dict[str, str] = field(default_factory=dict)
    _width: int = 12

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None:
        sizes = [info.num_examples for info in setup.clients]
        tasks = sorted({info.task for info in setup.clients})
        say = self._say
        say(
            (experiment.name, "bold"),
            f": {type(experiment.algorithm).__name__}, {experiment.rounds} rounds"
            + (f", continuing with round {first}" if first > 1 else ""),
        )
        example_counts = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(min(sizes))
        say(f"  {len(sizes)} clients, tasks {', '.join(tasks)}, {example_counts} training examples each")
        counts = setup.model.counts
        memories = sorted({info.memory_bytes for info in setup.clients if info.memory_bytes})
        devices = ", ".join(human(m) for m in memories) or "not limited"
        experts = f"{sum(counts.values())} experts in {len(counts)} layers; " if counts else ""
        memory_note = f"training all needs {human(setup.footprint(counts).total)}; " if counts else ""
        say(f"  model {experiment.model.path}: {experts}{memory_note}devices: {devices}")
        if counts and not memories and experiment.algorithm.chooses_by_memory():
            name = type(experiment.algorithm).__name__
            note = (
                "note: no --memory is given, so every client holds nearly all experts and nothing is chosen: "
                f"{name} then does what FedAvg does, at a higher cost; say what a device holds, e.g. --memory 8GiB"
            )
            self.console.print(Padding(Text(note), (0, 0, 0, 2)), highlight=False)
        if warning := experiment.privacy.delta_warning(len(sizes)):
            say(f"  warning: {warning}")
        self._names = dict(federation.names) if federation else {}
        display_names = (one_line(self._names.get(info.id, info.id), 200) for info in setup.clients)
        self._width = min(max((len(name) for name in display_names), default=0), 40)
        for client, reason in federation.skipped.items() if federation else ():
            say(f"  skipped {federation.names.get(client, client)}: {reason}")
        for note in federation.notes if federation else ():
            say(f"  note: {note}")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets"))),
        )
        self._bars.start()
        self._tasks["rounds"] = self._bars.add_task("rounds", total=experiment.rounds, completed=first - 1)
        self._tasks["client"] = self._bars.add_task("", total=None)

    def _say(self, *parts: str | tuple[str, str], style: str = "") -> None:
        """Print one line of texts, or (text, style) pairs, literally: markup is not interpreted."""
        pairs = [(part, "") if isinstance(part, str) else part for part in parts]
        line = Text.assemble(*((terminal(text), of_part) for text, of_part in pairs), style=style)
        self.console.print(line, highlight=False, soft_wrap=True)

    def step(self, client: str, phase: str, done: int, total: int) -> None:
        if self._bars:
            self._bars.update(
                self._tasks["client"],
                description=one_line(f"{phase} {self._names.get(client, client)}", 200),
                completed=done,
                total=total,
            )

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        say, problems = self._say, ""
        record, events = renamed(record, self._names), renamed(list(events), self._names)
        if self.console.is_terminal:
            self._details(record, events)
        else:
            problems = self._summed(record, events)
        scores = record["scores"] or {}
        test = "  ".join(f"{task} {score:.3f}" for task, score in scores.items())
        stage = f" (stage {record['stage']})" if record["stage"] else ""
        abandoned_note = f"  abandoned: {record['abandoned']}" if record.get("abandoned") else ""
        say(
            (f"round {record['round']}", "bold"),
            f"{stage}: {len(record['clients'])} clients",
            f", {len(record['unable'])} unable" if record["unable"] else "",
            (f"  test {test}" if test else "", "green"),
            (f"  {kept_note}" if (kept_note := self._kept(record)) else "", "yellow"),
            f"  {record['seconds']['round']:.1f} s{problems}{abandoned_note}",
        )
        if self._bars:
            self._bars.update(self._tasks["rounds"], completed=record["round"] - bool(abandoned_note))

    def _kept(self, record: Mapping[str, Any]) -> str:
        """Return how many parts of the model a robust rule left unchanged; "" if it changed all of them."""
        report = record.get("server") or {}
        count = int(report.get("experts_kept") or 0) + int(report.get("others_kept") or 0)
        return (
            f"{count} of {int(report['parts'])} parts kept: too few contributors"
            if count and report.get("parts")
            else ""
        )

    def _summed(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
        """Return the problems of a round for the end of its line in a log; metrics.jsonl has the details."""
        clients = record["clients"]
        failures = {"rejected": [c for c in clients.values() if c["rejected"]], "missing": record.get("missing")}
        failures |= {"failed": record.get("errors")}
        phrases = [f"{len(who)} {outcome}" for outcome, who in failures.items() if who]
        cut_clients = [name for name, c in clients.items() if c.get("cut") and name not in self._cut]
        self._cut.update(cut_clients)
        if cut_clients:
            examples = (sum(clients[name][key] for name in cut_clients) for key in ("cut", "examples"))
            phrases.append("{} of {} examples cut to fit.max_length, fit.target_length".format(*examples))
        bench_notes = [f"{e['client']} benched: {e['reason']}" for e in events if e["event"] == "benched"]
        return "".join(f"  {words}" for words in [*phrases, *bench_notes])

    def _details(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Print a line per client, and the events of each client."""
        say = self._say
        for client, c in record["clients"].items():
            loss = "-" if c["train_loss"] is None else f"{c['train_loss']:.3f}"
            value = "-" if c["validation"] is None else f"{c['validation']:.3f}"
            say(
                f"  {client:{self._width}} {c['experts'] or '-':>4} experts  loss {loss}  validation {value}  "
                f"sent+received {human(c['bytes_down'] + c['bytes_up'])}  "
                f"{c['seconds']['train'] + c['seconds']['evaluate']:.1f} s"
            )
            if c.get("cut") and client not in self._cut:
                self._cut.add(client)
                cut_note = f"{c['cut']} of {c['examples']} examples cut to fit.max_length, fit.target_length"
                say(f"  {client:{self._width}} {cut_note}")
            if c["rejected"]:
                say(f"  {client:{self._width}} left out of this round: {c['rejected']}", style="red")
        for outcome, key in (("missing", "missing"), ("missing", "untested"), ("failed", "errors")):
            for client, reason in record.get(key, {}).items():
                say(f"  {client:{self._width}} {outcome}: {reason}", style="red")
        for client, rounds in record.get("late", {}).items():
            late_note = f"late: its answer of round {', '.join(map(str, rounds))} is not used"
            say(f"  {client:{self._width}} {late_note}", style="red")
        for event in events:
            if event["event"] == "benched":
                say(f"  {event['client']:{self._width}} benched, not selected any more: {event['reason']}", style="red")
                continue
            if event["event"] != "structure":
                size_note = f" to {event['experts']} experts" if "experts" in event else ""
                say(f"  {event['event']} {event['client']}{size_note}", style="cyan")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()


@dataclass
class JsonLines:
    """A watch that writes each round as one line of JSON: its record, as in metrics.jsonl, with its "events"."""

    file: TextIO

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None: ...

    def step(self, client: str, phase: str, done: int, total: int) -> None: ...

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        self.line({**record, "events": list(events)})

    def line(self, value: Any) -> None:
        print(json.dumps(value, allow_nan=False), file=self.file, flush=True)


@dataclass
class Several:
    """Several watches as one; they are called in order."""

    watches: Sequence[Watch]

    def started(self, experiment: Experiment, setup: Setup, federation: Federation | None, first: int) -> None:
        for watch in self.watches:
            watch.started(experiment, setup, federation, first)

    def step(self, client: str, phase: str, done: int, total: int) -> None:
        for watch in self.watches:
            watch.step(client, phase, done, total)

    def rounded(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        for watch in self.watches:
            watch.rounded(record, events)


@dataclass
class Comparison:
    """A comparison: runs several experiments in their own processes, `jobs` at a time, and shows their progress.

    Each run has its own process, so its peak memory is its own, and a crash affects no other run. Finished runs are
    kept and interrupted runs are resumed, so a comparison can be restarted at any time.

    Args:
        flags: further ones for the commands `consilium run` and `consilium resume`.
        rounded: called with the name of a run and the record of each round that it completes.
    """

    console: Console
    planned: Mapping[Path, Experiment]
    jobs: int
    flags: Sequence[str] = ()
    rounded: Callable[[str, Mapping[str, Any]], None] | None = None
    _followed: dict[Path, "_Followed"] = field(default_factory=dict)

    def run(self) -> None:
        """Run everything that is not finished; experiments that cannot run are found before the first run starts.

        A failed run does not stop the others.

        Raises:
            ConfigError: if a directory holds another experiment, or one of the experiments cannot run.
            ConsiliumError: in the end, if runs failed, with the last line that each printed.
        """
        failures: list[str] = []
        queue = [folder for folder, experiment in self.planned.items() if not self._finished(folder, experiment)]
        with self.console.status(f"Reading data and model for {len(queue)} runs (the first time, a minute or two)"):
            self._check_new(queue)
        processes: dict[Path, subprocess.Popen] = {}
        columns = (
            TextColumn("{task.description:16}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[at]}", markup=False),
        )
        is_hidden = not self.console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self.console, disable=is_hidden) as bars:
            tasks = {
                folder: bars.add_task(one_line(folder.name, 200), total=experiment.rounds, at="")
                for folder, experiment in self.planned.items()
            }
            for folder, task in tasks.items():
                self._followed[folder] = _Followed(folder / "metrics.jsonl")
                self._show(bars, task, folder, None)  # rounds from before this comparison was started
            try:
                while queue or processes:
                    while queue and len(processes) < self.jobs:
                        folder = queue.pop(0)
                        processes[folder] = self._start(folder)
                    time.sleep(0.2)
                    for folder, process in list(processes.items()):
                        has_ended = process.poll() is not None
                        self._show(bars, tasks[folder], folder, self.rounded)
                        if has_ended:
                            if reason := self._failure(folder, processes.pop(folder)):
                                failures.append(reason)
                            self._say(reason or f"{folder.name}: finished")
            finally:
                for process in processes.values():
                    process.terminate()
                for process in processes.values():
                    process.wait()
        if failures:
            prefix = f"{len(failures)} of {len(self.planned)} runs failed: " if len(failures) > 1 else ""
            raise ConsiliumError(prefix + "; ".join(failures))

    def _finished(self, folder: Path, experiment: Experiment) -> bool:
        if not (folder / "config.json").exists():
            return False
        config = RunDirectory(folder).config()
        if from_json(config["experiment"]) != experiment:
            raise ConfigError(f"{folder} holds another experiment; choose another --name or --out, or delete it")
        return config["status"] == "finished"

    def _check_new(self, waiting: Sequence[Path]) -> None:
        folders: dict[Algorithm, Path] = {}  # seeds change the data, but hardly whether a method can run on it
        for folder in waiting:
            if not (folder / "config.json").exists():
                folders.setdefault(self.planned[folder].algorithm, folder)
        for folder in folders.values():
            try:
                prepare(self.planned[folder])
            except ConsiliumError as error:
                raise ConfigError(f"{folder.name} cannot run: {error}") from error

    def _start(self, folder: Path) -> subprocess.Popen:
        refuse_links(folder)
        if (folder / "config.json").exists():
            command = ["resume", str(folder)]
        else:
            description = json.dumps(to_json(self.planned[folder]))
            write_atomic(folder / "experiment.json", description.encode())
            command = ["run", str(folder / "experiment.json"), "--out", str(folder.parent)]
        thread_count = cores() // self.jobs  # a run of small models uses as many workers
        thread_settings = {"OMP_NUM_THREADS": str(max(self.planned[folder].threads, thread_count))}
        with open_here(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "consilium", *command, *self.flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **thread_settings},
                start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
            )

    def _say(self, text: str) -> None:
        print_line(self.console, text, 1000)

    def _failure(self, folder: Path, process: subprocess.Popen) -> str | None:
        if not process.returncode:
            return None
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else "no output"
        return f"{folder.name} failed with code {process.returncode} ({last_line}); see {folder}/log.txt"

    def _show(
        self, bars: Progress, task: Any, folder: Path, rounded: Callable[[str, Mapping[str, Any]], None] | None
    ) -> None:
        metrics_log = self._followed[folder]
        for record in metrics_log.new():
            if rounded and record["round"] > metrics_log.told:
                rounded(folder.name, record)
            metrics_log.told = max(metrics_log.told, record["round"])
            score_column = {"at": f"test {record['scores']['mean']:.3f}"} if record["scores"] else {}
            bars.update(task, completed=record["round"], **score_column)


@dataclass
class _Followed:
    """A run's metrics.jsonl while it grows: every line is read once.

    Args:
        told: the highest round so far.
        inode: inode of the file that was read; a resumed run replaces the file.
        read: bytes of the file that were read.
    """

    path: Path
    told: int = 0
    inode: int = 0
    read: int = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the rounds since the last call, without abandoned ones; an unfinished line is left for later."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self.inode:
                self.inode, self.read = inode, 0
            file.seek(self.read)
            lines, _, _ = file.read().rpartition(b"\n")
            self.read += len(lines) + 1 if lines else 0
            return [record for record in map(json.loads, lines.splitlines()) if not record.get("abandoned")]
        return []
