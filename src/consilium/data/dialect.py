"""Characters and fields of delimited text: which encoding, separator and quotes a file has, and its rows.

Nothing is guessed that cannot be checked. A separator is accepted only if every line of the file has as many fields as
the header; an encoding other than UTF-8 and UTF-16 only if the letters are those of one Western language. What remains
open is refused, with the setting that decides it.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from consilium.errors import ConfigError, DataError

__all__ = ["Delimited", "Dialect", "decode", "parse"]

_SEPARATORS = (",", ";", "\t", "|")
_WORDS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " "}
_ESCAPED, _SPACED = '"\\', '" after blanks'
"""Quotes that are recognised next to the plain ones: with a backslash before a quote inside, as MySQL writes them; and
behind a separator and a blank."""
_CHUNK = 4_000_000  # cells that are Python objects at a time


@dataclass(frozen=True)
class Dialect:
    """How a text file of rows is written; "" is recognised from the file.

    Args:
        separator: between fields: one character, "tab", or "none" for a file of one column.
        quote: around fields that hold separators or line breaks: one character, or "none" where quotes are ordinary
            characters.
        encoding: as Python names it, such as "cp1252".
    """

    separator: str = ""
    quote: str = ""
    encoding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "separator", _WORDS.get(self.separator, self.separator))
        for name in ("separator", "quote"):
            value = getattr(self, name)
            if value not in ("", "none", _ESCAPED, _SPACED) and (len(value) != 1 or value in "\r\n"):
                raise ConfigError(f"data.{name} is {value!r}; it must be one character, 'tab', or 'none'")
        if self.encoding:
            try:
                io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)
            except LookupError as error:
                raise ConfigError(
                    f"data.encoding is {self.encoding!r}, which is unknown; e.g. utf-8, cp1252"
                ) from error

    def __str__(self) -> str:
        shown = {"\t": "tabs", "none": "one column", "": "?"}.get(self.separator, f"'{self.separator}'")
        between = shown if self.separator == "none" else f"fields between {shown}"
        quoted = "quotes are ordinary characters" if self.quote == "none" else f"quoted by {self.quote}"
        return f"{between}, {quoted}, {self.encoding}"


@dataclass(frozen=True)
class Delimited:
    """A file of delimited text.

    Args:
        columns: name -> values. lines: of each row, the line of the file where it begins. dialect: as recognised.
    """

    columns: dict[str, pa.ChunkedArray]
    lines: list[int]
    dialect: Dialect


def decode(data: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """Return the characters of a file and the encoding that they were in; a byte order mark is left out.

    Raises:
        DataError: if the bytes are not of this encoding or, without one, of none that can be told.
    """
    if encoding:
        try:
            return data.decode(encoding).removeprefix("\ufeff"), encoding
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not {encoding} {_where(data, error.start)}; give another encoding") from error
    for mark, codec in (
        (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):  # fmt: skip
        if data.startswith(mark):
            return decode(data, name, codec)
    for place, codec in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of Latin text is 0
        if len(data) % 2 == 0 and data[place::2].count(0) * 5 > len(data):
            return decode(data, name, codec)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        try:
            western = data.decode("cp1252")
        except UnicodeDecodeError:
            western = ""
        if _is_western(western):
            return western, "Windows-1252"
        raise DataError(
            f"{name} is not UTF-8 {_where(data, error.start)}; save it as UTF-8, or name its encoding: "
            "--data.encoding cp1252 (Western), cp1250 (Central European), cp1251 (Cyrillic), gb18030, shift_jis"
        ) from error


def _where(data: bytes, start: int) -> str:
    return f"at byte {start} in line {data.count(bytes([10]), 0, start) + 1}"


_ALPHABETS = (
    "äöüß", "àâæçéèêëîïôœùûüÿ", "áéíóúüñ", "áâãàçéêíóôõúü", "àèéìíîòóùú", "æøåéèóòâ", "åäöé", "áðéíóúýþæö",
    "áéëïíóöüúèê", "àçéèíïóòúü",
)  # fmt: skip
"""Letters other than a to z: German, French, Spanish, Portuguese, Italian, Danish and Norwegian, Swedish and Finnish,
Icelandic, Dutch, Catalan."""


def _is_western(text: str) -> bool:
    """Return whether text that was decoded as Windows-1252 reads like it: Czech, Cyrillic or Chinese would not."""
    letters = Counter(c for c in text.lower() if c > "\x7f" and c.isalpha())
    if any(
        c > "\x7f"
        for c in re.findall(r"[a-zA-Z]([^a-zA-Z\s’´·\xad\u2013\u2014…])(?=[a-zA-Z])", text)
        if not c.isalpha()
    ):
        return False  # a sign in the middle of a word
    known = max(sum(letters[c] for c in alphabet) for alphabet in _ALPHABETS)
    return bool(text) and known >= 0.98 * letters.total() and letters.keys() <= set("".join(_ALPHABETS))


def parse(text: str, name: str, dialect: Dialect) -> Delimited:
    """Return the columns of delimited text, every field character by character.

    The header names the columns; one without a name is called "column 3" by its place. Empty lines are skipped.

    Raises:
        DataError: for a line with more or fewer fields than the header, a quote that is not closed, a column named
            twice, and a file without a header.
    """
    first = 1
    if hint := re.match(r'"?sep=(.)"?\r?\n', text):  # Excel's own hint
        text, first, dialect = text[hint.end() :], 2, replace(dialect, separator=dialect.separator or hint[1])
    with _long_fields():
        dialect = _recognised(text, name, dialect, first)
        rows = _rows(text, dialect)
        header = _named(name, next(rows)[1])
        lines: list[int] = []
        chunks: list[list[pa.Array]] = []
        some: list[list[str]] = []
        for line, row in rows:
            lines.append(line + first - 1)
            some.append(row)
            if len(some) * len(header) >= _CHUNK:
                chunks.append(_arrays(some))
                some = []
        if some or not chunks:
            chunks.append(_arrays(some) if some else [pa.array([], pa.large_string()) for _ in header])
    columns = {column: pa.chunked_array(parts) for column, *parts in zip(header, *chunks, strict=True)}
    return Delimited(columns, lines, dialect)


def _arrays(rows: list[list[str]]) -> list[pa.Array]:
    return [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]


def _named(name: str, header: list[str]) -> list[str]:
    """Return the names of the columns, without blanks around them."""
    names = [field.strip() or f"column {place}" for place, field in enumerate(header, 1)]
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        places = [place for place, other in enumerate(names, 1) if other == twice]
        raise DataError(
            f"{name} names the column {twice!r} twice, at places {places[0]} and {places[1]}; rename one of them"
        )
    return names


def _rows(text: str, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not an empty line, with the line (from 1) where it begins."""
    unused = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=unused if dialect.separator == "none" else dialect.separator,
        quotechar=None if dialect.quote == "none" else dialect.quote[0],
        quoting=csv.QUOTE_NONE if dialect.quote == "none" else csv.QUOTE_MINIMAL,
        escapechar="\\" if dialect.quote == _ESCAPED else None,
        skipinitialspace=dialect.quote == _SPACED,
        strict=True,
    )
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        open_ = "end of data" in str(error)
        raise _BrokenQuote(
            line, "has a quote that is not closed" if open_ else "has text behind a closing quote"
        ) from error


class _BrokenQuote(Exception):
    """A line, and what is wrong with it."""


@dataclass(frozen=True)
class _Trial:
    """What came of reading the file in one way: rows, and the first line that does not fit (line, fields, header)."""

    dialect: Dialect
    fields: int
    rows: int
    wrong: tuple[int, str] | None


def _tried(text: str, dialect: Dialect) -> _Trial:
    rows = _rows(text, dialect)
    header: list[str] = []
    n = 0
    try:
        _, header = next(rows, (1, []))
        for line, row in rows:
            if len(row) != len(header):
                return _Trial(dialect, len(header), n, (line, f"has {len(row)} fields, the header has {len(header)}"))
            n += 1
    except _BrokenQuote as broken:
        return _Trial(dialect, len(header), n, broken.args)  # type: ignore[arg-type]
    return _Trial(dialect, len(header), n, None)


def _recognised(text: str, name: str, dialect: Dialect, first: int) -> Dialect:
    """Return the dialect in which the whole file can be read.

    Raises:
        DataError: if there is none, with the line at which the likeliest one fails.
    """
    head = re.match(r"[\r\n]*([^\r\n]*)", text)[1]  # type: ignore[index]
    if not head.strip():
        raise DataError(f"{name} is empty; its first line must name the columns")
    separators = [dialect.separator] if dialect.separator else [s for s in _SEPARATORS if s in head]
    if re.search(r"\.(tsv|tab)(\.|$)", name.lower()) and "\t" in separators:
        separators = ["\t"]
    quotes = [dialect.quote] if dialect.quote else ['"', "none"] if '"' in text else ['"']
    tried = [
        _tried(text, replace(dialect, separator=separator, quote=quote))
        for separator in separators or ["none"]
        for quote in quotes
    ]
    whole = [trial for trial in tried if not trial.wrong]
    if not whole and not dialect.quote and '"' in text:
        rare = [_SPACED] + ([_ESCAPED] if not re.search(r'\\[^"\\]', text) else [])
        tries = [_tried(text, replace(dialect, separator=s, quote=q)) for s in separators for q in rare]
        whole = [trial for trial in tries if not trial.wrong]
    if not whole:
        worst = max(tried, key=lambda trial: (trial.fields, trial.rows))
        line, why = worst.wrong or (1, "")
        raise DataError(
            f"{name} line {line + first - 1} {why} ({worst.dialect}); put texts with separators in quotes, or say how "
            "the file is written: --data.separator, --data.quote"
        )
    most = max(trial.fields for trial in whole)
    best = [trial for trial in whole if trial.fields == most]
    same = [trial for trial in best if trial.dialect.separator == best[0].dialect.separator]
    return _quoting(text, same).dialect


def _quoting(text: str, trials: list[_Trial]) -> _Trial:
    """Choose between quotes that enclose fields and quotes that are ordinary characters, where the file can be read
    whole both ways.

    A file that has the right number of fields in every line was written without quoting if quoting would join lines.
    Databases, which write tabs, do not quote: there a single field with a quote elsewhere than around it decides.
    """
    if len(trials) == 1:
        return trials[0]
    quoted, plain = sorted(trials, key=lambda trial: trial.dialect.quote == "none")
    if plain.fields > 1 and plain.rows > quoted.rows:
        return plain
    if plain.dialect.separator == "\t":
        for _, row in _rows(text, plain.dialect):
            if any('"' in field and not re.fullmatch(r'"(?:[^"]|"")*"', field) for field in row):
                return plain
    return quoted


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 131,072 characters a field, which the module `csv` keeps for the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
