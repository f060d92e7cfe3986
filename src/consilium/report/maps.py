"""Figures with clients down the side and experts along the bottom, one panel per sparse layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from consilium.report.read import RunRecord
from consilium.report.results import number
from consilium.report.style import (
    Drawing,
    Key,
    NothingToDraw,
    Panel,
    clean_axes,
    color,
    color_map,
    new_figure,
    round_ticks,
    shorten,
    shorten_all,
)

__all__ = [
    "block_names",
    "expert_map",
    "gate_weights",
    "known_clients",
    "paint",
    "row_height",
    "training_heat_map",
    "usage_heat_map",
]

_WIDTH, _RIGHT, _TOP, _BOTTOM = 340, 18, 4, 34


def usage_heat_map(run: RunRecord) -> Drawing:
    """Draw the share of a client's tokens that ask for each expert (FedMoE's Figure 1), with one panel per layer."""
    missing = _no_structure(run, "how often each client's tokens ask for each expert")
    panels, keys, widths = _heat_map(run, "usage", missing, "is asked for most, on average by {:.0f} % of tokens")
    share = " or ".join(f"{100 / n:.1f} %" for n in widths)
    return Drawing(panels, keys, f"If every expert were asked for equally often, each would get {share}.")


def training_heat_map(run: RunRecord) -> Drawing:
    """Draw the share of a client's batches that trained each expert (HFedMoE's choice), with one panel per layer."""
    missing = f"{run.label} does not choose per batch: every expert that a client's tokens reach learns."
    panels, keys, _ = _heat_map(run, "trained", missing, "is trained most, on average in {:.0f} % of batches")
    return Drawing(panels, keys)


def _heat_map(run: RunRecord, key: str, missing: str, lead: str) -> tuple[list[Panel], list[Key], list[int]]:
    """Draw one entry of structure.json.

    Returns:
        The panels, the key to the colours, and the numbers of experts in the layers.

    Raises:
        NothingToDraw: with the message `missing`, if there are no values.
    """
    shares = known_clients((run.structure or {}).get(key), run)
    rows = [c for c in run.order if c in shares]
    blocks = _blocks(run, shares.values())
    names = block_names(blocks)
    tables = {}
    for block in blocks:
        width = max([_experts(run, block), *(len(shares[c].get(block) or ()) for c in rows)])
        table = np.full((len(rows), width), np.nan)
        for i, client in enumerate(rows):
            for j, value in enumerate(shares[client].get(block) or ()):
                if (share := number(value)) is not None:
                    table[i, j] = share
        if np.isfinite(table).any():
            tables[block] = table
    if not tables:
        raise NothingToDraw(missing)
    top = max(float(np.nanmax(table)) for table in tables.values()) or 1.0
    norm = PowerNorm(0.5, 0, top)  # square root: rarely used experts stay apart from unused ones
    panels = []
    for block, table in tables.items():
        figure = _grid_figure(run, rows, table.shape[1])
        paint(figure.axes[0], color_map()(norm(np.ma.masked_invalid(table))))
        _separate(figure.axes[0], run, rows, table.shape[1])
        mean_shares = np.nanmean(np.nan_to_num(table), axis=0)
        top_expert = int(np.argmax(mean_shares))
        alt = f"{names[block]}: expert {top_expert} {lead.format(100 * mean_shares[top_expert])}."
        panels.append(Panel(names[block], figure, alt))
    unit_text = f"share of the client’s {'tokens' if key == 'usage' else 'batches'}"
    keys = [Key(f"{unit_text}|0|{100 * top / 4:.0f} %|{100 * top:.0f} %", "ink", "ramp")]
    return panels, keys, sorted({table.shape[1] for table in tables.values()})


def expert_map(run: RunRecord) -> Drawing:
    """Draw which client holds which expert at the end, and the experts added or given up since the first map."""
    maps = (run.structure or {}).get("rounds") or {}
    order = sorted((k for k in maps if str(k).lstrip("-").isdigit()), key=int)
    first = known_clients(maps[order[0]] if order else None, run)
    last = known_clients(maps[order[-1]] if order else None, run)
    if not first or not last:
        raise NothingToDraw(_no_structure(run, "which client holds which expert"))
    rows = [c for c in run.order if c in first or c in last]
    blocks = _blocks(run, [*first.values(), *last.values()])
    names = block_names(blocks)
    panels = []
    for block in blocks:
        start = _held(first, rows, block, _experts(run, block))
        end = _held(last, rows, block, start.shape[1])
        if start.shape[1] < end.shape[1]:
            start = np.pad(start, ((0, 0), (0, end.shape[1] - start.shape[1])))
        panels.append(_map_panel(run, names[block], rows, start, end))
    keys = [
        Key("held from start to end", "kept", "square"),
        Key("added", "c0", "plus"),
        Key("given up", "c1", "minus"),
    ]
    rounds = f"Start: round {order[0]}. End: round {order[-1]}."
    is_unchanged = all((_same(first, last, c)) for c in rows)
    return Drawing(panels, keys, f"{rounds} Nothing changed in between." if is_unchanged else rounds)


def gate_weights(run: RunRecord) -> Drawing:
    """Draw the mean weight of the shared extractor per class and client (pFedMoE), with one panel per task."""
    weights_by_client: dict[str, dict[str, float]] = {}
    for line in run.rounds:
        for client, entry in (line.get("clients") or {}).items():
            report = entry.get("report") if isinstance(entry, Mapping) else None
            weights = {k[5:]: number(v) for k, v in (report or {}).items() if k.startswith("gate ")}
            if client in run.clients and any(v is not None for v in weights.values()):
                weights_by_client[client] = {label: v for label, v in weights.items() if v is not None}
    if not weights_by_client:
        raise NothingToDraw(f"{run.label} has no gate between a shared and an own extractor.")
    panels = []
    for task in run.tasks:
        rows = [c for c in run.order if c in weights_by_client and run.clients[c].task == task]
        if not rows:
            continue
        labels = list(dict.fromkeys(label for c in rows for label in run.clients[c].label_counts))
        labels += [label for c in rows for label in weights_by_client[c] if label not in labels]
        table = np.array([[weights_by_client[c].get(label, np.nan) for label in labels] for c in rows])
        figure = _grid_figure(run, rows, len(labels))
        axes = figure.axes[0]
        axes.set_xlabel("class", labelpad=3)
        places = axes.get_xticks()
        places = sorted({int(p) for p in places if 0 <= p < len(labels)})
        axes.set_xticks(places, shorten_all([labels[p] for p in places], 8) if places else [])
        paint(axes, color_map()(np.ma.masked_invalid(table)))
        _separate(axes, run, rows, len(labels))
        low, high = float(np.nanmin(table)), float(np.nanmax(table))
        mean = float(np.nanmean(table))
        alt = f"{task}: on average {100 * mean:.0f} %, from {100 * low:.0f} % to {100 * high:.0f} %."
        panels.append(Panel(f"{task}: {100 * low:.0f} to {100 * high:.0f} %", figure, alt))
    return Drawing(panels, [Key("weight of the shared extractor|0|50 %|100 %", "ink", "ramp")])


def block_names(blocks: Sequence[str]) -> dict[str, str]:
    """Return readable names of blocks, e.g. "encoder.block.1.layer.1.mlp" -> "encoder layer 1".

    Blocks with equal short names keep their full names.
    """
    short = {}
    for block in blocks:
        side = re.search(r"\b(encoder|decoder)\b", block)
        place = re.search(r"(?:block|blocks|layers?|h)\.(\d+)", block)
        name = f"{side.group() + ' ' if side else ''}layer {place.group(1)}" if place else block
        short[block] = shorten(name, 48)
    names = list(short.values())
    return {block: name if names.count(name) == 1 else shorten(block, 48) for block, name in short.items()}


def _map_panel(run: RunRecord, name: str, rows: list[str], start: np.ndarray, end: np.ndarray) -> Panel:
    kept_mask, added_mask, removed_mask = start & end, end & ~start, start & ~end
    figure = _grid_figure(run, rows, end.shape[1])
    axes = figure.axes[0]
    cells = np.zeros((*end.shape, 4))
    cells[...] = to_rgba(color("grid"), 0.45)
    cells[kept_mask] = to_rgba(color("kept"))
    cells[added_mask] = to_rgba(color("c0"))
    cells[removed_mask] = to_rgba(color("c1"), 0.32)
    paint(axes, cells)
    _separate(axes, run, rows, end.shape[1])
    size = min(9.0, 0.62 * min(_cell_width(end.shape[1]), row_height(len(rows))))
    for mask, marker, shade in ((added_mask, "+", "panel"), (removed_mask, "_", "c1")):
        y, x = np.nonzero(mask)
        axes.plot(x, y, linestyle="none", marker=marker, ms=size, mew=1.5, color=color(shade), clip_on=False)
    change = f"+{int(added_mask.sum())} −{int(removed_mask.sum())}" if added_mask.any() or removed_mask.any() else "±0"
    title = f"{name}: {start.sum() / len(rows):.1f} → {end.sum() / len(rows):.1f} ({change})"
    return Panel(
        title,
        figure,
        f"Experts per client in {title}. {int(end.any(axis=0).sum())} of {end.shape[1]} experts are held by someone.",
    )


def _grid_figure(run: RunRecord, rows: list[str], columns: int) -> Figure:
    """Create axes over a rows x columns grid of cells, with clients named at the left and grouped by task."""
    height = row_height(len(rows))
    names = shorten_all(rows, 13)
    margin = 10 + 6 * max(map(len, names))
    figure = new_figure(_WIDTH, _TOP + _BOTTOM + height * len(rows), margin, _BOTTOM, _RIGHT, _TOP)
    axes = figure.axes[0]
    clean_axes(axes, grid="", size=10)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), names, fontsize=min(10.0, height - 2.5))
    axes.xaxis.set_major_locator(round_ticks(8, integer=True))
    axes.set_xlabel("expert", labelpad=3)
    _name_tasks(axes, run, rows, height)
    return figure


def _name_tasks(axes: Axes, run: RunRecord, rows: list[str], height: float) -> None:
    """Write each task next to its rows, upright at the right edge, shortened to fit."""
    for task in run.tasks:
        places = [i for i, c in enumerate(rows) if run.clients[c].task == task]
        room = int(len(places) * height / 6.8)
        if places and (len(task) <= room or room >= 7):
            position = (1, sum(places) / len(places))
            axes.annotate(shorten(task, room), position, (5, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", rotation=270, va="center", fontsize=10)  # fmt: skip


def paint(axes: Axes, cells: np.ndarray) -> None:
    """Draw coloured cells [rows, columns, 4] without changing the limits of the axes."""
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(cells, interpolation="none", aspect="auto", origin="upper", zorder=1)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _separate(axes: Axes, run: RunRecord, rows: list[str], columns: int) -> None:
    """Draw hairlines between the cells and a clear gap between tasks.

    Lines of one width form a single path, because each separate line costs 200 bytes.
    """
    cell_lines = [((x - 0.5, -0.5), (x - 0.5, len(rows) - 0.5)) for x in range(1, columns)]
    cell_lines += [((-0.5, y - 0.5), (columns - 0.5, y - 0.5)) for y in range(1, len(rows))]
    tasks = [run.clients[c].task for c in rows]
    task_lines = [((-0.5, y - 0.5), (columns - 0.5, y - 0.5)) for y in range(1, len(rows)) if tasks[y] != tasks[y - 1]]
    hairline = min(0.9, 0.13 * _cell_width(columns))  # 128 experts make narrow cells, and these must not vanish
    for lines, width in ((cell_lines, hairline), (task_lines, 3.2)):
        if lines:
            points = [point for line in lines for point in line]
            path = Path(points, [Path.MOVETO, Path.LINETO] * len(lines))
            axes.add_patch(PathPatch(path, fill=False, edgecolor=color("panel"), lw=width, zorder=2))


def row_height(rows: int) -> float:
    """Return the height in pixels of a row in a map with the given number of rows."""
    return 17 if rows <= 14 else 13.5 if rows <= 40 else 10.5


def _cell_width(columns: int) -> float:
    return (_WIDTH - 70 - _RIGHT) / max(columns, 1)


def _held(experts: Mapping[str, Any], rows: list[str], block: str, width: int) -> np.ndarray:
    expert_ids = {
        c: [e for e in (experts.get(c) or {}).get(block) or () if isinstance(e, int) and e >= 0] for c in rows
    }
    width = max([width, *(max(h) + 1 for h in expert_ids.values() if h)])
    table = np.zeros((len(rows), width), dtype=bool)
    for i, client in enumerate(rows):
        table[i, expert_ids[client]] = True
    return table


def _same(first: Mapping[str, Any], last: Mapping[str, Any], client: str) -> bool:
    return first.get(client) == last.get(client)


def _blocks(run: RunRecord, tables: Any) -> list[str]:
    reported_blocks = list((run.structure or {}).get("blocks") or ())
    return list(dict.fromkeys([*reported_blocks, *(block for table in tables for block in table)]))


def _experts(run: RunRecord, block: str) -> int:
    expert_count = number(((run.structure or {}).get("blocks") or {}).get(block))
    return int(expert_count) if expert_count else 1


def known_clients(table: Any, run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """Return client -> block -> values for those clients of the run that a table of the structure file contains."""
    if not isinstance(table, Mapping):
        return {}
    return {c: blocks for c, blocks in table.items() if c in run.clients and isinstance(blocks, Mapping)}


def _no_structure(run: RunRecord, what: str) -> str:
    if run.structure is None and run.finished:
        return f"{run.label} does not choose experts per client, so it records nothing about {what}."
    return f"{run.label} has not recorded {what} yet; FedMoE does so when its stage one has ended."
