"""Methods over their seeds: means, deviations, and a paired test against the first method.

The test is the two-sided paired t-test on per-seed means, with one pair per seed that both methods finished on the same
data, and n - 1 degrees of freedom. Clients of one seed share a server's model and are not independent trials. They are
therefore counted ("ahead in 25 of 36") but not tested. Wilcoxon's signed-rank test is exact but cannot fall below
p = 0.25 with three pairs. If several methods are compared with the first, p is adjusted after Holm (1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from consilium.report.read import RunRecord
from consilium.report.results import (
    Column,
    Result,
    client_scores,
    differ_in_clients,
    format_bytes,
    format_score,
    format_seconds,
    result,
)

__all__ = [
    "TEST",
    "Method",
    "Paired",
    "Spread",
    "first_runs",
    "half_width",
    "has_seeds",
    "method_columns",
    "methods",
    "paired_columns",
    "rows",
]

TEST = "paired t-test over seeds"


@dataclass(frozen=True)
class Spread:
    """The mean and standard deviation (n - 1) over a method's runs; sd is None for a single run."""

    mean: float
    sd: float | None
    runs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Return the spread of the known values; None if there are none."""
        known_values = [v for v in values if v is not None]
        return (
            cls(
                statistics.fmean(known_values),
                statistics.stdev(known_values) if len(known_values) > 1 else None,
                len(known_values),
            )
            if known_values
            else None
        )


@dataclass(frozen=True)
class Paired:
    """A comparison of a method with the first one, on the same seeds, data and clients.

    The fields low, high and p are None for fewer than two pairs, or if all differences are alike.

    Args:
        pairs: number of seeds.
        difference: mean of this method's score minus the first one's, in [-1, 1].
        low: lower end of the 95 % confidence interval of the difference.
        high: upper end of this interval.
        p: p-value of `TEST`, adjusted after Holm.
        ahead: client x seed pairs in which this method scores higher.
        behind: client x seed pairs in which it scores lower.
        of: all client x seed pairs.
    """

    reference: str
    pairs: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    ahead: int
    behind: int
    of: int


@dataclass(frozen=True)
class Method:
    """One method over its finished runs.

    Scores are in [0, 1], sizes in bytes, and times in seconds. None means not recorded.

    Args:
        shared: mean of each run over only those clients that every run of its seed scored; None if it equals `mean`.
    """

    label: str
    runs: int
    tasks: Mapping[str, Spread]
    mean: Spread | None
    shared: Spread | None
    served: Spread
    clients: int
    bytes_total: Spread | None
    peak_bytes: Spread | None
    seconds: Spread | None
    against: Paired | None


def has_seeds(runs: Sequence[RunRecord]) -> bool:
    """Return whether some method ran more than once, so that means over runs are meaningful."""
    return len({run.method for run in runs}) < len(runs)


def first_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the first run of each method, in the order of the methods."""
    firsts: dict[str, RunRecord] = {}
    for run in runs:
        firsts.setdefault(run.method, run)
    return list(firsts.values())


def methods(runs: Sequence[RunRecord]) -> list[Method]:
    """Return one entry per method over its finished runs, in the given order; the first is the reference."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.finished:
            groups.setdefault(run.method, []).append(run)
    if not groups:
        return []
    summaries = [_method(name, members, groups) for name, members in groups.items()]
    adjusted = iter(_holm([m.against.p for m in summaries if m.against and m.against.p is not None]))
    return [
        replace(m, against=replace(m.against, p=next(adjusted))) if m.against and m.against.p is not None else m
        for m in summaries
    ]


def _method(name: str, own: Sequence[RunRecord], groups: Mapping[str, Sequence[RunRecord]]) -> Method:
    results: list[Result] = [result(run) for run in own]
    all_runs = [run for group in groups.values() for run in group]
    tasks = dict.fromkeys(task for run in own for task in run.tasks)
    scores = {task: Spread.of(r.tasks[task].mean if task in r.tasks else None for r in results) for task in tasks}
    shared_spread = None
    if any(differ_in_clients(_of_seed(all_runs, run)) for run in all_runs):
        shared_spread = Spread.of(_mean_over(run, _shared(_of_seed(all_runs, run))) for run in own)
    reference = next(iter(groups))
    served_spread = Spread.of(r.served for r in results)
    assert served_spread is not None
    return Method(
        label=name,
        runs=len(own),
        tasks={task: spread for task, spread in scores.items() if spread},
        mean=Spread.of(r.mean for r in results),
        shared=shared_spread,
        served=served_spread,
        clients=max(r.clients for r in results),
        bytes_total=Spread.of(r.bytes_total for r in results),
        peak_bytes=Spread.of(r.peak_bytes for r in results),
        seconds=Spread.of(r.seconds for r in results),
        against=_paired(reference, groups[reference], own) if name != reference else None,
    )


def _of_seed(runs: Sequence[RunRecord], run: RunRecord) -> list[RunRecord]:
    """Return the runs with the same seed and data as `run`, including `run` itself."""
    return [r for r in runs if (r.seed, r.fingerprint) == (run.seed, run.fingerprint)]


def _shared(runs: Sequence[RunRecord]) -> set[str]:
    return set.intersection(*(set(client_scores(run)) for run in runs))


def _mean_over(run: RunRecord, clients: Iterable[str]) -> float | None:
    """Return the mean over tasks of the mean over the named clients."""
    scores, by_task = client_scores(run), {}
    for client in sorted(clients):
        by_task.setdefault(run.clients[client].task, []).append(scores[client])
    return statistics.fmean(map(statistics.fmean, by_task.values())) if by_task else None


def _paired(reference: str, theirs: Sequence[RunRecord], own: Sequence[RunRecord]) -> Paired | None:
    gaps, ahead_count, behind_count, pair_count = [], 0, 0, 0
    for run in own:
        counterpart = next((o for o in theirs if (o.seed, o.fingerprint) == (run.seed, run.fingerprint)), None)
        clients = sorted(_shared([run, counterpart])) if counterpart else []
        if counterpart is None or not clients:
            continue
        own_scores, their_scores = client_scores(run), client_scores(counterpart)
        ahead_count += sum(own_scores[c] > their_scores[c] for c in clients)
        behind_count += sum(own_scores[c] < their_scores[c] for c in clients)
        pair_count += len(clients)
        gaps.append((_mean_over(run, clients) or 0.0) - (_mean_over(counterpart, clients) or 0.0))
    if not gaps:
        return None
    low, high, p = _t_test(gaps)
    return Paired(reference, len(gaps), statistics.fmean(gaps), low, high, p, ahead_count, behind_count, pair_count)


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % t-interval of the mean of two or more values."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _t_test(gaps: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 95 % confidence interval of the mean gap, and p of the two-sided test that the gap is 0.

    All three are None if there are fewer than two gaps or all gaps are equal.
    """
    if len(gaps) < 2 or math.isclose(max(gaps), min(gaps), rel_tol=1e-9, abs_tol=1e-12):
        return None, None, None
    from scipy.stats import ttest_1samp  # the paired test is this test on the differences

    test_result = ttest_1samp(gaps, 0.0)
    interval = test_result.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test_result.pvalue)


def _holm(ps: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down adjustment.

    The k-th smallest of m values is multiplied by m - k + 1. The result is never below a smaller one, and at most 1.
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        floor = max(floor, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = floor
    return adjusted


def method_columns(found: Sequence[Method]) -> list[Column]:
    """Return the table over seeds as columns with one value per method; texts hold "mean ± deviation"."""
    tasks = list(dict.fromkeys(task for m in found for task in m.tasks))
    columns = [Column("method", "", tuple(None for _ in found), tuple(m.label for m in found))]
    columns.append(_texts("seeds", [str(m.runs) for m in found]))
    for task in tasks:
        columns.append(_spreads(task, "high", [m.tasks.get(task) for m in found], format_score))
    if len(tasks) != 1:
        columns.append(_spreads("mean", "high", [m.mean for m in found], format_score))
    if any(m.shared for m in found):
        columns.append(_spreads("shared", "high", [m.shared for m in found], format_score))
    columns.append(
        Column("clients", "high", tuple(m.served.mean for m in found),
               tuple(f"{m.served.mean:.3g}/{m.clients}" for m in found))
    )  # fmt: skip
    columns.append(_spreads("traffic", "low", [m.bytes_total for m in found], format_bytes))
    columns.append(_spreads("memory", "low", [m.peak_bytes for m in found], format_bytes))
    columns.append(_spreads("time", "low", [m.seconds for m in found], format_seconds))
    return columns


def paired_columns(found: Sequence[Method]) -> list[Column]:
    """Return the comparison of each method with the first as columns.

    The columns are the name, the difference in points, its interval, p, pairs, and clients ahead.
    """
    comparisons = [m.against for m in found]
    return [
        _texts("method", [m.label for m in found]),
        _texts("difference", [_signed(a.difference) if a else "–" for a in comparisons]),
        _texts("95 % interval", [_interval(a) for a in comparisons]),
        _texts("p", [format_p(a.p) if a else "–" for a in comparisons]),
        _texts("pairs", [str(a.pairs) if a else "–" for a in comparisons]),
        _texts("clients ahead", [f"{a.ahead}/{a.of}" if a else "–" for a in comparisons]),
    ]


def rows(found: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the same table as plain numbers: scores in [0, 1], bytes, seconds.

    A key that ends in `_sd` holds the deviation over seeds.
    """
    records = []
    for m in found:
        row: dict[str, Any] = {"method": m.label, "seeds": m.runs}
        spreads = {**m.tasks, "mean": m.mean, "shared": m.shared, "bytes": m.bytes_total, "memory": m.peak_bytes,
                   "seconds": m.seconds}  # fmt: skip
        for name, spread in spreads.items():
            row |= {name: spread.mean if spread else None, f"{name}_sd": spread.sd if spread else None}
        row |= {"served": m.served.mean, "clients": m.clients}
        a = m.against
        row |= {
            "reference": a.reference if a else None, "difference": a.difference if a else None,
            "low": a.low if a else None, "high": a.high if a else None, "p": a.p if a else None,
            "test": TEST if a and a.p is not None else None, "pairs": a.pairs if a else None,
            "ahead": a.ahead if a else None, "behind": a.behind if a else None, "of": a.of if a else None,
        }  # fmt: skip
        records.append(row)
    return records


def format_p(p: float | None) -> str:
    """Format a p-value: 0.0312 -> "0.031"; 0.00004 -> "< 0.001"; None -> "–"."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def _signed(value: float) -> str:
    points = round(100 * value, 1)
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points):.1f}"


def _interval(a: Paired | None) -> str:
    return "–" if a is None or a.low is None or a.high is None else f"{_signed(a.low)} to {_signed(a.high)}"


def _texts(head: str, texts: Sequence[str]) -> Column:
    return Column(head, "", tuple(None for _ in texts), tuple(texts))


def _spreads(head: str, good: str, spreads: Sequence[Spread | None], text: Any) -> Column:
    texts = [
        text(None) if s is None else text(s.mean) + (f" ± {text(s.sd)}" if s.sd is not None else "") for s in spreads
    ]
    digits = 3 if text is format_score else 0  # compare scores as printed: invisible differences must not count
    return Column(head, good, tuple(None if s is None else round(s.mean, digits) for s in spreads), tuple(texts))
