"""A reader of run directories that tolerates what an interrupted run leaves behind.

The files `config.json` and `partition.json` make a directory a run. Everything else may be missing or unfinished. It is
then named in `RunRecord.notes`, so that a report never hides what it could not see. A torn last line of a `.jsonl` file
(from a run killed while writing) is dropped. A broken line in the middle is an error, because totals computed around it
would be wrong. The content of a file is compared with the shape that a run writes there, and its texts are cleaned of
characters that no page or screen can show. The figures therefore need no checks of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consilium.data.names import renamed
from consilium.engine.structure import NAME, OLD, fold
from consilium.errors import ConfigError, first_line
from consilium.escape import one_line, terminal
from consilium.inside import refuse_links

__all__ = ["ClientRecord", "RunRecord", "label_runs", "read_run", "read_runs"]

Json = Mapping[str, Any]

_USAGE = {"*": {"*": [float]}}
_HELD = {"*": {"*": [int]}}
_SHAPES: dict[str, dict[str, Any]] = {
    "config.json": {"experiment": {"algorithm": {"type": str}}, "versions": {}, "status": str, "git": str},
    "partition.json": {
        "clients": {"*": {"task": str, "sizes": {}, "label_counts": {}, "memory_bytes": float}},
        "skipped": {},
    },
    "summary.json": {
        "tasks": {"*": {"metric": str}},
        "clients": {"*": {"memory_bytes": float, "experts": [int]}},
        "seconds": {},
        "experts": {},
    },
    "metrics.jsonl": {"round": int, "stage": str, "clients": {"*": {"seconds": {}, "report": {}}}}
    | {key: {} for key in ("unable", "test", "scores", "seconds", "server")},
    "events.jsonl": {"event": str, "client": str},
    OLD: {"blocks": {}, "rounds": {"*": _HELD}, "usage": _USAGE, "trained": _USAGE},
    "completions.json": {"completions": [{key: str for key in ("client", "prompt", "text", "before", "after")}]},
    NAME: {"round": int, "blocks": {}, "held": _HELD, "usage": _USAGE, "trained": _USAGE},
}
"""File -> the shape of its content, as far as the report depends on it.

A dict is an object ("*": any key, {}: any values), a list is an array of that kind, str is a text, float a number, and
int a whole number. A key may be missing, and a value may be null.
"""


@dataclass(frozen=True)
class ClientRecord:
    """The entry of one client in the partition.

    Args:
        sizes: examples of train, validation and test.
        memory_bytes: device limit in bytes; None if the run sets none.
        label_counts: examples per label name, over the splits that the partition reports.
    """

    id: str
    task: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    label_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def commonest_label_share(self) -> float | None:
        """Return the share in [0, 1] of the commonest label; None without labels.

        It is the score of always giving that answer.
        """
        total = sum(self.label_counts.values())
        return max(self.label_counts.values()) / total if total else None


@dataclass(frozen=True)
class RunRecord:
    """The record of one run, as read from its directory.

    Args:
        is_deployment: whether the clients are sites on machines of their own.
        label: name used in figures, unique among the runs compared.
        method: name shared by all runs that differ only in their seed and name.
    """

    path: Path
    label: str
    method: str
    algorithm: str
    status: str
    config: Json
    versions: Json
    git: str
    clients: Mapping[str, ClientRecord]
    skipped: Mapping[str, str]
    fingerprint: str
    rounds: tuple[Json, ...]
    events: tuple[Json, ...]
    structure: Json | None
    summary: Json | None
    completions: tuple[Json, ...]
    notes: tuple[str, ...]
    is_deployment: bool = False

    @property
    def finished(self) -> bool:
        return self.status == "finished" and self.summary is not None

    @property
    def seed(self) -> int | None:
        """Return the seed of everything random; None if the run does not record one."""
        value = self.config.get("seed")
        return value if isinstance(value, int) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the task names in the order in which the clients first name them."""
        return tuple(dict.fromkeys(client.task for client in self.clients.values()))

    @property
    def order(self) -> tuple[str, ...]:
        """Return the client ids grouped by task, which is the row order of every figure."""
        tasks = self.tasks
        return tuple(sorted(self.clients, key=lambda c: (tasks.index(self.clients[c].task), c)))

    def metric(self, task: str) -> str:
        """Return the name of a task's metric ("accuracy"), or "score" if the run does not record one."""
        name = _dict(_dict(_dict(self.summary).get("tasks")).get(task)).get("metric")
        return str(name) if name else "score"


def read_run(path: Path | str) -> RunRecord:
    """Read one run directory.

    Raises:
        ConfigError: if `path` is not a run (the message names the runs nearby), or if a file is damaged.
        CheckpointError: if the directory contains a link.
    """
    path = Path(path)
    refuse_links(path)
    missing = [name for name in ("config.json", "partition.json") if not (path / name).is_file()]
    if missing:
        raise ConfigError(_not_a_run(path, missing))
    notes: list[str] = []
    config = _required_json(path / "config.json")
    partition = _required_json(path / "partition.json")
    experiment = _dict(config.get("experiment"))
    names = {str(k): str(v) for k, v in _dict(partition.get("names")).items()}
    summary = renamed(_optional_json(path / "summary.json", notes), names)
    algorithm = _dict(experiment.get("algorithm")).get("type") or _dict(summary).get("algorithm") or path.name
    rounds = _latest_per_round(_json_lines(path / "metrics.jsonl", notes), notes)
    return RunRecord(
        path=path,
        label=str(algorithm),
        method=str(algorithm),
        algorithm=str(algorithm),
        status=str(config.get("status", "unknown")),
        config=experiment,
        versions=_dict(config.get("versions")),
        git=str(config.get("git") or ""),
        clients=_clients(renamed(_dict(partition.get("clients")), names), _dict(_dict(summary).get("clients"))),
        skipped={str(k): str(v) for k, v in renamed(_dict(partition.get("skipped")), names).items()},
        fingerprint=str(partition.get("fingerprint") or ""),
        rounds=tuple(renamed(rounds, names)),
        events=tuple(renamed(_json_lines(path / "events.jsonl", notes), names)),
        structure=renamed(_structure(path, notes), names),
        summary=summary,
        completions=tuple((_optional_json(path / "completions.json", notes) or {}).get("completions") or ()),
        notes=(*notes, *_texts(partition.get("notes"))),
        is_deployment="run" in partition,
    )


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def read_runs(paths: Iterable[Path | str]) -> list[RunRecord]:
    """Read several runs and give each a unique label.

    Raises:
        ConfigError: if no run is given.
    """
    runs = [read_run(path) for path in paths]
    if not runs:
        raise ConfigError("no run given; name at least one run directory, e.g. runs/fedmoe-docstrings")
    return label_runs(runs)


def label_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Name the methods of the runs and label each run.

    The label is the method if it ran once. Otherwise the seed, or else the name of the directory, is added.
    """
    methods, labels = _methods(runs), []
    for run, method in zip(runs, methods, strict=True):
        seeds = [other_run.seed for other_run, name in zip(runs, methods, strict=True) if name == method]
        if len(seeds) == 1:
            labels.append(method)
        elif None not in seeds and len(set(seeds)) == len(seeds):
            labels.append(f"{method} seed {run.seed}")
        else:
            labels.append(f"{method} ({run.path.resolve().name})")
    labels = [f"{label} #{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
    return [replace(run, label=label, method=m) for run, label, m in zip(runs, labels, methods, strict=True)]


def _methods(runs: Sequence[RunRecord]) -> list[str]:
    """Return the name of each run's method, which is its algorithm.

    If runs of one algorithm have different settings, the directory's name without its seed tells them apart.
    """
    kinds = [json.dumps({k: v for k, v in run.config.items() if k not in ("name", "seed")}) for run in runs]
    names: dict[tuple[str, str], str] = {}
    for run, kind in zip(runs, kinds, strict=True):
        algorithm_kinds = {other for other, r in zip(kinds, runs, strict=True) if r.algorithm == run.algorithm}
        stem = re.sub(r"-seed\d+$", "", run.path.resolve().name)
        name = stem if stem.startswith(run.algorithm) else f"{run.algorithm} ({stem})"
        name = run.algorithm if len(algorithm_kinds) == 1 else name
        taken_names = [other for key, other in names.items() if key != (run.algorithm, kind)]
        names.setdefault((run.algorithm, kind), f"{name} #{len(taken_names) + 1}" if name in taken_names else name)
    return [names[run.algorithm, kind] for run, kind in zip(runs, kinds, strict=True)]


def _clients(raw: Json, told: Json) -> dict[str, ClientRecord]:
    """Return the client records of a partition.

    Args:
        told: entries of the summary, which hold the device limits that the partition lacks.
    """
    clients = {}
    for client, entry in sorted(raw.items()):
        entry = _dict(entry)
        memory = entry.get("memory_bytes") or _dict(told.get(client)).get("memory_bytes")
        clients[str(client)] = ClientRecord(
            id=str(client),
            task=str(entry.get("task") or "task"),
            sizes={k: int(v) for k, v in _dict(entry.get("sizes")).items() if isinstance(v, int)},
            memory_bytes=int(memory) if isinstance(memory, int | float) and memory > 0 else None,
            label_counts=_label_counts(_dict(entry.get("label_counts"))),
        )
    return clients


def _label_counts(raw: Json) -> dict[str, int]:
    """Return the examples per label, from {label: n} or {split: {label: n}}.

    The test split is preferred, because scores are measured on it.
    """
    splits = {k: v for k, v in raw.items() if isinstance(v, Mapping)}
    if splits:
        raw = splits.get("test") or next(iter(splits.values()))
    return {str(label): int(n) for label, n in raw.items() if isinstance(n, int)}


def _latest_per_round(lines: list[Json], notes: list[str]) -> tuple[Json, ...]:
    """Return one line per round, sorted by round.

    A resumed run may write a round twice. The later line counts, because the run continued from it. Abandoned rounds,
    which were tried again, are left out.
    """
    lines = [line for line in lines if not line.get("abandoned")]
    by_round: dict[int, Json] = {}
    for i, line in enumerate(lines):
        number = line.get("round")
        number = i if number is None else number
        by_round[number] = {**line, "round": number}
    if len(by_round) < len(lines):
        notes.append(f"metrics.jsonl tells {len(lines) - len(by_round)} round(s) twice; the later line is used")
    return tuple(by_round[number] for number in sorted(by_round))


def _json_lines(path: Path, notes: list[str]) -> list[Json]:
    if not path.is_file():
        if path.name == "metrics.jsonl":  # a run without events writes no file of events
            notes.append(f"{path.name} is missing")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ConfigError(
                    f"{path}: line {number} of {len(lines)} is not JSON; restore the file or cut it before that line"
                ) from None
            notes.append(f"the last line of {path.name} is torn and was left out")
            continue
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: line {number} cannot be read ({_why(error)}); restore the file") from None
        records.append(_checked(value, path, f"line {number}: "))
    return records


def _required_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({_why(error)}); restore the file or start the run again") from None
    return _checked(value, path)


def _optional_json(path: Path, notes: list[str]) -> Json | None:
    if not path.is_file():
        return None
    try:
        return _required_json(path)
    except ConfigError as error:
        notes.append(f"{path.name} cannot be read and was left out: {error}")
        return None


def _structure(path: Path, notes: list[str]) -> Json | None:
    """Return which client holds which experts, as `engine.structure.fold` gives it; None if there is no record."""
    if not (path / NAME).is_file():
        return _optional_json(path / OLD, notes)
    try:
        return fold(_json_lines(path / NAME, notes))
    except ConfigError as error:
        notes.append(f"{NAME} cannot be read and was left out: {error}")
        return None


def _why(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _checked(value: Any, path: Path, where: str = "") -> dict[str, Any]:
    """Return the content of a file, or of one of its lines, with cleaned texts.

    Raises:
        ConfigError: if it does not have the shape that a run writes there.
    """
    try:
        problem = _odd(value, _SHAPES[path.name], "")
        if not problem:
            return _cleaned(value)
    except RecursionError:
        problem = "it is nested too deeply"
    raise ConfigError(f"{path}: {where}{problem}; restore the file")


_LARGEST = 2**53
"""The bound of all numbers: above it a float cannot tell whole numbers apart, and no run writes such large ones."""
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a text",
    float: "a number below 2^53",
    int: "a whole number below 2^53",
}


def _odd(value: Any, shape: Any, name: str) -> str:
    """Return a description of the error in a value of that name; "" if the value is valid."""
    if value is None and name:
        return ""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    is_valid = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not is_valid or (kind in (int, float) and not abs(value) < _LARGEST):
        value_text = type(value).__name__ if isinstance(value, dict | list) else one_line(json.dumps(value), 60)
        return f"{one_line(name, 200) or 'it'} is {value_text}; it must be {_KINDS[kind]}"
    items = value.items() if isinstance(shape, dict) else [("*", item) for item in value] if kind is list else []
    for key, item in items:
        inner = shape[0] if kind is list else shape.get(key, shape.get("*"))
        if inner is not None and (problem := _odd(item, inner, name if kind is list else f"{name}.{key}".strip("."))):
            return problem
    return ""


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {terminal(key, keep="\n\t"): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return terminal(value, keep="\n\t") if isinstance(value, str) else value


def _dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _not_a_run(path: Path, missing: Sequence[str]) -> str:
    problem = f"it has no {' and no '.join(missing)}" if path.is_dir() else "there is no such directory"
    neighbours = _runs_near(path)
    hint = (
        f"runs near by: {', '.join(map(str, neighbours))}"
        if neighbours
        else "no run is near by; start one with `consilium run`"
    )
    return f"{path} is not a run: {problem}; {hint}"


def _runs_near(path: Path, limit: int = 5) -> list[Path]:
    """Return runs below `path`, next to it, or in ./runs, newest first; the user probably meant one of them."""
    times: dict[Path, float] = {}
    for folder in (path, path / "runs", path.parent, Path("runs")):
        if folder.is_dir():
            for config in folder.glob("*/config.json"):
                if (config.parent / "partition.json").is_file():
                    times.setdefault(config.parent, config.stat().st_mtime)
    return sorted(times, key=times.__getitem__, reverse=True)[:limit]
