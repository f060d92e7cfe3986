"""Rows dealt by flwr_datasets' partitioners."""

from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.data.partition import class_shares, deal, divide
from consilium.errors import DataError

LABELS = ["a", "b", "c", "d"] * 30


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=12, max_size=60),
    st.integers(1, 6),
    st.sampled_from(["iid", "dirichlet"]),
    st.integers(0, 99),
)
def test_every_row_goes_to_exactly_one_client(labels, clients, how, seed):
    parts = divide(labels, clients, how, alpha=0.5, seed=seed)
    assert len(parts) == clients
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    assert parts == divide(labels, clients, how, alpha=0.5, seed=seed)


def test_iid_shares_are_equal():
    assert [len(part) for part in divide(LABELS, 8, "iid")] == [15] * 8


def test_a_small_alpha_skews_and_a_large_one_does_not():
    def largest(alpha: float) -> float:
        parts = divide(LABELS, 4, "dirichlet", alpha=alpha, seed=1)
        return max(max(Counter(LABELS[i] for i in part).values()) / len(part) for part in parts if part)

    assert largest(0.05) > 0.8
    assert largest(1000.0) < 0.35


def test_pathological_clients_hold_so_many_labels_and_share_no_row():
    parts = divide(LABELS, 8, "pathological", each=2, seed=5)
    assert all(len({LABELS[i] for i in part}) == 2 for part in parts)
    rows = [row for part in parts for row in part]
    assert sorted(rows) == list(range(len(LABELS)))


def test_pathological_with_fewer_places_than_labels_leaves_labels_out():
    parts = divide(LABELS, 1, "pathological", each=2)
    assert len({LABELS[i] for i in parts[0]}) == 2


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(DataError, match="3 rows cannot be dealt to 4 clients"):
        divide(["a", "b", "a"], 4, "iid")
    with pytest.raises(DataError, match="5 labels per client asked for, but the data has 4"):
        divide(LABELS, 2, "pathological", each=5)
    with pytest.raises(DataError, match="'random' is unknown"):
        divide(LABELS, 2, "random")


# --- shares, dealt the same way to a training and a test set ----------------------------------------------------------


def test_the_pathological_shares():
    """10 clients with 2 of 10 classes: each class has 2 clients, which share it 0.4 : 0.6 at the extreme."""
    shares = class_shares(10, 10, "pathological", each=2, seed=3)
    assert ((shares > 0).sum(1) == 2).all() and ((shares > 0).sum(0) == 2).all()
    assert shares[shares > 0].min() >= 0.4 and shares.max() <= 0.6
    numpy.testing.assert_allclose(shares.sum(0), 1)
    assert (class_shares(10, 3, "pathological", each=2).sum(0) > 0).sum() == 6


@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from(["iid", "dirichlet", "pathological"]), st.integers(0, 99))
def test_every_row_of_a_dealt_class_goes_to_one_client(classes, clients, how, seed):
    shares = class_shares(classes, clients, how, alpha=0.3, each=1, seed=seed)
    labels = [i % classes for i in range(50)]
    held = deal(labels, shares, seed)
    rows = sorted(row for mine in held for row in mine)
    assert rows == [i for i in range(50) if shares[:, labels[i]].sum() > 0]
    for mine, share in zip(held, shares, strict=True):
        for kind in range(classes):
            n = labels.count(kind)
            assert abs(sum(labels[row] == kind for row in mine) - share[kind] * n) <= 1


def test_shares_refused():
    with pytest.raises(DataError, match="at most 3"):
        class_shares(3, 2, "pathological", each=4)
    with pytest.raises(DataError, match="unknown"):
        class_shares(3, 2, "other")
