"""A look at data before it is used: its columns, how its rows would be dealt, and the command that runs on it.

Columns are guessed by their names where they are not given; the split shown is the one a run with the same seed has.
"""

import difflib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from consilium.data.arrays import TableData
from consilium.data.language import LanguageData
from consilium.data.task import Federation
from consilium.data.textfile import TextFileData, read_rows
from consilium.errors import ConfigError
from consilium.escape import one_line, terminal
from consilium.report.maps import RAMP
from consilium.report.style import any_glyph, shorten_all

__all__ = ["Preview", "counts_of", "guess", "preview", "save_picture", "show", "write_figure"]

NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "instruction", "question", "query"),
    "response": ("response", "output", "answer", "completion"),
    "context": ("context", "passage"),
    "text": ("text", "sentence", "document", "content", "body", "note", "description"),
    "label": ("label", "target", "class", "category", "intent", "topic"),
    "client": ("client", "client_id", "site", "hospital", "owner", "author", "part"),
}
"""What a column is taken for by its name, whatever the case; the first that is there."""

_SHOWN = 12


def guess(columns: Sequence[str]) -> dict[str, str]:
    """What the columns are for, role -> column; roles that a chosen kind of data does not use are left out.

    A conversation is preferred to a prompt with a response, this to a text with a label, this to plain text.
    """
    found = _by_name(columns)
    for roles in (("messages",), ("prompt", "response", "context"), ("text", "label"), ("text",)):
        if all(role in found for role in roles if role != "context"):
            return {role: found[role] for role in (*roles, "client") if role in found}
    return {}


def _by_name(columns: Sequence[str]) -> dict[str, str]:
    """Every role for which there is a column of such a name."""
    lower = {column.lower(): column for column in columns}
    return {
        role: lower[next(name for name in names if name in lower)]
        for role, names in NAMES.items()
        if any(name in lower for name in names)
    }


@dataclass(frozen=True)
class Preview:
    """What was found in a file.

    Args:
        rows: how many. columns: of each, how many values are empty, how many differ, and one of them.
        roles: role -> column. recipe: which one runs on it, and its flags for the data.
        federation: the clients of a run with these settings.
        counts: client -> label (or "examples") -> rows in all three splits.
        lengths: tokens of the shortest, median, 95 % and longest text, by role.
        facts: further lines. model: further flags of the command, most of them of the model.
    """

    rows: int
    columns: dict[str, tuple[int, int, str]]
    roles: dict[str, str]
    recipe: str
    flags: dict[str, str]
    federation: Federation
    counts: dict[str, dict[str, int]]
    lengths: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    model: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command line that runs on the file."""
        flags = [part for flag, value in self.flags.items() for part in (f"--data.{flag}", value)]
        return shlex.join(["consilium", "run", self.recipe, *self.model, *flags])


def preview(
    path: Path, given: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], seed: int
) -> Preview:
    """Read a file, deal its rows and measure its texts.

    Args:
        given: role -> column, where the guess is not right; other columns are guessed if none of the data is given.
        settings: clients, partition, alpha of the split.

    Raises:
        ConfigError: if nothing can be guessed, or a role is unknown. DataError: as the data sources do.
    """
    rows = read_rows(path, list(given.values()))
    names = rows.column_names
    guessed = guess(names)
    roles = dict(given) if set(given) - {"client"} else guessed | given
    if "client" not in roles and (client := _by_name(names).get("client")):
        roles["client"] = client
    recipe, data, flags = _data(path, roles, settings, names)
    federation = data.load(seed)
    columns = {name: _column(rows[name][:]) for name in names}
    sizes = {
        role: _lengths(tokenizer, rows[roles[role]][:]) for role in ("prompt", "response", "text") if role in roles
    }
    model = {"fedmoe-text": (), "pfedmoe-table": ("--data.no-positive",)}.get(recipe, ("--model.path", "MODEL"))
    counts = counts_of(federation)
    return Preview(len(rows), columns, roles, recipe, flags, federation, counts, sizes, model=model)


def _data(
    path: Path, roles: Mapping[str, str], settings: Mapping[str, Any], names: Sequence[str]
) -> tuple[str, Any, dict[str, str]]:
    """The recipe, its data source, and the flags that make it."""
    rest = {key: roles[key] for key in ("client",) if key in roles}
    dealt = {} if rest else {key: value for key, value in settings.items() if value is not None}
    told = {key: str(value) for key, value in dealt.items()}
    if {"messages", "prompt", "response"} & roles.keys():
        used = {key: roles[key] for key in ("messages", "prompt", "response", "context") if key in roles} | rest
        return "fedmoe-instructions", LanguageData(path, **used, **dealt), {"path": str(path)} | used | told
    if {"text", "label"} <= roles.keys():
        used = {"text": roles["text"], "target": roles["label"]} | rest
        return "fedmoe-text", TextFileData(path, **used, **dealt), {"path": str(path)} | used | told
    if "text" in roles:
        used = {"text": roles["text"]} | rest
        return "fedmoe-plaintext", LanguageData(path, **used, **dealt), {"path": str(path)} | used | told
    if {"label", "client"} <= roles.keys():
        used = {"target": roles["label"]} | rest
        return "pfedmoe-table", TableData(path, **used), {"path": str(path)} | used
    raise ConfigError(
        f"cannot tell what the columns of {path.name} are for ({' | '.join(names)}); name them: --text and --label, "
        "--prompt and --response, --messages, or --text alone; of a table of numbers --label and --client"
    )


def _column(values: Sequence[Any]) -> tuple[int, int, str]:
    filled = [str(value) for value in values if value is not None and value == value and str(value).strip()]
    return len(values) - len(filled), len(set(filled)), " ".join(filled[0].split())[:40] if filled else ""


def _lengths(tokenizer: PreTrainedTokenizerBase, values: Sequence[Any]) -> tuple[int, int, int, int]:
    """Tokens of at most 2000 texts, evenly chosen: least, median, 95 %, most."""
    texts = [str(value) for value in values[:: -(-len(values) // 2000)]]
    sizes = sorted(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
    return sizes[0], sizes[len(sizes) // 2], sizes[int(len(sizes) * 0.95)], sizes[-1]


def counts_of(federation: Federation) -> dict[str, dict[str, int]]:
    """Client -> label (or "examples", where there are none) -> rows in all three splits."""
    counts = {}
    for client, told in federation.partition()["clients"].items():
        counts[client] = told["label_counts"] or {"examples": sum(told["sizes"].values())}
    return counts


def show(found: Preview, console: Console) -> None:
    """Print it: columns, lengths, clients by labels, the command."""

    def say(text: str) -> None:
        console.print(terminal(text), markup=False, highlight=False, soft_wrap=True)

    say(f"{found.rows} rows")
    for fact in found.facts:
        say(fact)
    of_column = {column: role for role, column in found.roles.items()}
    table = Table("column", "used as", "empty", "different", "for instance", box=None)
    for column, (empty, different, example) in found.columns.items():
        table.add_row(
            Text(one_line(column)), of_column.get(column, ""), str(empty), str(different), Text(one_line(example))
        )
    if found.columns:
        console.print(table)
    for role, (least, median, most95, most) in found.lengths.items():
        say(f"tokens of {role}: {least} to {most}, median {median}, 95 % have at most {most95}")
    totals: Counter[str] = Counter()
    for counts in found.counts.values():
        totals.update(counts)
    clients = list(found.counts)[:_SHOWN]
    room = console.width - max(map(len, [*map(one_line, clients), "client"])) - 10
    shown = max(min(_SHOWN, room // 10), 2)
    labels = [label for label, _ in totals.most_common(shown)]
    if len(totals) > 1:
        (most, n), (least, k) = totals.most_common(1)[0], min(totals.items(), key=lambda entry: entry[1])
        say(f"{len(totals)} labels, " + (f"{k} rows each" if k == n else f"from {k} rows ({least}) to {n} ({most})"))
    say(f"{len(found.counts)} clients, rows by label" + (f" (the {shown} largest)" if len(totals) > shown else ""))
    heads = (Column(Text(name)) for name in shorten_all([one_line(label) for label in labels], 9))
    split = Table(Column("client", no_wrap=True), *heads, "rows", box=None)
    for client in clients:
        counts = found.counts[client]
        split.add_row(
            Text(one_line(client)), *(str(counts.get(label, 0)) for label in labels), str(sum(counts.values()))
        )
    split.add_row("all", *(str(totals[label]) for label in labels), str(sum(totals.values())))
    console.print(split)
    if len(found.counts) > _SHOWN:
        say(f"  and {len(found.counts) - _SHOWN} more clients, counted in the last line")
    for client, why in found.federation.skipped.items():
        say(f"skipped {client}: {why}")
    say(found.command)


def save_picture(found: Preview, target: Path) -> Path:
    """Clients by labels as a picture (PNG, or what the ending says): the darker, the more rows."""
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
        shown = [one_line(name, 24) for name in names[::step]]
        axis.set_ticks(range(0, len(cells), step), shown, fontsize=8, parse_math=False)
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
    """Save a figure of matplotlib; raises ConfigError if it cannot be written."""
    try:
        with any_glyph():
            figure.savefig(target, dpi=110, metadata={"Software": None} if target.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(target.suffix, (".png", ".svg", ".pdf"), n=1)
        raise ConfigError(f"{target} cannot be written: {error}" + (f"; use {near[0]}" if near else "")) from error
    return target
