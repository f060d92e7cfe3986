"""Spreading experts over layers: numbers by hand, and what holds for every shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.moe.layers import shapes, spread

COUNTS = {"a": 16, "b": 16, "c": 16, "d": 16}
LEAST = dict.fromkeys(COUNTS, 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), [4, 4, 4, 4]), ((4.0, 1.0, 1.0, 1.0), [10, 2, 2, 2]), ((2.0, 1.0, 1.0, 1.0), [7, 3, 3, 3])],
)
def test_sixteen_of_sixty_four(shape, expected):
    """D'Hondt by hand, e.g. weights 4 1 1 1: 4/2 .. 4/7, then 4/8 = 1/2 (four ties), 4/9, 4/10."""
    assert list(spread(16, COUNTS, LEAST, shape).values()) == expected


@given(
    experts=st.integers(8, 60),
    shape=st.lists(st.floats(0.1, 10), min_size=4, max_size=4).map(tuple),
    sizes=st.lists(st.integers(2, 20), min_size=4, max_size=4),
)
def test_every_expert_is_given_once_and_more_never_takes_one_away(experts, shape, sizes):
    counts = dict(zip("abcd", sizes, strict=True))
    least = dict.fromkeys(counts, 2)
    given_ = spread(experts, counts, least, shape)
    more = spread(experts + 1, counts, least, shape)
    assert sum(given_.values()) == min(experts, sum(sizes))
    assert all(2 <= given_[block] <= counts[block] and given_[block] <= more[block] for block in counts)


def test_what_is_refused():
    with pytest.raises(ValueError, match="too few"):
        spread(3, COUNTS, LEAST)
    for shape in ((1.0, 1.0), (1.0, 1.0, 1.0, 0.0)):
        with pytest.raises(ValueError, match="4 positive numbers"):
            spread(8, COUNTS, LEAST, shape)


def test_the_shapes_that_are_tried():
    assert shapes(1) == [(1.0,)]
    assert shapes(2) == [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (1.0, 2.0), (1.0, 4.0)]
    assert len(shapes(4)) == 10 and (4.0, 3.0, 2.0, 1.0) in shapes(4)
    assert len(set(shapes(16))) == 10 and all(len(shape) == 16 for shape in shapes(16))
    assert shapes(16)[2] == (2.0,) * 4 + (1.0,) * 12
