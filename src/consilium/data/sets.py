"""Data sets of the library `datasets`: directories that `save_to_disk` wrote, owner/name on the hub or in its cache."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from consilium.constraints import forbid
from consilium.data.pixels import ENDINGS
from consilium.errors import DataError, first_line
from consilium.inside import refuse_name_outside, refuse_outside

__all__ = ["check_shares", "digest", "is_directory", "is_hub_name", "is_litter", "located", "open_set", "rows_of"]

_LITTER = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "$recycle.bin",
    "system volume information", "icon\r", "lost+found", "network trash folder", "temporary items",
}  # fmt: skip

_FILES = {
    ".npz", ".parquet", ".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".xlsx", ".txt", ".gz", ".bz2", ".xz",
    ".zst", ".zip", ".tar", ".bin", ".pkl",
    *ENDINGS,
}  # fmt: skip
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_litter(name: str) -> bool:
    """Return whether a name is hidden, or that of files that operating systems and file servers leave in folders."""
    return name.startswith(".") or name.lower() in _LITTER or name.lower().startswith("thumbs.db:")


def is_hub_name(path: Path) -> bool:
    """Return whether a path has the form owner/name and does not exist."""
    return bool(_HUB.fullmatch(str(path))) and path.suffix.lower() not in _FILES and not path.exists()


def is_directory(path: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def check_shares(validation: float, test: float) -> None:
    """Raise ConfigError if nothing is left for training, besides these shares of the rows."""
    forbid(validation + test >= 1, f"validation {validation} and test {test} must be together below 1, as shares")


def located(path: Path | str) -> Path:
    """Return a path as a data source stores it.

    A path becomes absolute, because a run may be resumed from another folder. A name on the hub is unchanged.
    """
    path = Path(path).expanduser()
    return path if is_hub_name(path) else path.absolute()


def open_set(path: Path) -> Any:
    """Open a data set as a `datasets.Dataset`, or as a `DatasetDict` of its splits.

    Raises:
        DataError: if it cannot be read.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    if is_directory(path):
        _check_directory(path)
        try:
            return load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read as a datasets directory: {first_line(error)}") from error
    try:
        return load_dataset(str(path))
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise DataError(
            f"{path} is neither a file or directory here nor a data set on the hub: {first_line(error)}"
        ) from error


def _check_directory(path: Path) -> None:
    """Raise DataError if a directory of `datasets` names files outside of it, or has links that lead out of it."""
    refuse_outside(path, DataError)
    for file in [*path.rglob("dataset_dict.json"), *path.rglob("state.json")]:
        try:
            metadata = json.loads(file.read_text())
            names = metadata.get("splits", []) + [entry["filename"] for entry in metadata.get("_data_files", [])]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{file.relative_to(path)} {type(error).__name__}"
            raise DataError(f"{path} cannot be read as a datasets directory: {reason}") from error
        for name in names:
            refuse_name_outside(name, file, DataError)


def rows_of(path: Path) -> Any:
    """Concatenate all splits into one `datasets.Dataset`, with the names of classes in place of their numbers.

    Raises:
        DataError: as `open_set`, or if the splits differ in their columns.
    """
    from datasets import ClassLabel, Dataset, concatenate_datasets

    data_set = open_set(path)
    try:
        rows = data_set if isinstance(data_set, Dataset) else concatenate_datasets(list(data_set.values()))
    except ValueError as error:
        raise DataError(f"the splits of {path} differ in their columns: {first_line(error)}") from error
    names = rows.column_names
    for name, feature in list(rows.features.items()):
        if isinstance(feature, ClassLabel):
            values = [None if v is None or v < 0 else feature.int2str(v) for v in rows[name][:]]
            rows = rows.remove_columns(name).add_column(name, values)
    return rows.select_columns(names)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a directory's files in the order of their paths; "" for a name on the hub."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(file.read_bytes())
    return hasher.hexdigest() if files else ""
