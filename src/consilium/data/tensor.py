"""Images, tables and token ids as tensors: one tensor for the data set, and row indices for every client and split.

Shapes: N rows of the data set, n of a split, B of a batch, *S the shape of one example ((C, H, W) or (columns,)).
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from consilium.data.encode import Encoded
from consilium.data.task import ClientData, Federation, Task
from consilium.errors import DataError

__all__ = [
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
PADDING = 4
"""Number of pixels that "crop" pads on every side before it cuts a window of the old size, as is usual for CIFAR."""


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Rows of a data set that all splits share. Data is copied only when a batch is made.

    Args:
        x: [N, *S] float32, or uint8 pixels, which a batch converts to float32 in [-1, 1], or token ids [N, L] int64.
        y: [N] int64, indices into `labels`.
        index: [n] int64, the rows of this split.
        labels: names of the classes.
        cut: number of truncated texts (`of_texts`); images and rows of tables are never truncated.
        augment: augmentation of training batches only, see `augmented`.
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
        """Return the shape *S of one example."""
        return tuple(self.x.shape[1:])

    @cached_property
    def targets(self) -> list[str]:
        """Return the label name of each example."""
        return [self.labels[i] for i in self.y[self.index].tolist()]

    @property
    def texts(self) -> list[str]:
        """Return the label names, with which `evaluate` compares predictions, as in `encode.Encoded`."""
        return self.targets

    @property
    def rows(self) -> list[str]:
        """Return the row of the data set of each example."""
        return [str(i) for i in self.index.tolist()]

    def examples(self) -> Iterable[tuple[str, str]]:
        """Yield the SHA-256 of each example's bytes, and its label, for the fingerprint."""
        for row, target in zip(self.index.tolist(), self.targets, strict=True):
            yield hashlib.sha256(self.x[row].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(), target

    def order(self) -> list[int]:
        """Return all rows in order, because tensors need no sorting by length."""
        return list(range(len(self)))

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return `x` [B, *S] float32 (for texts [B, L] int64) and `labels` [B] int64 at these indices of the split."""
        return self.at(self.index.index_select(0, torch.as_tensor(rows)), device)

    def at(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return `x` and `labels` of these rows of the data set; `rows` may have any shape."""
        # This avoids `x[rows]`, which on a CPU copies the pixels one by one.
        x = self.x.index_select(0, rows.flatten().to(self.x.device)).view(*rows.shape, *self.shape)
        x = self._seen(x.to(device))
        x = x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
        return {"x": x, "labels": self.y[rows].to(device)}

    def _seen(self, x: Tensor) -> Tensor:
        return x

    def augmented(self, seed: int) -> "TensorSplit":
        """Return this split with augmented batches, for one call of `training.fit`.

        The augmentation is drawn from the seed, in the order in which batches are made. If `augment` is "none", the
        split itself is returned.
        """
        if self.augment == "none":
            return self
        settings = {f.name: getattr(self, f.name) for f in fields(TensorSplit)}
        return Augmented(**settings, generator=torch.Generator().manual_seed(seed))

    def epochs(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the rows [B] int64 of each batch in `epochs` shuffled passes; the last batch of a pass may be short."""
        for _ in range(epochs):
            yield from torch.randperm(len(self), generator=generator).split(batch_size)


def of_texts(tokens: Encoded, labels: tuple[str, ...], length: int) -> TensorSplit:
    """Return a split with the token ids as one tensor x, int64 [N, length], padded with the padding id at the end."""
    x = torch.full((len(tokens), length), tokens.pad, dtype=torch.int64)
    for row, ids in zip(x, tokens.sources, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return TensorSplit(x, torch.tensor(tokens.targets), torch.arange(len(x)), labels, tokens.cut)


@dataclass(frozen=True, eq=False)
class Augmented(TensorSplit):
    """A split for training with augmented batches.

    Every batch draws from `generator`, which is on the CPU so that all devices get equal bits.
    """

    generator: torch.Generator = field(default_factory=torch.Generator)

    def _seen(self, x: Tensor) -> Tensor:
        return crop_flip(x, self.augment, self.generator)


def crop_flip(x: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """Crop and flip images [B, C, H, W], uint8 or float32, with separate draws for each image, on the device of x.

    "crop": pad the image by 4 black pixels (0, or -1 for float32 in [-1, 1]) and take a window of H x W with a corner
    drawn from {0..8}^2. "flip": then mirror the image left to right with probability 1/2.
    """
    B, C, H, W = x.shape
    rows, columns = torch.arange(H).expand(B, H), torch.arange(W).expand(B, W)
    if "flip" in how:
        flip_mask = torch.rand(B, 1, generator=generator) < 0.5
        columns = torch.where(flip_mask, W - 1 - columns, columns)
    if "crop" in how:
        row_shift, column_shift = torch.randint(-PADDING, PADDING + 1, (2, B, 1), generator=generator)
        rows, columns = rows + row_shift, columns + column_shift
    inside_mask = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    indices = rows.clamp(0, H - 1)[:, :, None] * W + columns.clamp(0, W - 1)[:, None, :]
    indices, outside_mask = indices.flatten(1).to(x.device), ~inside_mask.to(x.device)
    crops = x.flatten(2).gather(2, indices[:, None].expand(B, C, H * W)).view(B, C, H, W)
    return crops.masked_fill_(outside_mask[:, None], 0 if x.dtype == torch.uint8 else -1)


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
    """Make a federation of clients over one tensor.

    A client with too few rows for three splits is skipped, and the reason is recorded.

    Args:
        train: client -> rows to learn from.
        test: client -> rows of an official test set; None: cut from `train`.
        shares: shares of a client's rows, per class, for validation and (without an official test set) for test.
        seed: seed of the splits, together with the client's name.
        augment: augmentation of training batches.
        names: see `Federation`.
        notes: see `Federation`.
    """
    clients, skip_reasons = {}, {}
    for name, rows in train.items():
        rng = random.Random(f"{seed}:{name}")
        part_shares = [shares[0]] if test is not None else [*shares]
        parts = cut(rows, y, part_shares, rng)
        parts = [*parts, sorted(test[name])] if test is not None else parts
        if all(parts):
            splits = [TensorSplit(x, y, torch.tensor(part), task.labels, augment=augment) for part in parts]
            clients[name] = ClientData(task, *splits)
        else:
            skip_reasons[name] = f"{len(rows)} row(s), too few for training, validation and test"
    return Federation(clients, skip_reasons, dict(source), dict(names or {}), tuple(notes))


def cut(rows: Sequence[int], y: Tensor, shares: Sequence[float], rng: random.Random) -> list[list[int]]:
    """Split rows into one part for training and one for each of `shares`, class by class.

    All parts have the same mixture of classes. Every part gets at least one row of a class, as long as one row is left
    for training; a single row is for training. A part that gets no row at all takes one from the largest of the parts
    other than training, if that has at least two.
    """
    rows_by_class = defaultdict(list)
    for row in sorted(rows):
        rows_by_class[int(y[row])].append(row)
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for _, members in sorted(rows_by_class.items()):
        rng.shuffle(members)
        remaining = len(members) - 1
        for part, share in enumerate(shares, 1):
            n = min(remaining, max(1, round(len(members) * share)))
            parts[part] += [members.pop() for _ in range(n)]
            remaining -= n
        parts[0] += members
    for part in parts[1:]:
        if not part and len(largest_part := max(parts[1:], key=len)) > 1:
            part.append(largest_part.pop())
    return [sorted(part) for part in parts]


def on_device(federation: Federation, device: torch.device) -> Federation:
    """Return the same clients with tensors on the device, if all tensors fit into a quarter of its free memory.

    Otherwise, on a CPU, and for texts, the federation is returned unchanged.
    """
    splits = [split for data in federation.clients.values() for _, split in data.splits()]
    if device.type != "cuda" or not all(isinstance(split, TensorSplit) for split in splits):
        return federation
    tensors = {id(t): t for split in splits for t in (split.x, split.y)}
    if sum(t.nbytes for t in tensors.values()) > torch.cuda.mem_get_info(device)[0] / 4:
        return federation
    device_tensors = {key: t.to(device) for key, t in tensors.items()}

    def moved(split: TensorSplit) -> TensorSplit:
        return replace(split, x=device_tensors[id(split.x)], y=device_tensors[id(split.y)])

    clients = {
        name: replace(data, train=moved(data.train), validation=moved(data.validation), test=moved(data.test))
        for name, data in federation.clients.items()
    }
    return replace(federation, clients=clients)
