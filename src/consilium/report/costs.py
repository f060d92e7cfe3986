"""Figures about the costs of a run: bytes on the wire, memory on the devices, seconds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from consilium.report.read import RunRecord
from consilium.report.results import format_bytes, format_seconds, number, unable_clients
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
    shorten_all,
)

__all__ = ["memory", "second_axis", "time_split", "traffic", "traffic_per_client"]

_WIDTH = 340
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"kiB": 2**10, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_PARTS = (("train", "training", "c0"), ("evaluate", "evaluation", "c4"), ("engine", "engine", "c6"))


def traffic(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the total bytes down and up of each run, and the growth of the total over the rounds."""
    totals = [(_total(run, "bytes_down"), _total(run, "bytes_up")) for run in runs]
    if not any(down or up for down, up in totals):
        raise NothingToDraw("Nothing was sent: these runs recorded no bytes up or down (Standalone never does).")
    bars = _bar_figure([run.label for run in runs])
    axes = bars.axes[0]
    axes.barh(range(len(runs)), [d for d, _ in totals], 0.62, color=color("c0"))
    axes.barh(range(len(runs)), [u for _, u in totals], 0.62, left=[d for d, _ in totals], color=color("c1"))
    _end_texts(axes, [format_bytes(d + u) for d, u in totals], [d + u for d, u in totals])
    _byte_axis(axes)
    growth_figure = new_figure(_WIDTH, 215, left=58, bottom=36, right=12)
    _cumulative(growth_figure.axes[0], runs)
    totals_text = ", ".join(f"{run.label} {format_bytes(d + u)}" for run, (d, u) in zip(runs, totals, strict=True))
    keys = [Key("server to clients (down)", "c0", "square"), Key("clients to server (up)", "c1", "square")]
    if len(runs) > 1:
        keys += [Key(run.label, "ink", f"run {i}") for i, run in zip(_styles(runs), runs, strict=True)]
    panels = [Panel("whole run", bars, f"Bytes of the whole run: {totals_text}.")]
    if max(len(run.rounds) for run in runs) > 1:
        panels.append(Panel("sum over the rounds", growth_figure, "Bytes sent and received so far, by round."))
    return Drawing(panels, keys)


def traffic_per_client(run: RunRecord) -> Drawing:
    """Draw the bytes down and up of each client over the run."""
    rows = list(run.order)
    down, up = (_client_bytes(run, key) for key in ("bytes_down", "bytes_up"))
    if not any(down.values()) and not any(up.values()):
        raise NothingToDraw(f"{run.label} sent nothing: its rounds record no bytes per client.")
    unable_reasons = unable_clients(run)
    panels = []
    for task, members in _by_task(run, rows):
        figure = _bar_figure(members)
        axes = figure.axes[0]
        places = range(len(members))
        axes.barh(places, [down[c] for c in members], 0.66, color=color("c0"))
        axes.barh(places, [up[c] for c in members], 0.66, left=[down[c] for c in members], color=color("c1"))
        sums = [down[c] + up[c] for c in members]
        texts = [
            format_bytes(s) if s else ("cannot run" if c in unable_reasons else "took no part")
            for c, s in zip(members, sums, strict=True)
        ]
        axes.set_xlim(0, max(down[c] + up[c] for c in rows) * 1.24)
        _end_texts(axes, texts, sums)
        _byte_axis(axes)
        panels.append(Panel(f"{task} · {format_bytes(sum(sums))}", figure, f"Bytes per client, task {task}."))
    return Drawing(
        panels, [Key("server to client (down)", "c0", "square"), Key("client to server (up)", "c1", "square")]
    )


def memory(run: RunRecord) -> Drawing:
    """Draw the memory of each client's device, and the peak memory that the method needs there."""
    peaks, unable_reasons = _peaks(run), unable_clients(run)
    if not any(peaks.values()) and not any(c.memory_bytes for c in run.clients.values()):
        raise NothingToDraw(f"{run.label} recorded neither device limits nor a memory estimate.")
    need = max([p for p in peaks.values() if p], default=0)
    limits = [c.memory_bytes or 0 for c in run.clients.values()]
    top = min(max(limits), 2.5 * need) if need else max(limits)  # a huge device must not flatten all bars
    top = max(top, need)
    panels = []
    for task, members in _by_task(run, list(run.order)):
        figure = _bar_figure(members)
        axes = figure.axes[0]
        for place, client in enumerate(members):
            _memory_bar(axes, place, peaks.get(client), run.clients[client].memory_bytes, client in unable_reasons, top)
        axes.set_xlim(0, top * (1.24 if max(limits) <= top else 1.5))
        ends = [max(peaks.get(c) or 0, min(run.clients[c].memory_bytes or 0, top)) for c in members]
        _end_texts(axes, [_memory_text(run, c, peaks.get(c), c in unable_reasons, top) for c in members], ends)
        _byte_axis(axes)
        able_count = sum(c not in unable_reasons for c in members)
        panels.append(
            Panel(f"{task} · {able_count} of {len(members)} can run", figure, f"Memory per client, task {task}.")
        )
    keys = [Key("needed at the peak", "c0", "square"), Key("device limit", "ink", "bar")]
    if max(limits) > top:
        keys.append(Key("limit beyond the scale", "ink", "right"))
    if unable_reasons:
        keys.append(Key("needs more than the device has", "c1", "hatch"))
    return Drawing(panels, keys)


def time_split(runs: Sequence[RunRecord]) -> Drawing:
    """Draw the seconds of training, evaluation and engine of each run."""
    seconds_by_run = [_seconds(run) for run in runs]
    if not any(sum(parts.values()) for parts in seconds_by_run):
        raise NothingToDraw("No round has recorded its seconds yet.")
    figure = _bar_figure([run.label for run in runs])
    axes = figure.axes[0]
    ends = [0.0] * len(runs)
    for part, _, role in _PARTS:
        axes.barh(range(len(runs)), [s[part] for s in seconds_by_run], 0.62, left=ends, color=color(role))
        ends = [end + s[part] for end, s in zip(ends, seconds_by_run, strict=True)]
    _end_texts(axes, [format_seconds(total) for total in ends], ends)
    second_axis(axes.xaxis, axes.get_xlim()[1])
    times_text = "; ".join(
        f"{run.label}: " + ", ".join(f"{name} {format_seconds(s[part])}" for part, name, _ in _PARTS)
        for run, s in zip(runs, seconds_by_run, strict=True)
    )
    panels = [Panel("whole run", figure, f"Time: {times_text}.")]
    if len(runs) == 1 and len(runs[0].rounds) > 1:
        panels.append(_time_by_round(runs[0]))
    return Drawing(panels, [Key(name, role, "square") for _, name, role in _PARTS])


def _time_by_round(run: RunRecord) -> Panel:
    figure = new_figure(_WIDTH, 215, left=58, bottom=36, right=12)
    axes = figure.axes[0]
    clean_axes(axes)
    rounds = [r.get("round", j) for j, r in enumerate(run.rounds)]
    parts = [[_second(r, part) for r in run.rounds] for part, _, _ in _PARTS]
    rounds = [rounds[0] - 0.5, *rounds, rounds[-1] + 0.5]  # so that the first and last bar are as wide as others
    parts = [[values[0], *values, values[-1]] for values in parts]
    axes.stackplot(rounds, *parts, colors=[color(role) for _, _, role in _PARTS], step="mid", linewidth=0)
    axes.margins(x=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    second_axis(axes.yaxis, axes.get_ylim()[1])
    return Panel("round by round", figure, "Seconds of each round, by what they were spent on.")


def _bar_figure(names: Sequence[str]) -> Figure:
    height = 24 if len(names) <= 5 else 19 if len(names) <= 14 else 15
    names = shorten_all(names, 14)
    margin = 12 + 6.6 * max(map(len, names))
    figure = new_figure(_WIDTH, 34 + height * len(names), left=margin, bottom=26, right=24)
    axes = figure.axes[0]
    clean_axes(axes, grid="x")
    axes.set_yticks(range(len(names)), names, fontsize=10.5 if height > 15 else 10)
    axes.tick_params(axis="y", labelcolor=color("ink"))
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _end_texts(axes: Axes, texts: Sequence[str], ends: Sequence[float]) -> None:
    """Write the value of each bar behind its end, and widen the axis to make room for it."""
    top = max([*ends, 0]) * 1.24 or 1
    axes.set_xlim(0, max(axes.get_xlim()[1] if axes.get_xlim()[1] > top else 0, top))
    for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5)


def _memory_bar(axes: Axes, place: int, peak: float | None, limit: float | None, unable: bool, top: float) -> None:
    if peak:
        hatch_style = {"facecolor": "none", "edgecolor": color("c1"), "hatch": "/////", "linewidth": 1.2}
        axes.barh(place, peak, 0.62, **(hatch_style if unable else {"color": color("c0")}))
    if limit and limit > top:
        axes.plot([top], [place], marker=">", ms=7, color=color("ink"), zorder=4)
    elif limit:
        axes.vlines(limit, place - 0.42, place + 0.42, color=color("ink"), lw=2.2, zorder=4)


def _memory_text(run: RunRecord, client: str, peak: float | None, unable: bool, top: float) -> str:
    limit = run.clients[client].memory_bytes
    if unable:
        return "cannot run"
    if not peak:
        return "took no part"
    limit_text = f" of {format_bytes(limit, trim=True)}" if limit and limit > top else ""
    return f"{100 * peak / limit:.0f} %{limit_text}" if limit else format_bytes(peak)


def _peaks(run: RunRecord) -> dict[str, float | None]:
    """Return the peak bytes of the memory model per client: from the summary, else the largest value of a round."""
    peaks: dict[str, float | None] = {}
    for client in run.order:
        reported = number((((run.summary or {}).get("clients") or {}).get(client) or {}).get("peak_bytes_model"))
        round_peaks = [number(((r.get("clients") or {}).get(client) or {}).get("peak_bytes_model")) for r in run.rounds]
        peaks[client] = (
            reported if reported is not None else max([s for s in round_peaks if s is not None], default=None)
        )
    for client, reason in unable_clients(run).items():
        # A client that cannot run has no peak, but the reason says what it would have needed.
        match = re.search(r"needs ([\d.]+) ?([kKMGT]?i?B)", reason)
        if peaks.get(client) is None and match:
            peaks[client] = float(match.group(1)) * _UNITS.get(match.group(2), 1)
    return peaks


def _cumulative(axes: Axes, runs: Sequence[RunRecord]) -> None:
    clean_axes(axes)
    for i, run in zip(_styles(runs), runs, strict=True):
        if run.rounds:
            rounds = [r.get("round", j) for j, r in enumerate(run.rounds)]
            steps = ((number(r.get("bytes_down")) or 0) + (number(r.get("bytes_up")) or 0) for r in run.rounds)
            style = series(i) if len(runs) > 1 else {"color": color("ink")}
            axes.plot(rounds, list(itertools.accumulate(steps)), lw=2.2, ms=5, markevery=[-1], **style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value, trim=True)))


def second_axis(axis: Axis, top: float) -> None:
    """Place ticks at round clock times, because a tick at 100 s would read as "1m 40s"."""
    steps = [m * unit for unit, ms in ((0.001, (1, 2, 5, 10, 20, 50, 100, 200, 500)), (1, (1, 2, 5, 10, 15, 30)),
                                       (60, (1, 2, 5, 10, 15, 30)), (3600, (1, 2, 3, 6, 12))) for m in ms]  # fmt: skip
    step = next((s for s in steps if top / s <= 4.5), 86_400 * max(1, round(top / 86_400 / 4)))
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _clock(v)))


def _clock(value: float) -> str:
    """Format a tick without needless digits, e.g. "30 s", "2m" or "1m 30s"."""
    if not value:
        return "0"
    return f"{value:g} s" if value < 60 else format_seconds(value).replace(" 00s", "").replace(" 00m", "")


def _styles(runs: Sequence[RunRecord]) -> list[int]:
    return run_styles([run.method for run in runs])


def _byte_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(round_ticks(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value, trim=True)))


def _total(run: RunRecord, key: str) -> float:
    reported = number((run.summary or {}).get(key))
    return reported if reported is not None else sum(number(r.get(key)) or 0 for r in run.rounds)


def _client_bytes(run: RunRecord, key: str) -> dict[str, float]:
    return {
        c: sum(number(((r.get("clients") or {}).get(c) or {}).get(key)) or 0 for r in run.rounds) for c in run.order
    }


def _seconds(run: RunRecord) -> dict[str, float]:
    reported = (run.summary or {}).get("seconds")
    seconds: dict[str, float] = {}
    for part, _, _ in _PARTS:
        value = number(reported.get(part)) if isinstance(reported, Mapping) else None
        seconds[part] = value if value is not None else sum(_second(r, part) for r in run.rounds)
    return seconds


def _second(line: Mapping[str, Any], part: str) -> float:
    return number((line.get("seconds") or {}).get(part)) or 0.0


def _by_task(run: RunRecord, rows: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [(task, [c for c in rows if run.clients[c].task == task]) for task in run.tasks]
