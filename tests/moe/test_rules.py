"""Rules that merge adapters: numbers by hand, and what holds for all of them."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import PayloadError
from consilium.moe.rules import ANY_RANK, FOLDS, AdapterMean, Rule, effective_rank, spectrum, truncated
from consilium.params import WeightedMean

E = "block.experts.0.w"
A, B, W = f"{E}.lora_A", f"{E}.lora_B", f"{E}.lora_W"
RULES = get_args(Rule)


def pair(b, a):
    return {B: torch.as_tensor(b, dtype=torch.float64), A: torch.as_tensor(a, dtype=torch.float64)}


def product(params):
    return params[B] @ params[A]


def server(rank=2, x=2, y=2, seed=0):
    """What the server has: A at random, B and W zero."""
    a = torch.randn(rank, x, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pair(torch.zeros(y, rank), a) | {W: torch.zeros(y, x, dtype=torch.float64)}


def merge(rule, clients, previous, scale=1.0, begin=None):
    mean = AdapterMean(rule, scale, lambda: begin or {A: previous[A] + 1})
    for params, weight in clients:
        mean.add(params, weight)
    return mean.mean(previous), mean.told()


def change(rule, merged, scale=1.0):
    """By how much the model that is deployed differs from the base it began with."""
    return scale * product(merged) + merged[W]


CLIENTS = [(pair([[1.0], [0.0]], [[1.0, 0.0]]), 3), (pair([[0.0], [1.0]], [[0.0, 1.0]]), 1)]
"""Updates diag(1, 0) and diag(0, 1) with weights 3 and 1: the mean update is diag(3/4, 1/4)."""
MEAN = torch.tensor([[0.75, 0.0], [0.0, 0.25]], dtype=torch.float64)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "pad", "rank_partition"])
def test_the_mean_of_factors(rule):
    """A = (3/4, 1/4) and B = A^T: their product [[9, 3], [3, 1]] / 16 is not the mean update."""
    found, told = merge(rule, CLIENTS, server(rank=1))
    torch.testing.assert_close(product(found), torch.tensor([[9.0, 3.0], [3.0, 1.0]]).double() / 16)
    assert told["effective_rank"] == pytest.approx(1)


def test_the_same_as_a_weighted_mean_of_every_number():
    mean = WeightedMean()
    for params, weight in CLIENTS:
        mean.add(params, weight)
    plain, found = mean.mean(server(rank=1)), merge("mean", CLIENTS, server(rank=1))[0]
    assert all(torch.equal(plain[key], found[key]) for key in plain)


def test_svd():
    """Of diag(3/4, 1/4) the nearest matrix of rank 1 is diag(3/4, 0): B = (3/4, 0), A = (1, 0), up to one sign."""
    clients = [(params | {"block.router.0.weight": torch.tensor([float(w)])}, w) for params, w in CLIENTS]
    previous = server(rank=1) | {"block.router.0.weight": torch.zeros(1), "other": torch.ones(1)}
    found, _ = merge("svd", clients, previous)
    torch.testing.assert_close(product(found), torch.diag(torch.tensor([0.75, 0.0])).double())
    torch.testing.assert_close(found[A].abs(), torch.tensor([[1.0, 0.0]]).double())
    assert found["block.router.0.weight"] == 2.5 and found["other"] == 1  # (3 * 3 + 1 * 1) / 4


@pytest.mark.parametrize("rule", sorted(FOLDS))
def test_stack_and_residual_are_the_mean_update(rule):
    """Scale 2: W + 2 B A = 2 diag(3/4, 1/4). Stack begins anew with B = 0; residual keeps the mean factors, so that
    W = 2 (diag(3/4, 1/4) - [[9, 3], [3, 1]] / 16) = [[3, -3], [-3, 3]] / 8."""
    previous = server(rank=1)
    found, told = merge(rule, CLIENTS, previous, scale=2.0)
    torch.testing.assert_close(change(rule, found, 2.0), 2 * MEAN, rtol=0, atol=1e-15)
    if rule == "stack":
        assert not found[B].any() and torch.equal(found[A], previous[A] + 1)
    else:
        torch.testing.assert_close(found[W], torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).double() / 8)
    # singular values 3/4 and 1/4: shares 3/4 and 1/4; squares 9 and 1, of which 1/10 lies beyond rank 1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert told == {"effective_rank": pytest.approx(math.exp(entropy)), "energy_beyond": pytest.approx(0.1)}


UNEQUAL = [
    (pair([[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]), 1),
    (pair([[4.0], [0.0]], [[1.0, 0.0]]), 3),
]
"""Ranks 2 and 1: updates diag(2, 4) and diag(4, 0), weights 1 and 3; the mean update is diag(14/4, 1)."""


def test_pad_dilutes_the_rows_that_few_have():
    """Row 0: A (1, 0), B (14/4, 0). Row 1: A (0, 1/4), B (0, 4/4): diag(3.5, 1/4), where the mean update has 1."""
    found, told = merge("pad", UNEQUAL, server())
    torch.testing.assert_close(product(found), torch.diag(torch.tensor([3.5, 0.25])).double())
    assert told["energy_beyond"] == pytest.approx(0.0625 / (12.25 + 0.0625))


def test_rank_partition_does_not():
    """Row 1 is of the first client alone: A (0, 1), B (0, 4)."""
    found, _ = merge("rank_partition", UNEQUAL, server())
    torch.testing.assert_close(product(found), torch.diag(torch.tensor([3.5, 4.0])).double())


def test_pad_norm_weighs_by_the_norm_of_the_updates():
    """Norms sqrt(4 + 16) = sqrt(20) and 4, whatever the weights 1 and 3."""
    found, _ = merge("pad_norm", UNEQUAL, server())
    one, other = math.sqrt(20) / (math.sqrt(20) + 4), 4 / (math.sqrt(20) + 4)
    torch.testing.assert_close(found[B], torch.tensor([[2 * one + 4 * other, 0], [0, 4 * one]]).double())
    torch.testing.assert_close(found[A], torch.tensor([[1, 0], [0, one]]).double())


@pytest.mark.parametrize("rule", ["stack", "svd"])
def test_unequal_ranks_without_loss(rule):
    found, _ = merge(rule, UNEQUAL, server())
    torch.testing.assert_close(change(rule, found), torch.diag(torch.tensor([3.5, 1.0])).double())


def test_rows_that_nobody_has_stay():
    previous = server() | {B: torch.ones(2, 2, dtype=torch.float64)}
    found, _ = merge("rank_partition", [UNEQUAL[1]], previous)
    assert torch.equal(found[A][1], previous[A][1]) and torch.equal(found[B][:, 1], previous[B][:, 1])


@pytest.mark.parametrize("rule", ["ffa", "alternate", "share_a"])
def test_halves_are_means(rule):
    """One half arrives: 3/4 of the first, 1/4 of the second; the other stays as it was."""
    half = A if rule == "share_a" else B
    previous = server(rank=1)
    found, told = merge(rule, [({half: params[half]}, w) for params, w in CLIENTS], previous, begin=previous)
    torch.testing.assert_close(found[half], (3 * CLIENTS[0][0][half] + CLIENTS[1][0][half]) / 4)
    other = B if half == A else A
    assert torch.equal(found[other], previous[other])
    assert told == ({} if rule == "share_a" else {"effective_rank": pytest.approx(1), "energy_beyond": 0})


def test_where_nothing_was_learnt_something_still_can_be():
    """B zero everywhere: the product is zero, and A keeps rows of length one."""
    found, told = merge("svd", [(pair([[0.0], [0.0]], [[3.0, 4.0]]), 1)], server(rank=1))
    assert not found[B].any() and found[A].norm() == pytest.approx(1) and told == {}


@pytest.mark.parametrize("rule", sorted(ANY_RANK | FOLDS))
def test_what_is_no_pair_of_the_server_is_refused(rule):
    mean = AdapterMean(rule, 1.0, dict)
    for half in (A, B):
        with pytest.raises(PayloadError, match="without"):
            mean.add({half: torch.ones(1, 2)}, 1)
    with pytest.raises(PayloadError, match="finite"):
        mean.add(CLIENTS[0][0], -1.0)
    mean.add(pair([[1.0], [1.0]], [[1.0, 0.0]]), 1)
    with pytest.raises(PayloadError, match="no pair of the server's model"):
        mean.mean({A: torch.ones(1, 3), B: torch.ones(2, 1), W: torch.ones(2, 3)})


@pytest.mark.parametrize("rule", RULES)
def test_a_client_without_weight_counts_for_nothing(rule):
    previous = server(rank=1)
    found, _ = merge(rule, [(CLIENTS[0][0], 0)], previous)
    assert all(torch.equal(found[key], previous[key]) for key in previous)


# --- what holds for all -----------------------------------------------------------------------------------------------

sizes = st.integers(1, 5)
seeds = st.integers(0, 10_000)


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@given(x=sizes, y=sizes, seed=seeds, scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_with_one_client_every_rule_is_the_identity(x, y, seed, scale):
    rank = 1 + seed % min(x, y)
    rng = torch.Generator().manual_seed(seed)
    client, previous = pair(draw(rng, y, rank), draw(rng, rank, x)), server(rank, x, y, seed)
    for rule in RULES:
        sent = dict(client)
        if rule == "ffa":
            sent[A] = previous[A]
        found, _ = merge(rule, [(sent, 7)], previous, scale, begin=previous if rule == "ffa" else None)
        torch.testing.assert_close(change(rule, found, scale), scale * product(sent), rtol=1e-9, atol=1e-9)


@given(n=st.integers(2, 5), x=sizes, y=sizes, seed=seeds)
def test_with_equal_a_all_rules_agree(n, x, y, seed):
    """On sum w_k B_k A; but for "pad_norm", whose weights are others."""
    rank = 1 + seed % min(x, y)
    rng = torch.Generator().manual_seed(seed)
    a, previous = draw(rng, rank, x), server(rank, x, y, seed)
    previous[A] = a
    clients = [(pair(draw(rng, y, rank), a), 1 + k) for k in range(n)]
    expected = sum(w * product(params) for params, w in clients) / sum(w for _, w in clients)
    for rule in sorted(set(RULES) - {"pad_norm"}):
        found, _ = merge(rule, clients, previous, begin=previous if rule == "ffa" else None)
        torch.testing.assert_close(change(rule, found), expected, rtol=1e-9, atol=1e-9)


@given(n=st.integers(1, 5), x=sizes, y=sizes, seed=seeds, scale=st.sampled_from([0.5, 2.0]))
def test_stack_and_residual_equal_the_mean_update_and_svd_is_the_best_approximation(n, x, y, seed, scale):
    rank = 1 + seed % min(x, y)
    rng = torch.Generator().manual_seed(seed)
    previous = server(rank, x, y, seed)
    clients = [(pair(draw(rng, y, rank), draw(rng, rank, x)), 1 + k) for k in range(n)]
    expected = scale * sum(w * product(params) for params, w in clients) / sum(w for _, w in clients)
    for rule in FOLDS:
        found, _ = merge(rule, clients, previous, scale)
        torch.testing.assert_close(change(rule, found, scale), expected, rtol=1e-12, atol=1e-12)
    found, _ = merge("svd", clients, previous, scale)
    values = torch.linalg.svdvals(expected)
    error = (change("svd", found, scale) - expected).norm()
    assert float(error) == pytest.approx(float(values[rank:].norm()), abs=1e-9)  # Eckart-Young
    other = scale * draw(rng, y, rank) @ draw(rng, rank, x)
    assert float(error) <= float((other - expected).norm()) + 1e-9


@given(x=sizes, y=sizes, seed=seeds)
def test_the_spectrum_is_that_of_the_product(x, y, seed):
    rank = 1 + seed % 6  # also above x and y
    rng = torch.Generator().manual_seed(seed)
    a, b = draw(rng, rank, x), draw(rng, y, rank)
    values, whole = spectrum(a, b), torch.linalg.svdvals(b @ a)
    least = min(len(values), len(whole))
    torch.testing.assert_close(values[:least], whole[:least], rtol=1e-9, atol=1e-9)
    assert values[least:].abs().sum() < 1e-9 and whole[least:].abs().sum() < 1e-9
    low, high = effective_rank(values), len(values)
    assert 1 - 1e-9 <= low <= high + 1e-9
    for kept in range(1, rank + 1):
        near_a, near_b = truncated(a, b, kept)
        assert len(near_a) == near_b.shape[1] <= kept


def test_effective_rank_by_hand():
    """Equal values: their number. (3/4, 1/4): exp(H). Zeros do not count; all zero: 0."""
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_small_ranks_collapse_the_rows_that_padding_dilutes():
    """Nine clients of rank 1 and one of rank 2 with equal rows: after t rounds the second row's A and B each fell to
    1/10 of what they were, so that its share of the energy falls by 10^-4 each round; rank_partition keeps it."""
    start = pair(torch.eye(2), torch.eye(2)) | {W: torch.zeros(2, 2, dtype=torch.float64)}
    shares = {}
    for rule in ("pad", "rank_partition"):
        params = dict(start)
        for _ in range(2):
            small = {A: params[A][:1], B: params[B][:, :1]}
            params, told = merge(rule, [(small, 1)] * 9 + [({A: params[A], B: params[B]}, 1)], params)
        shares[rule] = told["energy_beyond"]
    assert shares["rank_partition"] == pytest.approx(0.5)
    assert shares["pad"] == pytest.approx(1e-8 / (1 + 1e-8), rel=1e-6)
