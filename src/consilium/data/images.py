"""Images from wherever they lie: what a path is, is recognised by what is in it.

    digits                       scikit-learn's, 1,797 of 8 x 8; no file, no network
    FILE.npz                     x_train, y_train, x_test, y_test, perhaps label_names; arrays of objects are refused
    DIR/<class>/*.png            a folder of images per class; or DIR/train/<class> and DIR/test/<class>
    DIR/<client>/<class>/*.png   the same for every client, whose images they are; also below DIR/train and DIR/test
    FILE.parquet, DIR/*.parquet  a column of encoded images and one of classes; train-*.parquet and test-*.parquet
    DIR                          of `datasets` (save_to_disk), or owner/name on the hub
    DIR/*.bin                    CIFAR-10's and CIFAR-100's binary version
    DIR/*-idx3-ubyte[.gz]        MNIST's files

Python pickles are refused: reading one runs whatever it says.
"""

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consilium.data.binaries import IDX, read_cifar, read_idx
from consilium.data.columns import part_of, read_parquet, read_set
from consilium.data.pixels import ENDINGS, Images, labelled, resized, stack
from consilium.data.sets import digest, is_directory, is_hub_name
from consilium.errors import ConfigError, DataError, first_line

__all__ = ["kind_of", "read_images"]

ALLOWED = (
    "an .npz file, a .parquet file or a directory of them, a folder of images per class, a directory of `datasets`, "
    "CIFAR's *.bin, MNIST's *-idx3-ubyte, or owner/name on the hub"
)
TABLES = ("parquet", "datasets", "hub")
_PICKLES = re.compile(r".*\.(pkl|pickle|p|pt|pth)|data_batch_\d+|test_batch|batches\.meta|meta")


def kind_of(path: Path) -> str:
    """Which of "digits", "npz", "parquet", "datasets", "hub", "cifar", "idx" and "folder" a path is.

    Raises:
        DataError: for what is none of these, with what was found and what is allowed.
    """
    if str(path) == "digits":
        return "digits"
    if path.is_file() or path.suffix.lower() in (".npz", ".parquet"):
        if path.suffix.lower() in (".npz", ".parquet"):
            return path.suffix.lower()[1:]
        if _PICKLES.fullmatch(path.name.lower()):
            raise DataError(_pickled(path, [path.name]))
        packed = path.suffix.lower() in (".gz", ".zip", ".tar", ".tgz")
        raise DataError(
            f"{path} is {'packed: unpack it, and' if packed else 'a file of no known kind;'} give {ALLOWED}"
        )
    if not path.is_dir():
        if is_hub_name(path):
            return "hub"
        raise DataError(f"{path} is not there; give {ALLOWED}")
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
    found = f"holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "is empty"
    raise DataError(f"{path} {found}; give {ALLOWED}")


def read_images(path: Path, size: int = 0, image: str = "", label: str = "", client: str = "") -> Images:
    """All images of a source as one array, see `Images`.

    Args:
        size: of a side, after scaling and cutting (`pixels.resized`); 0: as they are, all equal.
        image, label, client: columns, of a table; "": guessed, and no client. label of CIFAR-100: "coarse_label".

    Raises:
        DataError: for what cannot be read, naming file, row or column.
        ConfigError: for a column where there is no table.
    """
    kind = kind_of(path)
    given = [f"data.{name}" for name, column in (("image", image), ("label", label), ("client", client)) if column]
    if kind not in TABLES and given and (kind != "cifar" or given != ["data.label"]):
        raise ConfigError(f"{', '.join(given)} names a column; {path.name} is no table: leave it out")
    match kind:
        case "digits":
            return _digits(size)
        case "npz":
            return _npz(path, size)
        case "cifar":
            return read_cifar(path, _names(path), label, size)
        case "idx":
            return read_idx(path, _names(path), size)
        case "parquet":
            return read_parquet(path, size, image, label, client)
        case "datasets" | "hub":
            return read_set(path, size, image, label, client)
    return _folder(path, size)


def _names(path: Path) -> list[str]:
    """What lies in a directory, but for what is hidden."""
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def _pickled(path: Path, found: Sequence[str]) -> str:
    return (
        f"{path} holds Python pickles ({', '.join(found[:3])}), which can run code when they are read, and are "
        "refused; get the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz), or save the arrays "
        "as .npz with x_train, y_train, x_test, y_test"
    )


def _folder(path: Path, size: int) -> Images:
    """Folders of images: a class each; or clients with the classes in them; or train (and validation) and test, with
    classes or clients in them."""
    roots = {"train": [path], "test": []}
    names = _folders(path)
    if any(part_of(name) == "train" for name in names):
        if odd := [name for name in names if part_of(name) is None]:
            raise DataError(f"{path} has the folder {odd[0]} beside train; allowed are train, validation and test")
        roots = {part: [path / name for name in names if part_of(name) == part] for part in roots}
    sites = {part: [site for root in roots[part] for site in _clients(root)] for part in roots}
    owned = {bool(client) for found in sites.values() for client, _ in found}
    if len(owned) > 1:
        raise DataError(f"{path} has a folder per client in one of train, validation and test, and not in another")
    parts = {
        part: [(client, *found) for client, site in sites[part] for found in _classes(site)]
        for part in ("train", "test")
    }
    files, train = parts["train"] + parts["test"], len(parts["train"])
    x = stack(len(files), ((str(file), file) for _, file, _ in files), size)
    places, labels = labelled(np.array([name for *_, name in files]), None)
    source = {"format": "image folder", "files": len(files)}
    owners = [client for client, *_ in files] if owned == {True} else ()
    return Images(x, places, labels, train, owners, source)


def _folders(path: Path) -> list[str]:
    return [name for name in _names(path) if (path / name).is_dir()]


def _clients(root: Path) -> list[tuple[str, Path]]:
    """(client, its folder of classes); ("", root) unless every folder has folders in it."""
    names = _folders(root)
    if names and all(_folders(root / name) for name in names):
        return [(name, root / name) for name in names]
    return [("", root)]


def _classes(root: Path) -> list[tuple[Path, str]]:
    """(file, class) of every image; stray files beside the folders of classes are left alone."""
    found = []
    for name in _folders(root):
        files = [root / name / file for file in _names(root / name)]
        for file in files:
            if file.is_dir() or file.suffix.lower() not in ENDINGS:
                what = "a folder" if file.is_dir() else "no image"
                raise DataError(
                    f"{file} is {what}; a folder of a class holds images alone ({' '.join(ENDINGS)}): move or remove it"
                )
        if not files:
            raise DataError(f"{root / name} is empty; put the images of the class into it, or remove it")
        found += [(file, name) for file in files]
    if not found:
        raise DataError(f"{root} has no folders of classes; put the images of each class into a folder of its name")
    return found


def _digits(size: int) -> Images:
    """Pixels 0..16 become float32 in [-1, 1]; there is no official test set."""
    from sklearn import __version__
    from sklearn.datasets import load_digits

    if size:
        raise ConfigError("data.size is for image files; the digits are 8 x 8")
    x, y = load_digits(return_X_y=True)
    places, labels = labelled(y, None)
    x = (x.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    return Images(x, places, labels, len(y), source={"scikit-learn": __version__})


def _npz(path: Path, size: int) -> Images:
    found = _arrays(path)
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in found]
    if missing:
        raise DataError(f"{path.name} has no {', '.join(missing)}; it has {', '.join(found)}")
    for part in ("train", "test"):
        x, y = found[f"x_{part}"], found[f"y_{part}"]
        if len(x) != len(y) or y.ndim != 1:
            raise DataError(f"{path.name}: x_{part} is {x.shape}, y_{part} {y.shape}; give one label per image")
    if found["x_train"].shape[1:] != found["x_test"].shape[1:]:
        raise DataError(f"{path.name}: x_train and x_test differ in the shape of one image")
    x = _channels(np.concatenate([found["x_train"], found["x_test"]]))
    places, labels = labelled(np.concatenate([found["y_train"], found["y_test"]]), found.get("label_names"))
    source = {"sha256": digest(path)}
    return Images(resized(x, size), places, labels, len(found["y_train"]), source=source)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as .npz: {reason}") from error


def _channels(x: np.ndarray) -> np.ndarray:
    """[N, C, H, W] of [N, H, W], [N, H, W, C] or [N, C, H, W], C is 1 or 3 (other shapes stay); whole numbers in
    0..255 are pixels (uint8), others float32."""
    if x.dtype.kind in "iu" and len(x) and x.min() >= 0 and x.max() <= 255:
        x = x.astype(np.uint8)
    elif x.dtype != np.uint8:
        x = x.astype(np.float32)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x
