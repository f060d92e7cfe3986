"""Clients with images or with tables of numbers: `images` and `table` read the rows, this module deals them."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from consilium.constraints import NonNegativeInt, OpenShare, PositiveFloat, PositiveInt, check_settings
from consilium.data.dialect import Dialect
from consilium.data.images import Axes, read_images
from consilium.data.names import by_client, client_ids, names_of
from consilium.data.pixels import Images, Pages
from consilium.data.sets import check_shares, digest, located
from consilium.data.table import Table, read_table
from consilium.data.task import Federation, Task
from consilium.data.tensor import Augment, federation
from consilium.data.textfile import look_alikes, usable
from consilium.errors import DataError
from consilium.kinds import DataSource, Gives

__all__ = ["ImageData", "TableData"]


@dataclass(frozen=True)
class ImageData(DataSource):
    """Clients that hold images of classes.

    Args:
        path: "digits"; an .npz file; a folder of images per class, or of such folders per client; Parquet; a directory
            of `datasets` or owner/name on the hub; CIFAR's binary version; MNIST's files. See `consilium.data.images`.
        partition: "pathological" (`classes` per client, unequal shares of each), "dirichlet" (label skew by `alpha`),
            "iid"; used if neither `client` nor folders assign the images to clients.
        clients: number of clients if `partition` deals the images, >= 1.
        classes: number of classes per client under "pathological", >= 1.
        alpha: concentration of the Dirichlet distribution, > 0.
        validation: share of a client's training rows, class by class, that is kept for validation, in (0, 1).
        test: share of a client's rows that is kept for test if there is no official test set (digits), in (0, 1);
            an official test set is dealt in the same proportions as the training set.
        examples: maximum number of rows to deal from the training set and from the test set, drawn at random, >= 0;
            0: all.
        size: side in pixels of the square to which every image is scaled and cropped, >= 0; 0: keep the images as they
            are, which must then be of equal size.
        image: column of the images in a table (Parquet, `datasets`); "": guessed.
        label: column of the classes in a table; "": guessed. for CIFAR-100, "fine_label" (or "") or "coarse_label".
        client: column of a table with the client of each row; "": dealt by `partition`.
        pages: what to do with a file of several pages or frames (TIFF, GIF, WebP, APNG): "refuse" it, or take the
            "first" or "all" as images. the pages of one file may then lie in different splits.
        axes: order of the axes of one image in an .npz file: "CHW" or "HWC" (channels, height, width); "": recognised
            from the shape if possible.
        augment: augmentation of training batches only: "crop" (a random window after padding by 4), "flip" (left to
            right, with probability 1/2), "crop-flip", "none". drawn from the seed of client and round.
    """

    gives: ClassVar[Gives] = "tensors"

    path: Path = Path("digits")
    partition: Literal["pathological", "dirichlet", "iid"] = "pathological"
    clients: PositiveInt = 10
    classes: PositiveInt = 2
    alpha: PositiveFloat = 0.3
    validation: OpenShare = 0.2
    test: OpenShare = 0.2
    examples: NonNegativeInt = 0
    size: NonNegativeInt = 0
    image: str = ""
    label: str = ""
    client: str = ""
    pages: Pages = "refuse"
    axes: Axes = ""
    augment: Augment = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path("digits") if str(self.path) == "digits" else located(self.path))
        check_settings(self, "data.")
        check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read and deal the images. Equal files and seeds give equal results.

        Raises:
            DataError: if the file, an image or a label cannot be used, or no client has enough rows.
        """
        return self.deal(self.read(), seed)

    def read(self) -> Images:
        """Read all images.

        Raises:
            DataError: if the file, an image or a label cannot be used.
        """
        return read_images(self.path, self.size, self.image, self.label, self.client, self.pages, self.axes)

    def deal(self, found: Images, seed: int) -> Federation:
        """Deal the images that `read` returned.

        Raises:
            DataError: if no client has enough rows, or if the data to augment are not images.
        """
        if self.augment != "none" and found.x.ndim != 4:
            raise DataError(f"data.augment is for images (channels, height, width); these are {found.x.shape[1:]}")
        task = Task(_task_name(self.path), "classification", found.labels, "accuracy")
        n, rng = found.train, np.random.default_rng(seed)
        pools = [rng.permutation(n), n + rng.permutation(len(found) - n)]
        pools = [np.sort(pool[: self.examples or None]) for pool in pools if len(pool)]
        ids = client_ids(found.owners)
        partitions = [self._deal(found, pool, task.name, ids, seed) for pool in pools]
        clients = sorted({client for part in partitions for client in part})
        train, *official_tests = ({client: part.get(client, []) for client in clients} for part in partitions)
        origin = {"type": "ImageData", "path": str(self.path), "partition": "" if found.owners else self.partition}
        return federation(
            torch.from_numpy(found.x),
            torch.from_numpy(found.y),
            task,
            train,
            official_tests[0] if official_tests else None,
            (self.validation, self.test),
            seed,
            {**origin, "rows": len(found), **found.source},
            self.augment,
            {id: name for name, id in ids.items() if id != name},
            look_alikes({"labels": found.labels, "clients": ids}),
        )

    def _deal(
        self, found: Images, pool: np.ndarray, task: str, ids: Mapping[str, str], seed: int
    ) -> dict[str, list[int]]:
        """Return client id -> its rows of the pool.

        Args:
            ids: client name -> client id.
        """
        from consilium.data.partition import class_shares, deal

        if found.owners:
            rows_by_client: dict[str, list[int]] = defaultdict(list)
            for row in pool.tolist():
                rows_by_client[ids[found.owners[row]]].append(row)
            return rows_by_client
        shares = class_shares(len(found.labels), self.clients, self.partition, self.alpha, self.classes, seed)
        names = [f"{task}-{i:0{max(2, len(str(self.clients - 1)))}d}" for i in range(self.clients)]
        parts = deal(found.y[pool], shares, seed)
        return {name: [int(pool[i]) for i in rows] for name, rows in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class TableData(DataSource):
    """Clients that hold rows of numbers, dealt by a client column.

    A client standardises its columns by the mean and standard deviation of its own training rows only. A missing value
    becomes the mean (0). A column without any value in the client's training rows gets mean 0 and deviation 1.

    Args:
        path: a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file (text also as .gz or .zst), a folder of such files, a
            directory of `datasets`, or owner/name on the hub. decimal commas are understood.
        target: column of the class; `--data.label` is accepted too.
        client: column with the client of each row.
        columns: columns of numbers; () takes all others.
        positive: make two classes, "yes" if the target is above 0 and "no" otherwise, as for the grades of a disease.
        validation: share of a client's rows for validation, class by class, in (0, 1); the rows for neither validation
            nor test are for training.
        test: share of a client's rows for test, class by class, in (0, 1).
        separator: separator between the fields of a text file: one character, or "tab"; "": recognised.
        quote: quote around the fields of a text file: one character, or "none" if quotes are ordinary characters; "":
            recognised.
        encoding: encoding of a text file, e.g. cp1252; "": recognised.
    """

    gives: ClassVar[Gives] = "tensors"

    path: Path = Path("heart_disease.parquet")
    target: str = "num"
    client: str = "hospital"
    columns: tuple[str, ...] = ()
    positive: bool = False
    validation: OpenShare = 0.15
    test: OpenShare = 0.25
    separator: str = ""
    quote: str = ""
    encoding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        Dialect(self.separator, self.quote, self.encoding)
        check_settings(self, "data.")
        check_shares(self.validation, self.test)

    def load(self, seed: int) -> Federation:
        """Read, deal and standardise the rows. Equal files and seeds give equal results.

        Raises:
            DataError: if the file, a column or a value cannot be used, or no client has enough rows.
        """
        federation, contents = self._split(seed)
        for client, data in federation.clients.items():
            rows = contents.held[client]
            scale = Scale.of(contents.columns, contents.x[data.train.index.numpy()])
            data.train.x[rows] = torch.from_numpy(scale.standardised(contents.x[rows]).astype(np.float32))
        return federation

    def scale(self, client: str, seed: int) -> "Scale":
        """Return the means and deviations with which `load` standardises the rows of this client.

        Raises:
            DataError: as `load`.
        """
        federation, contents = self._split(seed)
        return Scale.of(contents.columns, contents.x[federation.clients[client].train.index.numpy()])

    def _split(self, seed: int) -> "tuple[Federation, _Rows]":
        """Return the clients over a tensor of zeros, and the contents of the table."""
        contents = self._read()
        x = contents.x
        labels, label_ids = np.unique([contents.targets[row] for row in contents.used], return_inverse=True)
        y = torch.full((len(x),), -1)
        y[contents.used] = torch.from_numpy(label_ids.astype(np.int64))
        task = Task(_task_name(self.path), "classification", tuple(str(label) for label in labels), "accuracy")
        source = {
            "type": "TableData",
            "path": str(self.path),
            "sha256": digest(self.path),
            "rows": len(x),
            "columns": [*contents.columns],
        }
        notes = [*contents.notes, *look_alikes({"labels": task.labels, "clients": contents.names})]
        table_federation = federation(
            torch.zeros(x.shape, dtype=torch.float32),
            y,
            task,
            contents.held,
            None,
            (self.validation, self.test),
            seed,
            source,
            names={id: name for name, id in contents.names.items() if id != name},
            notes=notes,
        )
        return table_federation, contents

    def _read(self) -> "_Rows":
        dialect = Dialect(self.separator, self.quote, self.encoding)
        table = read_table(self.path, dialect, [self.target, self.client, *self.columns])
        columns = self.columns or tuple(c for c in table.column_names if c not in (self.target, self.client))
        owners: list[Any] = names_of(table.texts(self.client))
        targets: list[Any] = names_of(table.texts(self.target))
        if self.positive:
            grades = table.numbers(self.target)
            targets = [None if math.isnan(grade) else ("no", "yes")[int(grade > 0)] for grade in grades]
        used_rows, notes = usable(table, {self.target: targets, self.client: owners})
        rows_by_client, _ = by_client([owners[row] for row in used_rows])
        rows_by_client = {client: [used_rows[i] for i in rows] for client, rows in rows_by_client.items()}
        ids = {owners[rows[0]]: client for client, rows in rows_by_client.items()}
        return _Rows(columns, matrix(table, columns), targets, used_rows, rows_by_client, ids, notes)


@dataclass(frozen=True)
class _Rows:
    """The contents of a table.

    Args:
        columns: names of the columns of numbers.
        x: the columns of numbers, [N, S] float64.
        targets: class of every row.
        used: rows that can be used.
        held: client id -> its rows.
        names: client name -> client id.
        notes: notes on the rows that cannot be used.
    """

    columns: tuple[str, ...]
    x: np.ndarray
    targets: list[str]
    used: list[int]
    held: dict[str, list[int]]
    names: dict[str, str]
    notes: list[str]


UNSEEN = 1e30
"""Deviation of a column without values: it brings any number to 0, and is one that JSON and float32 can hold."""


@dataclass(frozen=True)
class Scale:
    """The means and deviations that standardise a client's columns.

    Args:
        columns: names of the columns.
        mean: mean of each column over the client's training rows; 0 if no row has a value.
        deviation: standard deviation of each column over these rows; 1 if all are alike, and `UNSEEN` if no row has a
            value: whatever other rows hold there, the model has never seen it and gets 0.
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, columns: Sequence[str], x: np.ndarray) -> "Scale":
        """Return the scale of rows x [n, S], in which nan stands for a missing value."""
        known_mask = ~np.isnan(x)
        n = np.maximum(known_mask.sum(0), 1)
        mean = np.where(known_mask, x, 0).sum(0) / n
        deviation = np.sqrt((np.where(known_mask, x - mean, 0) ** 2).sum(0) / n)
        deviation = np.where(known_mask.any(0), np.where(deviation > 0, deviation, 1), UNSEEN)
        return cls(tuple(columns), tuple(mean.tolist()), tuple(deviation.tolist()))

    @classmethod
    def of_json(cls, told: Mapping[str, Sequence[Any]]) -> "Scale":
        """Return the scale that `dataclasses.asdict` turned into a dict, after a round trip through JSON."""
        return cls(*(tuple(told[name]) for name in ("columns", "mean", "deviation")))

    def standardised(self, x: np.ndarray) -> np.ndarray:
        """Return (x - mean) / deviation, and 0 where x is nan, [n, S] float64."""
        return np.where(np.isnan(x), 0, (x - np.array(self.mean)) / np.array(self.deviation))


def matrix(table: Table, columns: Sequence[str]) -> np.ndarray:
    """Return these columns of a table, [N, S] float64, with nan for missing values.

    Raises:
        DataError: if a value is not a number, or there are no columns.
    """
    if not columns:
        raise DataError(f"{table.name} has no columns of numbers beside the target and the client; add some")
    return np.stack([table.numbers(name) for name in columns], axis=1)


def _task_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:58]
