"""Read a run directory into a `RunRecord`, forgiving what an interrupted run leaves behind.

`config.json` and `partition.json` make a directory a run; everything else may be missing or unfinished and is
then named in `RunRecord.notes`, so that a report never hides what it could not see. A torn last line of a
`.jsonl` file (a run killed while writing) is dropped; a broken line in the middle is an error, because totals
computed around it would be wrong. What a file holds is compared with the shape that a run writes there, and its texts
are cleaned of characters that no page or screen can show, so that the figures need not doubt either.
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
"""File -> what it holds, as far as the report builds on it: a dict is an object ("*": of any key, {}: of any values), a
list an array of that kind, str a text, float a number, int a whole one. A key may be missing, and a value null."""


@dataclass(frozen=True)
class ClientRecord:
    """What the partition says about one client.

    sizes: examples of train, validation and test. memory_bytes: the device limit in bytes, None where the run
    sets none. label_counts: examples per label name, over the splits that the partition reports.
    """

    id: str
    task: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    label_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def commonest_label_share(self) -> float | None:
        """Share in [0, 1] of the commonest label: what always giving that answer scores; None without labels."""
        total = sum(self.label_counts.values())
        return max(self.label_counts.values()) / total if total else None


@dataclass(frozen=True)
class RunRecord:
    """One run, as its directory tells it.

    is_deployment: the clients are sites on machines of their own.
    label: the name used in figures, unique among the runs compared. method: the name that all runs share which differ
    in nothing but their seed and name. seed: of everything random, None where the run does not say.
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
        told = self.config.get("seed")
        return told if isinstance(told, int) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which the clients first name them."""
        return tuple(dict.fromkeys(client.task for client in self.clients.values()))

    @property
    def order(self) -> tuple[str, ...]:
        """Client ids grouped by task: the row order of every figure."""
        tasks = self.tasks
        return tuple(sorted(self.clients, key=lambda c: (tasks.index(self.clients[c].task), c)))

    def metric(self, task: str) -> str:
        """The metric's name for a task ("accuracy"), or "score" where the run does not say."""
        told = _dict(_dict(_dict(self.summary).get("tasks")).get(task)).get("metric")
        return str(told) if told else "score"


def read_run(path: Path | str) -> RunRecord:
    """Read one run directory.

    Raises ConfigError when `path` is not a run (the message names the runs near by) or when a file is damaged, and
    CheckpointError when it holds a link.
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
    """Read several runs and give each a label that no other has. Raises ConfigError for none at all."""
    runs = [read_run(path) for path in paths]
    if not runs:
        raise ConfigError("no run given; name at least one run directory, e.g. runs/fedmoe-docstrings")
    return label_runs(runs)


def label_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Name the runs' methods and label the runs: the method where it ran once, else with what tells its runs apart
    (the seed, else the name of the directory)."""
    methods, labels = _methods(runs), []
    for run, method in zip(runs, methods, strict=True):
        seeds = [other.seed for other, name in zip(runs, methods, strict=True) if name == method]
        if len(seeds) == 1:
            labels.append(method)
        elif None not in seeds and len(set(seeds)) == len(seeds):
            labels.append(f"{method} seed {run.seed}")
        else:
            labels.append(f"{method} ({run.path.resolve().name})")
    labels = [f"{label} #{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
    return [replace(run, label=label, method=m) for run, label, m in zip(runs, labels, methods, strict=True)]


def _methods(runs: Sequence[RunRecord]) -> list[str]:
    """The algorithm; where runs of one have different settings, the directory's name without its seed tells more."""
    kinds = [json.dumps({k: v for k, v in run.config.items() if k not in ("name", "seed")}) for run in runs]
    names: dict[tuple[str, str], str] = {}
    for run, kind in zip(runs, kinds, strict=True):
        alike = {other for other, r in zip(kinds, runs, strict=True) if r.algorithm == run.algorithm}
        stem = re.sub(r"-seed\d+$", "", run.path.resolve().name)
        name = stem if stem.startswith(run.algorithm) else f"{run.algorithm} ({stem})"
        name = run.algorithm if len(alike) == 1 else name
        taken = [other for key, other in names.items() if key != (run.algorithm, kind)]
        names.setdefault((run.algorithm, kind), f"{name} #{len(taken) + 1}" if name in taken else name)
    return [names[run.algorithm, kind] for run, kind in zip(runs, kinds, strict=True)]


def _clients(raw: Json, told: Json) -> dict[str, ClientRecord]:
    """told: the summary's entries, which hold the device limits where the partition does not."""
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
    """Either {label: n}, or {split: {label: n}}, of which the test split is what scores are about."""
    nested = {k: v for k, v in raw.items() if isinstance(v, Mapping)}
    if nested:
        raw = nested.get("test") or next(iter(nested.values()))
    return {str(label): int(n) for label, n in raw.items() if isinstance(n, int)}


def _latest_per_round(lines: list[Json], notes: list[str]) -> tuple[Json, ...]:
    """A resumed run may write a round twice; the later line is the one the run went on from. Abandoned rounds, which
    were tried again, are left out."""
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
    found = []
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
        found.append(_checked(value, path, f"line {number}: "))
    return found


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
    """Return who holds which experts, as `engine.structure.fold` says it; None where the run has no such record."""
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
    """Return what a file or a line of it holds, with its texts cleaned.

    Raises:
        ConfigError: if it has not the shape that a run writes there.
    """
    try:
        odd = _odd(value, _SHAPES[path.name], "")
        if not odd:
            return _cleaned(value)
    except RecursionError:
        odd = "it is nested too deeply"
    raise ConfigError(f"{path}: {where}{odd}; restore the file")


_LARGEST = 2**53
"""Beyond it a float tells no whole numbers apart: nothing that a run writes is so large."""
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a text",
    float: "a number below 2^53",
    int: "a whole number below 2^53",
}


def _odd(value: Any, shape: Any, name: str) -> str:
    """Return what is wrong with a value of that name, "" if nothing is."""
    if value is None and name:
        return ""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (kind in (int, float) and not abs(value) < _LARGEST):
        shown = type(value).__name__ if isinstance(value, dict | list) else one_line(json.dumps(value), 60)
        return f"{one_line(name, 200) or 'it'} is {shown}; it must be {_KINDS[kind]}"
    items = value.items() if isinstance(shape, dict) else [("*", item) for item in value] if kind is list else []
    for key, item in items:
        inner = shape[0] if kind is list else shape.get(key, shape.get("*"))
        if inner is not None and (odd := _odd(item, inner, name if kind is list else f"{name}.{key}".strip("."))):
            return odd
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
    why = f"it has no {' and no '.join(missing)}" if path.is_dir() else "there is no such directory"
    near = _runs_near(path)
    hint = f"runs near by: {', '.join(map(str, near))}" if near else "no run is near by; start one with `consilium run`"
    return f"{path} is not a run: {why}; {hint}"


def _runs_near(path: Path, limit: int = 5) -> list[Path]:
    """Runs below `path`, beside it, or in ./runs: what was probably meant, newest first."""
    found: dict[Path, float] = {}
    for folder in (path, path / "runs", path.parent, Path("runs")):
        if folder.is_dir():
            for config in folder.glob("*/config.json"):
                if (config.parent / "partition.json").is_file():
                    found.setdefault(config.parent, config.stat().st_mtime)
    return sorted(found, key=found.__getitem__, reverse=True)[:limit]
