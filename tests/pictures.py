"""Tiny images on disk, in every form that is read: what the pixels are is known, so that tests can look for them."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "fish")


def pixels(n: int = 24, side: int = 8, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x [n, side, side, channels] uint8 (without the last axis for one channel), y [n]: classes by turns; a class is
    bright in a row of its own, so that a small network can tell them."""
    x = np.random.default_rng(seed).integers(0, 60, (n, side, side, channels), dtype=np.uint8)
    y = np.arange(n) % len(CLASSES)
    for image, kind in zip(x, y, strict=True):
        image[side // 4 * (kind + 1)] = 250
    return (x[..., 0] if channels == 1 else x), y


def folder(
    root: Path, n: int = 24, splits: tuple[str, ...] = (), ending: str = "png", seed: int = 0, **options
) -> Path:
    """root/<class>/000.png, or root/<split>/<class>/000.png with n images in each split."""
    for number, split in enumerate(splits or ("",)):
        x, y = pixels(n, seed=seed + number, **options)
        for i, (image, kind) in enumerate(zip(x, y, strict=True)):
            path = root / split / CLASSES[kind] / f"{i:03d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def table(n: int = 24, clients: int = 0, named: bool = True, **options):
    """A `datasets.Dataset` with the columns img and label, and site if there are clients."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Picture

    x, y = pixels(n, **options)
    columns = {"img": [Image.fromarray(image) for image in x], "label": y.tolist()}
    features = {"img": Picture(), "label": ClassLabel(names=list(CLASSES)) if named else Value("int64")}
    if clients:
        columns["site"] = [f"site {i // len(CLASSES) % clients}" for i in range(n)]
        features["site"] = Value("string")
    return Dataset.from_dict(columns, Features(features))


def cifar(root: Path, hundred: bool = False, n: int = 40, test: int = 20) -> Path:
    """data_batch_1.bin, data_batch_2.bin, test_batch.bin; or train.bin, test.bin. Record i has label i % classes, and
    of CIFAR-100 the coarse label i % 20; every byte of its image is i % 256."""
    root.mkdir(parents=True)
    files = {"train.bin": n, "test.bin": test} if hundred else {"data_batch_1.bin": n, "data_batch_2.bin": n}
    files |= {} if hundred else {"test_batch.bin": test}
    for name, count in files.items():
        labels = [[i % 20, i % 100] if hundred else [i % 10] for i in range(count)]
        (root / name).write_bytes(b"".join(bytes(label) + bytes([i % 256]) * 3072 for i, label in enumerate(labels)))
    names = "fine_label_names.txt" if hundred else "batches.meta.txt"
    (root / names).write_text("".join(f"class {i}\n" for i in range(100 if hundred else 10)))
    return root


def idx(root: Path, n: int = 40, test: int = 20, side: int = 8, packed: bool = False) -> Path:
    """MNIST's four files of tiny images; with `packed`, those of the training set as .gz."""
    root.mkdir(parents=True)
    for number, (part, count) in enumerate((("train", n), ("t10k", test))):
        x, y = pixels(count, side, 1, number)
        for kind, shape, data in (("images-idx3", x.shape, x), ("labels-idx1", y.shape, y.astype(np.uint8))):
            head = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
            name, content = f"{part}-{kind}-ubyte", head + data.tobytes()
            if packed and part == "train":
                name, content = f"{name}.gz", gzip.compress(content)
            (root / name).write_bytes(content)
    return root


def npz(path: Path, n: int = 40, test: int = 20, **options) -> Path:
    """x_train, y_train, x_test, y_test and the names of the classes."""
    (x_train, y_train), (x_test, y_test) = pixels(n, **options), pixels(test, seed=1, **options)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, label_names=np.array(CLASSES))
    return path
