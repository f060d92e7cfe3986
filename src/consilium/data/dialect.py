"""A reader of delimited text that recognises the encoding, the separator and the quotes of a file.

It makes only guesses that it can check. A separator is accepted only if every line of the file has as many fields as
the header. An encoding other than UTF-8, UTF-16 and UTF-32 is accepted only if nearly all letters are those of one
Western language. An ambiguous file is refused, and the error names the setting that decides.
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
"""Two styles of quotes that are recognised in addition to the plain one: quotes inside a field escaped by a backslash,
as MySQL writes them; and opening quotes that follow a separator and a blank."""
_CHUNK = 4_000_000  # This bounds how many cells are Python objects at a time.


@dataclass(frozen=True)
class Dialect:
    """The format of a text file of rows. A setting of "" is recognised from the file.

    Args:
        separator: separator between fields: one character, "tab", or "none" for a file of one column.
        quote: quote around fields with separators or line breaks: one character, or "none" if quotes are ordinary
            characters.
        encoding: Python's name of the encoding, such as "cp1252".
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
        separator_name = {"\t": "tabs", "none": "one column", "": "?"}.get(self.separator, f"'{self.separator}'")
        separation = separator_name if self.separator == "none" else f"fields between {separator_name}"
        quoting = "quotes are ordinary characters" if self.quote == "none" else f"quoted by {self.quote}"
        return f"{separation}, {quoting}, {self.encoding}"


@dataclass(frozen=True)
class Delimited:
    """A file of delimited text.

    Args:
        columns: name -> values.
        lines: for each row, the line of the file where it begins.
        dialect: the dialect that was recognised.
    """

    columns: dict[str, pa.ChunkedArray]
    lines: list[int]
    dialect: Dialect


def decode(data: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """Decode the bytes of a file; return the text without a byte order mark, and the encoding.

    Raises:
        DataError: if the bytes are not valid in `encoding`, or if no encoding is given and none is recognised.
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
    # Without a mark, UTF-16 is recognised because every other byte of Latin text is 0.
    for offset, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(data) % 2 == 0 and data[offset::2].count(0) * 5 > len(data):
            return decode(data, name, codec)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            text = ""
        if _is_western(text):
            return text, "Windows-1252"
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
"""Letters other than a to z, per line of languages: German, French, Spanish, Portuguese, Italian, Danish and Norwegian,
Swedish and Finnish, Icelandic, Dutch, Catalan."""


def _is_western(text: str) -> bool:
    """Return whether text that was decoded as Windows-1252 is plausible, which Czech, Cyrillic or Chinese is not."""
    letters = Counter(c for c in text.lower() if c > "\x7f" and c.isalpha())
    if any(
        c > "\x7f"
        for c in re.findall(r"[a-zA-Z]([^a-zA-Z\s’´·\xad\u2013\u2014…])(?=[a-zA-Z])", text)
        if not c.isalpha()
    ):
        return False  # A sign in the middle of a word shows that the encoding is another one.
    known_count = max(sum(letters[c] for c in alphabet) for alphabet in _ALPHABETS)
    return bool(text) and known_count >= 0.98 * letters.total() and letters.keys() <= set("".join(_ALPHABETS))


def parse(text: str, name: str, dialect: Dialect) -> Delimited:
    """Parse delimited text into columns; the characters of every field are unchanged.

    The header names the columns. A column without a name is named after its place, e.g. "column 3". Empty lines are
    skipped.

    Raises:
        DataError: if a line has more or fewer fields than the header, a quote is not closed, a column is named twice,
            or the file has no header.
    """
    first_line = 1
    if hint := re.match(r'"?sep=(.)"?\r?\n', text):  # Excel writes this line as a hint.
        text, first_line, dialect = text[hint.end() :], 2, replace(dialect, separator=dialect.separator or hint[1])
    with _long_fields():
        dialect = _recognised(text, name, dialect, first_line)
        rows = _rows(text, dialect)
        header = _named(name, next(rows)[1])
        lines: list[int] = []
        chunks: list[list[pa.Array]] = []
        chunk: list[list[str]] = []
        for line, row in rows:
            lines.append(line + first_line - 1)
            chunk.append(row)
            if len(chunk) * len(header) >= _CHUNK:
                chunks.append(_arrays(chunk))
                chunk = []
        if chunk or not chunks:
            chunks.append(_arrays(chunk) if chunk else [pa.array([], pa.large_string()) for _ in header])
    columns = {column: pa.chunked_array(parts) for column, *parts in zip(header, *chunks, strict=True)}
    return Delimited(columns, lines, dialect)


def _arrays(rows: list[list[str]]) -> list[pa.Array]:
    return [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]


def _named(name: str, header: list[str]) -> list[str]:
    """Return the names of the columns, stripped of surrounding blanks."""
    names = [field.strip() or f"column {position}" for position, field in enumerate(header, 1)]
    if len(set(names)) < len(names):
        duplicate, _ = Counter(names).most_common(1)[0]
        positions = [position for position, other_name in enumerate(names, 1) if other_name == duplicate]
        raise DataError(
            f"{name} names the column {duplicate!r} twice, at places {positions[0]} and {positions[1]}; rename one "
            "of them"
        )
    return names


def _rows(text: str, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not an empty line, preceded by the line (from 1) where it begins."""
    unused_char = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=unused_char if dialect.separator == "none" else dialect.separator,
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
        is_open = "end of data" in str(error)
        raise _BrokenQuote(
            line, "has a quote that is not closed" if is_open else "has text behind a closing quote"
        ) from error


class _BrokenQuote(Exception):
    """A broken quote; the arguments are the line and the reason."""


@dataclass(frozen=True)
class _Trial:
    """The result of reading the file in one dialect.

    Args:
        dialect: the dialect.
        fields: number of fields of the header.
        rows: number of rows before the first wrong line.
        wrong: the first line that does not fit and the reason; None if all lines fit.
    """

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
        return _Trial(dialect, len(header), n, broken.args)
    return _Trial(dialect, len(header), n, None)


def _recognised(text: str, name: str, dialect: Dialect, first: int) -> Dialect:
    """Return the dialect in which the whole file can be read.

    Raises:
        DataError: if there is none; the message names the line at which the likeliest dialect fails.
    """
    header_line = re.match(r"[\r\n]*([^\r\n]*)", text)[1]  # type: ignore[index]
    if not header_line.strip():
        raise DataError(f"{name} is empty; its first line must name the columns")
    separators = [dialect.separator] if dialect.separator else [s for s in _SEPARATORS if s in header_line]
    if re.search(r"\.(tsv|tab)(\.|$)", name.lower()) and "\t" in separators:
        separators = ["\t"]
    quotes = [dialect.quote] if dialect.quote else ['"', "none"] if '"' in text else ['"']
    trials = [
        _tried(text, replace(dialect, separator=separator, quote=quote))
        for separator in separators or ["none"]
        for quote in quotes
    ]
    valid_trials = [trial for trial in trials if not trial.wrong]
    if not valid_trials and not dialect.quote and '"' in text:
        rare_quotes = [_SPACED] + ([_ESCAPED] if not re.search(r'\\[^"\\]', text) else [])
        rare_trials = [_tried(text, replace(dialect, separator=s, quote=q)) for s in separators for q in rare_quotes]
        valid_trials = [trial for trial in rare_trials if not trial.wrong]
    if not valid_trials:
        closest_trial = max(trials, key=lambda trial: (trial.fields, trial.rows))
        line, reason = closest_trial.wrong or (1, "")
        raise DataError(
            f"{name} line {line + first - 1} {reason} ({closest_trial.dialect}); put texts with separators in "
            "quotes, or say how the file is written: --data.separator, --data.quote"
        )
    max_fields = max(trial.fields for trial in valid_trials)
    widest_trials = [trial for trial in valid_trials if trial.fields == max_fields]
    candidates = [trial for trial in widest_trials if trial.dialect.separator == widest_trials[0].dialect.separator]
    return _quoting(text, candidates).dialect


def _quoting(text: str, trials: list[_Trial]) -> _Trial:
    """Choose between quotes that enclose fields and quotes that are ordinary characters.

    The choice matters if the whole file can be read both ways. If quoting would join lines, although every line has the
    right number of fields, the file was written without quoting. Databases write tabs and do not quote. In a file with
    tabs, a single field with a quote that does not enclose it therefore decides for ordinary characters.
    """
    if len(trials) == 1:
        return trials[0]
    quoted_trial, plain_trial = sorted(trials, key=lambda trial: trial.dialect.quote == "none")
    if plain_trial.fields > 1 and plain_trial.rows > quoted_trial.rows:
        return plain_trial
    if plain_trial.dialect.separator == "\t":
        for _, row in _rows(text, plain_trial.dialect):
            if any('"' in field and not re.fullmatch(r'"(?:[^"]|"")*"', field) for field in row):
                return plain_trial
    return quoted_trial


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 131,072 characters per field inside the block; the module `csv` keeps it per process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
