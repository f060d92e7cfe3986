"""The figure of the score of each method against the cost of its runs, one panel per cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.ticker import FuncFormatter

from consilium.report.costs import second_axis
from consilium.report.methods import Method, Spread, methods
from consilium.report.read import RunRecord
from consilium.report.results import format_bytes, format_score, format_seconds
from consilium.report.style import (
    Drawing,
    Key,
    NothingToDraw,
    Panel,
    clean_axes,
    color,
    new_figure,
    round_ticks,
    series,
)

__all__ = ["score_for_cost"]

Cost = tuple[str, str, Callable[[Method], "Spread | None"], Callable[[float | None], str]]
COSTS: tuple[Cost, ...] = (
    ("traffic", "bytes", lambda m: m.bytes_total, format_bytes),
    ("time", "seconds", lambda m: m.seconds, format_seconds),
    ("peak memory", "bytes", lambda m: m.peak_bytes, format_bytes),
)


def score_for_cost(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the final mean score over traffic, time and memory.

    The mean is over the shared clients if methods serve different ones.
    """
    method_summaries = methods(runs)
    has_shared = any(m.shared for m in method_summaries)
    names = list(dict.fromkeys(run.method for run in runs))
    entries = [(names.index(m.label), m, s) for m in method_summaries if (s := m.shared if has_shared else m.mean)]
    if len(entries) < 2:
        raise NothingToDraw("Fewer than two methods have finished a run: there is nothing to weigh against each other.")
    panels = []
    for title, unit, cost, text in COSTS:
        points = [(i, m, s, c) for i, m, s in entries if (c := cost(m))]
        if len(points) > 1 and any(c.mean for *_, c in points):
            panels.append(_panel(title, unit, points, text))
    if not panels:
        raise NothingToDraw("The runs recorded neither bytes nor seconds nor memory.")
    keys = [Key(m.label, "ink", f"run {i}") for i, m, _ in entries]
    note = "Scores are means over the clients that all runs scored." if has_shared else ""
    return Drawing(panels, keys, note)


def _panel(
    title: str, unit: str, known: Sequence[tuple[int, Method, Spread, Spread]], text: Callable[[float | None], str]
) -> Panel:
    figure = new_figure(340, 215, left=38, bottom=36, right=16)
    axes = figure.axes[0]
    clean_axes(axes)
    for i, _, score, cost in known:
        style = series(i)
        axes.errorbar(
            cost.mean, 100 * score.mean, xerr=cost.sd or None, yerr=100 * score.sd if score.sd else None, ms=8,
            elinewidth=1.4, capsize=0, zorder=3, color=style["color"], marker=style["marker"], linestyle="none",
        )  # fmt: skip
    axes.margins(x=0.06, y=0.14)
    axes.set_xlim(left=-0.04 * axes.get_xlim()[1])  # the mark of a method without cost must not be cut in half
    axes.yaxis.set_major_locator(round_ticks(5))
    if unit == "seconds":
        second_axis(axes.xaxis, axes.get_xlim()[1])
    else:
        axes.xaxis.set_major_locator(round_ticks(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value, trim=True)))
    axes.set_xlabel(title)
    axes.xaxis.label.set_color(color("muted"))
    points_text = "; ".join(f"{m.label} {format_score(s.mean)} for {text(c.mean)}" for _, m, s, c in known)
    return Panel(f"mean score, %, over {title}", figure, f"Mean score over {title}: {points_text}.")
