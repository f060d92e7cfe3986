"""Decode image files into one array of pixels; this is the only module that imports PIL.

An image is what a viewer shows:

    alpha, transparent colours   over white
    1, 16 and 32 bits            scaled by their type: 0 is black, the largest number of the type is white
    floating point               0 is black, 1 is white; other numbers are refused
    CMYK, YCbCr, palettes        as RGB
    orientation tags             applied
    several pages or frames      refused unless `pages` says "first" or "all"; thumbnails and masks are no pages

A broken file, one that would unpack to more than PIL's limit of pixels, and images of unequal size are refused by name.
Formats are those below and no others: PIL knows some that start programs.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from consilium.errors import DataError, first_line
from consilium.pointers import refuse_pointer

__all__ = ["ENDINGS", "PAGES", "Images", "Pages", "finite", "labelled", "resized", "scaled", "stack"]

Pages = Literal["refuse", "first", "all"]
PAGES: tuple[Pages, ...] = get_args(Pages)
ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff",
)  # fmt: skip
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_NO_PAGE = 0b101  # of TIFF's NewSubfileType: a reduced copy, a transparency mask
_SUBFILE, _BITS, _INVERTED, _SAMPLES = 254, 258, 262, 339  # tags of TIFF
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
    """Return the place of each label [N] int64 and the names of the classes that occur.

    Args:
        y: [N] labels. names: what the numbers stand for; used if there is a name for every number.
    """
    kinds, places = np.unique(y, return_inverse=True)
    named = (
        names is not None and kinds.dtype.kind in "iu" and len(kinds) and kinds.min() >= 0 and kinds.max() < len(names)
    )
    return places.astype(np.int64), tuple(str(names[kind]) if named else str(kind) for kind in kinds)


def scaled(x: np.ndarray) -> np.ndarray:
    """Return numbers of an array of images as pixels (uint8) where they are some, else as float32.

    Whole numbers in 0..255 are pixels, of uint16 with larger ones those that 65535 is white of, of bool 0 and 255.

    Raises:
        DataError: for what are no numbers.
    """
    if x.dtype.kind not in "biuf":
        raise DataError(f"pixels are {x.dtype}; they must be numbers")
    if x.dtype == bool:
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind in "iu" and x.size and x.min() >= 0 and x.max() <= 255:
        return x.astype(np.uint8)
    if x.dtype == np.uint16:
        return ((x.astype(np.uint32) * 2 + 257) // 514).astype(np.uint8)  # rounded, of x / 257
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def stack(
    n: int, files: Iterable[tuple[str, Path | IO[bytes]]], size: int = 0, pages: Pages = "refuse"
) -> tuple[np.ndarray, list[int]]:
    """Decode n image files one by one into one array.

    Args:
        files: (what to call it in an error, a path or an open file) of each.
        size: of a side, see `resized`; 0: as they are.
        pages: what to do with a file of several pages or frames: "refuse" it, take the "first" or "all".

    Returns:
        The pixels [N, C, H, W] uint8, where C is 1 if all images are grey, else 3, and the images in each file.

    Raises:
        DataError: for a file that cannot be used, naming it; for two images of unequal size, naming both.
    """
    x, first, counts, end = np.empty((n, 0, 0, 0), np.uint8), "", [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, file in files:
            counts.append(0)
            for pixels in _decode(name, file, size, pages):
                counts[-1] += 1
                height, width = pixels.shape[-2:]
                if not end:
                    x, first = _room(n, pixels.shape), name
                if (height, width) != x.shape[2:]:
                    raise DataError(
                        f"images differ in size: {first} is {x.shape[3]} x {x.shape[2]}, {name} is {width} x {height} "
                        "(width x height); give --data.size, e.g. --data.size 32"
                    )
                if len(pixels) > x.shape[1]:
                    x = x.repeat(3, axis=1)  # those before were grey
                if end == len(x):  # files of several pages
                    x = np.concatenate([x, _room(max(16, len(x) // 2), x.shape[1:])])
                x[end] = pixels
                end += 1
    return x[:end], counts


def _decode(name: str, file: Path | IO[bytes], size: int, pages: Pages) -> Iterator[np.ndarray]:
    """Yield each image of a file as [C, H, W] uint8."""
    refuse_pointer(file, DataError, name)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # The further pictures in a JPEG (MPO) are previews and gain maps, which no viewer shows.
            places = [0] if image.format == "MPO" else _pages(image)
            if len(places) > 1 and pages == "refuse":
                raise DataError(
                    f"{name} holds {len(places)} pages or frames; train with --data.pages all to take each as an image "
                    "or --data.pages first, or save them as files of their own"
                )
            for place in places[:1] if pages == "first" else places:
                if place:
                    image.seek(place)
                yield _channels_first(_fitted(_as_shown(name, image), size))
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{name} is no image of the formats that are read: {', '.join(_FORMATS)}, or of a type that Pillow "
            "does not know"
        ) from error
    except (*_BROKEN, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} cannot be decoded: {first_line(error)}; replace or remove it") from error


def _pages(image: Image.Image) -> list[int]:
    """Return the places of a file's pages or frames; of a TIFF without reduced copies and masks."""
    n = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or n == 1:
        return list(range(n))
    places = []
    for place in range(n):
        image.seek(place)
        if not image.tag_v2.get(_SUBFILE, 0) & _NO_PAGE:
            places.append(place)
    image.seek(0)
    return places or [0]


def _as_shown(name: str, image: Image.Image) -> Image.Image:
    """Return the page that a file stands at as a viewer shows it, upright, in mode L or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return Image.fromarray(_to_bytes(name, image, np.asarray(upright)))
    grey = upright.mode in ("1", "L", "LA", "La")
    if upright.has_transparency_data:
        key = upright.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # PIL keeps 8 of 16 bits of a colour, but not of this one
            upright.info["transparency"] = tuple(value >> 8 for value in key)
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return upright.convert("L" if grey else "RGB")


def _to_bytes(name: str, image: Image.Image, x: np.ndarray) -> np.ndarray:
    """Return numbers of more than 8 bits [H, W], which were read from an image, as uint8, scaled by their type."""
    tags = getattr(image, "tag_v2", {})
    key = image.info.get("transparency")
    if image.mode == "F":
        finite(name, x)
        if x.min() < 0 or x.max() > 1:
            raise DataError(
                f"{name} holds floating point numbers from {x.min():g} to {x.max():g}; only 0 (black) to 1 (white) "
                "say how bright a pixel is: save it with 8 or 16 bits"
            )
        top: float = 1
    elif image.mode == "I" and image.format == "TIFF":
        signed, bits = tags.get(_SAMPLES, (1,))[0] == 2, tags.get(_BITS, (32,))[0]
        x = x if signed else x.view(np.uint32)
        if x.min() < 0:
            raise DataError(
                f"{name} holds numbers from {x.min()} to {x.max()}; a pixel cannot be negative: save it with 8 or 16 "
                "bits"
            )
        top = 2 ** (bits - signed) - 1
    else:  # I;16 of any byte order, and PPM, which PIL scales to 65535
        top = 65535
    grey = np.round(x.astype(np.float64) * (255 / top)).astype(np.uint8)
    if tags.get(_INVERTED) == 0:
        grey = 255 - grey
    return np.where(x == key, np.uint8(255), grey) if isinstance(key, int) else grey


def finite(name: str, x: np.ndarray) -> None:
    """Raise DataError if a number of x is not finite, with its place."""
    with np.errstate(all="ignore"):
        if np.isfinite(x.sum(dtype=np.float64)):  # cheaper than a look at each; an overflow is looked into
            return
    if len(places := np.argwhere(~np.isfinite(x))):
        place = places[0].tolist()
        more = f", the first of {len(places)}" if len(places) > 1 else ""
        raise DataError(f"{name} is {x[tuple(place)]} at {place}{more}; every pixel must be a finite number: mend it")


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
