"""Images and tables as clients: digits, .npz, tables by columns; what is refused."""

import numpy as np
import pytest
import torch

from consilium.data.arrays import ImageData, TableData
from consilium.errors import ConfigError, DataError


def npz(path, n=40, **changes):
    """Ten-pixel squares of two classes with an official test set."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 255, (n, 3, 3), dtype=np.uint8), "y_train": np.arange(n) % 2,
        "x_test": rng.integers(0, 255, (20, 3, 3), dtype=np.uint8), "y_test": np.arange(20) % 2,
        "label_names": np.array(["cat", "dog"]),
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def table(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_digits_need_no_file():
    """1,797 images; a client has two digits, and every digit two clients: all images are dealt, none twice."""
    federation = ImageData().load(0)
    assert federation.shape == (1, 8, 8) and list(federation.clients) == [f"digits-{i:02d}" for i in range(10)]
    rows = [row for data in federation.clients.values() for _, split in data.splits() for row in split.rows]
    assert len(rows) == len(set(rows)) == 1797
    for data in federation.clients.values():
        assert data.task.labels == tuple("0123456789")  # everybody's head has all classes, as in the paper
        held = {split: set(part.targets) for split, part in data.splits()}
        assert held["train"] == held["validation"] == held["test"] and len(held["train"]) == 2
        batch = data.train.batch(range(3), torch.device("cpu"))
        assert batch["x"].dtype == torch.float32 and batch["x"].min() >= -1 and batch["x"].max() <= 1
    again, other = ImageData().load(0), ImageData().load(1)
    assert federation.fingerprint == again.fingerprint != other.fingerprint
    assert federation.partition() == again.partition()


def test_npz_with_an_official_test_set(tmp_path):
    """Train and test are dealt in the same proportions, and never mixed; uint8 255 becomes 1, 0 becomes -1."""
    x = np.zeros((40, 3, 3), dtype=np.uint8)
    x[1::2] = 255
    data = ImageData(npz(tmp_path / "sq.npz", x_train=x), partition="iid", clients=2, validation=0.3)
    federation = data.load(0)
    assert list(federation.clients) == ["sq-00", "sq-01"] and federation.shape == (1, 3, 3)
    for client in federation.clients.values():
        assert [len(split) for _, split in client.splits()] == [14, 6, 10]
        assert all(int(row) >= 40 for row in client.test.rows) and all(int(row) < 40 for row in client.train.rows)
        assert client.task.labels == ("cat", "dog")
        batch = client.train.batch(range(14), torch.device("cpu"))
        expected = torch.where(batch["labels"] == 1, 1.0, -1.0)
        assert (batch["x"] == expected[:, None, None, None]).all()


def test_fewer_examples(tmp_path):
    federation = ImageData(npz(tmp_path / "sq.npz"), partition="iid", clients=1, examples=10).load(0)
    (client,) = federation.clients.values()
    assert [len(split) for _, split in client.splits()] == [8, 2, 10]


@pytest.mark.parametrize("shape", [(40, 5, 6, 3), (40, 3, 5, 6)])
def test_colours_come_first(tmp_path, shape):
    x = np.zeros(shape, dtype=np.uint8)
    path = npz(tmp_path / "sq.npz", x_train=x, x_test=x[:20])
    assert ImageData(path, partition="iid", clients=1).load(0).shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"y_test": None}, r"has no y_test; it has"), ({"y_train": np.arange(3)}, "one label per image"),
     ({"x_test": np.zeros((20, 4, 4), np.uint8)}, "differ in the shape"),
     ({"y_train": np.array([{}] * 40, dtype=object)}, "cannot be read")],
)  # fmt: skip
def test_an_npz_that_cannot_be_used(tmp_path, changes, message):
    """An array of objects would be read with pickle, and is not."""
    with pytest.raises(DataError, match=message):
        ImageData(npz(tmp_path / "sq.npz", **changes)).load(0)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        ImageData(tmp_path / "no.npz").load(0)


ROWS = ["site,age,weight,grade"]
ROWS += [f"{('south', 'north')[i % 2]},{30 + i},{i if i % 2 else ''},{i % 3}" for i in range(24)]


def test_a_table_is_standardised_client_by_client(tmp_path):
    """The south never recorded the weight: zeros; the north's columns have mean 0 and deviation 1 in training."""
    path = table(tmp_path / "t.csv", ROWS)
    federation = TableData(path, target="grade", client="site").load(0)
    assert list(federation.clients) == ["north", "south"] and federation.shape == (2,)
    assert federation.source["columns"] == ["age", "weight"]
    train = federation.clients["north"].train
    north, south = train.x[train.index], federation.clients["south"].train.x[::2]
    torch.testing.assert_close(north.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(north.std(0, correction=0), torch.ones(2))
    assert (south[:, 1] == 0).all() and federation.clients["south"].task.labels == ("0", "1", "2")


def test_statistics_are_of_training_rows_alone(tmp_path):
    """What stands in a row for test or validation changes no other row, nor the scale that an export carries."""
    data = TableData(table(tmp_path / "t.csv", ROWS), target="grade", client="site")
    before, scale = data.load(0), data.scale("north", 0)
    held = [i for _, split in list(before.clients["north"].splits())[1:] for i in split.index.tolist()]
    lines = [
        ROWS[0],
        *(line.replace(f",{30 + i},", ",9999,") if i in held else line for i, line in enumerate(ROWS[1:])),
    ]
    other = TableData(table(tmp_path / "o.csv", lines), target="grade", client="site")
    after = other.load(0)
    index = before.clients["north"].train.index
    assert held and torch.equal(before.clients["north"].train.x[index], after.clients["north"].train.x[index])
    assert not torch.equal(before.clients["north"].train.x[held], after.clients["north"].train.x[held])
    assert other.scale("north", 0) == scale


def test_a_grade_as_yes_or_no(tmp_path):
    federation = TableData(table(tmp_path / "t.csv", ROWS), target="grade", client="site", positive=True).load(0)
    data = federation.clients["north"]
    assert data.task.labels == ("no", "yes")
    counts = federation.partition()["clients"]["north"]["label_counts"]
    assert counts == {"no": 4, "yes": 8}


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["site,age,grade", "a,x,1"], "column 'age' does not hold numbers"), (["site,grade", "a,1"], "no column 'age'"),
     (["site,age,grade", "a,1,"], "without a value of 'grade'"), (["site,age,grade", "a,1,1"], "at least 2")],
)  # fmt: skip
def test_a_table_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        TableData(table(tmp_path / "t.csv", lines), target="grade", client="site", columns=("age",)).load(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clients": 0}, "clients is 0"), ({"alpha": 0.0}, "alpha is 0"), ({"partition": "x"}, "partition is 'x'"),
     ({"validation": 0.5, "test": 0.5}, "together below 1")],
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageData(**options)
