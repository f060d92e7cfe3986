"""Readers for CIFAR's binary version and MNIST's IDX files.

They check headers, sizes and labels before they use a pixel.
"""

import gzip
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from consilium.data.pixels import Images, labelled, resized
from consilium.errors import ConfigError, DataError

__all__ = ["IDX", "read_cifar", "read_idx"]

IDX = re.compile(r"(?P<before>.*)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(?P<gz>\.gz)?")
_UNPACKED = 1100  # Deflate packs at most 1032 bytes into one.
_LABELS = {"fine_label": (1, "fine_label_names.txt", 100), "coarse_label": (0, "coarse_label_names.txt", 20)}


def read_cifar(folder: Path, files: Sequence[str], label: str, size: int) -> Images:
    """Read CIFAR-10 or CIFAR-100.

    CIFAR-10 is data_batch_1.bin .. test_batch.bin with one label byte per record, CIFAR-100 is train.bin and test.bin
    with two.

    Args:
        label: for CIFAR-100, "fine_label" (or "") or "coarse_label"; for CIFAR-10, "".

    Raises:
        DataError: if a file is not a whole number of records, or a label is out of range.
        ConfigError: if `label` has another value.
    """
    is_cifar100 = "train.bin" in files
    if label not in ("", *_LABELS) if is_cifar100 else label:
        choices = f"{' or '.join(_LABELS)}" if is_cifar100 else "nothing, it has one label"
        raise ConfigError(f"data.label is {label!r}; of {folder.name} it can be {choices}")
    label_offset, names_file, classes = _LABELS[label or "fine_label"] if is_cifar100 else (0, "batches.meta.txt", 10)
    train = ["train.bin"] if is_cifar100 else sorted(f for f in files if re.fullmatch(r"data_batch_\d+\.bin", f))
    test = [f for f in ("test.bin" if is_cifar100 else "test_batch.bin",) if f in files]
    width = 3072 + (2 if is_cifar100 else 1)
    parts = [_records(folder / file, width, label_offset, classes) for file in (*train, *test)]
    records = np.concatenate(parts)
    n = sum(len(part) for part in parts[: len(train)])
    x = np.ascontiguousarray(records[:, width - 3072 :]).reshape(-1, 3, 32, 32)
    y, labels = labelled(records[:, label_offset].astype(np.int64), _listed(folder / names_file, classes))
    return Images(resized(x, size), y, labels, n, source={"format": "CIFAR binary", "files": [*train, *test]})


def _records(path: Path, width: int, place: int, classes: int) -> np.ndarray:
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % width:
        raise DataError(f"{path} has {len(data)} bytes; it must be a whole number of records of {width}: get it again")
    records = data.reshape(-1, width)
    if (invalid_rows := np.flatnonzero(records[:, place] >= classes)).size:
        raise DataError(
            f"{path} record {invalid_rows[0]} has label {records[invalid_rows[0], place]}; there are 0..{classes - 1}"
        )
    return records


def _listed(path: Path, classes: int) -> list[str] | None:
    """Return the names of the classes, one per line of the file; None unless there are `classes` distinct names."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    return names if len(names) == classes and len(set(names)) == classes else None


def read_idx(folder: Path, files: Sequence[str], size: int) -> Images:
    """Read MNIST or a data set in the same format.

    The files are <name>train-images-idx3-ubyte and -labels-idx1-ubyte, and t10k- or test- likewise; all may end in .gz.

    Raises:
        DataError: if a file is broken, of another kind or missing, or if there are two sets of names.
    """
    image_files = {}
    for file in files:
        if match := IDX.fullmatch(file):
            image_files.setdefault((match["before"], "train" if match["part"] == "train" else "test"), file)
    prefixes = sorted({prefix for prefix, _ in image_files})
    if len(prefixes) > 1 or (prefixes[0], "train") not in image_files:
        raise DataError(
            f"{folder} has {', '.join(sorted(image_files.values()))}; give a directory with one training set"
        )
    parts = []
    for part in ("train", "test"):
        if file := image_files.get((prefixes[0], part)):
            labels_path = _beside(folder, file, files)
            x, y = _idx(folder / file, 3), _idx(labels_path, 1)
            if len(x) != len(y):
                raise DataError(f"{folder / file} has {len(x)} images, but there are {len(y)} labels of them")
            parts.append((x, y))
    shapes = [x.shape[1:] for x, _ in parts]
    if len(set(shapes)) > 1:
        raise DataError(f"{folder}: images for training are {shapes[0]}, for test {shapes[1]}")
    x = np.concatenate([x for x, _ in parts])[:, None]
    y, labels = labelled(np.concatenate([y for _, y in parts]).astype(np.int64), None)
    source = {"format": "IDX", "files": sorted(image_files.values())}
    return Images(resized(x, size), y, labels, len(parts[0][1]), source=source)


def _beside(folder: Path, images: str, files: Sequence[str]) -> Path:
    """Return the path of the labels that belong to a file of images, compressed or not."""
    labels_name = (
        images.removesuffix(".gz").replace("-images-idx3", "-labels-idx1").replace("-images.idx3", "-labels.idx1")
    )
    for name in (labels_name, f"{labels_name}.gz"):
        if name in files:
            return folder / name
    raise DataError(f"{folder} has {images}, but not {labels_name} or {labels_name}.gz")


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array that the header announces.

    At most one byte more than announced is unpacked, and only if the file could hold that much.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(
                    f"{path} is no IDX file of bytes in {dimensions} dimension(s): it begins {header[:4]!r}"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            n = int(np.prod(shape, dtype=object))
            data = file.read(n + 1) if n <= _UNPACKED * path.stat().st_size else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get it again") from error
    if len(data) != n or not n:
        byte_count = "more" if len(data) > n else str(len(data))
        raise DataError(f"{path} announces {' x '.join(map(str, shape))} bytes and holds {byte_count}; get it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
