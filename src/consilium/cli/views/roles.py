"""The roles of a table's columns: text, label, prompt, response and client, guessed by their names and values."""

from collections.abc import Mapping, Sequence
from typing import Any

from consilium.data.language import COMPANIONS
from consilium.data.names import names_of
from consilium.data.table import Table as Rows
from consilium.errors import ConfigError, DataError

__all__ = ["COLUMNS", "NAMES", "guess", "is_number", "roles_of"]

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

COLUMNS = 40
"""The most columns of a table that are looked at."""
_MOST_LABELS = 50


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
    for column in [c for c in table.columns if c not in roles.values()][:COLUMNS]:
        try:
            values = [value for value in table.filled(column) if value]
        except DataError:
            continue
        value_count = len({*names_of(values)} - {None})
        mean_length = sum(map(len, values)) / max(len(values), 1)
        if 2 <= value_count <= min(_MOST_LABELS, len(table) // 3) and not is_number(table, column):
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


def is_number(table: Rows, column: str) -> bool:
    """Return whether every value of a column is a number."""
    try:
        table.numbers(column)
    except DataError:
        return False
    return True


def roles_of(table: Rows, given: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return role -> column, for given and guessed roles, and notes on the guess.

    Args:
        given: role -> column; the column "none" leaves a role out.
        settings: clients and partition of the split, if the user sets them.

    Raises:
        ConfigError: if the file holds preference pairs.
    """
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
