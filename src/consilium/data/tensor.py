"""Images, tables and token ids: one tensor for the data set, and for every client and split the rows it holds of it.

Shapes: N rows of the data set, n of a split, B of a batch, *S the shape of one example ((C, H, W) or (columns,)).
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from consilium.data.encode import Encoded
from consilium.data.task import ClientData, Federation, Task
from consilium.errors import DataError

__all__ = [
    "AUGMENTATIONS",
    "Augment",
    "Augmented",
    "TensorSplit",
    "crop_flip",
    "cut",
    "federation",
    "of_texts",
    "on_device",
]

Augment = Literal["none", "crop", "flip", "crop-flip"]
AUGMENTATIONS: tuple[Augment, ...] = get_args(Augment)
PADDING = 4
"""Pixels that "crop" pads on every side before it cuts a window of the old size, as is usual for CIFAR."""


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Rows of a data set that all splits share; nothing is copied until a batch is asked for.

    Args:
        x: [N, *S] float32, or uint8 pixels, which a batch turns into float32 in [-1, 1], or token ids [N, L] int64.
        y: [N] int64, places in `labels`.
        index: [n] int64, the rows of this split.
        labels: names of the classes.
        cut: rows that were longer as texts (`of_texts`); nothing of an image or a row of a table is ever cut off.
        augment: what is done to training batches alone, see `augmented`.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    labels: tuple[str, ...]
    cut: int = 0
    augment: Augment = "none"

    way = "classification"

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} examples but {len(self.y)} labels: give one label per example")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """*S."""
        return tuple(self.x.shape[1:])

    @cached_property
    def targets(self) -> list[str]:
        """Label name per example."""
        return [self.labels[i] for i in self.y[self.index].tolist()]

    @property
    def texts(self) -> list[str]:
        """What `evaluate` compares predictions with, as in `encode.Encoded`: the label names."""
        return self.targets

    @property
    def rows(self) -> list[str]:
        """Row of the data set per example."""
        return [str(i) for i in self.index.tolist()]

    def examples(self) -> Iterable[tuple[str, str]]:
        """SHA-256 of an example's bits, and its label, for the fingerprint."""
        for row, target in zip(self.index.tolist(), self.targets, strict=True):
            yield hashlib.sha256(self.x[row].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(), target

    def order(self) -> list[int]:
        """All rows; tensors need no sorting by length."""
        return list(range(len(self)))

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device) -> dict[str, Tensor]:
        """`x` [B, *S] float32 (of texts [B, L] int64) and `labels` [B] int64 of these places in the split."""
        return self.at(self.index.index_select(0, torch.as_tensor(rows)), device)

    def at(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """`x` and `labels` of these rows of the data set, of any shape."""
        # Not `x[rows]`, which on a CPU goes through the pixels one by one.
        x = self.x.index_select(0, rows.flatten().to(self.x.device)).view(*rows.shape, *self.shape)
        x = self._seen(x.to(device))
        x = x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
        return {"x": x, "labels": self.y[rows].to(device)}

    def _seen(self, x: Tensor) -> Tensor:
        return x

    def augmented(self, seed: int) -> "TensorSplit":
        """The split whose batches are augmented by draws from this seed, in the order they are asked for: for one call
        of `training.fit`. Itself where `augment` is "none"."""
        if self.augment == "none":
            return self
        given = {f.name: getattr(self, f.name) for f in fields(TensorSplit)}
        return Augmented(**given, generator=torch.Generator().manual_seed(seed))

    def epochs(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of each batch [B] int64: `epochs` shuffled passes, the last batch of a pass may be short."""
        for _ in range(epochs):
            yield from torch.randperm(len(self), generator=generator).split(batch_size)


def of_texts(tokens: Encoded, labels: tuple[str, ...], length: int) -> TensorSplit:
    """Rows of token ids as one tensor x, int64 [N, length], filled up with the padding id at the end."""
    x = torch.full((len(tokens), length), tokens.pad, dtype=torch.int64)
    for row, ids in zip(x, tokens.sources, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return TensorSplit(x, torch.tensor(tokens.targets), torch.arange(len(x)), labels, tokens.cut)


@dataclass(frozen=True, eq=False)
class Augmented(TensorSplit):
    """A split for training: every batch is another draw from `generator` (on the CPU: equal bits on every device)."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def _seen(self, x: Tensor) -> Tensor:
        return crop_flip(x, self.augment, self.generator)


def crop_flip(x: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W], uint8 or float32, each cut and turned by draws of its own; on the device of x.

    "crop": the window of H x W of the image padded by 4 black pixels (0, of float32 in [-1, 1]: -1) whose corner is
    drawn from {0..8}^2. "flip": then mirrored left to right with probability 1/2.
    """
    B, C, H, W = x.shape
    rows, columns = torch.arange(H).expand(B, H), torch.arange(W).expand(B, W)
    if "flip" in how:
        flipped = torch.rand(B, 1, generator=generator) < 0.5
        columns = torch.where(flipped, W - 1 - columns, columns)
    if "crop" in how:
        top, left = torch.randint(-PADDING, PADDING + 1, (2, B, 1), generator=generator)
        rows, columns = rows + top, columns + left
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    places = rows.clamp(0, H - 1)[:, :, None] * W + columns.clamp(0, W - 1)[:, None, :]
    places, outside = places.flatten(1).to(x.device), ~inside.to(x.device)
    cut = x.flatten(2).gather(2, places[:, None].expand(B, C, H * W)).view(B, C, H, W)
    return cut.masked_fill_(outside[:, None], 0 if x.dtype == torch.uint8 else -1)


def federation(
    x: Tensor,
    y: Tensor,
    task: Task,
    train: Mapping[str, Sequence[int]],
    test: Mapping[str, Sequence[int]] | None,
    shares: tuple[float, float],
    seed: int,
    source: Mapping[str, Any],
    augment: Augment = "none",
    names: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Federation:
    """Clients over one tensor; who has too few rows for three splits is skipped, with the reason.

    Args:
        train: client -> rows to learn from. test: client -> rows of an official test set; None: cut from `train`.
        shares: of a client's rows, per class, for validation and (without an official test set) for test.
        seed: of the cut, with the client's name. augment: of training batches. names, notes: see `Federation`.
    """
    clients, skipped = {}, {}
    for name, rows in train.items():
        rng = random.Random(f"{seed}:{name}")
        held = [shares[0]] if test is not None else [*shares]
        parts = cut(rows, y, held, rng)
        parts = [*parts, sorted(test[name])] if test is not None else parts
        if all(parts):
            splits = [TensorSplit(x, y, torch.tensor(part), task.labels, augment=augment) for part in parts]
            clients[name] = ClientData(task, *splits)
        else:
            skipped[name] = f"{len(rows)} row(s), too few for training, validation and test"
    return Federation(clients, skipped, dict(source), dict(names or {}), tuple(notes))


def cut(rows: Sequence[int], y: Tensor, shares: Sequence[float], rng: random.Random) -> list[list[int]]:
    """Rows for training and for each of `shares`, class by class, so that all parts have the same mixture.

    A class gives a part at least one row as long as one is left to train on; of a single row, it trains. A part that
    nevertheless gets none is given a row of the largest of the others but training, if that has two.
    """
    classes = defaultdict(list)
    for row in sorted(rows):
        classes[int(y[row])].append(row)
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for _, members in sorted(classes.items()):
        rng.shuffle(members)
        left = len(members) - 1
        for part, share in enumerate(shares, 1):
            n = min(left, max(1, round(len(members) * share)))
            parts[part] += [members.pop() for _ in range(n)]
            left -= n
        parts[0] += members
    for part in parts[1:]:
        if not part and len(largest := max(parts[1:], key=len)) > 1:
            part.append(largest.pop())
    return [sorted(part) for part in parts]


def on_device(federation: Federation, device: torch.device) -> Federation:
    """The same clients over tensors on the device, where all of them fit into a quarter of its free memory; on a CPU,
    and for texts, the federation as it is."""
    splits = [split for data in federation.clients.values() for _, split in data.splits()]
    if device.type != "cuda" or not all(isinstance(split, TensorSplit) for split in splits):
        return federation
    own = {id(t): t for split in splits for t in (split.x, split.y)}
    if sum(t.nbytes for t in own.values()) > torch.cuda.mem_get_info(device)[0] / 4:
        return federation
    there = {key: t.to(device) for key, t in own.items()}

    def moved(split: TensorSplit) -> TensorSplit:
        return replace(split, x=there[id(split.x)], y=there[id(split.y)])

    clients = {
        name: replace(data, train=moved(data.train), validation=moved(data.validation), test=moved(data.test))
        for name, data in federation.clients.items()
    }
    return replace(federation, clients=clients)
