"""Limits for the unpacked size of a file, because a small file may unpack to far more than the memory holds.

The unpacked size is determined before a file is read, or while it is unpacked. It may take half of the free memory.
"""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from consilium.errors import DataError
from consilium.machine import free_memory

__all__ = ["PACKED", "check_archive", "check_parquet", "check_room", "unpack"]

PACKED: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(pa.OSFile(str(path)), compression="zstd"),
}
"""Ending of a compressed file -> function that opens it."""
PART = 2**22
"""Number of bytes that are unpacked at a time."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}
"""Bytes per value of a Parquet type; all other types take 8. Texts and bytes take `OBJECT` plus their length."""
OBJECT = 64
"""Bytes that a Python text takes in addition to its characters."""


def check_room(path: Path, size: int, what: str = "") -> None:
    """Raise DataError if the unpacked `size` of a file, in bytes, is more than half of the free memory."""
    if size > (free_bytes := free_memory()) // 2:
        raise DataError(
            f"{path.name} has {path.stat().st_size:,} bytes and unfolds to {size:,} or more{what}; {free_bytes:,} "
            "are free, of which half may be used. Take fewer rows or columns, or a machine with more memory"
        )


def unpack(path: Path) -> bytes:
    """Return the content of a file, unpacked if its ending is that of a compressed file.

    Raises:
        DataError: as `check_room`, as soon as too much is unpacked.
        OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException: if the file is not valid.
    """
    opener = PACKED.get(path.suffix.lower())
    if opener is None:
        check_room(path, path.stat().st_size)
        return path.read_bytes()
    parts: list[bytes] = []
    with opener(path) as file:
        while part := file.read(PART):
            parts.append(part)
            check_room(path, sum(map(len, parts)))
    return b"".join(parts)


def check_archive(path: Path) -> None:
    """Raise DataError if a zip archive, such as an Excel workbook, unpacks to too much.

    The announced sizes suffice for this check, because zipfile reads at most the announced size of an entry.
    """
    with zipfile.ZipFile(path) as archive:
        check_room(path, sum(entry.file_size for entry in archive.infolist()))


def check_parquet(path: Path) -> None:
    """Raise DataError if a Parquet file unpacks to too much.

    A small Parquet file may do so, because repeated values take almost no space in it.

    Raises:
        OSError, pa.ArrowException: if the file is not a Parquet file.
    """
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
    columns = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]
    min_size, max_extra = 0, 0
    for column in columns:
        is_text = column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
        width = OBJECT if is_text else WIDTHS.get(column.physical_type, 8)
        min_size += max(column.num_values * width, column.total_uncompressed_size)
        max_length = column.total_uncompressed_size if is_text and column.has_dictionary_page else 0
        max_extra += column.num_values * max_length
    row_note = f" in {metadata.num_rows:,} rows"
    check_room(path, min_size, row_note)
    # The upper bound assumes that the longest text is the one that is repeated, so count before refusing the file.
    if min_size + max_extra > free_memory() // 2:
        check_room(path, min_size + _repeated(path, columns), row_note)


def _repeated(path: Path, columns: list[Any]) -> int:
    """Return the total bytes of the texts in a Parquet file, which is read with each distinct value only once."""
    text_columns = sorted({column.path_in_schema for column in columns if column.has_dictionary_page})
    total = 0
    with pq.ParquetFile(path, read_dictionary=text_columns) as file:
        for batch in file.iter_batches(8192):
            total += sum(map(_text_bytes, batch.columns))
            check_room(path, total)
    return total


def _text_bytes(array: pa.Array) -> int:
    """Return the total bytes of the texts in an array, including nested ones; repeated texts count every time."""
    if pa.types.is_dictionary(array.type):
        if pa.types.is_fixed_size_binary(array.type.value_type) or not len(array.dictionary):
            return len(array) * getattr(array.type.value_type, "byte_width", 0)
        lengths = pc.cast(pc.binary_length(array.dictionary), pa.int64())
        return pc.sum(pc.take(lengths, array.indices)).as_py() or 0
    if pa.types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    if pa.types.is_map(array.type):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    if pa.types.is_nested(array.type):
        return _text_bytes(array.flatten())
    return 0
