"""A reader of images from many kinds of sources; the kind is detected from the contents of the path.

    digits                       scikit-learn's, 1,797 of 8 x 8; no file, no network
    FILE.npz                     x_train, y_train, x_test, y_test, optional label_names; arrays of objects are refused;
                                 `axes` must give the order of the axes if the shape is ambiguous
    DIR/<class>/*.png            a folder of images per class; or DIR/train/<class> and DIR/test/<class>
    DIR/<client>/<class>/*.png   a folder per client with a folder of images per class; also below DIR/train, DIR/test
    FILE.parquet, DIR/*.parquet  a column of encoded images and one of classes; train-*.parquet and test-*.parquet
    DIR                          of `datasets` (save_to_disk), or owner/name on the hub
    DIR/*.bin                    CIFAR-10's and CIFAR-100's binary version
    DIR/*-idx3-ubyte[.gz]        MNIST's files

Hidden files and files that operating systems leave in folders (Thumbs.db, __MACOSX, ...) are skipped and counted.
Folders are splits only if all of them have names of splits, because a class may be called train. Python pickles are
refused, because reading one can run arbitrary code.
"""

import math
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from consilium.data.binaries import IDX, read_cifar, read_idx
from consilium.data.columns import part_of, read_parquet, read_set
from consilium.data.pixels import ENDINGS, Images, Pages, finite, labelled, resized, scaled, stack
from consilium.data.sets import digest, is_directory, is_hub_name, is_litter
from consilium.errors import ConfigError, DataError, first_line
from consilium.machine import free_memory
from consilium.pointers import refuse_pointer, refuse_pointers

__all__ = ["Axes", "kind_of", "read_images"]

Axes = Literal["", "CHW", "HWC"]

ALLOWED = (
    "an .npz file, a .parquet file or a directory of them, a folder of images per class, a directory of `datasets`, "
    "CIFAR's *.bin, MNIST's *-idx3-ubyte, or owner/name on the hub"
)
TABLES = ("parquet", "datasets", "hub")
_PICKLES = re.compile(r".*\.(pkl|pickle|p|pt|pth)|data_batch_\d+|test_batch|batches\.meta|meta")


def kind_of(path: Path) -> str:
    """Return the kind of a path: "digits", "npz", "parquet", "datasets", "hub", "cifar", "idx" or "folder".

    Raises:
        DataError: if it is none of these; the message says what was found and what is allowed.
    """
    if str(path) == "digits":
        return "digits"
    if path.is_file() or path.suffix.lower() in (".npz", ".parquet"):
        refuse_pointer(path, DataError)
        if path.suffix.lower() in (".npz", ".parquet"):
            return path.suffix.lower()[1:]
        if _PICKLES.fullmatch(path.name.lower()):
            raise DataError(_pickled(path, [path.name]))
        is_packed = path.suffix.lower() in (".gz", ".zip", ".tar", ".tgz")
        raise DataError(
            f"{path} is {'packed: unpack it, and' if is_packed else 'a file of no known kind;'} give {ALLOWED}"
        )
    if not path.is_dir():
        if is_hub_name(path):
            return "hub"
        raise DataError(f"{path} is not there; give {ALLOWED}")
    refuse_pointers(path, DataError)
    names = _names(path)
    if is_directory(path):
        return "datasets"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if "train.bin" in names or any(re.fullmatch(r"data_batch_\d+\.bin", name) for name in names):
        return "cifar"
    if any(IDX.fullmatch(name) for name in names):
        return "idx"
    if pickles := [name for name in names if _PICKLES.fullmatch(name) and (path / name).is_file()]:
        raise DataError(_pickled(path, pickles))
    if any((path / name).is_dir() for name in names):
        return "folder"
    contents = f"holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "is empty"
    raise DataError(f"{path} {contents}; give {ALLOWED}")


def read_images(
    path: Path,
    size: int = 0,
    image: str = "",
    label: str = "",
    client: str = "",
    pages: Pages = "refuse",
    axes: Axes = "",
) -> Images:
    """Read all images of a source as one array, see `Images`.

    Args:
        size: side in pixels after scaling and cropping (`pixels.resized`); 0: keep the images, which must be of equal
            size.
        image: column of the images in a table; "": guessed.
        label: column of the classes in a table; "": guessed. For CIFAR-100: "fine_label" or "coarse_label".
        client: column of the clients in a table; "": no clients.
        pages: what to do with a file of several pages or frames, see `pixels.stack`.
        axes: order of the axes of one image in an .npz file; "": recognised from the shape if possible.

    Raises:
        DataError: if something cannot be read; the message names the file, row or column.
        ConfigError: if a column is given but the source is not a table, or `axes` but the source is not an .npz file.
    """
    kind = kind_of(path)
    column_options = [
        f"data.{name}" for name, column in (("image", image), ("label", label), ("client", client)) if column
    ]
    if kind not in TABLES and column_options and (kind != "cifar" or column_options != ["data.label"]):
        raise ConfigError(f"{', '.join(column_options)} names a column; {path.name} is no table: leave it out")
    if axes and kind != "npz":
        raise ConfigError(f"data.axes is for the arrays of an .npz file; {path.name} has none: leave it out")
    match kind:
        case "digits":
            return _digits(size)
        case "npz":
            return _npz(path, size, axes)
        case "cifar":
            return read_cifar(path, _names(path), label, size)
        case "idx":
            return read_idx(path, _names(path), size)
        case "parquet":
            return read_parquet(path, size, image, label, client, pages)
        case "datasets" | "hub":
            return read_set(path, size, image, label, client, pages)
    return _folder(path, size, pages)


def _names(path: Path) -> list[str]:
    """Return the names in a directory, without hidden files and files that operating systems leave there."""
    return sorted(entry.name for entry in path.iterdir() if not is_litter(entry.name))


def _litter(path: Path) -> dict[str, int]:
    """Count the files and folders below a directory that `_names` leaves out; return name -> count, largest first."""
    counts: Counter[str] = Counter()
    for _, folders, files in os.walk(path):
        counts.update("._*" if name.startswith("._") else name for name in (*folders, *files) if is_litter(name))
        folders[:] = [name for name in folders if not is_litter(name)]
    return dict(counts.most_common())


def _pickled(path: Path, found: Sequence[str]) -> str:
    return (
        f"{path} holds Python pickles ({', '.join(found[:3])}), which can run code when they are read, and are "
        "refused; get the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz), or save the arrays "
        "as .npz with x_train, y_train, x_test, y_test"
    )


def _folder(path: Path, size: int, pages: Pages) -> Images:
    """Read folders of images.

    The folders are classes; or clients with folders of classes; or train, test and optionally validation, with folders
    of classes or of clients.
    """
    roots = _roots(path)
    sites = {part: [site for root in roots[part] for site in _clients(root)] for part in roots}
    client_flags = {bool(client) for items in sites.values() for client, _ in items}
    if len(client_flags) > 1:
        raise DataError(f"{path} has a folder per client in one of train, validation and test, and not in another")
    parts = {
        part: [(client, *items) for client, site in sites[part] for items in _classes(site)]
        for part in ("train", "test")
    }
    files = parts["train"] + parts["test"]
    x, counts = stack(len(files), ((str(file), file) for _, file, _ in files), size, pages)
    label_ids, labels = labelled(np.array([name for *_, name in files]), None)
    source: dict[str, Any] = {"format": "image folder", "files": len(files)}
    if litter := _litter(path):
        source["litter"] = litter
    owners = np.repeat([client for client, *_ in files], counts).tolist() if client_flags == {True} else ()
    return Images(x, np.repeat(label_ids, counts), labels, sum(counts[: len(parts["train"])]), owners, source)


def _roots(path: Path) -> dict[str, list[Path]]:
    """Return the folders of the training part and of the test part.

    Folders are splits only if all of them have names of splits.

    Raises:
        DataError: if there are folders of clients or classes next to folders of splits.
    """
    names = _folders(path)
    part_by_name = {name: part_of(name) for name in names}
    if all(part_by_name.values()):
        roots = {part: [path / name for name in names if part_by_name[name] == part] for part in ("train", "test")}
        if not roots["train"]:
            raise DataError(f"{path} has folders for test alone ({', '.join(names)}); there must be one for training")
        return roots
    splits = [name for name in names if part_by_name[name] and _folders(path / name)]
    if splits and (others := [name for name in names if not part_by_name[name]]):
        raise DataError(
            f"{path} has the folder {others[0]} beside {splits[0]}, which holds folders; if {splits[0]} is a "
            "split, all must be: train, validation and test; if it is a client, rename it"
        )
    return {"train": [path], "test": []}


def _folders(path: Path) -> list[str]:
    return [name for name in _names(path) if (path / name).is_dir()]


def _clients(root: Path) -> list[tuple[str, Path]]:
    """Return (client, its folder of classes) of every client; only ("", root) unless every folder contains folders."""
    names = _folders(root)
    if names and all(_folders(root / name) for name in names):
        return [(name, root / name) for name in names]
    return [("", root)]


def _classes(root: Path) -> list[tuple[Path, str]]:
    """Return (file, class) of every image; files next to the folders of classes are ignored."""
    images = []
    for name in _folders(root):
        files = [root / name / file for file in _names(root / name)]
        for file in files:
            if file.is_dir() or file.suffix.lower() not in ENDINGS:
                kind = "a folder" if file.is_dir() else "no image"
                raise DataError(
                    f"{file} is {kind}; a folder of a class holds images alone ({' '.join(ENDINGS)}): move or remove it"
                )
        if not files:
            raise DataError(f"{root / name} is empty; put the images of the class into it, or remove it")
        images += [(file, name) for file in files]
    if not images:
        raise DataError(f"{root} has no folders of classes; put the images of each class into a folder of its name")
    return images


def _digits(size: int) -> Images:
    """Load scikit-learn's digits: pixels 0..16 become float32 in [-1, 1]; there is no official test set."""
    from sklearn import __version__
    from sklearn.datasets import load_digits

    if size:
        raise ConfigError("data.size is for image files; the digits are 8 x 8")
    x, y = load_digits(return_X_y=True)
    label_ids, labels = labelled(y, None)
    x = (x.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    return Images(x, label_ids, labels, len(y), source={"scikit-learn": __version__})


_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
UNFOLDED = 200
"""Maximum ratio of an .npz file's unpacked size to its own size."""


def _npz(path: Path, size: int, axes: Axes) -> Images:
    arrays = _arrays(path)
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if len(x) != len(y) or y.ndim != 1:
            raise DataError(f"{path.name}: x_{part} is {x.shape}, y_{part} {y.shape}; give one label per image")
        if x.dtype.kind == "f":
            finite(f"{path.name}: x_{part}", x)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise DataError(f"{path.name}: x_train and x_test differ in the shape of one image")
    x = np.concatenate([arrays["x_train"], arrays["x_test"]])
    x = _channels_first(path.name, scaled(x), axes)
    if x.dtype == np.float32:
        finite(f"{path.name}, as float32: x", x)  # A finite float64 may be too large for float32.
    y = np.concatenate([_class_of(path.name, name, arrays[name]) for name in ("y_train", "y_test")])
    label_ids, labels = labelled(y, arrays.get("label_names"))
    source = {"sha256": digest(path)}
    return Images(resized(x, size), label_ids, labels, len(arrays["y_train"]), source=source)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file that are used; no other array is unpacked."""
    refuse_pointer(path, DataError)
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in _ARRAYS if name not in file.files]:
                raise DataError(f"{path.name} has no {', '.join(missing)}; it has {', '.join(file.files)}")
            names = [name for name in (*_ARRAYS, "label_names") if name in file.files]
            _check_size(path, file, names)
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {first_line(error)}") from error


def _check_size(path: Path, file: Any, names: Sequence[str]) -> None:
    """Raise DataError if the arrays of an .npz file differ from their announced size, or are too large.

    The limit is the larger of 64 MB and `UNFOLDED` times the file's size, and at most half of the free memory.
    """
    total = 0
    for name in names:
        entry = file.zip.getinfo(f"{name}.npy")
        with file.zip.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
            size = stream.tell() + math.prod(shape) * dtype.itemsize
        if size != entry.file_size and not dtype.hasobject:  # numpy itself refuses arrays of objects.
            raise DataError(
                f"{path.name}: {name} announces {size:,} bytes, {shape} of {dtype}, and has {entry.file_size:,}"
            )
        total += size
    packed_size, free_bytes = path.stat().st_size, free_memory()
    if total > max(UNFOLDED * packed_size, 64_000_000):
        raise DataError(
            f"{path.name} has {packed_size:,} bytes and unpacks to {total:,}; at most {UNFOLDED} times as much is "
            "unpacked"
        )
    if total > free_bytes // 2:
        raise DataError(f"{path.name} unpacks to {total:,} bytes; {free_bytes:,} are free, of which half may be used")


def _class_of(name: str, array: str, y: np.ndarray) -> np.ndarray:
    """Return labels as whole numbers or texts.

    Raises:
        DataError: if a label is a number that is not whole.
    """
    if y.dtype.kind == "S":
        return np.char.decode(y, "utf-8", "replace")
    if y.dtype.kind == "f" and len(rows := np.flatnonzero(~np.isfinite(y) | (y != np.round(y)))):
        raise DataError(f"{name}: {array} is {y[rows[0]]} in row {rows[0]}; a class must be a whole number or a text")
    return y.astype(np.int64) if y.dtype.kind == "f" else y


def _channels_first(name: str, x: np.ndarray, axes: Axes) -> np.ndarray:
    """Return images [N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W]; rows [N, S] of numbers are unchanged.

    Args:
        axes: order of the axes of one image; "": the first or last axis is that of the channels if its size is 1 or 3.

    Raises:
        DataError: if the shape is ambiguous, or `axes` is given and an image does not have three axes.
    """
    shape = x.shape[1:]
    if axes and len(shape) != 3:
        raise DataError(f"{name}: an image is {shape}; data.axes {axes} is for three axes: leave it out")
    if len(shape) == 2:
        return x[:, None]
    if len(shape) != 3:
        return x
    layouts = [layout for layout, side in (("CHW", shape[0]), ("HWC", shape[2])) if side in (1, 3)]
    if not axes and len(layouts) != 1:
        raise DataError(
            f"{name}: an image is {shape}; that does not say which axis is that of the channels: give --data.axes CHW "
            "or --data.axes HWC"
        )
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if (axes or layouts[0]) == "HWC" else x
