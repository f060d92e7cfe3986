"""WeightedMean by hand and by property; checksum; nbytes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import PayloadError
from consilium.params import WeightedMean, checksum, finite, nbytes

KEYS = ("trunk", "b.experts.0.w", "b.experts.1.w")
NUMBERS = st.floats(-100, 100, width=32)
WEIGHTS = st.integers(1, 1000)
UPDATES = st.lists(
    st.tuples(WEIGHTS, st.dictionaries(st.sampled_from(KEYS), st.lists(NUMBERS, min_size=2, max_size=2), min_size=1)),
    min_size=1,
    max_size=5,
)
OLD = {key: torch.tensor([7.5, -0.0]) for key in KEYS}


def tensors(update, dtype=torch.float32):
    return {key: torch.tensor(values, dtype=dtype) for key, values in update.items()}


def mean_of(updates, old=OLD):
    mean = WeightedMean()
    for weight, update in updates:
        mean.add(tensors(update), weight)
    return mean.mean(old)


def test_by_hand():
    """Trunk: (1*1 + 3*5) / 4 = 4. Expert 0 from the first client alone: 10. Expert 1 from nobody: as it was."""
    mean = WeightedMean()
    mean.add({"trunk": torch.tensor(1.0), "b.experts.0.w": torch.tensor(10.0)}, 1)
    mean.add({"trunk": torch.tensor(5.0)}, 3)
    old = {"trunk": torch.tensor(0.0), "b.experts.0.w": torch.tensor(0.0), "b.experts.1.w": torch.tensor(-2.0)}
    new = mean.mean(old)
    assert {key: t.item() for key, t in new.items()} == {"trunk": 4.0, "b.experts.0.w": 10.0, "b.experts.1.w": -2.0}
    assert new["b.experts.1.w"] is old["b.experts.1.w"]
    assert old["trunk"].item() == 0.0


def test_weight_by_key():
    """Router rows weighted 1 and 9: (0*1 + 10*9) / 10 = 9; the trunk 1 to 1: 5; a weight of 0 does not count."""
    mean = WeightedMean()
    for value, row_weight in ((0.0, 1), (10.0, 9)):
        update = {"row": torch.tensor(value), "trunk": torch.tensor(value), "unused": torch.tensor(value)}
        mean.add(update, lambda key, w=row_weight: {"row": w, "trunk": 1, "unused": 0}[key])
    new = mean.mean({"row": torch.zeros(()), "trunk": torch.zeros(()), "unused": torch.tensor(-1.0)})
    assert (new["row"], new["trunk"], new["unused"]) == (9.0, 5.0, -1.0)


@given(UPDATES)
def test_within_the_contributors_or_untouched(updates):
    new = mean_of(updates)
    for key in KEYS:
        values = [tensors(u)[key] for _, u in updates if key in u]
        if not values:
            assert new[key] is OLD[key]
            continue
        stacked = torch.stack(values)
        assert (stacked.amin(0) <= new[key]).all() and (new[key] <= stacked.amax(0)).all()


@given(st.dictionaries(st.sampled_from(KEYS), st.lists(NUMBERS, min_size=2, max_size=2)), st.lists(WEIGHTS, min_size=1))
def test_identical_updates_give_that_update_bit_for_bit(update, weights):
    """A single client's mean is its update, for instance."""
    new = mean_of([(w, update) for w in weights])
    for key, tensor in tensors(update).items():
        assert torch.equal(new[key], tensor)


@given(UPDATES, st.integers(2, 50))
def test_only_ratios_of_weights_count(updates, c):
    new, scaled = mean_of(updates), mean_of([(w * c, u) for w, u in updates])
    for key in KEYS:
        torch.testing.assert_close(new[key], scaled[key], rtol=1e-6, atol=1e-30)


@given(UPDATES, st.permutations(KEYS))
def test_names_carry_no_meaning(updates, names):
    """Experts renamed consistently, router rows with them, and then averaged: the average, renamed. No tensor is
    moved by tensors of other names."""
    to = dict(zip(KEYS, names, strict=True))
    renamed = mean_of([(w, {to[k]: v for k, v in u.items()}) for w, u in updates])
    for key, tensor in mean_of(updates).items():
        assert torch.equal(renamed[to[key]], tensor)
        alone = mean_of([(w, {key: u[key]}) for w, u in updates if key in u])
        assert torch.equal(alone[key], tensor)


@given(st.lists(WEIGHTS, min_size=1, max_size=5))
def test_clients_that_changed_nothing_change_nothing(weights):
    new = mean_of([(w, {key: tensor.tolist() for key, tensor in OLD.items()}) for w in weights])
    assert all(torch.equal(new[key], OLD[key]) for key in KEYS)


@given(st.lists(st.tuples(st.integers(1, 2**53), st.floats(-1e30, 1e30)), min_size=1, max_size=6))
def test_finite_updates_never_give_anything_else(updates):
    new = mean_of([(w, {"trunk": [x, -x]}) for w, x in updates])
    assert finite(new["trunk"])


@given(st.lists(st.sampled_from([0.0, -1.5, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-45]), max_size=5))
def test_finite_is_what_torch_says_of_each_number(values):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
        assert finite(tensor) == bool(tensor.isfinite().all())


@given(UPDATES, st.integers(0, 5))
def test_two_levels_equal_one(updates, cut):
    """The mean of two groups' means, each weighted by what it counted, is the mean over all."""
    upper = WeightedMean()
    for group in (updates[:cut], updates[cut:]):
        counted = {k: sum(w for w, u in group if k in u) for k in KEYS}
        lower = WeightedMean()
        for weight, update in group:
            lower.add(tensors(update, torch.float64), weight)
        mean = lower.mean({k: t.double() for k, t in OLD.items()})
        upper.add({k: mean[k] for k in KEYS if counted[k]}, counted.__getitem__)
    merged = upper.mean(OLD)
    for key, flat in mean_of(updates).items():
        torch.testing.assert_close(merged[key], flat, rtol=1e-6, atol=1e-12)


def test_sums_are_float64():
    """In float32, 2**24 + 1 + 1 loses both ones; here the mean of (2**24, 1, 1) is (2**24 + 2) / 3 to the last bit."""
    mean = WeightedMean()
    for value in (2.0**24, 1.0, 1.0):
        mean.add({"w": torch.tensor(value)}, 1)
    assert mean.mean({"w": torch.zeros(())})["w"] == torch.tensor((2.0**24 + 2) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keeps_the_servers_dtype(dtype):
    """(1*1 + 2*2.5) / 3 = 2 in every dtype, and clients may send another one than the server holds."""
    mean = WeightedMean()
    mean.add({"w": torch.tensor([1.0], dtype=dtype)}, 1)
    mean.add({"w": torch.tensor([2.5], dtype=torch.float32)}, 2)
    new = mean.mean({"w": torch.zeros(1, dtype=dtype)})["w"]
    assert new.dtype == dtype and new.item() == 2.0


def test_nobody_answered():
    assert WeightedMean().mean(OLD) == OLD


def test_does_not_change_its_arguments():
    update = {"w": torch.ones(2)}
    mean = WeightedMean()
    mean.add(update, 2)
    mean.add(update, 3)
    mean.mean({"w": torch.zeros(2)})
    assert torch.equal(update["w"], torch.ones(2))


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf, -math.inf])
def test_refuses_a_weight(weight):
    with pytest.raises(PayloadError, match="'w' is not a finite number >= 0"):
        WeightedMean().add({"w": torch.ones(1)}, weight)


def test_refuses_shapes_that_differ():
    mean = WeightedMean()
    mean.add({"w": torch.ones(2)}, 1)
    with pytest.raises(PayloadError, match=r"'w' arrived with shape \(1,\), others sent \(2,\)"):
        mean.add({"w": torch.ones(1)}, 1)
    with pytest.raises(PayloadError, match=r"'w' arrived with shape \(2,\), the server holds \(3,\)"):
        mean.mean({"w": torch.ones(3)})


def test_refuses_an_unknown_key():
    mean = WeightedMean()
    mean.add({"stranger": torch.ones(2)}, 1)
    with pytest.raises(PayloadError, match="'stranger' is not a parameter of the server's model"):
        mean.mean({"w": torch.ones(2)})


def test_checksum_sees_names_dtypes_shapes_and_bits_and_no_order():
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0])}
    assert checksum(base) == checksum(dict(reversed(base.items())))
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].reshape(1, 2), "b": base["b"]},
        {"a": torch.tensor([-0.0, 1.0]), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({checksum(base), *map(checksum, others)}) == 6


def test_checksum_of_views_and_scalars():
    square = torch.arange(4.0).reshape(2, 2)
    assert checksum({"a": square.T}) == checksum({"a": square.T.contiguous()})
    assert checksum({"a": torch.tensor(1.0, dtype=torch.bfloat16)})


def test_nbytes():
    assert nbytes([torch.zeros(3, 2), torch.zeros((), dtype=torch.bfloat16), torch.zeros(0)]) == 26
