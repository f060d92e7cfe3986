"""An image has the pixels that a viewer shows: every kind of file that is read, against a conversion by hand."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from consilium.data.arrays import ImageData
from consilium.data.images import read_images
from consilium.data.pixels import stack
from consilium.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5, 1), dtype=np.uint8)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def read(file, pages="refuse"):
    """[N, H, W] of grey images or [N, H, W, 3] of coloured ones."""
    x, counts = stack(1, [("it.x", file)], pages=pages)
    assert counts == [len(x)]
    return x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)


def over_white(x, alpha):
    """What is seen of x through alpha, on white paper."""
    a = alpha.astype(float) / 255
    return x * a + 255 * (1 - a)


def near(found, expected, by=1.0):
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).max() <= by


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_over_white(form):
    """rgba 0 0 0 0, transparent black, is white paper; half transparent black is grey."""
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    image = Image.fromarray(np.concatenate([COLOUR, ALPHA], axis=-1))
    near(read(saved(image, form, **options))[0], over_white(COLOUR, ALPHA))
    black = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (read(saved(black, form, **options)) == 255).all()


def test_grey_with_alpha_stays_grey():
    image = Image.fromarray(np.concatenate([GREY[..., None], ALPHA], axis=-1), "LA")
    near(read(saved(image, "PNG"))[0], over_white(GREY, ALPHA[..., 0]))


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_palettes(form):
    """A colour of the palette that is transparent is white; the others are what the palette says."""
    places = RNG.integers(0, 4, (6, 5), dtype=np.uint8)
    colours = np.array([[250, 0, 0], [0, 240, 0], [0, 0, 230], [9, 9, 9]], np.uint8)
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    clear = {"transparency": 3}
    if form == "WEBP":
        image.info |= clear
        file = saved(image.convert("RGBA"), form, lossless=True, exact=True)
    else:
        file = saved(image, form, **clear)
    near(read(file)[0], np.where(places[..., None] == 3, 255, colours[places]))


def test_one_transparent_colour():
    """PNG's tRNS, of grey, of colour, and of 16 bits."""
    grey, colour, deep = GREY.copy(), COLOUR.copy(), np.full((2, 2), 40000, np.uint16)
    grey[0, 0], colour[0, 0], deep[0, 0] = 7, (1, 2, 3), 7
    file = saved(Image.fromarray(grey), "PNG", transparency=7)
    near(read(file)[0], np.where(grey == 7, 255, grey))
    file = saved(Image.fromarray(colour), "PNG", transparency=(1, 2, 3))
    near(read(file)[0], np.where((colour == (1, 2, 3)).all(-1, keepdims=True), 255, colour))
    file = saved(Image.fromarray(deep), "PNG", transparency=7)
    near(read(file)[0], np.where(deep == 7, 255, deep / 257))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "BMP", "GIF"])
def test_one_bit(form):
    bits = GREY > 127
    found = read(saved(Image.fromarray(bits), form))[0]
    near(found if found.ndim == 2 else found[..., 0], bits * 255.0)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_type(form):
    """65535 is white; a dark image (12 bits in 16) stays as dark as in a viewer."""
    for top in (65535, 4095):
        x = RNG.integers(0, top + 1, (6, 5), dtype=np.uint16)
        near(read(saved(Image.fromarray(x), form))[0], x / 257, by=0.51)


def tiff(x, inverted=False):
    """An uncompressed TIFF of numbers of any type [H, W], as no library wrote it."""
    kind = {"u": 1, "i": 2, "f": 3}[x.dtype.kind]
    entries = [(256, x.shape[1]), (257, x.shape[0]), (258, 8 * x.itemsize), (259, 1), (262, 0 if inverted else 1),
               (273, 8), (277, 1), (278, x.shape[0]), (279, x.nbytes), (339, kind)]  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + x.nbytes)
    return io.BytesIO(head + x.tobytes() + struct.pack("<H", len(entries)) + body + bytes(4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32])
def test_numbers_in_a_tiff(dtype):
    """Of each type the largest number is white, and 1 of floating point; negative ones are refused."""
    top = 1.0 if np.dtype(dtype).kind == "f" else float(np.iinfo(dtype).max)
    x = (RNG.random((6, 5)) * top).astype(dtype)
    x[0, :2] = 0, top
    near(read(tiff(x))[0], x / top * 255, by=0.51)
    if np.dtype(dtype).kind != "u":
        x[1, 1] = -1
        with pytest.raises(DataError, match=r"it\.x holds .*-1"):
            read(tiff(x))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_tiff_in_which_zero_is_white(dtype):
    top = 1.0 if np.dtype(dtype).kind == "f" else float(np.iinfo(dtype).max)
    x = (RNG.random((6, 5)) * top).astype(dtype)
    near(read(tiff(x, inverted=True))[0], 255 - x / top * 255, by=0.51)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path, bad):
    """In a file by its name and place, in an array likewise, before anything is trained."""
    x = np.full((6, 5), 0.5, np.float32)
    x[4, 2] = bad
    with pytest.raises(DataError, match=rf"it\.x is {bad} at \[4, 2\]; every pixel must be a finite number"):
        read(tiff(x))
    good = np.zeros_like(x)
    np.savez(tmp_path / "a.npz", x_train=[good, x], y_train=[0, 1], x_test=[good], y_test=[0])
    with pytest.raises(DataError, match=rf"a\.npz: x_train is {bad} at \[1, 4, 2\]"):
        read_images(tmp_path / "a.npz")


def test_a_type_that_pillow_does_not_read():
    with pytest.raises(DataError, match=r"it\.x is no image of the formats that are read: .*or of a type that Pillow"):
        read(tiff(np.zeros((6, 5))))


def test_floating_point_that_is_no_brightness():
    with pytest.raises(DataError, match=r"it\.x holds floating point numbers from 0 to 4095; only 0 \(black\) to 1"):
        read(tiff(np.array([[0, 4095]], np.float32)))


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("YCbCr", "JPEG")])
def test_other_colours_become_rgb(mode, form):
    """A CMYK JPEG of Adobe's is stored inverted: red stays red."""
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert(mode)
    near(read(saved(red, form))[0], np.full((16, 16, 3), (220, 30, 40), float), by=4)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_applied(form, orientation):
    """As `ImageOps.exif_transpose` has it; a photo that lies on its side would be learned lying."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = np.zeros((8, 16, 3), np.uint8)
    x[:4, :8], x[4:, 8:] = (250, 0, 0), (0, 0, 250)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    file = saved(Image.fromarray(x), form, exif=exif, **options)
    turned = {1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.transpose(1, 0, 2), 6: np.rot90(x, -1),
              7: x[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(x)}[orientation]  # fmt: skip
    near(read(file)[0], turned.astype(float), by=6)
    near(np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")), turned.astype(float), by=6)


def frames(n=4, side=6):
    """Images that share nothing, so that no encoder joins two of them."""
    return [Image.fromarray(RNG.integers(0, 256, (side, side), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("form", ["TIFF", "GIF", "WEBP", "PNG"])
def test_pages_and_frames(form):
    """All of them, or the first, where that is asked for; else the file is refused by name."""
    pages = frames()
    options = {"lossless": True} if form == "WEBP" else {}
    content = saved(pages[0], form, save_all=True, append_images=pages[1:], **options).getvalue()
    with pytest.raises(DataError, match=r"it\.x holds 4 pages or frames; .*--data\.pages all .*--data\.pages first"):
        read(io.BytesIO(content))
    found = read(io.BytesIO(content), "all")
    found = found if found.ndim == 3 else found[..., 0]
    near(found, np.stack([np.asarray(page) for page in pages]).astype(float), by=2)
    first = read(io.BytesIO(content), "first")
    near(first if first.ndim == 3 else first[..., 0], np.asarray(pages[0])[None].astype(float), by=2)


def test_previews_are_no_pages():
    """A JPEG with a preview in it (MPO), as telephones write it, and a TIFF with a reduced copy are one image."""
    photo, preview = frames(2, 16)
    near(read(saved(photo, "MPO", save_all=True, append_images=[preview], quality=95))[0], np.asarray(photo), by=30)
    copy = preview.resize((4, 4))
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    file = saved(photo, "TIFF", save_all=True, append_images=[copy])
    assert (read(file)[0] == np.asarray(photo)).all()


def test_pages_of_a_folder_keep_class_and_client(tmp_path):
    """Files of one and of several pages by turns: every page has the class and the client of its file."""
    expected = []
    for site in ("a", "b"):
        for kind in ("cat", "dog"):
            (tmp_path / site / kind).mkdir(parents=True)
            for i, n in enumerate((3, 1, 20)):
                pages = frames(n)
                pages[0].save(tmp_path / site / kind / f"{i}.tif", save_all=True, append_images=pages[1:])
                expected += [(site, kind, np.asarray(page)) for page in pages]
    found = read_images(tmp_path, pages="all")
    assert len(found) == found.train == len(expected) == 96
    for x, y, owner, (site, kind, page) in zip(found.x, found.y, found.owners, expected, strict=True):
        assert (x[0] == page).all() and found.labels[y] == kind and owner == site
    federation = ImageData(tmp_path, pages="all").load(0)
    assert [sum(len(split) for _, split in data.splits()) for data in federation.clients.values()] == [48, 48]


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [((3, 5, 6), "", (3, 5, 6)), ((5, 6, 3), "", (3, 5, 6)), ((5, 6, 1), "", (1, 5, 6)), ((5, 6), "", (1, 5, 6)),
     ((3, 3, 3), "", None), ((3, 3, 3), "CHW", (3, 3, 3)), ((3, 3, 3), "HWC", (3, 3, 3)), ((1, 6, 3), "", None),
     ((5, 6, 4), "", None), ((5, 6, 4), "HWC", (4, 5, 6)), ((2, 5, 6), "CHW", (2, 5, 6))],
)  # fmt: skip
def test_axes_of_arrays(tmp_path, shape, axes, expected):
    """Where both ends could be the channels, or none, the user is asked."""
    x, y = RNG.integers(0, 256, (4, *shape), dtype=np.uint8), [0, 1, 0, 1]
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    if expected is None:
        with pytest.raises(DataError, match=r"does not say which axis is that of the channels: give --data\.axes CHW"):
            read_images(tmp_path / "a.npz")
        return
    found = read_images(tmp_path / "a.npz", axes=axes)
    channels_last = axes == "HWC" or (not axes and shape[-1] in (1, 3))
    x = x.reshape(4, *((1,) if len(shape) == 2 else ()), *shape)
    assert found.x.shape == (8, *expected)
    assert (found.x[:4] == (x.transpose(0, 3, 1, 2) if channels_last else x)).all()


@pytest.mark.parametrize(
    ("x", "expected"),
    [(np.array([[[True, False]]]), [[[255, 0]]]), (np.array([[[65535, 0, 256]]], np.uint16), [[[255, 0, 1]]]),
     (np.array([[[-1.5, 0.25]]]), [[[-1.5, 0.25]]])],
)  # fmt: skip
def test_numbers_of_arrays(tmp_path, x, expected):
    """Bits and 16 bits are pixels, floating point stays as it is."""
    np.savez(tmp_path / "a.npz", x_train=x, y_train=[0], x_test=x, y_test=[1])
    found = read_images(tmp_path / "a.npz")
    assert found.x[0].tolist() == expected and found.x.dtype == (np.float32 if x.dtype.kind == "f" else np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"x_train": np.full((2, 2, 2), 1e300)}, "as float32: x is inf at"),
     ({"x_train": np.full((2, 2, 2), "a")}, "be numbers"),
     ({"y_train": [0.0, np.nan]}, "y_train is nan in row 1"), ({"y_test": [0, 0.5]}, r"y_test is 0\.5 in row 1")],
)  # fmt: skip
def test_arrays_that_cannot_be_used(tmp_path, changes, message):
    x = np.zeros((2, 2, 2))
    np.savez(tmp_path / "a.npz", **{"x_train": x, "y_train": [0, 1], "x_test": x, "y_test": [0, 1]} | changes)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "a.npz")


def test_labels_of_arrays(tmp_path):
    """Whole floating point numbers and bytes are the classes that people mean."""
    x = np.zeros((2, 2, 2), np.uint8)
    for y, expected in (
        ([0.0, 2.0], ("0", "2")),
        ([b"cat", b"dog"], ("cat", "dog")),
        ([True, False], ("False", "True")),
    ):
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        assert read_images(tmp_path / "a.npz").labels == expected


def test_a_header_that_announces_too_much(tmp_path):
    """10^15 bytes in a header of a few: refused, not a MemoryError; arrays that are not used are not unpacked."""
    x = np.zeros((2, 2, 2), np.uint8)
    arrays = {"x_train": x, "y_train": [0, 1], "x_test": x, "y_test": [0, 1]}

    def huge():
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
        return file.getvalue()

    np.savez(tmp_path / "a.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as packed:
        packed.writestr("other.npy", huge())
    assert len(read_images(tmp_path / "a.npz")) == 4
    np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if k != "x_test"})
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as packed:
        packed.writestr("x_test.npy", huge())
    with pytest.raises(DataError, match=r"b\.npz: x_test announces 1,000,000,000,000,128 bytes"):
        read_images(tmp_path / "b.npz")


def test_a_png_with_its_tags_at_the_end():
    """eXIf may follow the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(Image.fromarray(COLOUR), "PNG").getvalue()
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = content.index(b"IEND") - 4
    assert (read(io.BytesIO(content[:place] + chunk + content[place:]))[0] == np.rot90(COLOUR, -1)).all()
