"""A preview of data before it is used: its columns, the split of its rows, and the command that runs on it.

Columns that are not given are guessed by their names. The label is also guessed by its small number of different
values. The split shown is the one that a run with the same seed has.
"""

import difflib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from consilium.data.arrays import TableData
from consilium.data.causal import renderings
from consilium.data.dialect import Dialect
from consilium.data.language import COMPANIONS, LanguageData
from consilium.data.names import names_of
from consilium.data.table import Table as Rows
from consilium.data.table import read_table
from consilium.data.task import Federation
from consilium.data.textfile import TextFileData
from consilium.errors import ConfigError, DataError
from consilium.escape import one_line, terminal
from consilium.fit import Fit
from consilium.report.maps import RAMP
from consilium.report.style import any_glyph, shorten_all

__all__ = ["Preview", "counts_of", "guess", "preview", "save_picture", "show", "write_figure"]

NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "instruction", "question", "query"),
    "response": ("response", "output", "answer", "completion", "answers", "answerkey"),
    "context": ("context", "passage"),
    "input": ("input",),
    "choices": ("choices", "options"),
    "text": ("text", "sentence", "document", "content", "body", "note", "description"),
    "label": ("label", "target", "class", "category", "intent", "topic"),
    "client": ("client", "client_id", "site", "hospital", "owner", "author", "part", "user"),
}
"""Role -> the column names, in any case, that suggest it; the first that exists counts."""

_PROMPT = ("prompt", "response", *(role for roles in COMPANIONS.values() for role in roles))
_SHOWN = 12
_COLUMNS = 40
_MOST_LABELS = 50
_ROWS = 10  # fewest rows per client, if the rows are partitioned


def guess(columns: Sequence[str]) -> dict[str, str]:
    """Guess the roles of columns by their names, and return role -> column.

    Roles that a kind of data does not use are left out. A conversation is preferred to a prompt with a response, this
    to a text with a label, and this to plain text.
    """
    columns_by_role = _by_name(columns)
    if "prompt" not in columns_by_role and {"input", "response"} <= columns_by_role.keys():
        columns_by_role["prompt"] = columns_by_role.pop("input")
    companions = COMPANIONS.get(columns_by_role.get("prompt", "").lower(), {})
    for required_roles, optional_roles in (
        (("messages",), ()),
        (("prompt", "response"), companions),
        (("text", "label"), ()),
        (("text",), ()),
    ):
        if all(role in columns_by_role for role in required_roles):
            return {
                role: columns_by_role[role]
                for role in (*required_roles, *optional_roles, "client")
                if role in columns_by_role
            }
    return {}


def _by_name(columns: Sequence[str]) -> dict[str, str]:
    """Return role -> column for every role with a column of a suitable name."""
    lower = {column.lower(): column for column in columns}
    return {
        role: lower[next(name for name in names if name in lower)]
        for role, names in NAMES.items()
        if any(name in lower for name in names)
    }


def _by_values(table: Rows, roles: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Guess the text and the label by the values of the columns, if the roles lack them.

    The text is the column with the longest values, if these have several words. The label is the column with the fewest
    different values. It needs at least two, each at least three times on average, and they must not all be numbers.

    Returns:
        The guessed roles, and notes on the other columns with few values.
    """
    guesses, value_counts, max_length = {}, {}, 0.0
    for column in [c for c in table.columns if c not in roles.values()][:_COLUMNS]:
        try:
            values = [value for value in table.filled(column) if value]
        except DataError:
            continue
        value_count = len({*names_of(values)} - {None})
        mean_length = sum(map(len, values)) / max(len(values), 1)
        if 2 <= value_count <= min(_MOST_LABELS, len(table) // 3) and not _is_number(table, column):
            value_counts[column] = value_count
        elif (
            "text" not in roles
            and mean_length > max(max_length, 20)
            and sum(" " in value for value in values) > len(values) / 2
        ):
            guesses["text"], max_length = column, mean_length
    if value_counts and "label" not in roles:
        guesses["label"] = min(value_counts, key=lambda column: value_counts[column])
    return guesses, [
        f"{column!r} has {n} different values" for column, n in value_counts.items() if column != guesses.get("label")
    ]


def _is_number(table: Rows, column: str) -> bool:
    try:
        table.numbers(column)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Preview:
    """The content of a file, as far as it is needed to choose a recipe.

    Args:
        rows: number of rows.
        columns: column -> number of empty values, number of different values, and one value.
        roles: role -> column.
        recipe: recipe that runs on the file.
        flags: flags of the recipe for the data.
        federation: clients of a run with these settings.
        counts: client -> label (or "examples") -> rows in all three splits.
        lengths: tokens of the shortest, median, 95 % and longest text, by role.
        facts: further lines.
        model: further flags of the command, most of them of the model.
        advice: lines before the command.
    """

    rows: int
    columns: Mapping[str, tuple[int, int, str]]
    roles: Mapping[str, str]
    recipe: str
    flags: Mapping[str, str]
    federation: Federation
    counts: Mapping[str, Mapping[str, int]]
    lengths: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Return the command line that runs on the file."""
        flags = [part for flag, value in self.flags.items() for part in (f"--data.{flag}", *shlex.split(value))]
        return shlex.join(["consilium", "run", self.recipe, *self.model, *flags])


def preview(
    path: Path,
    given: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    seed: int,
    dialect: Dialect | None = None,
    model: str = "",
    fit_of: Callable[[str], Fit] | None = None,
) -> Preview:
    """Read a file, partition its rows and measure its texts.

    Args:
        given: role -> column, where the guess is wrong; other columns are guessed if none of the data is given. The
            client "none" partitions the rows anew.
        settings: clients, partition and alpha of the split.
        dialect: dialect of a text file; None: it is recognised.
        model: path or name of the model in the command; "": the recipe's own, or a placeholder.
        fit_of: returns the training settings of a recipe; None: the command sets no lengths.

    Raises:
        ConfigError: if nothing can be guessed, or a role is unknown.
        DataError: for the same reasons as the data sources.
    """
    dialect = dialect or Dialect()
    table = read_table(path, dialect, [column for column in given.values() if column != "none"])
    roles, advice = _roles(table, given, settings)
    recipe, data, flags, notes = _data(path, table, roles, settings, dialect)
    federation = data.load(seed)
    column_names = [*dict.fromkeys([*roles.values(), *table.column_names])][:_COLUMNS]
    columns = {name: _column(table, name) for name in table.column_names if name in column_names}
    facts = [table.form]
    if len(table.columns) > len(columns):
        facts.append(f"{len(table.columns)} columns, of which {len(columns)} are shown")
    unused_columns = [column for column in table.columns if column not in roles.values()]
    # LanguageData notes this itself.
    if unused_columns and recipe != "pfedmoe-table" and not isinstance(data, LanguageData):
        facts.append(
            f"columns that are not used: {', '.join(unused_columns[:12])}{', ...' if len(unused_columns) > 12 else ''}"
        )
    lengths = _lengths(federation, tokenizer)
    flags_of_model = {"pfedmoe-table": ("--data.no-positive",)}.get(recipe, ())
    if recipe != "pfedmoe-table":
        placeholder = "" if recipe == "fedmoe-text" else "MODEL"
        flags_of_model = ("--model.path", model or placeholder) if model or placeholder else ()
        flags_of_model += _fits(recipe, lengths, fit_of(recipe)) if fit_of else ()
        if placeholder and not model:
            advice.append("MODEL is a mixture-of-experts language model: a directory, or owner/name on the hub")
        advice.append(
            "add --memory SIZE, what a client's device holds (e.g. --memory 8GiB): without it no experts need be chosen"
        )
    return Preview(
        len(table),
        columns,
        roles,
        recipe,
        flags,
        federation,
        counts_of(federation),
        lengths,
        tuple(facts),
        flags_of_model,
        (*notes, *advice),
    )


def _roles(table: Rows, given: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return role -> column, for given and guessed roles, and notes on the guess."""
    names = table.column_names
    if {"chosen", "rejected"} <= {name.lower() for name in names} and not set(given) - {"client"}:
        raise ConfigError(
            f"{table.name} holds preference pairs (chosen, rejected), which are not trained on; to train on the chosen "
            "answers alone, name them: --prompt and --response, or --messages chosen"
        )
    roles, advice = dict(given), []
    split_keys = [key for key in ("clients", "partition") if settings.get(key) is not None]
    client = _by_name(names).get("client")
    if "client" not in given and client not in (None, *given.values()):
        if split_keys:
            advice.append(
                f"{client!r} may say whose a row is; --{split_keys[0]} deals the rows anew (else: --client {client})"
            )
        else:
            roles["client"] = str(client)
    if not set(given) - {"client"}:
        guesses = guess([name for name in names if name not in given.values()])
        roles = {role: column for role, column in guesses.items() if role != "client"} | roles
    kinds = {"messages", "prompt", "response", "label"}
    if not kinds & roles.keys() and not {"text"} & given.keys():
        value_guesses, _ = _by_values(table, roles)
        if "label" in value_guesses and ("text" in value_guesses or "text" in roles or "client" in roles):
            roles |= value_guesses
            n = len({*names_of(table.texts(value_guesses["label"]))} - {None})
            advice.append(
                f"{value_guesses['label']!r} has {n} different values and is taken for the label (else: --label COLUMN)"
            )
        elif "text" in value_guesses:
            roles |= value_guesses
    elif "text" in given and not kinds & roles.keys():
        label_column = _by_name(names).get("label")
        value_guesses = {"label": label_column} if label_column else _by_values(table, roles)[0]
        if "label" in value_guesses:
            advice.append(f"{value_guesses['label']!r} may be the label of the text: --label {value_guesses['label']}")
    if "client" not in roles and not split_keys:
        notes = _by_values(table, {"text": "", "label": "", **roles})[1]
        if notes:
            advice.append(f"{'; '.join(notes)}: if one says whose a row is, name it: --client COLUMN")
    return {role: column for role, column in roles.items() if column != "none"}, advice


def _data(
    path: Path, table: Rows, roles: Mapping[str, str], settings: Mapping[str, Any], dialect: Dialect
) -> tuple[str, Any, dict[str, str], list[str]]:
    """Return the recipe, its data source, the flags that create it, and notes on settings that it does not use."""
    split_settings = {key: value for key, value in settings.items() if value is not None}
    notes = []
    if "client" in roles:
        notes += [f"--{key} is ignored: the column {roles['client']!r} says whose a row is" for key in split_settings]
        split_settings = {}
    elif "alpha" in split_settings and split_settings.get("partition") != "dirichlet":
        notes.append("--alpha is ignored: it is for --partition dirichlet")
        del split_settings["alpha"]
    if "client" not in roles and "clients" not in split_settings and len(table) < 10 * _ROWS:
        split_settings["clients"] = max(1, len(table) // _ROWS)
    dialect_settings = {key: value for key in ("separator", "quote", "encoding") if (value := getattr(dialect, key))}
    setting_flags = {key: shlex.quote(str(value)) for key, value in (split_settings | dialect_settings).items()}

    def used(**columns: str) -> dict[str, str]:
        """Return field -> column for the roles that exist."""
        return {field: roles[role] for field, role in columns.items() if role in roles}

    def flags(columns: Mapping[str, str]) -> dict[str, str]:
        return {key: shlex.quote(value) for key, value in {"path": str(path), **columns}.items()} | setting_flags

    if {"messages", "prompt", "response"} & roles.keys():
        columns = used(**{role: role for role in ("messages", *dict.fromkeys(_PROMPT), "client")})
        return (
            "fedmoe-instructions",
            LanguageData(path, **columns, **split_settings, **dialect_settings),
            flags(columns),
            notes,
        )
    if {"text", "label"} <= roles.keys():
        columns = used(text="text", target="label", client="client")
        return "fedmoe-text", TextFileData(path, **columns, **split_settings, **dialect_settings), flags(columns), notes
    if "text" in roles:
        columns = used(text="text", client="client")
        return (
            "fedmoe-plaintext",
            LanguageData(path, **columns, **split_settings, **dialect_settings),
            flags(columns),
            notes,
        )
    if {"label", "client"} <= roles.keys():
        columns = used(target="label", client="client")
        other_columns = [column for column in table.columns if column not in columns.values()]
        number_columns = [column for column in other_columns if _is_number(table, column)]
        column_flag = {} if number_columns == other_columns else {"columns": shlex.join(number_columns)}
        if column_flag:
            unused_columns = [column for column in other_columns if column not in number_columns]
            notes.append(f"columns that are not used, as they hold no numbers: {', '.join(unused_columns[:12])}")
        data = TableData(path, **columns, columns=tuple(number_columns) if column_flag else (), **dialect_settings)
        return "pfedmoe-table", data, flags(columns) | column_flag, notes
    column_list = " | ".join(table.column_names[:_COLUMNS])
    raise ConfigError(
        f"cannot tell what the columns of {path.name} are for ({column_list}); name them: --text and --label, "
        "--prompt and --response, --messages, or --text alone; of a table of numbers --label and --client"
    )


def _column(table: Rows, name: str) -> tuple[int, int, str]:
    """Return the number of empty values, the number of different ones, and the beginning of the first filled one."""
    values = [value if isinstance(value, str) else str(value) for value in table.cells(name) if value is not None]
    filled_values = [value for value in values if value.strip()]
    return (
        len(table) - len(filled_values),
        len(set(filled_values)),
        " ".join(filled_values[0].split())[:40] if filled_values else "",
    )


def _lengths(federation: Federation, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, int, int, int]]:
    """Return the least, median, 95 % and largest number of tokens per role, over at most 2000 examples.

    The examples are evenly spaced. Prompts are measured as they are rendered.
    """
    texts: dict[str, list[str]] = {}
    for data in federation.clients.values():
        for _, split in data.splits():
            for source, target in zip(split.texts, split.targets, strict=True):
                if data.task.form == "classification":
                    pairs = {"text": source} if source and hasattr(split, "examples") and split.shape == () else {}
                elif data.task.form == "language":
                    pairs = {"text": target} if not source else {"prompt": source, "response": target}
                else:
                    pairs = {"text": source, "target": target}
                for role, text in pairs.items():
                    texts.setdefault(role, []).append(text)
    lengths = {}
    for role, values in texts.items():
        values = values[:: -(-len(values) // 2000)]
        if role == "prompt":
            values = [prompt for prompt, _ in renderings([(json.loads(value), "") for value in values], tokenizer)]
        sizes = sorted(len(ids) for ids in tokenizer(values, verbose=False)["input_ids"])
        lengths[role] = (sizes[0], sizes[len(sizes) // 2], sizes[int(len(sizes) * 0.95)], sizes[-1])
    return lengths


def _fits(recipe: str, lengths: Mapping[str, tuple[int, int, int, int]], fit: Fit) -> tuple[str, ...]:
    """Return flags that make room for 95 % of the texts, if the recipe's own lengths do not."""
    flags: list[str] = []
    fields = (
        {"text": "max_length"} if recipe == "fedmoe-text" else {"prompt": "max_length", "response": "target_length"}
    )
    for role, name in fields.items():
        if role in lengths and lengths[role][2] > getattr(fit, name):
            flags += [f"--fit.{name.replace('_', '-')}", str(-(-lengths[role][2] // 16) * 16)]
    return tuple(flags)


def counts_of(federation: Federation) -> dict[str, dict[str, int]]:
    """Return client name -> label (or "examples", if there are none) -> rows in all three splits."""
    counts = {}
    for client, entry in federation.partition()["clients"].items():
        counts[federation.names.get(client, client)] = entry["label_counts"] or {
            "examples": sum(entry["sizes"].values())
        }
    return counts


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
