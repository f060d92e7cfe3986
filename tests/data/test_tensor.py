"""One tensor, indexed: batches, cuts and fingerprints."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.task import ClientData, Federation, Task
from consilium.data.tensor import TensorSplit, crop_flip, cut
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
        assert sorted(torch.cat(batches[i : i + 2]).tolist()) == [0, 1, 2]


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


def drawn(shape, how, seed=0, dtype=torch.uint8):
    """A batch of images whose pixels all differ, and what becomes of it."""
    x = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
    return x, crop_flip(x, how, torch.Generator().manual_seed(seed))


def by_hand(x, top, left, flipped, black):
    """One image [C, H, W]: padded by 4, the window at (top, left), then mirrored."""
    C, H, W = x.shape
    padded = torch.full((C, H + 8, W + 8), black, dtype=x.dtype)
    padded[:, 4 : 4 + H, 4 : 4 + W] = x
    window = padded[:, top : top + H, left : left + W]
    return window.flip(2) if flipped else window


@pytest.mark.parametrize(("dtype", "black"), [(torch.uint8, 0), (torch.float32, -1)])
def test_every_image_is_cut_and_turned_by_draws_of_its_own(dtype, black):
    """Each result is one of the 2 x 9 x 9 that there are, and the draws are even: of 1,620 images, 810 are mirrored
    (5 deviations: 100), every corner is cut 20 times (5 deviations: 22)."""
    x = (torch.arange(6).reshape(1, 3, 2) + 1).to(dtype)
    cut = crop_flip(x.expand(1620, 1, 3, 2), "crop-flip", torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    flipped = (torch.rand(1620, 1, generator=rng) < 0.5).flatten().tolist()
    top, left = (torch.randint(-4, 5, (2, 1620, 1), generator=rng) + 4).flatten(1).tolist()
    for i in range(1620):
        assert torch.equal(cut[i], by_hand(x, top[i], left[i], flipped[i], black))
    assert abs(sum(flipped) - 810) < 100
    counts = torch.bincount(9 * torch.tensor(top) + torch.tensor(left), minlength=81)
    assert counts.min() > 0 and counts.max() <= 42


def test_crop_and_flip_alone():
    """A flip moves no row, and gives the image or its mirror; a crop mirrors none. Colours stay together."""
    x, turned = drawn((40, 3, 2, 4), "flip", dtype=torch.float32)
    same = (turned == x).flatten(1).all(1)
    mirrored = (turned == x.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    x, cut = drawn((40, 3, 6, 6), "crop", dtype=torch.float32)
    for before, after in zip(x, cut, strict=True):
        seen = after[:, (after[0] >= 0).any(1)][:, :, (after[0] >= 0).any(0)]  # black is -1
        assert (seen[:, :, 1:] - seen[:, :, :-1] == 1).all() and (seen[1] - seen[0] == 36).all()
        assert seen.min() >= before.min() and seen.max() <= before.max()


def test_only_an_augmented_split_augments():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    part = TensorSplit(x, torch.tensor([0, 1, 0, 1]), torch.tensor([2, 0, 3]), ("a", "b"), augment="crop-flip")
    plain = part.batch([0, 1, 2], CPU)["x"]
    assert torch.equal(plain, part.batch([0, 1, 2], CPU)["x"]) and torch.equal(plain[0], x[2] / 127.5 - 1)
    one, two = part.augmented(7), part.augmented(7)
    first, second = (one.batch([0, 1, 2], CPU)["x"] for _ in range(2))
    assert torch.equal(first, two.batch([0, 1, 2], CPU)["x"]) and torch.equal(second, two.batch([0, 1, 2], CPU)["x"])
    assert not torch.equal(first, second) and not torch.equal(first, part.augmented(8).batch([0, 1, 2], CPU)["x"])
    assert first.min() >= -1 and first.max() <= 1 and one.x.data_ptr() == x.data_ptr() and len(one) == 3
    none = TensorSplit(x, part.y, part.index, part.labels)
    assert none.augmented(7) is none
