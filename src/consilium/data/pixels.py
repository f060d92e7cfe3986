"""Image files decoded into one array of pixels: the only module that imports PIL.

A broken file, one that would unpack to more than PIL's limit of pixels, one with 16 bits a pixel, and images of unequal
size are refused by name. Formats are those below and no others: PIL knows some that start programs.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from consilium.errors import DataError, first_line

__all__ = ["ENDINGS", "Images", "labelled", "resized", "stack"]

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a source, those for training before those of an official test set.

    Args:
        x: [N, C, H, W] uint8; float32 where a source has numbers that are no pixels.
        y: [N] int64, places in `labels`.
        labels: names of the classes, of those alone that occur.
        train: so many rows are for training; the others, perhaps none, are the official test set.
        owners: client of each row; () where the source tells none.
        source: what a run records about where it read them.
    """

    x: np.ndarray
    y: np.ndarray
    labels: tuple[str, ...]
    train: int
    owners: Sequence[str] = ()
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)


def labelled(y: np.ndarray, names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Places [N] int64 and names of the classes that occur; numbers are named by `names` where that has them all."""
    kinds, places = np.unique(y, return_inverse=True)
    named = (
        names is not None and kinds.dtype.kind in "iu" and len(kinds) and kinds.min() >= 0 and kinds.max() < len(names)
    )
    return places.astype(np.int64), tuple(str(names[kind]) if named else str(kind) for kind in kinds)


def stack(n: int, files: Iterable[tuple[str, Path | IO[bytes]]], size: int = 0) -> np.ndarray:
    """[n, C, H, W] uint8 of n encoded images, decoded one by one; C is 1 if all are grey, else 3. Alpha is left out.

    Args:
        files: (what to call it in an error, a path or an open file). size: of a side, see `resized`; 0: as they are.

    Raises:
        DataError: for a file that cannot be used, naming it; for two images of unequal size, naming both.
    """
    x, first = np.empty((n, 0, 0, 0), np.uint8), ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, (name, file) in enumerate(files):
            pixels = _decoded(name, file, size)
            height, width = pixels.shape[-2:]
            if not i:
                x, first = _room(n, pixels.shape), name
            if (height, width) != x.shape[2:]:
                raise DataError(
                    f"images differ in size: {first} is {x.shape[3]} x {x.shape[2]}, {name} is {width} x {height} "
                    "(width x height); give --data.size, e.g. --data.size 32"
                )
            if len(pixels) > x.shape[1]:
                x = x.repeat(3, axis=1)  # those before were grey
            x[i] = pixels
    return x


def _decoded(name: str, file: Path | IO[bytes], size: int) -> np.ndarray:
    """[C, H, W] uint8, upright."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{name} has more than 8 bits per pixel (mode {image.mode}); save it with 8")
            upright = image if image.format == "PNG" else ImageOps.exif_transpose(image)
            grey = upright.mode in ("1", "L", "LA", "La")
            return _channels_first(_fitted(upright.convert("L" if grey else "RGB"), size))
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name} is no image of the formats that are read: {', '.join(_FORMATS)}") from error
    except (*_BROKEN, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} cannot be decoded: {first_line(error)}; replace or remove it") from error


def _fitted(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR) if size else image


def _channels_first(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _room(n: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array for n images, refused where the machine could not hold it."""
    need, have = n * int(np.prod(shape)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise DataError(
            f"{n} images of {shape[2]} x {shape[1]} pixels take {need / 1e9:.1f} GB at once, this machine has "
            f"{have / 1e9:.1f} GB; give --data.size, e.g. --data.size 64"
        )
    return np.empty((n, *shape), np.uint8)


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """[N, C, size, size] of pixels [N, C, H, W] uint8: scaled until the shorter side fits (bilinear, smoothed), and the
    longer one cut at both ends. size 0: as it is.

    Raises:
        DataError: for numbers that are no pixels.
    """
    if not size or x.shape[2:] == (size, size):
        return x
    if x.dtype != np.uint8 or x.ndim != 4:
        raise DataError(f"data.size is for pixels (uint8) of 1 or 3 channels; these are {x.dtype} {x.shape[1:]}")
    made = _room(len(x), (x.shape[1], size, size))
    for i, pixels in enumerate(x):
        for channel, plane in enumerate(pixels):
            made[i, channel] = np.asarray(_fitted(Image.fromarray(plane), size))
    return made
