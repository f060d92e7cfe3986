"""The numbers of a run that the page and the terminal both show, computed once.

An unfinished run has no summary.json; its numbers then come from the rounds that it completed. If both exist, the
summary takes precedence, because it is the run's own report.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilium.report.read import RunRecord

METRICS = {"accuracy": "accuracy", "token_f1": "token F1", "rouge2": "ROUGE-2", "token_accuracy": "token accuracy"}

__all__ = [
    "METRICS",
    "Column",
    "Result",
    "TaskScore",
    "best",
    "client_scores",
    "columns",
    "differ_in_clients",
    "format_bits",
    "format_bytes",
    "format_score",
    "format_seconds",
    "measured",
    "number",
    "result",
    "round_of",
    "shared_mean",
    "unable_clients",
]

LARGEST = 1e100
"""The largest number of a run. A client made up any larger number, so it is treated as not recorded."""


@dataclass(frozen=True)
class TaskScore:
    """The mean and standard deviation (n - 1) over clients, in [0, 1]; sd is None for fewer than two clients."""

    mean: float
    sd: float | None
    clients: int


@dataclass(frozen=True)
class Result:
    """One row of the comparison.

    Bytes are totals over the run, and seconds are wall-clock time. None means not recorded.
    """

    label: str
    tasks: Mapping[str, TaskScore]
    mean: float | None
    served: int
    clients: int
    bytes_down: int | None
    bytes_up: int | None
    peak_bytes: int | None
    seconds: float | None
    experts_start: float | None
    experts_end: float | None
    rounds: int
    finished: bool

    @property
    def coverage(self) -> str:
        return f"{self.served}/{self.clients}"

    @property
    def bytes_total(self) -> int | None:
        known_bytes = [b for b in (self.bytes_down, self.bytes_up) if b is not None]
        return sum(known_bytes) if known_bytes else None


def result(run: RunRecord) -> Result:
    """Return the row of one run."""
    summary = run.summary or {}
    scores = client_scores(run)
    tasks = {}
    for task in run.tasks:
        values = [scores[c] for c in run.order if c in scores and run.clients[c].task == task]
        reported = number(_get(summary, "tasks", task, "score"))
        if values or reported is not None:
            sd = statistics.stdev(values) if len(values) > 1 else None
            mean = reported if reported is not None else statistics.fmean(values)
            tasks[task] = TaskScore(mean, sd, len(values) or int(_get(summary, "tasks", task, "clients") or 0))
    mean = number(summary.get("mean"))
    if mean is None and tasks:
        mean = statistics.fmean(t.mean for t in tasks.values())
    experts = [e for e in (number(r.get("experts_mean")) for r in run.rounds) if e is not None]
    start, end = number(_get(summary, "experts", "start")), number(_get(summary, "experts", "end"))
    seconds = number(_get(summary, "seconds", "total"))
    return Result(
        label=run.label,
        tasks=tasks,
        mean=mean,
        served=len(run.clients) - len(unable_clients(run)),
        clients=len(run.clients),
        bytes_down=_total(run, "bytes_down"),
        bytes_up=_total(run, "bytes_up"),
        peak_bytes=_peak(run),
        seconds=seconds if seconds is not None else _sum(_get(r, "seconds", "round") for r in run.rounds),
        experts_start=start if start is not None else (experts[0] if experts else None),
        experts_end=end if end is not None else (experts[-1] if experts else None),
        rounds=len(run.rounds),
        finished=run.finished,
    )


def client_scores(run: RunRecord) -> dict[str, float]:
    """Return the test score in [0, 1] per client, from the summary or else from the last round that tested."""
    reported = {c: number(_get(run.summary, "clients", c, "test")) for c in run.order}
    scores = {c: v for c, v in reported.items() if v is not None}
    if scores:
        return scores
    for line in reversed(run.rounds):
        if isinstance(line.get("test"), Mapping):
            test = {c: number(v) for c, v in line["test"].items() if c in run.clients}
            return {c: v for c, v in test.items() if v is not None}
    return {}


def measured(run: RunRecord, name: str) -> dict[str, float]:
    """Return a measure other than the score ("bits_per_byte", ...) per client, from the last round that tested."""
    for line in reversed(run.rounds):
        if isinstance(line.get(name), Mapping):
            values = {c: number(v) for c, v in line[name].items() if c in run.clients}
            return {c: v for c, v in values.items() if v is not None}
    return {}


def unable_clients(run: RunRecord) -> dict[str, str]:
    """Return the clients that cannot run this algorithm, with the run's reason.

    The latest record of a client counts.
    """
    if run.summary is not None and isinstance(run.summary.get("clients"), Mapping):
        reasons = {c: _get(run.summary, "clients", c, "reason") for c in run.order}
        return {c: str(reason) for c, reason in reasons.items() if reason}
    latest_reasons: dict[str, str] = {}
    for line in run.rounds:
        for client in line.get("clients") or {}:
            latest_reasons.pop(client, None)
        for client, reason in (line.get("unable") or {}).items():
            if client in run.clients and client not in (line.get("clients") or {}):
                latest_reasons[client] = str(reason)
    return latest_reasons


def differ_in_clients(runs: Sequence[RunRecord]) -> bool:
    """Return whether the runs scored different sets of clients, so that their plain means are not comparable."""
    return len({frozenset(client_scores(run)) for run in runs}) > 1


def shared_mean(runs: Sequence[RunRecord]) -> list[float | None]:
    """Return, for each run, the mean over tasks of the mean over the clients that EVERY run scored.

    It is the fair column if the runs serve different clients.
    """
    scores = [client_scores(run) for run in runs]
    common_clients = set.intersection(*(set(s) for s in scores)) if scores else set()
    means: list[float | None] = []
    for run, score in zip(runs, scores, strict=True):
        by_task: dict[str, list[float]] = {}
        for client in common_clients:
            by_task.setdefault(run.clients[client].task, []).append(score[client])
        means.append(statistics.fmean(map(statistics.fmean, by_task.values())) if by_task else None)
    return means


@dataclass(frozen=True)
class Column:
    """One column of the comparison: its content, and its good end ("high", "low" or "").

    Scores in `values` are rounded as printed, so that an invisible difference decides nothing.
    """

    head: str
    good: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]


def columns(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the comparison as columns with one value per run; the first column is each run's name."""
    rows = [result(run) for run in runs]
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    table_columns = [Column("run", "", tuple(None for _ in rows), tuple(row.label for row in rows))]
    for task in tasks:
        cells = [row.tasks.get(task) for row in rows]
        texts = tuple(format_score(c.mean if c else None, c.sd if c else None) for c in cells)
        table_columns.append(Column(task, "high", _printed([c.mean if c else None for c in cells]), texts))
    if len(tasks) != 1:
        table_columns.append(_column("mean", "high", _printed([row.mean for row in rows]), format_score))
    if differ_in_clients(runs):
        table_columns.append(_column("shared", "high", _printed(shared_mean(runs)), format_score))
    for name, head in (("bits_per_byte", "bits/byte"), ("personal_bits_per_byte", "own best")):
        means = [statistics.fmean(values.values()) if (values := measured(run, name)) else None for run in runs]
        if any(value is not None for value in means):
            table_columns.append(_column(head, "low", _printed(means), format_bits))
    coverage = tuple(row.coverage for row in rows)
    table_columns.append(
        Column("clients", "high", tuple(r.served / r.clients if r.clients else None for r in rows), coverage)
    )
    table_columns.append(_column("traffic", "low", [row.bytes_total for row in rows], format_bytes))
    table_columns.append(_column("memory", "low", [row.peak_bytes for row in rows], format_bytes))
    table_columns.append(_column("time", "low", [row.seconds for row in rows], format_seconds))
    return table_columns


def best(column: Column, eligible: Sequence[bool]) -> set[int]:
    """Return the rows to mark in a column: the best of the eligible rows, or none if they do not differ."""
    pool = [i for i, v in enumerate(column.values) if v is not None and eligible[i]]
    if not column.good or len(pool) < 2:
        return set()
    top = (max if column.good == "high" else min)(column.values[i] for i in pool)
    winners = {i for i in pool if column.values[i] == top}
    return winners if len(winners) < len(pool) else set()


def format_score(value: float | None, sd: float | None = None) -> str:
    """Format a score: 0.634 -> "63.4"; with sd "63.4 ± 4.2"; None -> "–"."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if sd is None else f"{100 * value:.1f} ± {100 * sd:.1f}"


def format_bits(value: float | None) -> str:
    """Format bits per byte: 1.8123 -> "1.812"; None -> "–"."""
    return "–" if value is None else f"{value:.3f}"


def format_bytes(value: float | None, trim: bool = False) -> str:
    """Format bytes in decimal units with three digits: 93_100_000 -> "93.1 MB"; None -> "–".

    Args:
        trim: drop trailing zeros: 50_000_000 -> "50 MB", 0 -> "0".
    """
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            if trim:
                return f"{float(f'{value:.3g}'):g} {unit}" if value else "0"
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError


def format_seconds(value: float | None) -> str:
    """Format seconds: 42.3 -> "42 s"; 4.21 -> "4.2 s"; 754 -> "12m 34s"; 7500 -> "2h 05m"; None -> "–"."""
    if value is None or not value <= LARGEST:
        return "–"
    if value < 9.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def number(value: Any) -> float | None:
    """Return the value as a float if it is a number that figures can place and sums can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value)


def round_of(line: Mapping[str, Any], index: int) -> float:
    """Return the number of the round that a line of the metrics records; its place in the file if it has none."""
    round_number = number(line.get("round"))
    return index if round_number is None else round_number


def _printed(scores: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if s is None else round(s, 3) for s in scores)


def _column(head: str, good: str, values: Sequence[float | None], text: Any) -> Column:
    return Column(head, good, tuple(values), tuple(text(v) for v in values))


def _total(run: RunRecord, key: str) -> int | None:
    reported = number((run.summary or {}).get(key))
    value = reported if reported is not None else _sum(r.get(key) for r in run.rounds)
    return None if value is None else int(value)


def _peak(run: RunRecord) -> int | None:
    """Return the largest client's peak by the memory model, in bytes, over the clients that could run."""
    unable_reasons = unable_clients(run)
    peaks = [number(_get(run.summary, "clients", c, "peak_bytes_model")) for c in run.order if c not in unable_reasons]
    peaks += [number(e.get("peak_bytes_model")) for r in run.rounds for e in (r.get("clients") or {}).values()]
    known_peaks = [p for p in peaks if p is not None]
    return int(max(known_peaks)) if known_peaks else None


def _sum(values: Any) -> float | None:
    known_values = [v for v in map(number, values) if v is not None]
    return number(sum(known_values)) if known_values else None


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
