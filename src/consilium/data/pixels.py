"""A decoder of image files into one array of pixels; this is the only module that imports PIL.

Images are decoded as a viewer shows them:

    alpha, transparent colours   over white
    1, 16 and 32 bits            scaled by their type: 0 is black, the largest number of the type is white
    floating point               0 is black, 1 is white; other numbers are refused
    CMYK, YCbCr, palettes        as RGB
    orientation tags             applied
    several pages or frames      refused unless `pages` says "first" or "all"; thumbnails and masks are no pages

A broken file, a file that would unpack to more than PIL's limit of pixels, and images of unequal size are refused; the
error names the file. Only the formats below are read, because PIL knows some that start programs.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from consilium.errors import DataError, first_line
from consilium.pointers import refuse_pointer

__all__ = ["ENDINGS", "Images", "Pages", "finite", "labelled", "resized", "scaled", "stack"]

Pages = Literal["refuse", "first", "all"]
ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff",
)  # fmt: skip
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_NO_PAGE = 0b101  # These bits of TIFF's NewSubfileType mark a reduced copy and a transparency mask.
_SUBFILE, _BITS, _INVERTED, _SAMPLES = 254, 258, 262, 339  # These are tags of TIFF.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a source, the training images first, then those of an official test set.

    Args:
        x: [N, C, H, W] uint8; float32 if the source has numbers that are not pixels.
        y: [N] int64, indices into `labels`.
        labels: names of the classes that occur.
        train: number of rows for training; the other rows, perhaps none, are the official test set.
        owners: client of each row; () if the source names no clients.
        source: origin of the images, for a run's records.
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
    """Return the class index of each label, [N] int64, and the names of the classes that occur.

    Args:
        y: [N] labels.
        names: names of the classes by number; used only if every number has a name.
    """
    values, indices = np.unique(y, return_inverse=True)
    has_names = (
        names is not None
        and values.dtype.kind in "iu"
        and len(values)
        and values.min() >= 0
        and values.max() < len(names)
    )
    return indices.astype(np.int64), tuple(str(names[value]) if has_names else str(value) for value in values)


def scaled(x: np.ndarray) -> np.ndarray:
    """Convert an array of images to pixels (uint8) if its numbers are pixels, else to float32.

    Integers in 0..255 are pixels. A uint16 array with larger numbers is scaled such that 65535 is white. A bool array
    becomes 0 and 255.

    Raises:
        DataError: if the array does not hold numbers.
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
        return ((x.astype(np.uint32) * 2 + 257) // 514).astype(np.uint8)  # This is x / 257, rounded.
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def stack(
    n: int, files: Iterable[tuple[str, Path | IO[bytes]]], size: int = 0, pages: Pages = "refuse"
) -> tuple[np.ndarray, list[int]]:
    """Decode n image files one by one into one array.

    Args:
        n: number of files.
        files: (name for error messages, path or open file) of each.
        size: side in pixels, see `resized`; 0: keep the size.
        pages: what to do with a file of several pages or frames: "refuse" it, take the "first" or "all".

    Returns:
        The pixels [N, C, H, W] uint8, where C is 1 if all images are grey, else 3; and the number of images per file.

    Raises:
        DataError: if a file cannot be used, or two images differ in size; the message names the files.
    """
    x, first_name, counts, end = np.empty((n, 0, 0, 0), np.uint8), "", [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, file in files:
            counts.append(0)
            for pixels in _decode(name, file, size, pages):
                counts[-1] += 1
                height, width = pixels.shape[-2:]
                if not end:
                    x, first_name = _room(n, pixels.shape), name
                if (height, width) != x.shape[2:]:
                    raise DataError(
                        f"images differ in size: {first_name} is {x.shape[3]} x {x.shape[2]}, {name} is {width} x "
                        f"{height} (width x height); give --data.size, e.g. --data.size 32"
                    )
                if len(pixels) > x.shape[1]:
                    x = x.repeat(3, axis=1)  # All images before this one were grey.
                if end == len(x):  # Files of several pages hold more images than there are files.
                    x = np.concatenate([x, _room(max(16, len(x) // 2), x.shape[1:])])
                x[end] = pixels
                end += 1
    return x[:end], counts


def _decode(name: str, file: Path | IO[bytes], size: int, pages: Pages) -> Iterator[np.ndarray]:
    """Yield each image of a file as [C, H, W] uint8."""
    refuse_pointer(file, DataError, name)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # The other pictures in a JPEG (MPO) are previews and gain maps, which no viewer shows.
            page_indices = [0] if image.format == "MPO" else _pages(image)
            if len(page_indices) > 1 and pages == "refuse":
                raise DataError(
                    f"{name} holds {len(page_indices)} pages or frames; train with --data.pages all to take each "
                    "as an image or --data.pages first, or save them as files of their own"
                )
            for page_index in page_indices[:1] if pages == "first" else page_indices:
                if page_index:
                    image.seek(page_index)
                yield _channels_first(_fitted(_as_shown(name, image), size))
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{name} is no image of the formats that are read: {', '.join(_FORMATS)}, or of a type that Pillow "
            "does not know"
        ) from error
    except (*_BROKEN, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} cannot be decoded: {first_line(error)}; replace or remove it") from error


def _pages(image: Image.Image) -> list[int]:
    """Return the indices of a file's pages or frames; a TIFF's reduced copies and masks are left out."""
    n = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or n == 1:
        return list(range(n))
    page_indices = []
    for page_index in range(n):
        image.seek(page_index)
        if not image.tag_v2.get(_SUBFILE, 0) & _NO_PAGE:
            page_indices.append(page_index)
    image.seek(0)
    return page_indices or [0]


def _as_shown(name: str, image: Image.Image) -> Image.Image:
    """Return the current page of a file as a viewer shows it: upright, in mode L or RGB."""
    upright_image = ImageOps.exif_transpose(image)
    if upright_image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_bytes(name, image, np.asarray(upright_image)))
    is_grey = upright_image.mode in ("1", "L", "LA", "La")
    if upright_image.has_transparency_data:
        transparency = upright_image.info.get("transparency")
        # PIL reduces 16-bit colours to 8 bits, but not the transparent colour.
        if isinstance(transparency, tuple) and max(transparency) > 255:
            upright_image.info["transparency"] = tuple(value >> 8 for value in transparency)
        rgba_image = upright_image.convert("RGBA")
        upright_image = Image.alpha_composite(Image.new("RGBA", rgba_image.size, "white"), rgba_image)
    return upright_image.convert("L" if is_grey else "RGB")


def _to_bytes(name: str, image: Image.Image, x: np.ndarray) -> np.ndarray:
    """Scale numbers of more than 8 bits [H, W], read from an image, by the range of their type to uint8."""
    tags = getattr(image, "tag_v2", {})
    transparency = image.info.get("transparency")
    if image.mode == "F":
        finite(name, x)
        if x.min() < 0 or x.max() > 1:
            raise DataError(
                f"{name} holds floating point numbers from {x.min():g} to {x.max():g}; only 0 (black) to 1 (white) "
                "say how bright a pixel is: save it with 8 or 16 bits"
            )
        max_value: float = 1
    elif image.mode == "I" and image.format == "TIFF":
        is_signed, bits = tags.get(_SAMPLES, (1,))[0] == 2, tags.get(_BITS, (32,))[0]
        x = x if is_signed else x.view(np.uint32)
        if x.min() < 0:
            raise DataError(
                f"{name} holds numbers from {x.min()} to {x.max()}; a pixel cannot be negative: save it with 8 or 16 "
                "bits"
            )
        max_value = 2 ** (bits - is_signed) - 1
    else:  # This is I;16 in any byte order, or PPM, which PIL scales to 65535.
        max_value = 65535
    pixels = np.round(x.astype(np.float64) * (255 / max_value)).astype(np.uint8)
    if tags.get(_INVERTED) == 0:
        pixels = 255 - pixels
    return np.where(x == transparency, np.uint8(255), pixels) if isinstance(transparency, int) else pixels


def finite(name: str, x: np.ndarray) -> None:
    """Raise DataError if a number of x is not finite; the message gives its index."""
    with np.errstate(all="ignore"):
        # The sum is cheaper than an elementwise check. A non-finite sum may be an overflow, so check then.
        if np.isfinite(x.sum(dtype=np.float64)):
            return
    if len(indices := np.argwhere(~np.isfinite(x))):
        index = indices[0].tolist()
        note = f", the first of {len(indices)}" if len(indices) > 1 else ""
        raise DataError(f"{name} is {x[tuple(index)]} at {index}{note}; every pixel must be a finite number: mend it")


def _fitted(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR) if size else image


def _channels_first(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _room(n: int, shape: tuple[int, ...]) -> np.ndarray:
    """Allocate a uint8 array for n images of this shape; raise DataError if it exceeds the machine's memory."""
    size, memory = n * int(np.prod(shape)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise DataError(
            f"{n} images of {shape[2]} x {shape[1]} pixels take {size / 1e9:.1f} GB at once, this machine has "
            f"{memory / 1e9:.1f} GB; give --data.size, e.g. --data.size 64"
        )
    return np.empty((n, *shape), np.uint8)


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """Resize pixels [N, C, H, W] uint8 to [N, C, size, size].

    The images are scaled until the shorter side fits (bilinear, smoothed), and the longer side is cropped at both ends.
    size 0 returns x unchanged.

    Raises:
        DataError: if the numbers are not pixels.
    """
    if not size or x.shape[2:] == (size, size):
        return x
    if x.dtype != np.uint8 or x.ndim != 4:
        raise DataError(f"data.size is for pixels (uint8) of 1 or 3 channels; these are {x.dtype} {x.shape[1:]}")
    output = _room(len(x), (x.shape[1], size, size))
    for i, pixels in enumerate(x):
        for channel, plane in enumerate(pixels):
            output[i, channel] = np.asarray(_fitted(Image.fromarray(plane), size))
    return output
