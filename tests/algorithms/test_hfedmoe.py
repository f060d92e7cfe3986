"""HFedMoE equation by equation with numbers worked out by hand, then the server on hand-made replies, then the client.

The batch of most examples has four tokens and two experts, gates (.9, .1), (.9, .1), (.5, .5), (.1, .9):
means .6 and .4, largest .9 and .9.
"""

import itertools
import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.algorithms.hfedmoe import (
    HFedMoE,
    best_experts,
    divergence,
    dominant,
    importance,
    information,
    router_weights,
)
from consilium.core import Payload, derive_seed, experts_from_scalars
from consilium.errors import ConfigError
from consilium.moe.addressing import expert_of
from consilium.moe.lora import Lora

GATES = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)


def close(tensor, numbers):
    assert tensor.tolist() == pytest.approx(numbers)


# --- Eq 3 to 14: the scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lam", "scores"), [(1.0, (0.6, 0.4)), (0.0, (0.9, 0.9)), (0.25, (0.825, 0.775))])
def test_importance_by_hand(lam, scores):
    """.25 * .6 + .75 * .9 = .825; .25 * .4 + .75 * .9 = .775."""
    close(importance(GATES, lam), scores)


def test_divergence_by_hand():
    """Eq 11 of expert 0: (2 * .9 log(.9/.6) + .5 log(.5/.6) + .1 log(.1/.6)) / 4.

    With two experts the gates of one are one minus those of the other: each term of a Bernoulli divergence is the
    other expert's printed one, so both have the sum of the two.
    """
    first = (2 * 0.9 * math.log(1.5) + 0.5 * math.log(5 / 6) + 0.1 * math.log(1 / 6)) / 4
    second = (2 * 0.1 * math.log(0.25) + 0.5 * math.log(1.25) + 0.9 * math.log(2.25)) / 4
    close(divergence(GATES), (first, second))
    close(divergence(GATES, "bernoulli"), (first + second, first + second))


def test_divergence_of_gates_that_are_zero_or_one():
    """0 log 0 = 0: half the tokens on each of two experts give .5 log 2; a third that nobody uses gives 0."""
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    close(divergence(gates), (0.5 * math.log(2), 0.5 * math.log(2), 0))
    close(divergence(gates, "bernoulli"), (math.log(2), math.log(2), 0))


def test_information_by_hand():
    """Eq 14: s_b - beta * KL."""
    kl = divergence(GATES).tolist()
    close(information(GATES, 0.25, 0.5), (0.825 - 0.5 * kl[0], 0.775 - 0.5 * kl[1]))
    assert torch.equal(information(GATES, 0.25, 0.0), importance(GATES, 0.25))


ROWS = st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=6)


@given(ROWS, st.sampled_from(["paper", "bernoulli"]))
def test_divergence_is_zero_only_for_a_constant_gate(logits, kl):
    gates = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    assert (divergence(gates, kl) >= 0).all()
    close(divergence(gates[:1].expand(5, 4), kl), [0] * 4)
    if (gates.amax(0) - gates.amin(0)).min() > 1e-3:
        assert (divergence(gates, kl) > 0).all()


# --- Eq 15: the choice ------------------------------------------------------------------------------------------------


def scores(**blocks):
    return {block: torch.tensor(values, dtype=torch.float64) for block, values in blocks.items()}


EVERY = {"A": range(4), "B": range(4)}


@pytest.mark.parametrize(
    ("budget", "A", "B"),
    [(2, (1,), (2,)), (3, (1, 3), (2,)), (4, (0, 1, 3), (2,)), (6, (0, 1, 2, 3), (0, 2)), (8, (0, 1, 2, 3), (0, 2, 3))],
)
def test_best_experts_by_hand(budget, A, B):
    """One each (A1, B2), then A3 .8, A0 .7, A2 .5, B0 .1, B3 0; B1 is below zero and never chosen."""
    table = scores(A=[0.7, 0.9, 0.5, 0.8], B=[0.1, -0.2, 0.3, 0.0])
    assert best_experts(table, EVERY, budget) == {"A": A, "B": B}


def test_best_experts_leaves_out_what_no_token_reached():
    """Of A only 0 and 2 were routed to, of B only 1, which is below zero and still B's only one."""
    table = scores(A=[0.7, 0.9, 0.5, 0.8], B=[0.1, -0.2, 0.3, 0.0])
    assert best_experts(table, {"A": [0, 2], "B": [1]}, 5) == {"A": (0, 2), "B": (1,)}


def test_best_experts_layer_by_layer():
    """Five of eight: one each, and of the other three one each again (3 * 4 // 8)."""
    table = scores(A=[0.7, 0.9, 0.5, 0.8], B=[0.1, -0.2, 0.3, 0.0])
    assert best_experts(table, EVERY, 5, per_layer=True) == {"A": (1, 3), "B": (0, 2)}


def test_best_experts_ties_and_least():
    table = scores(A=[0.5, 0.5, 0.5, 0.5], B=[0.5, 0.5, 0.5, 0.5])
    assert best_experts(table, EVERY, 5, least=2) == {"A": (0, 1, 2), "B": (0, 1)}
    with pytest.raises(ConfigError, match="a budget of 3 experts is too small for 2 layers with 2 each"):
        best_experts(table, EVERY, 3, least=2)


BLOCK = st.tuples(st.lists(st.integers(-2, 9), min_size=3, max_size=3), st.sets(st.integers(0, 2), min_size=1))


@given(BLOCK, BLOCK, BLOCK, st.integers(3, 9))
def test_the_choice_maximises_eq_15(a, b, c, budget):
    """Against every subset of the routed experts within the budget that leaves no layer without one."""
    blocks = dict(zip("ABC", (a, b, c), strict=True))
    table, among = scores(**{k: v[0] for k, v in blocks.items()}), {k: v[1] for k, v in blocks.items()}
    chosen = [(k, e) for k, ids in best_experts(table, among, budget).items() for e in ids]
    assert len(chosen) <= budget and all(e in among[k] for k, e in chosen)
    routed = [(k, e) for k in "ABC" for e in sorted(among[k])]
    allowed = [
        subset
        for size in range(budget + 1)
        for subset in itertools.combinations(routed, size)
        if {k for k, _ in subset} == set("ABC")
    ]
    assert set(chosen) in map(set, allowed)
    value = {(k, e): float(table[k][e]) for k, e in routed}
    assert sum(map(value.get, chosen)) == max(sum(map(value.get, subset)) for subset in allowed)


@given(BLOCK, BLOCK, BLOCK, st.integers(3, 9))
def test_the_budget_holds_layer_by_layer_too(a, b, c, budget):
    blocks = dict(zip("ABC", (a, b, c), strict=True))
    table, among = scores(**{k: v[0] for k, v in blocks.items()}), {k: v[1] for k, v in blocks.items()}
    held = best_experts(table, among, budget, per_layer=True)
    sizes = [len(ids) for ids in held.values()]
    assert 3 <= sum(sizes) <= budget and max(sizes) <= 1 + (budget - 3) // 3
    assert all(set(ids) <= among[k] for k, ids in held.items())


# --- Eq 16 to 21: who counts how much ---------------------------------------------------------------------------------


def test_dominant_by_hand():
    """tau = .5 of 1/4 is .125: reached by .125 itself."""
    assert dominant(torch.tensor([0.5, 0.2, 0.125, 0.1]), 0.5).tolist() == [True, True, True, False]


U = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.1, 0.1, 0.3, 0.5]], dtype=torch.float64)
S = torch.tensor([[0.8, 0.5, 0.9, 0.0], [0.9, 0.9, 0.5, 0.4]], dtype=torch.float64)
HELD = torch.tensor([[True, True, True, False], [True, True, True, True]])
SIZES = torch.tensor([30.0, 10.0], dtype=torch.float64)


def test_router_weights_by_hand():
    """tau 1 is .25: S_1 = {0, 1}, S_2 = {2, 3}, so |S_global| = 4.

    p_1 = .4, .2; p_2 = .15, .2: alpha = .6 / 4 = .15 and .35 / 4 = .0875, normalised .6 / .95 and .35 / .95.
    Row 3 is held by the second alone. Row by row each row has one client that dominates it.
    """
    a, b = 0.6 / 0.95, 0.35 / 0.95
    weights = router_weights(U, S, HELD, SIZES, 1.0)
    close(weights[0], (a, a, a, 0))
    close(weights[1], (b, b, b, 1))
    close(router_weights(U, S, HELD, SIZES, 1.0, "row").flatten(), (1, 1, 0, 0, 0, 0, 1, 1))
    literal = router_weights(U, S, HELD, SIZES, 1.0, "literal")
    close(literal[0], (0.15, 0.15, 0.15, 0))
    close(literal[1], (0.0875,) * 4)


def test_coverage_by_hand():
    """tau .4 is .1: S_1 = {0, 1, 2}, S_2 all four, r = 3/4 and 1.

    p_1 = .4, .2, .09: alpha_1 = .69 / 4; p_2 = .09, .09, .15, .2: alpha_2 = .53 / 4. With r they are .5175 to .53.
    """
    plain = router_weights(U, S, HELD, SIZES, 0.4)
    close(plain[:, 0], (0.69 / 1.22, 0.53 / 1.22))
    close(router_weights(U, S, HELD, SIZES, 0.4, coverage=True)[:, 0], (0.5175 / 1.0475, 0.53 / 1.0475))


def test_router_weights_when_nobody_dominates():
    """|D_c| over the holders; by rows nobody has a weight; printed they are zero."""
    weights = router_weights(U, S, HELD, SIZES, 3.9)
    close(weights[0], (0.75, 0.75, 0.75, 0))
    close(weights[1], (0.25, 0.25, 0.25, 1))
    assert not router_weights(U, S, HELD, SIZES, 3.9, "row").any()
    assert not router_weights(U, S, HELD, SIZES, 3.9, "literal").any()


CLIENTS = st.lists(
    st.tuples(*[st.tuples(st.integers(0, 9), st.integers(1, 9), st.booleans())] * 3), min_size=1, max_size=4
)


@given(CLIENTS, st.floats(0, 2), st.sampled_from(["importance", "row"]), st.booleans())
def test_router_weights_sum_to_one(table, tau, how, coverage):
    """Over the clients, for every row that somebody holds (and, row by row, somebody dominates)."""
    u, s, held = (torch.tensor([[cell[i] for cell in client] for client in table]) for i in range(3))
    held = held.bool()
    u = u.double() * held / (u * held).sum(1, keepdim=True).clamp(min=1)
    s = s.double() * held / 10
    weights = router_weights(u, s, held, torch.arange(1.0, len(table) + 1).double(), tau, how, coverage)
    assert (weights >= 0).all() and not weights[~held].any()
    counted = held.any(0) if how == "importance" else (dominant(u, tau) & held & (u > 0)).any(0)
    close(weights.sum(0), counted.double().tolist())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lam": 1.5}, r"lam is 1.5; it must be within \[0, 1\]"),
        ({"beta": -1}, "beta is -1; it must be at least 0"),
        ({"tau": float("inf")}, "tau is inf"),
        ({"budget": (0.5, 0.0)}, r"budget is \(0.5, 0.0\); it must be within \(0, 1\]"),
        ({"resident": (0.5,)}, "resident is given without budget"),
        ({"router": "rows"}, "router is 'rows'; it must be one of importance, row, literal, plain"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ConfigError, match=message):
        HFedMoE(**wrong)


def test_shares_of_the_experts():
    """16 experts in two layers, clients in the order of their ids; a client holds at least what it trains."""
    made = tiny.setup()
    server = HFedMoE(budget=(0.25, 1.0), resident=(0.5, 0.125, 0.75)).server(made)
    assert list(server.budgets.values()) == [(8, 4), (16, 16), (12, 4), (16, 16), (4, 4), (16, 16)]
    assert HFedMoE(budget=(0.25,)).server(made).budgets["animal-00"] == (16, 4)
    with pytest.raises(ConfigError, match=r"budget 0.09 of 16 experts is 1; with 2 layers it must be at least 0.125"):
        HFedMoE(budget=(0.09,)).server(made)


def test_a_family_that_needs_two_experts_holds_two():
    server = HFedMoE(budget=(0.125,), resident=(0.125,)).server(tiny.setup(tiny.source("phimoe")))
    assert server.budgets["animal-00"] == (4, 2)
    assert all(len(ids) == 2 for ids in server.resident(tiny.infos()[0]).values())


def test_shares_and_device_memory_exclude_each_other():
    with pytest.raises(ConfigError, match="client animal-00 has device memory, which budget would ignore"):
        HFedMoE(budget=(0.5,)).server(tiny.setup(memory=10**9))


def test_without_limits_everybody_holds_and_trains_all():
    assert set(HFedMoE().server(tiny.setup()).budgets.values()) == {(16, 16)}


# --- the server: merging ----------------------------------------------------------------------------------------------

k, a, b = "animal-00", "animal-01", "colour-00"


def blocks_of(setup):
    return dict(zip("AB", setup.model.counts, strict=True))


def merged(algorithm, replies):
    """Server parameters -1 before the replies, each (client, n, params, u, s, n_c of block A); A's experts by number.

    What is told of block B is the same for all: usage of expert 0 alone, nothing trained.
    """
    setup = tiny.setup()
    server = HFedMoE(**algorithm).server(setup)
    A, B = blocks_of(setup).values()
    keys = ["trunk", *(f"{A}.{part}.{i}.weight" for part in ("experts", "router") for i in range(4))]
    server.params = {key: torch.tensor([-1.0]) for key in keys}
    alone = [1.0, *[0.0] * 7]

    def answer(n, params, u, s, trained):
        groups = {"params": {key.replace("A.", f"{A}."): torch.tensor([x]) for key, x in params.items()}}
        for name, row, other in (("usage", u, alone), ("importance", s, alone), ("trained", trained, [0] * 8)):
            kind = torch.int64 if name == "trained" else torch.float64
            groups[name] = {A: torch.tensor(row + [0] * (8 - len(row)), dtype=kind)}
            groups[name][B] = torch.tensor(other, dtype=kind)
        groups["demand"] = {block: torch.ones(8, dtype=torch.int64) for block in (A, B)}
        return Payload(groups, {"num_examples": n, "steps": 10})

    server.before = dict(server.params)
    server.told = server.aggregate(1, iter([(client, answer(*rest)) for client, *rest in replies]))
    return server, {key.replace(f"{A}.", "A."): t.item() for key, t in server.params.items()}


EXPERTS = {f"A.experts.{i}.weight": float(10 + i) for i in range(4)}
OTHERS = {f"A.experts.{i}.weight": float(20 + i) for i in range(4)}


def test_expert_aggregation_by_hand():
    """tau = .8 / 8 = .1; n = 1 and 3.

    Expert 0: both trained it and use it: (1 * 10 + 3 * 20) / 4 = 17.5. Expert 1: the second uses it less than tau: 11.
    Expert 2: the first uses it, but never trained it: 22. Expert 3: trained by both, used by none: as it was.
    """
    one = (k, 1, {"trunk": 4.0, **EXPERTS}, [0.5, 0.3, 0.15, 0.05], [1.0] * 4, [2, 5, 0, 3])
    two = (a, 3, {"trunk": 8.0, **OTHERS}, [0.7, 0.05, 0.2, 0.05], [1.0] * 4, [6, 7, 1, 8])
    server, result = merged({"tau": 0.8}, [one, two])
    assert [result[f"A.experts.{i}.weight"] for i in range(4)] == [17.5, 11, 22, -1] and result["trunk"] == 7
    key = f"{blocks_of(server.setup)['A']}.experts.3.weight"
    assert server.params[key] is server.before[key], "an expert that nobody merges keeps its bits"
    assert server.told == {"trained": (3 + 4) / 2, "merged": 3.0}
    assert server.trained()[k][key.split(".experts")[0]] == pytest.approx([0.2, 0.5, 0, 0.3, 0, 0, 0, 0])
    by_batches = merged({"tau": 0.8, "weight": "batches"}, [one, two])[1]  # (2 * 10 + 6 * 20) / 8
    assert [by_batches[f"A.experts.{i}.weight"] for i in range(4)] == [17.5, 11, 22, -1]
    plain = merged({"tau": 0.8, "experts": "plain"}, [one, two])[1]
    assert [plain[f"A.experts.{i}.weight"] for i in range(4)] == [17.5, 18.5, 19.5, 20.5]


ROUTER = {f"A.router.{i}.weight": 2.0 for i in range(4)}


def test_router_aggregation_by_hand():
    """tau = .8 / 8: S_1 = {0, 1}, S_2 = {0, 2}, |S_global| = 3. alpha_1 = (.5 * .6 + .4 * .5) / 3 = .5 / 3,
    alpha_2 = (.8 * .5 + .2 * .5) / 3 = .5 / 3: equal weights whatever |D_c|, (2 + 6) / 2 = 4.

    Row 3 is held by the first alone. By rows, row 0 is (.3 * 2 + .4 * 6) / .7, row 1 the first's, row 2 the second's,
    and row 3, that nobody dominates, as it was. As printed rows shrink: (2 + 6) * .5 / 3. Plain: (1 * 2 + 3 * 6) / 4.
    """
    one = (k, 1, ROUTER, [0.5, 0.4, 0.05, 0.05], [0.6, 0.5, 0.9, 0.9], [0] * 4)
    rows = {key: 6.0 for key in ROUTER if ".3." not in key}
    two = (a, 3, rows, [0.8, 0.0, 0.2], [0.5, 0.9, 0.5], [0] * 3)

    def routers(**algorithm):
        result = merged({"tau": 0.8} | algorithm, [one, two])[1]
        return [result[f"A.router.{i}.weight"] for i in range(4)]

    assert routers() == pytest.approx([4, 4, 4, 2])
    assert routers(router="row") == pytest.approx([3 / 0.7, 2, 6, -1])
    assert routers(router="literal") == pytest.approx([4 / 3, 4 / 3, 4 / 3, 1 / 3])
    assert routers(router="plain") == pytest.approx([5, 5, 5, 2])


@pytest.mark.parametrize("router", ["importance", "row"])
def test_a_router_that_nobody_changed_stays(router):
    """Bit for bit, whatever the weights. As printed it shrinks: both dominate 0 and 1, alpha is (.3 * .7 + .7 * .3) / 2
    and (.9 * .7 + .1 * .3) / 2, together .54."""
    same = {key: -1.0 for key in ROUTER}
    told = [(c, n, same, u, [0.7, 0.3, 0.2, 0.1], [0] * 4) for c, n, u in ((k, 1, [0.3, 0.7]), (a, 7, [0.9, 0.1]))]
    server, _ = merged({"router": router}, told)
    assert tiny.same(server.params, server.before)
    _, literal = merged({"router": "literal"}, told)
    assert [literal[key] for key in ROUTER] == pytest.approx([-0.54] * 4)


@pytest.mark.parametrize("router", ["importance", "row", "literal", "plain"])
def test_nobody_answered(router):
    server, _ = merged({"router": router}, [])
    assert server.told == {} and tiny.same(server.params, server.before)


def test_residents_follow_the_demand_of_the_client_that_sent_it():
    """Four resident experts: of A what is asked for 5, 3 and 2 times in 10, of B the one that takes all ten."""
    setup = tiny.setup()
    A, B = blocks_of(setup).values()
    server = HFedMoE(budget=(0.125,), resident=(0.25,)).server(setup)
    before = server.structure()
    assert {sum(map(len, held.values())) for held in before.values()} == {4}
    demand = {A: torch.tensor([0, 5, 0, 3, 2, 0, 0, 0]), B: torch.tensor([0] * 7 + [10])}
    groups = {"params": {}, "demand": demand}
    for name in ("usage", "importance", "trained"):
        groups[name] = {block: torch.zeros(8, dtype=torch.float64) for block in (A, B)}
    server.aggregate(1, iter([(k, Payload(groups, {"num_examples": 1, "steps": 1}))]))
    held = server.structure()
    assert held[k] == {A: (1, 3, 4), B: (7,)}
    assert all(held[client] == before[client] for client in tiny.IDS if client != k)
    payload = next(iter(server.configure(1, tuple(c for c in setup.clients if c.id == k)).values()))
    assert experts_from_scalars(payload.scalars) == held[k] and payload.scalars["budget"] == 2
    rows = {key for key in server.params if ".router." in key}
    assert set(payload.groups["router"]) == rows - set(payload.groups["params"])


# --- the client -------------------------------------------------------------------------------------------------------


def trained_by(algorithm, source, form="classification", client=k, **fit):
    """(payload, reply) of one client's first round."""
    setup = tiny.setup(source, clients_per_round=6, **fit)
    server = algorithm.server(setup)
    payload = server.configure(1, setup.clients)[client]
    return payload, algorithm.client(tiny.setup(source, clients=(), **fit)).train(payload, tiny.context(client, form))


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_every_family_trains_within_both_budgets(model_type, form, monkeypatch):
    """Half of the experts held, an eighth or a quarter (what the fewest layers allow) trained in each batch.

    What was trained comes home, of the other experts nothing; routers and the rest come home whole. What learnt from
    the second batch has changed: in the first, the heads of classifiers are zero, and so are all other gradients.
    """
    from consilium.algorithms import hfedmoe

    choices = []

    class Spy(hfedmoe.Selection):
        def __call__(self, tap):
            choices.append((super().__call__(tap), {block: tap.served(block) for block in tap.logits}))
            return choices[-1][0]

    monkeypatch.setattr(hfedmoe, "Selection", Spy)
    source = tiny.source(model_type, form)
    total, layers = 8 * len(source.counts), len(source.counts)
    share = 2 * layers / total
    payload, reply = trained_by(HFedMoE(budget=(share,), resident=(0.5,)), source, form)
    held = experts_from_scalars(payload.scalars)
    assert sum(map(len, held.values())) == total // 2
    trained = {block: [0] * 8 for block in held}
    assert len(choices) == reply.scalars["steps"] == 2
    for chosen, served in choices:
        assert sum(map(len, chosen.values())) <= 2 * layers and all(chosen.values())
        assert all(served[block][place] > 0 for block, ids in chosen.items() for place in ids)
        for block, ids in chosen.items():
            for place in ids:
                trained[block][held[block][place]] += 1
    assert {block: n.tolist() for block, n in reply.groups["trained"].items()} == trained
    back, sent = reply.groups["params"], payload.groups["params"]
    missing = sent.keys() - back.keys()
    assert back.keys() <= sent.keys() and all(expert_of(key) for key in missing)
    for key in sent:
        if place := expert_of(key):
            block, e = place
            assert (key in back) == (trained[block][e] > 0)
            if e in [held[block][local] for local in choices[1][0][block]] and not key.endswith("_bias"):
                assert not torch.equal(back[key], sent[key])
    for block, u_E in reply.groups["usage"].items():
        assert u_E.sum() == pytest.approx(1) and set(u_E.nonzero().flatten().tolist()) <= set(held[block])


def test_usage_and_importance_of_a_round_by_hand():
    """Two batches of four and one more row with the rate so small that the model stays: Eq 16 over all tokens, Eq 5
    for each batch, from the router's rows and what each router was given."""
    source = tiny.source("olmoe", attention_dropout=0.0)
    payload, reply = trained_by(HFedMoE(lam=0.25), source, client="animal-01", lr=1e-12, head_lr=1e-12)
    setup, context = tiny.setup(source), tiny.context("animal-01")
    data = setup.encode(context, context.data.train)
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "batches"))
    model = setup.build(payload.groups["params"], context).eval()
    tokens, means = [], []
    for rows in data.epochs(1, 4, generator):
        batch = data.batch(rows, torch.device("cpu"))
        block, moe = next(iter(model.blocks().items()))
        caught = []
        hook = moe.gate.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        with torch.no_grad():
            model(batch)
        hook.remove()
        hidden = caught[0].reshape(-1, 32)[batch["attention_mask"].reshape(-1).bool()]
        gates = (hidden @ moe.gate.weight.T).softmax(-1).detach()
        tokens.append(gates)
        means.append(0.25 * gates.mean(0) + 0.75 * gates.max(0).values)
    assert [len(data), len(means)] == [5, 2]
    assert reply.groups["usage"][block].tolist() == pytest.approx(torch.cat(tokens).mean(0).tolist(), rel=1e-4)
    assert reply.groups["importance"][block].tolist() == pytest.approx(torch.stack(means).mean(0).tolist(), rel=1e-4)


def test_the_forward_pass_is_everybodys_and_the_backward_pass_is_not():
    """The loss of a first and only batch does not depend on the budget; what is trained does, and random choice
    trains others."""
    source = tiny.source("olmoe", attention_dropout=0.0)
    replies = [
        trained_by(HFedMoE(budget=(share,), select=how), source, batch_size=8)[1]
        for share, how in ((1.0, "information"), (0.125, "information"), (0.125, "random"))
    ]
    losses = [reply.scalars["train_loss"] for reply in replies]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    chosen = [
        {(block, e) for block, n_E in r.groups["trained"].items() for e in n_E.nonzero().flatten().tolist()}
        for r in replies
    ]
    assert [len(experts) for experts in chosen[1:]] == [2, 2] and chosen[1] < chosen[0] and chosen[2] < chosen[0]
    assert chosen[1] != chosen[2]


@pytest.mark.parametrize("rule", ["mean", "svd"])
@pytest.mark.parametrize("model_type", ["olmoe", "switch_transformers", "deepseek_v3"])
def test_adapters_are_chosen_sent_and_merged_expert_by_expert(model_type, rule):
    """Of the experts only adapters travel, and home come those of the trained; an expert that nobody trained keeps
    its adapter bit for bit, one that was trained does not."""
    made = tiny.setup(tiny.source(model_type), clients_per_round=2, lora=Lora(rank=2, rule=rule), epochs=2)
    share = 2 / 8
    algorithm = HFedMoE(budget=(share,), resident=(0.5,), tau=0.0)
    server, client = algorithm.server(made), algorithm.client(made)
    sent = server.configure(1, made.clients)
    replies = [(c, client.train(payload, tiny.context(c))) for c, payload in sent.items()]
    trained = set()
    for c, reply in replies:
        mine = {(b, e) for b, n_E in reply.groups["trained"].items() for e in n_E.nonzero().flatten().tolist()}
        home = {expert_of(key) for key in reply.groups["params"]} - {None}
        assert home == mine and len(mine) < sum(map(len, experts_from_scalars(sent[c].scalars).values()))
        assert all("lora_" in key for key in reply.groups["params"] if expert_of(key))
        trained |= mine
    before = dict(server.params)
    server.aggregate(1, iter(replies))
    experts = {key for key in before if expert_of(key)}
    assert all(server.params[key] is before[key] for key in experts if expert_of(key) not in trained)
    moved = {expert_of(key) for key in experts if not torch.equal(server.params[key], before[key])}
    assert moved and moved <= trained
