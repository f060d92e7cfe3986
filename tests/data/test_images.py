"""Images from wherever they lie: what is recognised, that the pixels are the ones written, and what is refused."""

import gzip
import io
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pictures
import pytest
from PIL import Image

from consilium.data import columns, pixels
from consilium.data.arrays import ImageData
from consilium.data.images import kind_of, read_images
from consilium.data.pixels import resized, stack
from consilium.data.sets import is_hub_name
from consilium.errors import ConfigError, DataError


def first(x):
    """[N, C, H, W] of what `pictures` makes."""
    return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)


def by_class(n=24, **options):
    """Pixels and labels in the order of a folder: class by class."""
    x, y = pictures.pixels(n, **options)
    order = np.argsort(y, kind="stable")
    return first(x)[order], y[order]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_classes(tmp_path, channels):
    """Hidden files and files beside the folders are left alone."""
    root = pictures.folder(tmp_path / "pets", channels=channels)
    (root / "README.txt").touch()
    (root / "cat" / ".DS_Store").touch()
    found, (x, y) = read_images(root), by_class(channels=channels)
    assert kind_of(root) == "folder" and found.labels == pictures.CLASSES and found.train == 24
    assert found.x.dtype == np.uint8 and (found.x == x).all() and (found.y == y).all()


def test_a_folder_with_splits(tmp_path):
    """What is for validation joins the training images; each client keeps its own share of them for validation."""
    found = read_images(pictures.folder(tmp_path / "pets", 12, ("test", "train", "val")))
    assert (len(found), found.train) == (36, 24)
    for rows, seed in ((slice(0, 12), 1), (slice(12, 24), 2), (slice(24, 36), 0)):
        x, y = by_class(12, seed=seed)
        assert (found.x[rows] == x).all() and (found.y[rows] == y).all()
    with pytest.raises(DataError, match=r"has the folder extra beside test, .*if test is a split, all must be: train"):
        read_images(pictures.folder(tmp_path / "pets", 3, ("extra",)))


def test_a_folder_per_client(tmp_path):
    """DIR/<client>/<class>: each client holds its own images, also where a test set of each is apart."""
    for seed, site in enumerate(("North 1", "south")):
        pictures.folder(tmp_path / "pets" / site, seed=seed)
    found, (x, y) = read_images(tmp_path / "pets"), by_class(seed=1)
    assert (found.x[24:] == x).all() and (found.y[24:] == y).all() and found.labels == pictures.CLASSES
    federation = ImageData(tmp_path / "pets", clients=7).load(0)
    assert list(federation.clients) == ["North-1", "south"] and federation.source["partition"] == ""
    for place, client in enumerate(federation.clients.values()):
        rows = {int(row) for _, split in client.splits() for row in split.rows}
        assert rows == {*range(24 * place, 24 * place + 24)}
    for part, site in (("train", "a"), ("train", "b"), ("test", "b"), ("test", "a")):
        pictures.folder(tmp_path / "apart" / part / site, n=12)
    tests = {name: len(client.test) for name, client in ImageData(tmp_path / "apart").load(0).clients.items()}
    assert tests == {"a": 12, "b": 12}
    with pytest.raises(DataError, match="a folder per client in one of train, validation and test, and not in another"):
        read_images(pictures.folder(tmp_path / "apart", 3, ("val",)))


def test_grey_and_coloured_files_together(tmp_path):
    """Grey becomes three equal channels, whichever comes first; a turned photo stands upright."""
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    colour = np.stack([grey, 2 * grey, 3 * grey], axis=-1)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, array in zip(files, (grey, colour, 4 * colour), strict=True):
        Image.fromarray(array).save(file)
    x, counts = stack(3, [(file.name, file) for file in files])
    assert counts == [1, 1, 1] and (x[2] == 4 * x[1]).all()
    assert (x[0] == grey).all() and (x[1] == colour.transpose(2, 0, 1)).all()
    turned, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (5, 9)).save(turned, exif=exif)
    assert stack(1, [("turned", turned)])[0].shape == (1, 3, 5, 9)


@pytest.mark.parametrize("form", ["file", "directory", "shards", "disk", "disk with splits", "hub"])
def test_tables(tmp_path, monkeypatch, form):
    """Parquet as `datasets` writes it, alone or by split, its directories, and the hub: equal pixels, named classes."""
    train, test, path = pictures.table(clients=2), pictures.table(6, clients=2, seed=1), tmp_path / "pets"
    both = form not in ("file", "disk", "shards")
    if form == "file":
        path = tmp_path / "pets.parquet"
        train.to_parquet(path)
    elif form in ("directory", "shards"):
        path.mkdir()
        names = ("train-00000-of-00001", "pets_test") if both else ("0000", "0001")
        tables = (train, test) if both else (train.select(range(12)), train.select(range(12, 24)))
        for name, rows in zip(names, tables, strict=True):
            rows.to_parquet(path / f"{name}.parquet")
    elif form == "disk":
        train.save_to_disk(path)
    else:
        split = datasets.DatasetDict({"train": train, "test": test})
        if form == "hub":
            monkeypatch.setattr(datasets, "load_dataset", lambda name: split)
            path = "someone/pets"
        else:
            split.save_to_disk(path)
    data = ImageData(path, client="site")
    found = read_images(data.path, client="site")
    assert found.labels == pictures.CLASSES and found.train == 24 and len(found) == (30 if both else 24)
    x, y = pictures.pixels()
    assert (found.x[:24] == first(x)).all() and (found.y[:24] == y).all()
    federation = data.load(0)
    assert list(federation.clients) == ["site-0", "site-1"]  # names become ids
    assert [len(c.test) for c in federation.clients.values()] == [3, 3]
    for client, data in enumerate(federation.clients.values()):
        assert {int(row) // 3 % 2 for row in (*data.train.rows, *data.validation.rows)} == {client}


def test_a_client_without_rows_for_training_is_named(tmp_path):
    train, test = pictures.table(clients=1), pictures.table(6, clients=2)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "pets")
    federation = ImageData(tmp_path / "pets", client="site").load(0)
    assert list(federation.clients) == ["site-0"] and "0 row(s), too few" in federation.skipped["site-1"]


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, packed):
    found = read_images(pictures.idx(tmp_path / "mnist", packed=packed))
    x, y = pictures.pixels(40, channels=1)
    assert found.x.shape == (60, 1, 8, 8) and found.train == 40 and found.labels == ("0", "1", "2")
    assert (found.x[:40] == first(x)).all() and (found.y[:40] == y).all()


def test_cifar(tmp_path):
    """3,073 bytes a record: label, then red, green, blue; of CIFAR-100 3,074, and the second label is the default."""
    found = read_images(pictures.cifar(tmp_path / "ten"))
    assert found.x.shape == (100, 3, 32, 32) and found.train == 80 and found.labels[:2] == ("class 0", "class 1")
    assert (found.x[:, 2, 31, 31] == [*range(40), *range(40), *range(20)]).all()
    assert (found.y == [i % 10 for i in (*range(40), *range(40), *range(20))]).all()
    root = pictures.cifar(tmp_path / "hundred", hundred=True)
    fine, coarse = read_images(root), read_images(root, label="coarse_label")
    assert len(fine.labels) == 40 and (fine.y[:40] == range(40)).all() and (fine.x[:40, 0, 0, 0] == range(40)).all()
    assert coarse.labels == tuple(map(str, range(20))) and (coarse.y[:40] == [i % 20 for i in range(40)]).all()
    for path, label in ((tmp_path / "ten", "fine_label"), (root, "gross")):
        with pytest.raises(ConfigError, match=f"data.label is '{label}'; of"):
            read_images(path, label=label)


def test_whole_numbers_in_an_npz_are_pixels(tmp_path):
    """int64 0..255 would train as numbers of hundreds; 256 is no pixel."""
    for top, dtype in ((255, np.uint8), (256, np.float32)):
        x = np.full((4, 2, 2), top)
        np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(4) % 2, x_test=x, y_test=np.arange(4) % 2)
        found = read_images(tmp_path / "a.npz")
        assert found.x.dtype == dtype and (found.x == top).all()


def test_sizes(tmp_path):
    """Unequal images are refused by name, unless a size is given: the shorter side fills it, the rest is cut at both
    ends. A white band in the middle of a wide image stays, one at its end goes."""
    root = pictures.folder(tmp_path / "pets", 6)
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 6:10] = 255
    wide[:, 14:] = 255
    Image.fromarray(wide).save(root / "dog" / "zzz.png")
    message = r"images differ in size: .*cat/000.png is 8 x 8, .*dog/zzz.png is 16 x 8 .*--data.size"
    with pytest.raises(DataError, match=message):
        read_images(root)
    found = read_images(root, 4)
    assert found.x.shape == (7, 3, 4, 4)
    row = found.x[4, 0, 0]  # after two cats and two dogs
    assert row[0] < 60 and row[3] < 60 and row[1] > 180 and row[2] > 180
    x = first(pictures.pixels()[0])
    assert resized(x, 8) is x and resized(x, 0) is x and resized(x, 16).shape == (24, 3, 16, 16)
    assert (resized(np.full((2, 1, 9, 7), 200, np.uint8), 5) == 200).all()
    with pytest.raises(DataError, match=r"data\.size is for pixels"):
        resized(x.astype(np.float32), 4)


def png(width, height, data=b""):
    """A PNG that says it is that large."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(data)))
    body = b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def negative():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), -3, np.int32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(png(10**5, 10**5), "pixels"), (png(12000, 9000), "pixels"), (png(8, 8, b"\0"), "cannot be decoded"),
     (b"not an image", "is no image of the formats that are read: PNG"), (b"", "no image"),
     (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no image"), (negative(), "a pixel cannot be negative"),
     (png(8, 8)[:40], "cannot be decoded|no image")],
)  # fmt: skip
def test_files_that_cannot_be_decoded_are_named(tmp_path, content, message):
    """Bombs by their header alone, torn files, other formats under a known ending, 16 bits; in a folder and a table."""
    root = pictures.folder(tmp_path / "pets", 3)
    (root / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"dog/bad\.png .*({message})"):
        read_images(root)
    good = (root / "cat" / "000.png").read_bytes()
    rows = {"image": [{"bytes": b, "path": None} for b in (good, content)], "label": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"t\.parquet column 'image' row 1 .*({message})"):
        read_images(tmp_path / "t.parquet")


def test_more_than_the_machine_holds(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(DataError, match=r"1000 images of 8 x 8 pixels take 0\.0 GB at once, .*--data\.size"):
        pixels._room(1000, (1, 8, 8))


def made(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x" * 10)
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [(("data_batch_1", "batches.meta"), r"Python pickles \(batches.meta, data_batch_1\), .*cifar-10-binary.tar.gz"),
     (("train", "test", "meta"), "Python pickles"), (("a.pkl",), "Python pickles"),
     (("a.txt", "b.txt"), r"holds a.txt, b.txt; give an .npz file, a .parquet"), ((), "is empty; give"),
     (("cat/a.png", "cat/notes.txt"), r"cat/notes.txt is no image; a folder of a class holds images alone \(\.png"),
     (("cat/in/a.png", "dog/a.png"), "cat/in is a folder"), (("train/a.png",), "train has no folders of classes"),
     (("data_batch_1.bin",), "has 10 bytes; it must be a whole number of records of 3073"),
     (("train.bin",), "records of 3074"), (("train-images-idx3-ubyte",), "but not train-labels-idx1-ubyte"),
     (("t10k-images-idx3-ubyte",), "give a directory with one training set"),
     (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "is no IDX file of bytes in 3 dimension"),
     (("a.parquet",), "a.parquet cannot be read as parquet"), (("dataset_dict.json",), "cannot be read as a datasets")],
)  # fmt: skip
def test_directories_that_cannot_be_used(tmp_path, names, message):
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match=message):
        read_images(made(tmp_path / "here", *names))


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.tar.gz", "is packed: unpack it"), ("a.pkl", "Python pickles"), ("a.csv", "a file of no known kind; give"),
     ("a.npz", r"a.npz cannot be read as \.npz")],
)  # fmt: skip
def test_files_of_another_kind(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        read_images(made(tmp_path, name) / name)


def test_idx_files_that_lie(tmp_path):
    root = pictures.idx(tmp_path / "mnist")
    images = root / "train-images-idx3-ubyte"
    content = images.read_bytes()
    for wrong, message in (
        (content[:-1], "announces 40 x 8 x 8 bytes and holds 2559"),
        (content + b"x", "holds more"),
        (content[:4] + b"\xff" * 12, r"announces 4294967295 x .* and holds 0"),
        (content[:4] + struct.pack(">I", 39) + content[8:-64], "has 39 images, but there are 40 labels"),
    ):
        images.write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            read_images(root)
    images.unlink()
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(DataError, match="gz cannot be read: "):
        read_images(root)


def test_a_label_that_there_is_not(tmp_path):
    root = pictures.cifar(tmp_path / "ten")
    (root / "data_batch_2.bin").write_bytes(bytes([3]) + bytes(3072) + bytes([77]) + bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_2.bin record 1 has label 77; there are 0\.\.9"):
        read_images(root)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [(None, {"image": "ing"}, r"has no column 'ing' \(did you mean 'img'\?\); it has img \| label \| site"),
     (None, {"client": "where"}, "has no column 'where'"), (("label", "kind"), {}, "looks like the label; name it"),
     (("img", "photo"), {"image": "label"}, "column 'label' holds no encoded images"),
     (None, {"label": "img"}, "column 'img' row 0 holds")],
)  # fmt: skip
def test_columns_that_cannot_be_used(tmp_path, change, options, message):
    rows = pictures.table(6, clients=2)
    (rows.rename_column(*change) if change else rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "t.parquet", **options)


def test_values_that_cannot_be_used(tmp_path):
    """An empty image, one that only names a file (which could be any of this machine), a class that there is not."""
    good = pictures.table(3)[0]["img"]
    for row, message in (
        ({"img": None, "label": 0}, "column 'img' row 1 is empty"),
        ({"img": good, "label": -1}, "column 'label' row 1 is -1, no class of 3"),
        ({"img": good, "label": None}, "column 'label' is empty in 1 of 2 rows, first in row 1"),
    ):
        rows = datasets.Dataset.from_list([{"img": good, "label": 1}, row], pictures.table(3).features)
        with pytest.raises(DataError, match=message):
            columns._read("t", {"train": rows}, 0, "", "", "", {})
    part = datasets.Dataset.from_list([{"img": None, "label": 0}], pictures.table(3).features)
    with pytest.raises(DataError, match=r"t \(test\) column 'img' row 0 is empty"):
        columns._read("t", {"train": pictures.table(3), "test": part}, 0, "", "", "", {})
    named = datasets.Dataset.from_dict({"img": [{"bytes": None, "path": "/etc/hosts"}], "label": [0]})
    with pytest.raises(DataError, match=r"row 0 only names a file \(/etc/hosts\); write the images into the table"):
        columns._read("t", {"train": named}, 0, "", "", "", {})


def test_a_name_of_nothing():
    """Offline, a data set that is not cached; and paths that cannot be one."""
    with pytest.raises(
        DataError, match="nobody/nothing-there is neither a file or directory here nor a data set on the"
    ):
        ImageData("nobody/nothing-there").load(0)
    with pytest.raises(DataError, match=r"is not there; give an \.npz file"):
        ImageData("no/such/place").load(0)
    assert is_hub_name(Path("someone/pets-v1.5"))
    for path in ("data/notes.csv", "pets/cat.png", "a/b/c", "pets", "/pets/cats"):
        assert ImageData(path).path.is_absolute() and not is_hub_name(Path(path).absolute())
    with pytest.raises(ConfigError, match=r"data\.client names a column; digits is no table"):
        ImageData(client="site").load(0)
    with pytest.raises(ConfigError, match="the digits are 8 x 8"):
        ImageData(size=4).load(0)


def test_litter_of_operating_systems_is_skipped_and_counted(tmp_path):
    """In every folder: Windows, macOS, NAS; also beside Parquet files, and folders that hold images of their own."""
    root = pictures.folder(tmp_path / "pets", 12)
    for name in ("Thumbs.db", "cat/Thumbs.db", "cat/desktop.ini", "cat/.DS_Store", "cat/._000.png", "dog/._000.png",
                 "__MACOSX/cat/._000.png", "@eaDir/cat/000.png", "cat/@eaDir/000.png/x.jpg"):  # fmt: skip
        made(root, name)
    found = read_images(root)
    assert found.labels == pictures.CLASSES and len(found) == 12
    assert found.source["litter"] == {
        "Thumbs.db": 2, "@eaDir": 2, "._*": 2, "desktop.ini": 1, ".DS_Store": 1, "__MACOSX": 1
    }  # fmt: skip
    pictures.table(6).to_parquet(made(tmp_path / "table", "._a.parquet", "Thumbs.db") / "a.parquet")
    assert len(read_images(tmp_path / "table")) == 6


def test_classes_called_like_splits(tmp_path):
    """Folders are splits only if all are called so: vehicles have trains, and states may be called test and dev."""
    for kind in ("bus", "car", "train", "Test"):
        pictures.folder(tmp_path / "pets" / kind, 3)
        (tmp_path / "vehicles" / kind).mkdir(parents=True)
        for i, file in enumerate(sorted((tmp_path / "pets" / kind).rglob("*.png"))):
            file.rename(tmp_path / "vehicles" / kind / f"{i}.png")
    assert read_images(tmp_path / "vehicles").labels == ("Test", "bus", "car", "train")
    pictures.folder(tmp_path / "alone", 3, ("test",))
    with pytest.raises(DataError, match=r"alone has folders for test alone \(test\)"):
        read_images(tmp_path / "alone")


@pytest.mark.parametrize(
    "name", ["a.npz", "a.parquet", "pets/cat/0.png", "mnist/train-images-idx3-ubyte", "c/train.bin"]
)
def test_pointers_of_git_lfs(tmp_path, name):
    """What a clone without Git LFS leaves is named, with what to do."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 244104\n"
    (made(tmp_path, name) / name).write_bytes(pointer)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer of 131 bytes: run git lfs pull"):
        read_images(tmp_path / name if "/" not in name else tmp_path / name.split("/")[0])


def test_few_rows_of_many_classes_are_not_all_for_validation(tmp_path):
    """Two images of each of three classes: a client of six rows has some for test too."""
    root = pictures.folder(tmp_path / "pets", 6)
    (client,) = ImageData(root, partition="iid", clients=1).load(0).clients.values()
    assert [len(split) for _, split in client.splits()] == [3, 2, 1]
