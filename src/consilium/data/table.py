"""A reader of tables in several formats. A table is read whole or refused, and its columns hold the original text.

    .csv .tsv .tab          delimited text, see `dialect`
    .jsonl .ndjson .json    an object a line; an array of objects; LEAF's users and user_data
    .parquet                also folders of them
    .xlsx                   the one sheet that has rows (needs the extra "excel")
    a directory             of `datasets` (save_to_disk), or of files of one of the formats above
    owner/name              on the hub

Text files may be compressed as .gz, .bz2, .xz or .zst. Values are the text in the file; no types are guessed. If the
format itself has types, a whole number becomes its digits, another number its shortest decimal form, and a date is
written in ISO 8601.
"""

import json
import lzma
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from consilium.constraints import nearest
from consilium.data.dialect import Dialect, decode, parse
from consilium.data.names import MISSING
from consilium.data.room import PACKED, check_archive, check_parquet, unpack
from consilium.data.sets import is_directory, is_hub_name, is_litter, rows_of
from consilium.errors import ConfigError, DataError, first_line
from consilium.pointers import refuse_pointer

__all__ = ["Table", "number_of", "parts_of", "read_table"]

_TEXTS = (".csv", ".tsv", ".tab")
_JSON = (".jsonl", ".ndjson", ".json")
_READABLE = ".csv, .tsv, .jsonl, .json, .parquet, .xlsx (text also as .gz or .zst), or a folder of one kind"
_MARKS = re.compile(r"_.*|.*\.crc|dataset_infos\.json|README(\.md|\.txt)?")

Cell = str | bytes | list[Any] | dict[str, Any] | None


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Args:
        name: name of the file for error messages.
        columns: name -> values, as an Arrow array or as the cells that `cells` returns.
        rows: number of rows.
        form: recognised format of the file, in words.
        lines: for each row, the line of the file where it begins, from 1; () if the format has no lines.
    """

    name: str
    columns: Mapping[str, pa.ChunkedArray | list[Cell]]
    rows: int
    form: str
    lines: Sequence[int] = field(default=(), repr=False)

    def __len__(self) -> int:
        return self.rows

    @property
    def column_names(self) -> list[str]:
        """Return the names of the columns in the order of the file."""
        return list(self.columns)

    def require(self, columns: Iterable[str]) -> None:
        """Raise DataError if a column is missing or the table has no rows; the message lists the columns."""
        for column in columns:
            if column not in self.columns:
                hint = nearest(column, self.columns, " (", ")")
                column_list = " | ".join([*self.columns][:40]) + (" | ..." if len(self.columns) > 40 else "")
                raise DataError(f"{self.name} has no column {column!r}{hint}; it has {column_list}")
        if not self.rows:
            raise DataError(f"{self.name} has no rows")

    def place(self, row: int) -> str:
        """Return the place of a row (from 0) in the file: "line 10" as in an editor, or else "row 9", from 1."""
        return f"line {self.lines[row]}" if self.lines else f"row {row + 1}"

    def cells(self, column: str) -> list[Cell]:
        """Return the values of a column: texts, None for null, lists and dicts for nested values, or bytes."""
        values = self.columns[column]
        return values if isinstance(values, list) else _cells(values)

    def texts(self, column: str) -> list[str | None]:
        """Return every value of a column as unchanged text; None for null.

        Raises:
            DataError: if a value is nested or binary; the message gives its place.
        """
        values = self.cells(column)
        for row, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{self.name} column {column!r} {self.place(row)} holds a {type(value).__name__}; "
                    "text, numbers and booleans are read"
                )
        return values  # type: ignore[return-value]

    def filled(self, column: str) -> list[str | None]:
        """Return `texts`, with None for values that are empty or blank."""
        return [text if text and not text.isspace() else None for text in self.texts(column)]

    def numbers(self, column: str) -> np.ndarray:
        """Return the numbers of a column, float64, with nan for missing values; decimal commas are understood.

        Raises:
            DataError: if a value is not a finite number, or is ambiguous, such as "1,234".
        """
        values = self.columns[column]
        if not isinstance(values, list) and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        else:
            texts = [(text or "").strip() for text in self.texts(column)]
            numbers = np.full(len(texts), math.nan)
            decimal_comma = any("," in text for text in texts) and self._decimal_comma(texts)
            for row, text in enumerate(texts):
                if text and text not in MISSING:
                    try:
                        is_plain = not decimal_comma and "," not in text and "_" not in text
                        numbers[row] = float(text) if is_plain else number_of(text, decimal_comma)
                    except ValueError as error:
                        hint = " (is that comma or point a decimal one?)" if "may be" in str(error) else ""
                        location = f"{self.name} column {column!r}"
                        raise DataError(
                            f"{location} does not hold numbers: {self.place(row)} has {text!r}{hint}; leave the "
                            "column out"
                        ) from error
        if np.isinf(numbers).any():
            row = int(np.flatnonzero(np.isinf(numbers))[0])
            raise DataError(f"{self.name} column {column!r} {self.place(row)} is not finite; remove or correct it")
        return numbers

    def _decimal_comma(self, texts: Iterable[str]) -> bool:
        """Return whether the commas of a column are decimal commas.

        They are if at least one comma can only be a decimal comma. They also are if the file is separated by ";", which
        Excel uses in locales with decimal commas, and no point can only be a decimal point.
        """
        texts = list(texts)
        if any(re.fullmatch(r"[+-]?\d*,(\d{1,2}|\d{4,})", text) for text in texts):
            return True
        has_points = any(re.fullmatch(r"[+-]?(\d*|\d{1,3}(,\d{3})+)\.(\d{1,2}|\d{4,})", text) for text in texts)
        return self.form.startswith("fields between ';'") and not has_points


def number_of(text: str, comma: bool) -> float:
    """Return the number that a text stands for, in a column with commas.

    Args:
        comma: whether commas are decimal commas in the column, and not separators of thousands.

    Raises:
        ValueError: if the text is not a number ("no number"), or could be either of two numbers ("may be two").
    """
    if "_" in text:  # Python's float would accept underscores.
        raise ValueError("no number")
    decimal_mark, group_mark = (",", ".") if comma else (".", ",")
    if group_mark not in text:
        return float(text.replace(decimal_mark, "."))
    grouping = rf"[+-]?\d{{1,3}}({re.escape(group_mark)}\d{{3}})+"
    if re.fullmatch(rf"{grouping}{re.escape(decimal_mark)}\d*|{grouping}{re.escape(group_mark)}\d{{3}}", text):
        return float(text.replace(group_mark, "").replace(decimal_mark, "."))
    if comma and re.fullmatch(r"[+-]?\d*\.(\d{1,2}|\d{4,})", text):
        return float(text)
    raise ValueError("may be two" if re.fullmatch(grouping, text) else "no number")


def read_table(path: Path, dialect: Dialect | None = None, wanted: Iterable[str] = ()) -> Table:
    """Read all rows of a file, a directory or a data set on the hub.

    Args:
        dialect: dialect of delimited text, and encoding of text files; None: recognised.
        wanted: columns that must exist.

    Raises:
        DataError: if the file is missing or unreadable, its ending is unknown, it has no rows, or a column is missing
            (the message lists the columns).
    """
    dialect = dialect or Dialect()
    if is_directory(path) or is_hub_name(path):
        rows = rows_of(path).with_format("arrow")
        table = _of_arrow(path.name, rows[:] if len(rows) else rows.data.table, "a data set of `datasets`")
    elif path.is_dir():
        table = _folder(path, dialect)
    elif not path.is_file():
        raise DataError(f"{path} is not a file; give {_READABLE}")
    else:
        table = _file(path, dialect)
    table.require(wanted)
    return table


def _kind(path: Path) -> str:
    """Return the ending of the format, without that of the compression; "" if it is unknown."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in PACKED:
        endings.pop()
        return endings[-1] if endings and endings[-1] in (*_TEXTS, *_JSON) else ""
    return endings[-1] if endings and endings[-1] in (*_TEXTS, *_JSON, ".parquet", ".xlsx") else ""


def _file(path: Path, dialect: Dialect) -> Table:
    kind = _kind(path)
    if not kind:
        raise DataError(f"{path.name} ends in {path.suffix!r}; readable are {_READABLE}")
    refuse_pointer(path, DataError)
    try:
        if kind == ".parquet":
            check_parquet(path)
            return _of_arrow(path.name, pq.ParquetFile(path).read(), "Parquet")
        if kind == ".xlsx":
            return _excel(path)
        text, encoding = decode(unpack(path), path.name, dialect.encoding)
    except (OSError, EOFError, ValueError, KeyError, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(f"{path.name} cannot be read as {kind[1:]}: {first_line(error)}") from error
    if kind in _JSON:
        return _json(path.name, text)
    delimited = parse(text, path.name, replace(dialect, encoding=encoding))
    return Table(path.name, delimited.columns, len(delimited.lines), str(delimited.dialect), delimited.lines)


def parts_of(path: Path) -> list[Path]:
    """Return the files of a folder and its subfolders if all are of one readable format; [] otherwise."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_mark(file.relative_to(path)))
    kinds = {_kind(file) for file in files}
    return files if len(kinds) == 1 and "" not in kinds else []


def _is_mark(path: Path) -> bool:
    """Return whether a file holds no rows: the operating system, or the program that wrote the rows, left it there."""
    return any(is_litter(part) for part in path.parts) or bool(_MARKS.fullmatch(path.name))


def _folder(path: Path, dialect: Dialect) -> Table:
    """Read the rows of all files of a folder, one file after the other; folders named "column=value" add a column."""
    files = parts_of(path)
    if not files:
        raise DataError(f"{path} is a folder without files of rows, or of more than one kind; give {_READABLE}")
    tables = []
    for file in files:
        table, folder_columns = _file(file, dialect), {}
        for part in file.relative_to(path).parts[:-1]:
            column, separator, value = part.partition("=")
            folder_columns |= {column: [value] * len(table)} if separator else {}
        tables.append(replace(table, columns={**table.columns, **folder_columns}))
    first_table = tables[0]
    for file, table in zip(files, tables, strict=True):
        if set(table.columns) != set(first_table.columns):
            odd_columns = sorted(set(table.columns) ^ set(first_table.columns))
            raise DataError(f"{file.name} and {files[0].name} of {path} differ in the column {odd_columns[0]!r}")
    columns = {column: [cell for table in tables for cell in table.cells(column)] for column in first_table.columns}
    return Table(path.name, columns, sum(map(len, tables)), f"{len(files)} files of {first_table.form}")


def _of_arrow(name: str, table: pa.Table, form: str) -> Table:
    """Convert an Arrow table; classes that `datasets` wrote as numbers are replaced by their names."""
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{name} names a column twice; rename one of the two")
    columns: dict[str, pa.ChunkedArray | list[Cell]] = dict(zip(table.column_names, table.columns, strict=True))
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    for column, feature in ((metadata.get("info") or {}).get("features") or {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in columns:
            names = feature["names"]
            columns[column] = [
                names[int(index)] if index.isdecimal() and int(index) < len(names) else None
                for index in map(str, table[column].to_pylist())
            ]
    return Table(name, columns, table.num_rows, form)


def _cells(values: pa.ChunkedArray) -> list[Cell]:
    """Convert Arrow's values to cells."""
    arrow_type = values.type
    if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type):
        return values.to_pylist()
    if pa.types.is_dictionary(arrow_type):
        return _cells(pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks], arrow_type.value_type))
    if pa.types.is_float32(arrow_type) or pa.types.is_float16(arrow_type):
        numbers = values.to_numpy(zero_copy_only=False)
        return [None if np.isnan(x) else str(x) for x in numbers]
    return [_cell(value) for value in values.to_pylist()]


def _cell(value: Any) -> Cell:
    """Convert a Python value to a cell."""
    if value is None or isinstance(value, str | bytes | list | dict):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if value != value else repr(value)
    if isinstance(value, datetime):
        return value.isoformat(" ") if value.time() != datetime.min.time() else value.date().isoformat()
    return value.isoformat() if isinstance(value, date) else str(value)


def _excel(path: Path) -> Table:
    """Read the only sheet of an Excel workbook that has rows."""
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError as error:
        raise ConfigError("openpyxl is missing: pip install 'consilium[excel]', or save the table as CSV") from error
    from zipfile import BadZipFile

    try:
        check_archive(path)
        book = load_workbook(path, read_only=True, data_only=True)
        sheets = {}
        for sheet in book.worksheets:
            rows = [[_excel_cell(value) for value in row] for row in sheet.iter_rows(values_only=True)]
            if numbered_rows := [
                (line, row) for line, row in enumerate(rows, 1) if any(cell is not None for cell in row)
            ]:
                sheets[sheet.title] = numbered_rows
        book.close()
    except (BadZipFile, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path.name} cannot be read as an Excel workbook: {first_line(error)}") from error
    if len(sheets) != 1:
        raise DataError(
            f"{path.name} has {len(sheets)} sheets with rows ({', '.join(sheets)}); save the one you need as a file of "
            "its own"
        )
    (title, rows) = next(iter(sheets.items()))
    header = rows.pop(0)[1]
    while header and header[-1] is None:
        header.pop()
    names = [(cell or "").strip() or f"column {position}" for position, cell in enumerate(header, 1)]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path.name} names the column {duplicate!r} twice; rename one of them")
    for line, row in rows:
        if any(cell is not None for cell in row[len(names) :]):
            raise DataError(f"{path.name} line {line} has more cells than the header, which has {len(names)}")
        row += [None] * (len(names) - len(row))
    columns: dict[str, Any] = {name: [row[position] for _, row in rows] for position, name in enumerate(names)}
    return Table(path.name, columns, len(rows), f"Excel, sheet {title!r}", [line for line, _ in rows])


def _excel_cell(value: Any) -> str | None:
    cell = _cell(value)
    return cell if cell is None or isinstance(cell, str) else str(cell)


class _Digits(str):
    """A number of a JSON text, with its original characters."""


def _json(name: str, text: str) -> Table:
    """Read one object per line, an array of objects, or one object that holds all rows, see `_object`."""
    if text.lstrip()[:1] == "[":
        return _objects(name, _parsed(name, text), "a JSON array", ())
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_parsed(name, line, number))
            except DataError:
                if rows:
                    raise
                return _object(name, _parsed(name, text))  # The object may extend over several lines.
            lines.append(number)
    if len(rows) == 1 and (".jsonl" not in name.lower() or "user_data" in rows[0]):
        return _object(name, rows[0])
    return _objects(name, rows, "JSON, an object a line", lines)


def _parsed(name: str, text: str, line: int = 0) -> Any:
    def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            duplicate = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise DataError(f"{name}{f' line {line}' if line else ''} names {duplicate!r} twice in one object")
        return entries

    try:
        return json.loads(
            text,
            parse_int=_Digits,
            parse_float=_Digits,
            parse_constant=lambda word: None if word == "NaN" else _Digits(word),
            object_pairs_hook=paired,
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} cannot be read as json: {error.msg} in line {line or error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} cannot be read as json: it is nested too deeply") from error


def _objects(name: str, rows: Any, form: str, lines: Sequence[int]) -> Table:
    """Make a table from a list of objects; a key that an object lacks is null in its row."""
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            location = f"line {lines[index]}" if lines else f"entry {index + 1}"
            raise DataError(f"{name} cannot be read as json: {location} is a {type(row).__name__}, not an object")
    keys = dict.fromkeys(key for row in rows for key in row)
    columns: dict[str, Any] = {key: [_json_cell(row.get(key)) for row in rows] for key in keys}
    return Table(name, columns, len(rows), form, lines)


def _json_cell(value: Any) -> Cell:
    if isinstance(value, _Digits):
        return str(value)
    return _restored(value) if isinstance(value, list | dict) else _cell(value)


def _restored(value: Any) -> Any:
    """Return a nested value with its `_Digits` converted to int or float."""
    if isinstance(value, _Digits):
        return float(value) if re.search(r"[.eEI]", value) else int(value)
    if isinstance(value, dict):
        return {key: _restored(v) for key, v in value.items()}
    return [_restored(v) for v in value] if isinstance(value, list) else value


def _object(name: str, found: Any) -> Table:
    """Read LEAF's JSON (users, and x and y for each), an object with one array of objects, or an object as one row."""
    if isinstance(found, dict) and isinstance(found.get("user_data"), dict):
        rows = []
        for user, data in found["user_data"].items():
            xs, ys = (data.get(key) for key in ("x", "y")) if isinstance(data, dict) else (None, None)
            if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
                raise DataError(f"{name}: user {user!r} has no lists x and y of equal length, as LEAF's JSON has")
            for x, y in zip(xs, ys, strict=True):
                is_flat = isinstance(x, list) and not any(isinstance(v, list | dict) for v in x)
                rows.append({"user": user, **({f"x{i}": v for i, v in enumerate(x)} if is_flat else {"x": x}), "y": y})
        return _objects(name, rows, "LEAF's JSON", ())
    arrays = [v for v in found.values() if isinstance(v, list)] if isinstance(found, dict) else []
    if len(arrays) == 1 and arrays[0] and all(isinstance(row, dict) for row in arrays[0]):
        return _objects(name, arrays[0], "a JSON array in an object", ())
    if isinstance(found, dict) and not any(isinstance(v, dict) for v in found.values()):
        return _objects(name, [found], "JSON, one object", ())
    raise DataError(
        f"{name} cannot be read as json: it holds neither an object a line, nor an array of objects, nor LEAF's users "
        "and user_data"
    )
