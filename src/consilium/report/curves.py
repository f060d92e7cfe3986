"""Figures with rounds, bytes or seconds along the x axis: scores, and ranks of adapters."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from consilium.report.costs import second_axis
from consilium.report.methods import has_seeds
from consilium.report.read import RunRecord
from consilium.report.results import METRICS, format_bytes, number, round_of
from consilium.report.style import (
    Drawing,
    Key,
    NothingToDraw,
    Panel,
    clean_axes,
    color,
    new_figure,
    round_ticks,
    run_styles,
    series,
)

__all__ = ["adapter_ranks", "scores_over_bytes", "scores_over_rounds", "scores_over_seconds"]

_WIDTH, _HEIGHT = 340, 215
Points = list[tuple[float, float]]
Placed = list[tuple[float, Mapping[str, Any]]]
"""The position of each round of a run on the x axis, with the record of the round."""


def scores_over_rounds(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the scores over the rounds, with one panel per task and one for the mean over tasks.

    Test scores are drawn in the rounds that were evaluated, and validation scores as a thin line.
    """
    rounds = [[(round_of(line, i), line) for i, line in enumerate(run.rounds)] for run in runs]
    drawing = _score_panels(runs, rounds, "round", single_detail=len(runs) == 1)
    stage_one = [_stage_one_end(run) for run in runs]
    if len(runs) == 1 and stage_one[0] is not None:
        for panel in drawing.panels:
            axes = panel.figure.axes[0]
            axes.axvspan(axes.get_xlim()[0], stage_one[0] + 0.5, color=color("grid"), alpha=0.55, lw=0, zorder=0)
    return drawing


def scores_over_bytes(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the same scores over the bytes that all clients together had sent and received by then."""
    rounds_by_run = [
        _summed(run, lambda r: (number(r.get("bytes_down")) or 0) + (number(r.get("bytes_up")) or 0)) for run in runs
    ]
    if not any(total for run in rounds_by_run for total, _ in run):
        raise NothingToDraw("No run has sent anything yet: its rounds record no bytes.")
    return _score_panels(runs, rounds_by_run, "bytes", single_detail=False)


def scores_over_seconds(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the same scores over the seconds that the run had taken by then."""
    rounds_by_run = [_summed(run, lambda r: number((r.get("seconds") or {}).get("round")) or 0) for run in runs]
    if len(runs) < 2 or not any(total for run in rounds_by_run for total, _ in run):
        raise NothingToDraw("There is no second run to compare with, or no round has recorded its seconds yet.")
    return _score_panels(runs, rounds_by_run, "seconds", single_detail=False)


def _summed(run: RunRecord, of: Callable[[Mapping[str, Any]], float]) -> Placed:
    return list(zip(itertools.accumulate(of(r) for r in run.rounds), run.rounds, strict=True))


RANKS = {"effective_rank": ("effective rank", 1), "energy_beyond": ("energy beyond the smallest rank, %", 100)}


def adapter_ranks(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the effective rank of the merged adapters, and their energy beyond the smallest rank, over the rounds."""
    panels = []
    styles = run_styles([run.method for run in runs])
    for name, (title, factor) in RANKS.items():
        points_by_run = [
            [
                (round_of(line, i), factor * value)
                for i, line in enumerate(run.rounds)
                if (value := number((line.get("server") or {}).get(name))) is not None
            ]
            for run in runs
        ]
        if not any(points_by_run):
            raise NothingToDraw("No run merges adapters by a rule that has a merged update.")
        figure = new_figure(_WIDTH, _HEIGHT, left=42, bottom=36, right=12)
        axes = figure.axes[0]
        clean_axes(axes)
        for style, points in zip(styles, points_by_run, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), lw=2.2, ms=4.5, **series(style))
        axes.margins(x=0.03, y=0.12)
        _x_axis(axes, "round")
        axes.yaxis.set_major_locator(round_ticks(5))
        panels.append(Panel(title, figure, _alt(title, [run.label for run in runs], points_by_run, "round")))
    keys = [Key(run.label, "ink", f"run {i}") for i, run in zip(styles, runs, strict=True)] if len(runs) > 1 else []
    return Drawing(panels, keys)


def _score_panels(runs: Sequence[RunRecord], placed: Sequence[Placed], along: str, single_detail: bool) -> Drawing:
    """Draw the scores, with one panel per task and one for the mean over tasks.

    If methods ran several times, a line is the mean over a method's runs. The band around it is their standard
    deviation.

    Args:
        placed: the rounds of each run with their positions on the x axis.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    panels = []
    has_guess_line = False
    by_method = has_seeds(runs)
    names = list(dict.fromkeys(run.method for run in runs)) if by_method else [run.label for run in runs]
    styles = list(range(len(names))) if by_method else run_styles([run.method for run in runs])
    with_validation = along == "round" and len(runs) <= 4 and not by_method  # with more, thin lines bury the others
    for task in [*tasks, "mean"] if len(tasks) > 1 else tasks:
        points_by_run = [_test_points(run, rounds, task) for run, rounds in zip(runs, placed, strict=True)]
        groups = (
            [[p for run, p in zip(runs, points_by_run, strict=True) if run.method == name] for name in names]
            if by_method
            else []
        )
        bands = [_band(group) for group in groups]
        lines = (
            [[(x, mean) for x, mean, _ in band] for band in bands]
            if by_method
            else [[(x, y) for _, x, y in points] for points in points_by_run]
        )
        validation_lines = [
            _validation_points(run, rounds, task) if with_validation else []
            for run, rounds in zip(runs, placed, strict=True)
        ]
        if not any(lines) and not any(validation_lines):
            continue
        figure = new_figure(_WIDTH, _HEIGHT, left=38, bottom=36, right=12)
        axes = figure.axes[0]
        clean_axes(axes)
        if single_detail and task != "mean":
            _each_client(axes, runs[0], placed[0], task)
            has_guess_line |= _guess_line(axes, runs[0], task)
        for i, band in enumerate(bands):
            _shade(axes, band, series(styles[i])["color"])
        for i, points in enumerate(lines):
            if not by_method and validation_lines[i]:
                axes.plot(
                    *zip(*validation_lines[i], strict=True),
                    lw=1,
                    alpha=0.75,
                    color=series(styles[i])["color"],
                    zorder=3,
                )
            if points:
                axes.plot(*zip(*points, strict=True), lw=2.2, ms=4.5, zorder=4, **series(styles[i]))
        axes.margins(x=0.03, y=0.12)
        _x_axis(axes, along)
        axes.yaxis.set_major_locator(round_ticks(5))
        metric = next((run.metric(task) for run in runs if task in run.tasks), "score")
        title = f"{task} · {METRICS.get(metric, metric)}, %" if task != "mean" else "mean of the tasks, %"
        panels.append(Panel(title, figure, _alt(title, names, lines, along)))
    if not panels:
        raise NothingToDraw("No round has been evaluated yet: scores appear after the first evaluation round.")
    keys = [Key(name, "ink", f"run {i}") for i, name in zip(styles, names, strict=True)]
    if by_method:
        keys.append(Key("± standard deviation over the method’s runs", "muted", "band"))
    if len(runs) == 1:
        keys = [Key("test, mean over clients", "c0", "run 0")]
        keys += [Key("test, one client", "c0", "faint")] if single_detail else []
    if with_validation:
        keys.append(Key("validation of that round's participants", "c0" if len(runs) == 1 else "muted", "thin"))
    if has_guess_line:
        keys.append(Key("always answering the commonest label", "muted", "dots"))
    return Drawing(panels, keys)


def _x_axis(axes: Axes, along: str) -> None:
    if along == "round":
        axes.xaxis.set_major_locator(round_ticks(6, integer=True))
        axes.set_xlabel("round")
    elif along == "seconds":
        axes.set_xlim(left=0)
        second_axis(axes.xaxis, axes.get_xlim()[1])
        axes.set_xlabel("time so far")
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(round_ticks(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value, trim=True)))
        axes.set_xlabel("sent and received so far, all clients")


def _band(told: Sequence[Sequence[tuple[float, float, float]]]) -> list[tuple[float, float, float]]:
    """Return (x, mean, standard deviation) over a method's runs for each round that all of them scored.

    The deviation of a single run is 0.
    """
    by_round = [{number: (x, y) for number, x, y in points} for points in told if points]
    band = []
    for round_number in sorted(set.intersection(*map(set, by_round))) if by_round else ():
        xs, ys = zip(*(points[round_number] for points in by_round), strict=True)
        band.append((statistics.fmean(xs), statistics.fmean(ys), statistics.stdev(ys) if len(ys) > 1 else 0.0))
    return band


def _shade(axes: Axes, band: Sequence[tuple[float, float, float]], ink: str) -> None:
    if any(sd for *_, sd in band):
        xs, means, sds = zip(*band, strict=True)
        low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=ink, alpha=0.16, lw=0, zorder=2)


def _test_points(run: RunRecord, placed: Placed, task: str) -> list[tuple[float, float, float]]:
    """Return (round, x, score in percent) for each round that was scored."""
    points = []
    for i, (x, line) in enumerate(placed):
        value = number((line.get("scores") or {}).get(task))
        if value is None and task != "mean":
            test = line.get("test") or {}
            values = [number(v) for c, v in test.items() if c in run.clients and run.clients[c].task == task]
            known_values = [v for v in values if v is not None]
            value = statistics.fmean(known_values) if known_values else None
        if value is not None:
            points.append((round_of(line, i), x, 100 * value))
    return points


def _validation_points(run: RunRecord, placed: Placed, task: str) -> Points:
    """Return (x, mean validation score in percent) of the round's participants of a task.

    Rounds without a score are left out, so the line bridges them.
    """
    points = []
    for x, line in placed:
        by_task: dict[str, list[float]] = {}
        for client, entry in (line.get("clients") or {}).items():
            value = number(entry.get("validation"))
            if client in run.clients and value is not None:
                by_task.setdefault(run.clients[client].task, []).append(value)
        if task == "mean":
            # A mean over only the tasks that took part would jump with the draw, so only full rounds have one.
            if len(by_task) == len(run.tasks):
                points.append((x, 100 * statistics.fmean(map(statistics.fmean, by_task.values()))))
        elif task in by_task:
            points.append((x, 100 * statistics.fmean(by_task[task])))
    return points if len(points) > 1 else []


def _each_client(axes: Axes, run: RunRecord, placed: Placed, task: str) -> None:
    for client in (c for c in run.order if run.clients[c].task == task):
        scores = [(x, number((line.get("test") or {}).get(client))) for x, line in placed]
        points = [(x, 100 * v) for x, v in scores if v is not None]
        if points:
            axes.plot(*zip(*points, strict=True), lw=1, alpha=0.28, color=color("c0"), zorder=2)


def _guess_line(axes: Axes, run: RunRecord, task: str) -> bool:
    """Draw the score of always answering a client's commonest label, and return whether it is known.

    Only accuracy has such a simple lower bound.
    """
    if run.metric(task) != "accuracy":
        return False
    shares = [c.commonest_label_share for c in run.clients.values() if c.task == task]
    percents = [100 * s for s in shares if s is not None]
    if percents:
        axes.axhline(statistics.fmean(percents), color=color("muted"), lw=1.2, linestyle=(0, (1.5, 2)), zorder=1)
    return bool(percents)


def _stage_one_end(run: RunRecord) -> float | None:
    stage_one_rounds = [round_of(line, i) for i, line in enumerate(run.rounds) if line.get("stage") == "one"]
    return max(stage_one_rounds) if stage_one_rounds and len(stage_one_rounds) < len(run.rounds) else None


def _alt(title: str, names: Sequence[str], lines: Sequence[Points], along: str) -> str:
    ends = [f"{name} {points[-1][1]:.1f}" for name, points in zip(names, lines, strict=True) if points]
    return f"{title} over {along}. At the end: {', '.join(ends) or 'not evaluated yet'}."
