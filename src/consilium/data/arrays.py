"""Images and tables for cohorts of small models: digits, any .npz, and tables by columns.

`digits` (1,797 images of 8 x 8, scikit-learn's) needs no network and no file. An .npz is the usual one of x_train,
y_train, x_test, y_test; arrays of objects are refused. A table is a file that `textfile` reads, whose numbers are the
examples.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from consilium.data.task import Federation, Task
from consilium.data.tensor import federation
from consilium.data.textfile import by_client, read_rows
from consilium.errors import ConfigError, DataError

__all__ = ["ImageData", "TableData"]


@dataclass(frozen=True)
class ImageData:
    """Clients that hold images of classes.

    Args:
        path: "digits", or an .npz file with x_train, y_train, x_test, y_test (and perhaps label_names).
        partition: "pathological" (`classes` per client, unequal shares of each), "dirichlet" (label skew by `alpha`),
            "iid".
        clients: number of clients, >= 1.
        classes: per client, pathological, >= 1.
        alpha: of the Dirichlet distribution, > 0.
        validation: share of a client's training rows, class by class, that is kept for validation, in (0, 1).
        test: share of a client's rows that is kept for test where there is no official test set (digits), in (0, 1);
            an official one is dealt in the same proportions as the training set.
        examples: so many rows of each of the training and the test set are dealt, the first after shuffling; 0: all.
    """

    path: Path = Path("digits")
    partition: Literal["pathological", "dirichlet", "iid"] = "pathological"
    clients: int = 10
    classes: int = 2
    alpha: float = 0.3
    validation: float = 0.2
    test: float = 0.2
    examples: int = 0

    def __post_init__(self) -> None:
        path = Path(self.path) if str(self.path) == "digits" else Path(self.path).expanduser().absolute()
        object.__setattr__(self, "path", path)  # a run may be resumed elsewhere
        for name, least in (("clients", 1), ("classes", 1), ("examples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.alpha > 0 or math.isinf(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}; it must be a positive number")
        if self.partition not in ("pathological", "dirichlet", "iid"):
            raise ConfigError(f"partition {self.partition!r}: use pathological, dirichlet or iid")
        _check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read and deal the images; equal for equal files and seeds.

        Raises DataError when the file or an array cannot be used, or no client has enough rows.
        """
        from consilium.data.partition import class_shares, deal

        arrays, source = _digits() if str(self.path) == "digits" else _npz(self.path)
        x_train, y_train, x_test, y_test, names = arrays
        y = np.concatenate([y_train, y_test])
        kinds, places = np.unique(y, return_inverse=True)
        task = Task(_task_name(self.path), "classification", tuple(_names(kinds, names)), "accuracy")
        shares = class_shares(len(kinds), self.clients, self.partition, self.alpha, self.classes, seed)
        ids = [f"{task.name}-{i:0{max(2, len(str(self.clients - 1)))}d}" for i in range(self.clients)]
        n, rng = len(y_train), np.random.default_rng(seed)
        pools = [rng.permutation(n), n + rng.permutation(len(y_test))]
        pools = [np.sort(pool[: self.examples or None]) for pool in pools if len(pool)]
        dealt = [
            dict(zip(ids, ([int(pool[i]) for i in rows] for rows in deal(places[pool], shares, seed)), strict=True))
            for pool in pools
        ]
        x = torch.from_numpy(np.ascontiguousarray(_images(np.concatenate([x_train, x_test]))))
        return federation(
            x,
            torch.from_numpy(places.astype(np.int64)),
            task,
            dealt[0],
            dealt[1] if len(dealt) > 1 else None,
            (self.validation, self.test),
            seed,
            {"type": "ImageData", "path": str(self.path), "partition": self.partition, "rows": len(y), **source},
        )


@dataclass(frozen=True)
class TableData:
    """Clients that hold rows of numbers, dealt by a client column.

    A client standardises its columns by the mean and deviation of its own rows; what is missing becomes the mean (0),
    a column that a client never recorded is 0 throughout.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file.
        target: column of the class.
        client: column that says which client a row belongs to.
        columns: of numbers; () takes all others.
        positive: the class is whether the target is above 0 ("no", "yes"), as with the grades of a disease.
        validation, test: shares of a client's rows, class by class; the rest trains.
    """

    path: Path = Path("heart_disease.parquet")
    target: str = "num"
    client: str = "hospital"
    columns: tuple[str, ...] = ()
    positive: bool = False
    validation: float = 0.15
    test: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser().absolute())
        _check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read and cut the rows; equal for equal files and seeds.

        Raises DataError when the file, a column or a value cannot be used, or no client has enough rows.
        """
        table = read_rows(self.path, [self.target, self.client, *self.columns])
        columns = self.columns or [c for c in table.column_names if c not in (self.target, self.client)]
        x = np.stack([_numbers(self.path, name, table[name][:]) for name in columns], axis=1)
        held = by_client([str(name) for name in table[self.client][:]], self.client)
        for rows in held.values():
            x[rows] = _standardised(x[rows])
        targets = _numbers(self.path, self.target, table[self.target][:]) if self.positive else table[self.target][:]
        if any(value is None or value != value for value in targets):
            raise DataError(f"{self.path.name} column {self.target!r} is empty in a row; remove or fill it")
        names = [("no", "yes")[int(value > 0)] if self.positive else str(value) for value in targets]
        kinds, places = np.unique(names, return_inverse=True)
        task = Task(_task_name(self.path), "classification", tuple(str(kind) for kind in kinds), "accuracy")
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        source = {"type": "TableData", "path": str(self.path), "sha256": digest, "rows": len(x), "columns": [*columns]}
        y = torch.from_numpy(places.astype(np.int64))
        shares = (self.validation, self.test)
        return federation(torch.from_numpy(x.astype(np.float32)), y, task, held, None, shares, seed, source)


def _check_shares(validation: float, test: float) -> None:
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ConfigError(f"validation {validation} and test {test} must be above 0 and together below 1, as shares")


def _task_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:58]


def _names(kinds: np.ndarray, names: Sequence[str] | None) -> list[str]:
    named = names is not None and kinds.dtype.kind in "iu" and kinds.max() < len(names)
    return [str(names[kind]) if named else str(kind) for kind in kinds]


def _digits() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pixels 0..16 become float32 in [-1, 1]; there is no official test set."""
    from sklearn import __version__
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8) / 8 - 1).astype(np.float32)
    return (x, y, x[:0], y[:0], None), {"scikit-learn": __version__}


def _npz(path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npz: {str(error).splitlines()[0]}") from error
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in found]
    if missing:
        raise DataError(f"{path.name} has no {', '.join(missing)}; it has {', '.join(found)}")
    for part in ("train", "test"):
        x, y = found[f"x_{part}"], found[f"y_{part}"]
        if len(x) != len(y) or y.ndim != 1:
            raise DataError(f"{path.name}: x_{part} is {x.shape}, y_{part} {y.shape}; give one label per image")
    if found["x_train"].shape[1:] != found["x_test"].shape[1:]:
        raise DataError(f"{path.name}: x_train and x_test differ in the shape of one image")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    arrays = *(found[name] for name in ("x_train", "y_train", "x_test", "y_test")), found.get("label_names")
    return arrays, {"sha256": digest}


def _images(x: np.ndarray) -> np.ndarray:
    """[N, C, H, W] of [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 or float32; C is 1 or 3 (other shapes stay)."""
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return x.transpose(0, 3, 1, 2)
    return x


def _numbers(path: Path, name: str, values: Sequence[Any]) -> np.ndarray:
    """float64, missing values as nan."""
    try:
        return np.array([math.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name} column {name!r} does not hold numbers: {error}; leave it out") from error


def _standardised(x: np.ndarray) -> np.ndarray:
    known = ~np.isnan(x)
    n = np.maximum(known.sum(0), 1)
    centred = np.where(known, x - np.where(known, x, 0).sum(0) / n, 0)
    deviation = np.sqrt((centred**2).sum(0) / n)
    return centred / np.where(deviation > 0, deviation, 1)
