"""Names of labels and clients, derived in the same way from the values of every source.

A name is its value in Unicode's composed form (NFC), stripped of surrounding blanks. A missing value, in any spelling
that file formats and programs write, has no name. A client's name may be any text. The client also has an id, which
is allowed in paths and in messages.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from consilium.core import CLIENT_ID
from consilium.errors import DataError

__all__ = ["MISSING", "alike", "by_client", "client_ids", "name_of", "names_of", "renamed", "without"]

MISSING = frozenset(
    ("NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "NAN", "NaT", "NULL", "Null", "null", "None", r"\N")
)
"""Spellings of a missing value in CSV, SQL, R, pandas, Excel and Python. An empty field is also missing. Words that
people may use as the name of a class, such as "none" or "na", are not included."""

_AROUND = "\u200b\u200c\u200d\u2060\ufeff"


def name_of(value: str | None, declared: Collection[str] = ()) -> str | None:
    """Return the name that a value of a label or client column stands for; None if the value is missing.

    Args:
        declared: names that are valid even if they look like a missing value.
    """
    if value is None:
        return None
    name = unicodedata.normalize("NFC", value)
    while name != (stripped_name := name.strip().strip(_AROUND)):
        name = stripped_name
    return None if not name or (name in MISSING and name not in declared) else name


def names_of(values: Iterable[str | None], declared: Collection[str] = ()) -> list[str | None]:
    """Return `name_of` for every value."""
    cache: dict[str | None, str | None] = {}
    names = []
    for value in values:
        if value not in cache:
            cache[value] = name_of(value, declared)
        names.append(cache[value])
    return names


def without(values: Sequence[Any], rows: Iterable[int]) -> str:
    """Return the counts of the missing values in these rows by spelling, e.g. "empty 3, NA 2"."""
    counts = Counter(str(values[row] or "").strip() or "empty" for row in rows)
    return ", ".join(f"{spelling} {n}" for spelling, n in counts.most_common())


_TWINS = str.maketrans(
    "аеорсхуіјѕһԁԛԝАВЕКМНОРСТХУІЈЅԌαοιρνυκχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcxyijshdqwABEKMHOPCTXYIJSGaoipvukxABEZHIKMNOPTYX",
)
"""Letters of the Cyrillic and Greek alphabets that look like Latin ones."""
_FIGURES = str.maketrans("0O1lI", "OOlll")


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that differ only by case, blanks, hyphens, underscores, accents or look-alikes."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        latin_name = unicodedata.normalize("NFKD", name).translate(_TWINS)
        letters = "".join(c for c in latin_name if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
        groups["case " + re.sub(r"[\s_-]+", "", letters).casefold()].add(name)
        groups["figures " + re.sub(r"\s+", "", letters.translate(_FIGURES))].add(name)
    return sorted({tuple(sorted(group)) for group in groups.values() if len(group) > 1})


def client_ids(names: Iterable[str]) -> dict[str, str]:
    """Return name -> unique id: the name itself if it is a valid id, else its Latin letters and digits.

    The id ends with eight digits of the name's SHA-256 if it would otherwise equal another id (ignoring case), if the
    name has no Latin letters or digits, or if the name is long.

    Raises:
        DataError: if two ids are equal nevertheless.
    """
    names = sorted(set(names))
    readable_names = {name: name if CLIENT_ID.fullmatch(name) else _readable(name) for name in names}
    counts = Counter(text.lower() for text in readable_names.values())
    ids = {}
    for name, text in readable_names.items():
        is_valid = text and counts[text.lower()] == 1 and len(text) <= 64
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        ids[name] = text if is_valid else f"{text[:48].rstrip('.-') or 'client'}-{digest}"
    if len(set(ids.values())) < len(ids):
        raise DataError("a client has the name that another client's id would be; rename one of the two")
    return ids


def _readable(name: str) -> str:
    text = unicodedata.normalize("NFKD", name.replace("ß", "ss").replace("ø", "o").replace("æ", "ae"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")


def by_client(owners: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return client id -> indices of its rows, and client id -> name for the clients with an id unlike their name."""
    ids = client_ids(owners)
    rows_by_client: dict[str, list[int]] = defaultdict(list)
    for row, owner in enumerate(owners):
        rows_by_client[ids[owner]].append(row)
    return dict(sorted(rows_by_client.items())), {id: name for name, id in ids.items() if id != name}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Replace client ids by names in a JSON record, both as keys and as values of "client"."""
    if not names:
        return value
    if isinstance(value, Mapping):
        return {
            names.get(key, key): names.get(v, v) if key == "client" and isinstance(v, str) else renamed(v, names)
            for key, v in value.items()
        }
    return [renamed(v, names) for v in value] if isinstance(value, list | tuple) else value
