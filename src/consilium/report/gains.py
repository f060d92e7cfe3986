"""The gain of each client over training alone, which is its reason to take part."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from consilium.report.read import RunRecord
from consilium.report.results import client_scores
from consilium.report.style import (
    Drawing,
    Key,
    NothingToDraw,
    Panel,
    clean_axes,
    color,
    new_figure,
    round_ticks,
    shorten_all,
)

__all__ = ["gain_over_standalone"]

ALONE = "Standalone"
_WIDTH, _NAMED = 340, 40
Gain = tuple[str, float]  # client (and seed, if there are several), gain in percentage points


def gain_over_standalone(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the gain of every client over training alone, with one panel per method.

    The gain is the client's test score minus its score in the run of Standalone on the same data and seed. Clients are
    sorted from the smallest gain to the largest.
    """
    scores_alone = {_pair(run): client_scores(run) for run in runs if run.algorithm == ALONE}
    methods: dict[str, list[Gain]] = {}
    seeds = len({key for key in scores_alone if any(_pair(run) == key for run in runs if run.algorithm != ALONE)})
    for run in runs:
        if run.algorithm != ALONE and (base := scores_alone.get(_pair(run))):
            seed = f" · {run.config.get('seed')}" if seeds > 1 else ""
            scores = client_scores(run).items()
            gains = [(client + seed, 100 * (score - base[client])) for client, score in scores if client in base]
            methods.setdefault(_name(run, runs), []).extend(gains)
    methods = {name: sorted(gains, key=lambda gain: gain[1]) for name, gains in methods.items() if gains}
    if not methods:
        raise NothingToDraw(f"No run of {ALONE} on the same data is compared here, so nobody's gain over it is known.")
    ends = [abs(gain) for gains in methods.values() for _, gain in gains]
    panels = [_panel(name, gains, max(*ends, 1.0) * 1.04) for name, gains in methods.items()]
    keys = [Key("better than alone", "c0", "square"), Key("worse than alone", "c1", "square")]
    note = "A client counts once for each seed, on which its data depends." if seeds > 1 else ""
    return Drawing(panels, [*keys, Key("mean of the clients", "ink", "dots")], note)


def _pair(run: RunRecord) -> tuple[str, str]:
    return run.fingerprint, str(run.config.get("seed"))


def _name(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the method, or the run's label if several of its runs share a data set and seed.

    Such runs differ in other settings.
    """
    similar_runs = [
        other_run for other_run in runs if other_run.algorithm == run.algorithm and _pair(other_run) == _pair(run)
    ]
    return run.label if len(similar_runs) > 1 else run.algorithm


def _panel(name: str, found: Sequence[Gain], most: float) -> Panel:
    names, gains = [client for client, _ in found], [gain for _, gain in found]
    mean, gain_count = statistics.fmean(gains), sum(gain > 0 for gain in gains)
    height = (19 if len(found) <= 14 else 15) if len(found) <= _NAMED else 0
    labels = dict(zip(names, shorten_all(names, 14), strict=True)) if height else {}
    margin = 12 + 6.6 * max(map(len, labels.values()), default=1)
    figure = new_figure(_WIDTH, 44 + (height * len(found) or 250), left=margin, bottom=36, right=16)
    axes = figure.axes[0]
    _bars(axes, gains, labels, most, 10.5 if height > 15 else 10)
    axes.axvline(0, color=color("muted"), lw=1, zorder=3)
    axes.axvline(mean, color=color("ink"), lw=1.4, linestyle=(0, (1.5, 2)), zorder=4)
    alt = f"Gain over Standalone by client, {name}: mean {mean:+.1f} points, from {gains[0]:+.1f} to {gains[-1]:+.1f}."
    mean_text = f"{round(mean, 1) + 0.0:+.1f}".replace("-", "−")  # never −0.0
    return Panel(f"{name} · {mean_text} points, {gain_count} of {len(found)} gain", figure, alt)


def _bars(axes: Axes, gains: Sequence[float], labels: Mapping[str, str], most: float, size: float) -> None:
    """Draw one bar per client, with the smallest gain at the bottom; leave the names out if they do not fit."""
    clean_axes(axes, grid="x")
    colors = [color("c0") if gain >= 0 else color("c1") for gain in gains]
    axes.barh(range(len(gains)), gains, 0.66 if labels else 1.0, color=colors, linewidth=0, zorder=2)
    axes.set_yticks(range(len(gains)) if labels else [], list(labels.values()), fontsize=size)
    axes.tick_params(axis="y", labelcolor=color("ink"))
    axes.set_ylim(-0.5, len(gains) - 0.5)
    axes.set_xlim(-most, most)
    axes.xaxis.set_major_locator(round_ticks(6))
    axes.set_xlabel("points above or below training alone")
