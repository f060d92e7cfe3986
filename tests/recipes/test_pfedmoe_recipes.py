"""pFedMoE's table and Fed-Heart-Disease: every recipe runs on tiny files of the form that it asks for."""

import json
from dataclasses import replace
from pathlib import Path

import pictures
import pyarrow
import pyarrow.parquet
import pytest

from consilium.loop import run
from consilium.recipes import find

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
"""Open data that may lie beside the project."""


def started(name, folder, **data):
    """One round of the recipe with these settings of its data; returns the summary and the partition."""
    made = find(name).make()
    summary = run(replace(made, data=replace(made.data, **data), rounds=1), folder)
    return summary, json.loads((folder / "partition.json").read_text())["clients"]


@pytest.mark.parametrize(
    ("name", "make", "classes"),
    [
        ("pfedmoe-cifar10", lambda path: pictures.cifar(path, n=40, test=40), 2),
        ("pfedmoe-cifar100", lambda path: pictures.cifar(path, True, n=300, test=200), 10),
        ("pfedmoe-mnist", lambda path: pictures.idx(path, side=28), 2),
        ("pfedmoe-images", lambda path: pictures.npz(path.with_suffix(".npz"), side=28, channels=1), 2),
        ("pfedmoe-mnist", lambda path: pictures.npz(path.with_suffix(".npz"), side=28, channels=1), 2),
    ],
)
def test_the_papers_table(tmp_path, name, make, classes):
    """A round of three clients, each with its share of the classes; client k has the k-th of the five CNNs."""
    path = make(tmp_path / "here")
    summary, clients = started(name, tmp_path / "run", path=path, clients=3, augment="crop-flip")
    kinds = "mnist" if name == "pfedmoe-mnist" else "cnn"
    assert summary["coverage"] == "3/3" and 0 <= summary["mean"] <= 1
    assert [told["architecture"] for told in clients.values()] == [f"{kinds}-{i}" for i in (1, 2, 3)]
    assert {sum(n > 0 for n in told["label_counts"].values()) for told in clients.values()} == {classes}


@pytest.mark.parametrize("name", ["pfedmoe-cifar10", "pfedmoe-cifar100", "pfedmoe-mnist"])
def test_the_settings_of_the_table(name):
    """N = 10, 50 and 100 with 100, 20 and 10 % taking part: always ten; SGD of rate 0.01 on the cross-entropy."""
    made = find(name).make()
    assert made.data.partition == "pathological" and len(made.model.architectures) == 5
    assert [made.sampling.clients_per_round / n for n in (10, 50, 100)] == [1.0, 0.2, 0.1]
    assert (made.fit.optimizer, made.fit.lr, made.fit.batch_size, made.fit.momentum) == ("sgd", 0.01, 64, 0.0)
    assert made.model.width == (50 if name == "pfedmoe-mnist" else 500)


def test_heart_disease(tmp_path):
    """Rows of two hospitals, of which one never recorded a column; grades 0..4 become no and yes."""
    n = 60
    rows = {
        "hospital": ["north" if i % 2 else "south" for i in range(n)],
        "age": [float(30 + i % 40) for i in range(n)],
        "chol": [None if i % 2 else float(200 + i) for i in range(n)],
        "num": [i // 2 % 5 for i in range(n)],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "heart.parquet")
    summary, clients = started("pfedmoe-heart", tmp_path / "run", path=tmp_path / "heart.parquet")
    assert list(clients) == ["north", "south"] and summary["coverage"] == "2/2"
    assert all(told["label_counts"] == {"no": 6, "yes": 24} for told in clients.values())


@pytest.mark.parametrize(
    ("name", "file", "data", "clients"),
    [
        ("pfedmoe-mnist", "fashion_mnist.npz", {"clients": 100, "examples": 3000}, 100),
        ("pfedmoe-heart", "heart_disease.parquet", {}, 4),
    ],
)
def test_the_open_data(tmp_path, name, file, data, clients):
    if not (SHARED / file).is_file():
        pytest.skip(f"{file} does not lie in {SHARED}")
    summary, told = started(name, tmp_path / "run", path=SHARED / file, **data)
    assert len(told) == clients and summary["coverage"] == f"{clients}/{clients}" and summary["mean"] > 0
