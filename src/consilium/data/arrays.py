"""Images and tables as clients: `images` reads the one, `textfile` the other; here their rows are dealt."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from consilium.data.images import AXES, Axes, read_images
from consilium.data.pixels import PAGES, Images, Pages
from consilium.data.sets import digest, located
from consilium.data.task import Federation, Task
from consilium.data.tensor import AUGMENTATIONS, Augment, federation
from consilium.data.textfile import by_client, read_rows, strings
from consilium.errors import ConfigError, DataError

__all__ = ["ImageData", "TableData"]


@dataclass(frozen=True)
class ImageData:
    """Clients that hold images of classes.

    Args:
        path: "digits"; an .npz file; a folder of images per class, or of such folders per client; Parquet; a directory
            of `datasets` or owner/name on the hub; CIFAR's binary version; MNIST's files. See `consilium.data.images`.
        partition: "pathological" (`classes` per client, unequal shares of each), "dirichlet" (label skew by `alpha`),
            "iid"; used where neither `client` nor folders say whose an image is.
        clients: number of clients, >= 1, where the images are dealt.
        classes: per client, pathological, >= 1.
        alpha: of the Dirichlet distribution, > 0.
        validation: share of a client's training rows, class by class, that is kept for validation, in (0, 1).
        test: share of a client's rows that is kept for test where there is no official test set (digits), in (0, 1);
            an official one is dealt in the same proportions as the training set.
        examples: so many rows of each of the training and the test set are dealt, the first after shuffling; 0: all.
        size: every image is scaled to fill a square of so many pixels a side, and cut; 0: as they are, all equal.
        image, label: columns of a table (Parquet, `datasets`); "": guessed. Of CIFAR-100, label is "fine_label" (or "")
            or "coarse_label".
        client: column of a table that says which client a row belongs to; "": dealt by `partition`.
        pages: of a file with several pages or frames (TIFF, GIF, WebP, APNG): "refuse" it, or take the "first" or "all"
            as images. The pages of one file may then lie in different splits.
        axes: of one image in an .npz file: "CHW" or "HWC" (channels, height, width); "": by its shape, if that says it.
        augment: of training batches alone: "crop" (a random window after padding by 4), "flip" (left to right, every
            other image), "crop-flip", "none". Drawn from the seed of client and round.
    """

    path: Path = Path("digits")
    partition: Literal["pathological", "dirichlet", "iid"] = "pathological"
    clients: int = 10
    classes: int = 2
    alpha: float = 0.3
    validation: float = 0.2
    test: float = 0.2
    examples: int = 0
    size: int = 0
    image: str = ""
    label: str = ""
    client: str = ""
    pages: Pages = "refuse"
    axes: Axes = ""
    augment: Augment = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path("digits") if str(self.path) == "digits" else located(self.path))
        for name, least in (("clients", 1), ("classes", 1), ("examples", 0), ("size", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.alpha > 0 or math.isinf(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}; it must be a positive number")
        if self.partition not in ("pathological", "dirichlet", "iid"):
            raise ConfigError(f"partition {self.partition!r}: use pathological, dirichlet or iid")
        for name, allowed in (("pages", PAGES), ("axes", AXES)):
            if (given := getattr(self, name)) not in allowed:
                raise ConfigError(f"data.{name} is {given!r}; use {', '.join(filter(None, allowed))}")
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(f"augment {self.augment!r}: use {', '.join(AUGMENTATIONS)}")
        _check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read and deal the images; equal for equal files and seeds.

        Raises DataError when the file, an image or a label cannot be used, or no client has enough rows.
        """
        return self.deal(self.read(), seed)

    def read(self) -> Images:
        """Read all images; raises DataError when the file, an image or a label cannot be used."""
        return read_images(self.path, self.size, self.image, self.label, self.client, self.pages, self.axes)

    def deal(self, found: Images, seed: int) -> Federation:
        """Deal the images that `read` returned; raises DataError if no client has enough rows."""
        if self.augment != "none" and found.x.ndim != 4:
            raise DataError(f"data.augment is for images (channels, height, width); these are {found.x.shape[1:]}")
        task = Task(_task_name(self.path), "classification", found.labels, "accuracy")
        n, rng = found.train, np.random.default_rng(seed)
        pools = [rng.permutation(n), n + rng.permutation(len(found) - n)]
        pools = [np.sort(pool[: self.examples or None]) for pool in pools if len(pool)]
        dealt = [self._deal(found, pool, task.name, seed) for pool in pools]
        names = sorted({name for part in dealt for name in part})
        train, *official = ({name: part.get(name, []) for name in names} for part in dealt)
        told = {"type": "ImageData", "path": str(self.path), "partition": "" if found.owners else self.partition}
        return federation(
            torch.from_numpy(found.x),
            torch.from_numpy(found.y),
            task,
            train,
            official[0] if official else None,
            (self.validation, self.test),
            seed,
            {**told, "rows": len(found), **found.source},
            self.augment,
        )

    def _deal(self, found: Images, pool: np.ndarray, task: str, seed: int) -> dict[str, list[int]]:
        """Client -> those rows of the pool that are its own."""
        from consilium.data.partition import class_shares, deal

        if found.owners:
            where = f"column {self.client!r}" if self.client else str(self.path)
            held = by_client([found.owners[row] for row in pool], where)
            return {name: [int(pool[i]) for i in rows] for name, rows in held.items()}
        shares = class_shares(len(found.labels), self.clients, self.partition, self.alpha, self.classes, seed)
        ids = [f"{task}-{i:0{max(2, len(str(self.clients - 1)))}d}" for i in range(self.clients)]
        parts = deal(found.y[pool], shares, seed)
        return {name: [int(pool[i]) for i in rows] for name, rows in zip(ids, parts, strict=True)}


@dataclass(frozen=True)
class TableData:
    """Clients that hold rows of numbers, dealt by a client column.

    A client standardises its columns by the mean and deviation of its own training rows, and of no others; what is
    missing becomes the mean (0), a column that no training row of the client has recorded is 0 throughout.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file, a directory of `datasets`, or owner/name on the hub.
        target: column of the class; `--data.label` is taken too.
        client: column that says which client a row belongs to.
        columns: of numbers; () takes all others.
        positive: the class is whether the target is above 0 ("no", "yes"), as with the grades of a disease.
        validation: share of a client's rows, class by class; what neither validates nor tests is for training.
        test: share of a client's rows, likewise.
    """

    path: Path = Path("heart_disease.parquet")
    target: str = "num"
    client: str = "hospital"
    columns: tuple[str, ...] = ()
    positive: bool = False
    validation: float = 0.15
    test: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        _check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read and cut the rows; equal for equal files and seeds.

        Raises DataError when the file, a column or a value cannot be used, or no client has enough rows.
        """
        federation, columns, raw, held = self._split(seed)
        for client, data in federation.clients.items():
            scale = Scale.of(columns, raw[data.train.index.numpy()])
            data.train.x[held[client]] = torch.from_numpy(scale.standardised(raw[held[client]]).astype(np.float32))
        return federation

    def scale(self, client: str, seed: int) -> "Scale":
        """Return what `load` standardises the rows of this client by; raises as `load`."""
        federation, columns, raw, _ = self._split(seed)
        return Scale.of(columns, raw[federation.clients[client].train.index.numpy()])

    def _split(self, seed: int) -> tuple[Federation, tuple[str, ...], np.ndarray, dict[str, list[int]]]:
        """Return the clients over a tensor of zeros, the columns, their numbers [N, S] float64, each client's rows."""
        table, columns, x, held = self._read()
        targets = _numbers(self.path, self.target, table[self.target][:]) if self.positive else table[self.target][:]
        empty = [row for row, value in enumerate(targets) if value is None or value != value]
        if empty:
            raise DataError(f"{self.path.name} column {self.target!r} is empty in row {empty[0]}; remove or fill it")
        names = [("no", "yes")[int(value > 0)] if self.positive else str(value) for value in targets]
        kinds, places = np.unique(names, return_inverse=True)
        task = Task(_task_name(self.path), "classification", tuple(str(kind) for kind in kinds), "accuracy")
        source = {
            "type": "TableData",
            "path": str(self.path),
            "sha256": digest(self.path),
            "rows": len(x),
            "columns": [*columns],
        }
        y = torch.from_numpy(places.astype(np.int64))
        shares = (self.validation, self.test)
        zeros = torch.zeros(x.shape, dtype=torch.float32)
        return federation(zeros, y, task, held, None, shares, seed, source), columns, x, held

    def _read(self) -> tuple[Any, tuple[str, ...], np.ndarray, dict[str, list[int]]]:
        """The table, the names of the columns of numbers, these [N, S] float64, and the rows of every client."""
        table = read_rows(self.path, [self.target, self.client, *self.columns])
        columns = self.columns or tuple(c for c in table.column_names if c not in (self.target, self.client))
        held = by_client(strings(self.path, self.client, table[self.client][:]), f"column {self.client!r}")
        return table, columns, matrix(self.path, table, columns), held


@dataclass(frozen=True)
class Scale:
    """How a client's columns become numbers around 0.

    Args:
        columns: their names. mean, deviation: of each, over the client's training rows; 0 and 1 of a column that
            they never recorded, and a deviation of 1 where all rows are alike.
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, columns: Sequence[str], x: np.ndarray) -> "Scale":
        """Of rows x [n, S], with nan for what is missing."""
        known = ~np.isnan(x)
        n = np.maximum(known.sum(0), 1)
        mean = np.where(known, x, 0).sum(0) / n
        deviation = np.sqrt((np.where(known, x - mean, 0) ** 2).sum(0) / n)
        return cls(tuple(columns), tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1).tolist()))

    @classmethod
    def of_json(cls, told: Mapping[str, Sequence[Any]]) -> "Scale":
        """What `dataclasses.asdict` made of one, from JSON."""
        return cls(*(tuple(told[name]) for name in ("columns", "mean", "deviation")))

    def standardised(self, x: np.ndarray) -> np.ndarray:
        """(x - mean) / deviation, and 0 where x is nan, [n, S] float64."""
        return np.where(np.isnan(x), 0, (x - np.array(self.mean)) / np.array(self.deviation))


def matrix(path: Path, table: Any, columns: Sequence[str]) -> np.ndarray:
    """These columns of the table that was read from the file, [N, S] float64, with nan for what is missing.

    Raises:
        DataError: for what is no number.
    """
    return np.stack([_numbers(path, name, table[name][:]) for name in columns], axis=1)


def _check_shares(validation: float, test: float) -> None:
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ConfigError(f"validation {validation} and test {test} must be above 0 and together below 1, as shares")


def _task_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:58]


def _numbers(path: Path, name: str, values: Sequence[Any]) -> np.ndarray:
    """float64, missing values as nan."""
    numbers = np.full(len(values), math.nan)
    for row, value in enumerate(values):
        try:
            numbers[row] = math.nan if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path.name} column {name!r} does not hold numbers: row {row} is {value!r}; leave the column out"
            ) from error
    return numbers
