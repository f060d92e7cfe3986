"""A preview of data on the terminal, and as a picture of its split."""

import difflib
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from consilium.cli.views.preview import Preview
from consilium.errors import ConfigError
from consilium.escape import one_line, terminal
from consilium.report.style import RAMP, any_glyph, shorten_all

__all__ = ["save_picture", "show", "write_figure"]

_SHOWN = 12


def show(found: Preview, console: Console) -> None:
    """Print a preview: columns, lengths, clients by labels, skipped clients, and the command."""

    def say(text: str) -> None:
        console.print(terminal(text), markup=False, highlight=False, soft_wrap=True)

    say(f"{found.rows} rows")
    for fact in found.facts:
        say(fact)
    of_column = {column: role for role, column in found.roles.items()}
    table = Table("column", "used as", "empty", "different", "for instance", box=None)
    for column, (empty_count, different_count, example) in found.columns.items():
        table.add_row(
            Text(one_line(column)),
            of_column.get(column, ""),
            str(empty_count),
            str(different_count),
            Text(one_line(example)),
        )
    if found.columns:
        console.print(table)
    for role, (least, median, most95, most) in found.lengths.items():
        say(f"tokens of {role}: {least} to {most}, median {median}, 95 % have at most {most95}")
    totals: Counter[str] = Counter()
    for counts in found.counts.values():
        totals.update(counts)
    clients = list(found.counts)[:_SHOWN]
    client_names = shorten_all([one_line(client) for client in clients], 40)
    room = console.width - max(map(len, [*client_names, "client"])) - 10
    label_count = max(min(_SHOWN, room // 10), 2)
    labels = [label for label, _ in totals.most_common(label_count)]
    if len(totals) > 1:
        (most, n), (least, k) = totals.most_common(1)[0], min(totals.items(), key=lambda entry: entry[1])
        say(f"{len(totals)} labels, " + (f"{k} rows each" if k == n else f"from {k} rows ({least}) to {n} ({most})"))
    say(
        f"{len(found.counts)} clients, rows by label"
        + (f" (the {label_count} largest)" if len(totals) > label_count else "")
    )
    heads = (Column(Text(name)) for name in shorten_all([one_line(label) for label in labels], 9))
    split = Table(Column("client", no_wrap=True), *heads, "rows", box=None)
    for client, name in zip(clients, client_names, strict=True):
        counts = found.counts[client]
        cells = (str(counts.get(label, 0)) for label in labels)
        split.add_row(Text(name), *cells, str(sum(counts.values())))
    split.add_row("all", *(str(totals[label]) for label in labels), str(sum(totals.values())))
    console.print(split)
    if len(found.counts) > _SHOWN:
        say(f"  and {len(found.counts) - _SHOWN} more clients, counted in the last line")
    federation = found.federation
    for client, reason in federation.skipped.items():
        say(f"skipped {federation.names.get(client, client)}: {reason}")
    for note in (*federation.notes, *found.advice):
        say(f"note: {note}")
    say(found.command)


def save_picture(found: Preview, target: Path) -> Path:
    """Save a picture of clients by labels (PNG, or the format of the suffix); darker cells have more rows."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for counts in found.counts.values() for label in counts))
    values = [[counts.get(label, 0) for label in labels] for counts in found.counts.values()]
    wide, high = min(0.6, 15 / len(labels)), min(0.32, 15 / len(values))  # inches of a cell
    figure = Figure(figsize=(2.8 + wide * len(labels), 1.5 + high * len(values)), layout="constrained")
    axes = figure.add_subplot()
    ramp = LinearSegmentedColormap.from_list("split", RAMP["light"])
    image = axes.imshow(values, cmap=ramp, vmin=0, aspect="auto", interpolation="none")
    for cells, size, axis, names in (
        (labels, wide, axes.xaxis, labels),
        (values, high, axes.yaxis, list(found.counts)),
    ):
        step = max(1, round(0.17 / size))  # names that would overlap are left out
        tick_labels = [one_line(name, 24) for name in names[::step]]
        axis.set_ticks(range(0, len(cells), step), tick_labels, fontsize=8, parse_math=False)
    axes.tick_params(axis="x", rotation=60)
    if min(wide / 0.55, high / 0.25) >= 1:
        top = max(max(row) for row in values)
        for y, row in enumerate(values):
            for x, n in enumerate(row):
                axes.text(
                    x, y, n or "", ha="center", va="center", fontsize=7, color="white" if n > 0.45 * top else "black"
                )
    axes.set_title(f"{len(values)} clients, {sum(map(sum, values))} rows", fontsize=10)
    figure.colorbar(image, label="rows", fraction=0.05, pad=0.02, aspect=12 if len(values) < 12 else 40)
    return write_figure(figure, target)


def write_figure(figure: Any, target: Path) -> Path:
    """Save a matplotlib figure and return its path.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        with any_glyph():
            figure.savefig(target, dpi=110, metadata={"Software": None} if target.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        suffixes = difflib.get_close_matches(target.suffix, (".png", ".svg", ".pdf"), n=1)
        raise ConfigError(
            f"{target} cannot be written: {error}" + (f"; use {suffixes[0]}" if suffixes else "")
        ) from error
    return target
