"""The figure of the number of experts that each client holds, over the rounds."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes

from consilium.report.read import RunRecord
from consilium.report.results import number, round_of
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

__all__ = ["expert_counts"]

_WIDTH, _HEIGHT = 340, 215
Points = list[tuple[float, float]]


def expert_counts(run: RunRecord) -> Drawing:
    """Draw the experts held by each client at each round, summed over layers, with one panel per task.

    Changes are marked.
    """
    counts = _counts(run)
    if not counts:
        raise NothingToDraw(
            f"{run.label} records no expert counts: its clients do not hold an own choice of experts, or no round "
            "has ended yet."
        )
    panels = []
    last = max(x for points in counts.values() for x, _ in points)
    for task in run.tasks:
        members = [c for c in run.order if run.clients[c].task == task and c in counts]
        if members:
            panels.append(_count_panel(run, task, members, counts, last))
    keys = [Key("one client, named at its end", "c0", "thin"), Key("mean of the task", "ink")]
    marks = (("grow", "got experts", "up"), ("shrink", "gave up experts", "down"),
             ("rollback", "change taken back", "cross"), ("freeze", "frozen from here", "hollow"))  # fmt: skip
    event_kinds = {event.get("event") for event in run.events}
    return Drawing(panels, keys + [Key(text, "ink", mark) for name, text, mark in marks if name in event_kinds])


def _counts(run: RunRecord) -> dict[str, Points]:
    """Return client -> (round, experts held).

    The values are every change in structure.json, else the counts in metrics.jsonl.
    """
    counts: dict[str, Points] = {}
    maps = (run.structure or {}).get("rounds") or {}
    for key in sorted((k for k in maps if str(k).lstrip("-").isdigit()), key=int):
        for client, blocks in maps[key].items():
            counts.setdefault(client, []).append((int(key), sum(len(experts) for experts in blocks.values())))
    if not counts:
        for i, line in enumerate(run.rounds):
            for client, entry in (line.get("clients") or {}).items():
                if (experts := number(entry.get("experts"))) is not None:
                    counts.setdefault(client, []).append((round_of(line, i), experts))
    last = max([round_of(line, i) for i, line in enumerate(run.rounds)], default=0)
    for points in counts.values():
        if points[-1][0] < last:
            points.append((last, points[-1][1]))
    return {c: points for c, points in counts.items() if c in run.clients}


def _count_panel(run: RunRecord, task: str, members: list[str], counts: dict[str, Points], last: float) -> Panel:
    names = dict(zip(members, shorten_all(members, 12), strict=True))
    room = 26 + 6 * max(map(len, names.values()))
    figure = new_figure(_WIDTH, _HEIGHT + 15, left=34, bottom=36, right=room)
    axes = figure.axes[0]
    clean_axes(axes)
    for client in members:
        x, y = zip(*counts[client], strict=True)
        axes.step(x, y, where="post", lw=1.3, alpha=0.7, color=color("c0"), zorder=2)
        _mark_events(axes, run, client, counts[client])
    ticks = sorted({x for c in members for x, _ in counts[c]})
    means = [statistics.fmean(_at(counts[c], x) for c in members) for x in ticks]
    axes.step(ticks, means, where="post", lw=2.4, color=color("ink"), zorder=3)
    first = min(ticks)
    axes.set_xlim(first - 0.02 * max(last - first, 1), max(last, first + 1))
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    if high - low < 3:  # counts are whole: no ticks at 2.05 experts
        axes.set_ylim((low + high) / 2 - 1.5, (low + high) / 2 + 1.5)
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.yaxis.set_major_locator(round_ticks(5, integer=True))
    axes.set_xlabel("round")
    _name_line_ends(axes, [(names[c], counts[c][-1][1]) for c in members])
    alt = f"Experts per client over rounds, task {task}: mean {means[0]:.1f} at first, {means[-1]:.1f} at last."
    return Panel(f"{task} · {means[0]:.1f} → {means[-1]:.1f} experts a client", figure, alt)


def _mark_events(axes: Axes, run: RunRecord, client: str, points: Points) -> None:
    for event in run.events:
        round_number = number(event.get("round"))
        marker = {"grow": "^", "shrink": "v", "rollback": "x", "freeze": "o"}.get(str(event.get("event")))
        if event.get("client") != client or round_number is None or marker is None:
            continue
        face = "none" if marker == "o" else color("ink")
        axes.scatter([round_number], [_at(points, round_number)], marker=marker, s=22, linewidths=1.3, zorder=4,
                     facecolors=face if marker != "x" else None, color=face if marker == "x" else None,
                     edgecolors=color("ink") if marker != "x" else None)  # fmt: skip


def _name_line_ends(axes: Axes, ends: list[tuple[str, float]], limit: int = 11) -> None:
    """Write names next to the line ends, pushed apart so that they do not overlap."""
    bottom, top = axes.get_ylim()
    pixels = axes.bbox.height / (top - bottom)
    ends = sorted(ends, key=lambda end: end[1])
    if len(ends) > limit:
        ends = ends[: limit // 2] + ends[-(limit // 2) :]
    gap, heights = 12 / pixels, [y for _, y in ends]
    for _ in range(60):
        for i in range(len(heights) - 1):
            if (shortage := gap - (heights[i + 1] - heights[i])) > 1e-9:
                heights[i] -= shortage / 2
                heights[i + 1] += shortage / 2
        if heights and (excess_above := heights[-1] - (top - gap / 3)) > 0:
            heights[-1] -= excess_above
        if heights and (excess_below := (bottom + gap / 3) - heights[0]) > 0:
            heights[0] += excess_below
    for (client, y), height in zip(ends, heights, strict=True):
        axes.annotate(
            client,
            (1, y),
            (14, (height - y) * pixels),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",  # a point is a pixel here; PNG images have other resolutions
            va="center",
            fontsize=10,
            color=color("muted"),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.7,
                "color": color("muted"),
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _at(points: Points, x: float) -> float:
    """Return the value of a step function at x; before its first point, return its first value."""
    return next((y for position, y in reversed(points) if position <= x), points[0][1])
