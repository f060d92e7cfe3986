"""One tensor, indexed: batches, cuts and fingerprints."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.task import ClientData, Federation, Task
from consilium.data.tensor import TensorSplit, cut
from consilium.errors import DataError

CPU = torch.device("cpu")


def split(x, index=(2, 0, 3)):
    return TensorSplit(x, torch.tensor([0, 1, 0, 1]), torch.tensor(index), ("a", "b"))


def test_a_split_is_an_index():
    x = torch.arange(8.0).reshape(4, 2)
    part = split(x)
    assert len(part) == 3 and part.shape == (2,) and part.targets == ["a", "a", "b"] and part.rows == ["2", "0", "3"]
    batch = part.batch([2, 0], CPU)
    assert batch["x"].tolist() == [[6, 7], [4, 5]] and batch["labels"].tolist() == [1, 0]
    assert part.x.data_ptr() == x.data_ptr()


def test_every_epoch_passes_every_row_once():
    part = split(torch.zeros(4, 2))
    batches = list(part.epochs(3, 2, torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in batches] == [2, 1] * 3
    for i in range(0, 6, 2):
        assert sorted(batches[i] + batches[i + 1]) == [0, 1, 2]


def test_the_fingerprint_sees_every_bit_and_label():
    def fingerprint(x, index=(2, 0, 3)):
        part, task = split(x, index), Task("t", "classification", ("a", "b"), "accuracy")
        return Federation({"k": ClientData(task, part, part, part)}).fingerprint

    x = torch.zeros(4, 2)
    other = x.clone()
    other[3, 1] = 1e-30
    unused = x.clone()
    unused[1] = 5
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(unused)
    assert len({fingerprint(x), fingerprint(other), fingerprint(x, (2, 3, 0)), fingerprint(x, (2, 0))}) == 4


def test_labels_must_match():
    with pytest.raises(DataError, match="4 examples but 3 labels"):
        TensorSplit(torch.zeros(4, 2), torch.zeros(3), torch.arange(3), ("a",))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.05, 0.45), st.floats(0.05, 0.45))
def test_cuts_lose_nothing_and_train_on_every_class(y, validation, test):
    parts = cut(range(len(y)), torch.tensor(y), [validation, test], random.Random(0))
    assert sorted(row for part in parts for row in part) == list(range(len(y)))
    for kind in set(y):
        sizes = [sum(y[row] == kind for row in part) for part in parts]
        assert sizes[0] >= 1 and (sum(sizes) < 3 or min(sizes) >= 1)
        assert abs(sizes[1] - validation * sum(sizes)) <= 1 or sum(sizes) < 3
