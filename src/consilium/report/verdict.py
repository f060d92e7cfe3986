"""The result of a comparison in two sentences: the differences to the first method, and their uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from consilium.report.methods import half_width
from consilium.report.read import RunRecord
from consilium.report.results import client_scores, measured

__all__ = ["verdict"]

Values = Mapping[str, float]


def verdict(runs: Sequence[RunRecord]) -> list[str]:
    """Return two sentences on finished runs of several methods; [] if there is nothing to compare.

    The measure is the personal bits per byte, else bits per byte (lower is better for both), else the test score in
    percent. Differences are paired by client. Their 95 % t-intervals are over seeds if every method has several,
    otherwise over the clients of the one seed.
    """
    finished_runs = [run for run in runs if run.finished]
    groups: dict[str, dict[object, Values]] = {}
    measure = _measure(finished_runs)
    for run in finished_runs:
        groups.setdefault(run.method, {})[run.seed] = _values(run, measure)
    if len(groups) < 2:
        return []
    first, *rivals = groups
    unit, sign = ("points", 100.0) if measure == "score" else ("bits per byte", 1.0)
    gaps = {name: _gaps(groups[first], groups[name], sign) for name in rivals}
    gaps = {name: seed_gaps for name, seed_gaps in gaps.items() if seed_gaps}
    if not gaps:
        return []
    seeds = min(len(seed_gaps) for seed_gaps in gaps.values())
    intervals = []
    for name, seed_gaps in gaps.items():
        units = [statistics.fmean(values) for values in seed_gaps] if seeds > 1 else seed_gaps[0]
        intervals.append(f"{name} {_interval(units)}")
    first_mean = statistics.fmean(statistics.fmean(values.values()) for values in groups[first].values()) * sign
    direction = "lower is better" if measure != "score" else "higher is better"
    subject = "its clients' own best models reach" if measure == "personal_bits_per_byte" else "it reaches"
    opening = (
        f"{first}: {subject} {first_mean:.1f} {unit}"
        if measure == "score"
        else f"{first}: {subject} {first_mean:.3f} {unit}"
    )
    differences_text = "differences of the others" if len(gaps) > 1 else "difference of the other"
    first_sentence = f"{opening} on average ({direction}); {differences_text}: {', '.join(intervals)}."
    if seeds > 1:
        second_sentence = f"Differences are paired by seed and client; ± is the 95 % interval over {seeds} seeds."
    else:
        clients = len(next(iter(gaps.values()))[0])
        second_sentence = (
            f"± is the 95 % interval over the {clients} clients of one seed, which share a model: it does not say what "
            "another seed would give (--seeds 3 does)."
        )
    return [first_sentence, second_sentence]


def _measure(runs: Sequence[RunRecord]) -> str:
    for name in ("personal_bits_per_byte", "bits_per_byte"):
        if runs and all(measured(run, name) for run in runs):
            return name
    return "score"


def _values(run: RunRecord, which: str) -> Values:
    return client_scores(run) if which == "score" else measured(run, which)


def _gaps(first: Mapping[object, Values], other: Mapping[object, Values], sign: float) -> list[list[float]]:
    """Return, seed by seed, other - first for every client that both have."""
    gaps = []
    for seed in first.keys() & other.keys():
        clients = sorted(first[seed].keys() & other[seed].keys())
        if clients:
            gaps.append([sign * (other[seed][client] - first[seed][client]) for client in clients])
    return gaps


def _interval(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 1 else 3
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ± {half_width(values):.{digits}f}"
