"""Images in tables: Parquet files as `datasets` writes them, its directories, and its data sets on the hub.

One column holds encoded images (PNG, JPEG, ...), another the class, and an optional third the client. A split called
test is the official test set. A validation split is added to the training rows, because each client keeps a share of
its own training rows for validation.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from consilium.constraints import nearest
from consilium.data.names import names_of
from consilium.data.pixels import Images, Pages, labelled, stack
from consilium.data.room import check_parquet
from consilium.data.sets import digest, is_directory, is_litter, open_set
from consilium.errors import DataError, first_line
from consilium.pointers import refuse_pointer

__all__ = ["part_of", "read_parquet", "read_set", "table_of"]

_LABELS = ("label", "labels", "fine_label", "target", "class", "category", "y")
_IMAGES = ("image", "img", "picture", "pixels", "x")
_PARTS = {
    **dict.fromkeys(("train", "training", "val", "valid", "validation", "dev"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def part_of(name: str) -> str | None:
    """Return the part, "train" or "test", to which a split of this name belongs; None if the name is unknown."""
    return _PARTS.get(name.lower())


def read_parquet(path: Path, size: int, image: str, label: str, client: str, pages: Pages = "refuse") -> Images:
    """Read one Parquet file, or a directory of them: train-*.parquet, test-*.parquet, or shards of one table.

    Args:
        image: column of the images; "": guessed by type and name.
        label: column of the classes; "": guessed by name.
        client: column of the clients; "": no clients.

    Raises:
        DataError: if a file, a column or a value cannot be used.
    """
    from datasets import concatenate_datasets

    wanted_columns = [column for column in (image, label, client) if column]
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if not is_litter(file.name))
    word_parts = {file: map(part_of, re.split(r"[^a-z]+", file.stem.lower())) for file in files}
    parts = {file: next(filter(None, candidates), None) for file, candidates in word_parts.items()}
    if path.is_file() or not any(parts.values()):
        parts = dict.fromkeys(files, "train")
    if unknown_files := [file.name for file, part in parts.items() if part is None]:
        raise DataError(
            f"{path} has {', '.join(unknown_files)} beside train and test files; name it for one of them or remove it"
        )
    tables: dict[str, list[Any]] = {"train": [], "test": []}
    for file, part in parts.items():
        tables[part].append(_opened(file, wanted_columns))
    try:
        datasets_by_part = {part: concatenate_datasets(rows) for part, rows in tables.items() if rows}
    except ValueError as error:
        raise DataError(f"the files of {path} differ in their columns: {first_line(error)}") from error
    source = {"format": "Parquet", "files": [file.name for file in files]}
    if path.is_file():
        source["sha256"] = digest(path)
    return _read(path.name, datasets_by_part, size, image, label, client, source, pages)


def _opened(path: Path, wanted: Sequence[str]) -> Any:
    """Open a Parquet file as a `datasets.Dataset`, without a copy in the shared cache."""
    from datasets import Dataset, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.tqdm import are_progress_bars_disabled

    if not path.is_file():
        raise DataError(f"{path} is not a file")
    refuse_pointer(path, DataError)
    bars_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        check_parquet(path)
        with tempfile.TemporaryDirectory() as cache:
            rows = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    except (DatasetGenerationError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path.name} cannot be read as parquet: {first_line(error.__cause__ or error)}") from error
    finally:
        if not bars_disabled:
            enable_progress_bars()
    _check_columns(path.name, rows.column_names, wanted)
    if not len(rows):
        raise DataError(f"{path.name} has no rows")
    return rows


def _check_columns(name: str, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError if a wanted column is missing."""
    for column in wanted:
        if column and column not in there:
            hint = nearest(column, there, " (", ")")
            raise DataError(f"{name} has no column {column!r}{hint}; it has {' | '.join(there)}")


def _names(name: str, column: str, values: Sequence[Any]) -> list[str]:
    """Return the names of labels or clients.

    Raises:
        DataError: if a value is missing, or is neither a text nor a number.
    """
    invalid_row = next(
        (i for i, v in enumerate(values) if v is not None and not isinstance(v, str | int | float)), None
    )
    if invalid_row is not None:
        raise DataError(
            f"{name} column {column!r} row {invalid_row} holds a {type(values[invalid_row]).__name__}, not a text "
            "or number"
        )
    names = names_of(None if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    if empty_rows := [row for row, row_name in enumerate(names) if row_name is None]:
        raise DataError(
            f"{name} column {column!r} is empty in {len(empty_rows)} of {len(names)} rows, first in row "
            f"{empty_rows[0]}; fill or remove them"
        )
    return [row_name for row_name in names if row_name is not None]


def read_set(path: Path, size: int, image: str, label: str, client: str, pages: Pages = "refuse") -> Images:
    """Read a directory of `datasets`, or a data set on the hub.

    Raises:
        DataError: as `read_parquet`.
    """
    source = {"format": "datasets directory" if is_directory(path) else "hub"}
    name = path.name if is_directory(path) else str(path)
    return _read(name, _parts(str(path), open_set(path)), size, image, label, client, source, pages)


def _parts(name: str, found: Any) -> dict[str, Any]:
    """Return the training part, and the test part if there is one, of a data set with any number of splits."""
    from datasets import Dataset, concatenate_datasets

    splits: Mapping[str, Any] = {"train": found} if isinstance(found, Dataset) else found
    if unknown_splits := [split for split in splits if part_of(split) is None]:
        raise DataError(f"{name} has the split {unknown_splits[0]!r}; allowed are train, validation and test")
    parts = {part: [rows for split, rows in splits.items() if part_of(split) == part] for part in ("train", "test")}
    return {part: concatenate_datasets(rows) for part, rows in parts.items() if rows}


def _read(
    name: str,
    parts: dict[str, Any],
    size: int,
    image: str,
    label: str,
    client: str,
    source: dict[str, Any],
    pages: Pages = "refuse",
) -> Images:
    """Read the columns of both parts, one after the other."""
    if "train" not in parts:
        raise DataError(f"{name} has rows for test alone; there must be some for training")
    tables = list(parts.values())
    image, label = table_of(name, tables[0], image, label, client)
    n = sum(len(rows) for rows in tables)
    named_parts = [(f"{name} ({part})" if len(parts) > 1 else name, rows) for part, rows in parts.items()]
    x, counts = stack(
        n, (file for part_name, rows in named_parts for file in _files(part_name, rows, image)), size, pages
    )
    y = np.concatenate([_labels(part_name, rows, label) for part_name, rows in named_parts])
    owners = (
        [owner for part_name, rows in named_parts for owner in _names(part_name, client, rows[client][:])]
        if client
        else ()
    )
    label_ids, labels = labelled(y, getattr(tables[0].features[label], "names", None))
    columns = {"image": image, "label": label, "client": client}
    owners = np.repeat(owners, counts).tolist() if client else ()
    return Images(x, np.repeat(label_ids, counts), labels, sum(counts[: len(parts["train"])]), owners, source | columns)


def table_of(name: str, rows: Any, image: str = "", label: str = "", client: str = "") -> tuple[str, str]:
    """Return the columns of the image and of its class, as given or else guessed.

    Raises:
        DataError: if a given column is missing, or no column can be guessed.
    """
    from datasets import Image

    columns = rows.column_names
    _check_columns(name, columns, (image, label, client))
    image_columns = [column for column in columns if isinstance(rows.features[column], Image)]
    image = image or next(iter(image_columns), "") or _named(columns, _IMAGES)
    label = label or _named(columns, _LABELS)
    for role, column in (("image", image), ("label", label)):
        if not column:
            raise DataError(f"{name}: none of {' | '.join(columns)} looks like the {role}; name it with --data.{role}")
    return image, label


def _named(columns: Sequence[str], names: Sequence[str]) -> str:
    by_name = {column.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), "")


def _files(name: str, rows: Any, column: str) -> Iterator[tuple[str, BytesIO]]:
    """Yield the encoded images as open files, each with its name for error messages."""
    from datasets import Image

    try:
        rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"{name} column {column!r} holds no encoded images: {first_line(error)}") from error
    row = 0
    for batch in rows.iter(batch_size=256):
        for value in batch[column]:
            location = f"{name} column {column!r} row {row}"
            if value is None or value.get("bytes") is None:
                problem = f"only names a file ({value['path']})" if value and value.get("path") else "is empty"
                raise DataError(f"{location} {problem}; write the images into the table, as datasets' to_parquet does")
            yield location, BytesIO(value["bytes"])
            row += 1


def _labels(name: str, rows: Any, column: str) -> np.ndarray:
    """Return the labels as numbers [N] int64, or as names [N]."""
    values = rows[column][:]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        y, class_names = np.array(values, np.int64), getattr(rows.features[column], "names", None)
        invalid_rows = np.flatnonzero((y < 0) | (y >= (len(class_names) if class_names is not None else np.inf)))
        if class_names is not None and invalid_rows.size:
            raise DataError(
                f"{name} column {column!r} row {invalid_rows[0]} is {y[invalid_rows[0]]}, no class of "
                f"{len(class_names)}"
            )
        return y
    return np.array(_names(name, column, values))
