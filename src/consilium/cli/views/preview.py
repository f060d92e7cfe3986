"""A preview of data before it is used: its columns, the split of its rows, and the command that runs on it.

The roles of its columns are guessed by `roles`. The split shown is the one that a run with the same seed has.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from consilium.cli.views.roles import COLUMNS, is_number, roles_of
from consilium.data.arrays import TableData
from consilium.data.causal import renderings
from consilium.data.dialect import Dialect
from consilium.data.language import COMPANIONS, LanguageData
from consilium.data.table import Table as Rows
from consilium.data.table import read_table
from consilium.data.task import Federation
from consilium.data.textfile import TextFileData
from consilium.errors import ConfigError
from consilium.fit import Fit

__all__ = ["Preview", "counts_of", "preview"]

_PROMPT = ("prompt", "response", *(role for roles in COMPANIONS.values() for role in roles))
_ROWS = 10  # fewest rows per client, if the rows are partitioned


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
    roles, advice = roles_of(table, given, settings)
    recipe, data, flags, notes = _data(path, table, roles, settings, dialect)
    federation = data.load(seed)
    column_names = [*dict.fromkeys([*roles.values(), *table.column_names])][:COLUMNS]
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
        number_columns = [column for column in other_columns if is_number(table, column)]
        column_flag = {} if number_columns == other_columns else {"columns": shlex.join(number_columns)}
        if column_flag:
            unused_columns = [column for column in other_columns if column not in number_columns]
            notes.append(f"columns that are not used, as they hold no numbers: {', '.join(unused_columns[:12])}")
        data = TableData(path, **columns, columns=tuple(number_columns) if column_flag else (), **dialect_settings)
        return "pfedmoe-table", data, flags(columns) | column_flag, notes
    column_list = " | ".join(table.column_names[:COLUMNS])
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
