"""FedMoE equation by equation, then the server's decisions on hand-made replies, then the client.

The hand-made world: the tiny Switch has two sparse layers, A and B, of 8 experts each. `Q` is a usage that clients k,
a and b share; everybody else uses expert 7 alone, which Q never does, so with K = 2 the neighbours of k are a and b
(cosine 1) and p-hat is Q itself.

    k = animal-00     a = animal-01     b = colour-00
"""

import itertools
import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.algorithms.fedmoe import (
    FedMoE,
    largest_structure,
    p_hat,
    similar,
    similarity,
    structure_at,
    z_scores,
)
from consilium.core import ClientInfo, Payload, experts_from_scalars
from consilium.engine.codec import decode, encode
from consilium.errors import BudgetError, ConfigError
from consilium.moe.addressing import router_row_of

k, a, b = "animal-00", "animal-01", "colour-00"


def usage(**blocks):
    return {block: torch.tensor(p, dtype=torch.float64) for block, p in blocks.items()}


# --- Eq 3: the first structure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "A", "B"),
    [(0.0, (1,), (0,)), (0.5, (1,), (0, 1)), (0.6, (0, 1), (0, 1, 2)), (0.8, (0, 1), (0, 1, 2, 3)),
     (0.81, (0, 1, 3), (0, 1, 2, 3)), (1.0, (0, 1, 2, 3), (0, 1, 2, 3))],
)  # fmt: skip
def test_structure_at(theta, A, B):
    """A in descending order: 1 (.5), 0 (.8), 3 (.95), 2 (1). B is even, ties go to the lower id: .25, .5, .75, 1."""
    p = usage(A=[0.3, 0.5, 0.05, 0.15], B=[0.25, 0.25, 0.25, 0.25])
    assert structure_at(p, theta) == {"A": A, "B": B}


def test_unused_experts_are_never_kept():
    """(.7, 0, .3, 0) is covered to 1 by two experts; .1 + .2 + .7 is 1 in spite of float arithmetic."""
    p = usage(A=[0.7, 0, 0.3, 0], B=[0.1, 0.2, 0.7, 0])
    assert structure_at(p, 1.0) == {"A": (0, 2), "B": (0, 1, 2)}


COUNTS = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)
TABLES = st.fixed_dictionaries({"A": COUNTS, "B": COUNTS, "C": COUNTS})


def normalised(table):
    return {block: torch.tensor(n, dtype=torch.float64) / sum(n) for block, n in table.items()}


@given(TABLES, st.floats(0, 1))
def test_structure_at_is_the_smallest(table, theta):
    p = normalised(table)
    for block, ids in structure_at(p, theta).items():
        kept = sorted(p[block][list(ids)].tolist())
        assert sum(kept) >= theta - 1e-6
        assert len(ids) == 1 or sum(kept[1:]) < theta
        assert kept[0] >= max((p[block][i].item() for i in range(4) if i not in ids), default=0)


@given(TABLES, st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 60))
def test_bisection_finds_what_trying_every_theta_finds(table, sizes, memory):
    """A structure changes only where theta passes a partial sum of some layer; all of those are tried."""
    p, size = normalised(table), dict(zip("ABC", sizes, strict=True))

    def fits(counts):
        return sum(size[block] * n for block, n in counts.items()) <= memory

    sums = {0.0, 1.0}
    for n in table.values():
        sums |= {sum(sorted(n)[::-1][:i]) / sum(n) for i in range(1, 5)}
    fitting = [theta for theta in sums if fits({block: len(ids) for block, ids in structure_at(p, theta).items()})]
    if not fitting:
        with pytest.raises(BudgetError, match="one expert per layer does not fit"):
            largest_structure(p, fits)
    else:
        assert largest_structure(p, fits) == structure_at(p, max(fitting))


def test_the_largest_structure_by_hand():
    """Room for 4 experts: up to theta = .8, A (.5 + .3) and B (.6 + .2) take two each; more would take three of each.

    Room for 3: up to theta = .6, A takes two and B (.6) takes one.
    """
    p = usage(A=[0.5, 0.3, 0.1, 0.1], B=[0.2, 0.6, 0.1, 0.1])
    assert largest_structure(p, lambda counts: sum(counts.values()) <= 4) == {"A": (0, 1), "B": (0, 1)}
    assert largest_structure(p, lambda counts: sum(counts.values()) <= 3) == {"A": (0, 1), "B": (1,)}


# --- Eq 4 to 6 --------------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """(1, 0 | .5, .5) and (0, 1 | .5, .5): the product is .5, both norms are sqrt(1.5), the cosine is 1/3."""
    one, two = usage(A=[1, 0], B=[0.5, 0.5]), usage(B=[0.5, 0.5], A=[0, 1])
    assert similarity(one, two) == similarity(two, one) == pytest.approx(1 / 3)
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one, usage(A=[0, 0], B=[0, 0])) == 0
    assert similarity(one, {block: 7 * p for block, p in one.items()}) == pytest.approx(1)


def test_similar_by_hand():
    """To (1, 0): x 1.0, y and z .8 (a tie: y first), w 0; itself is left out."""
    p = {c: usage(A=v) for c, v in {"me": [1, 0], "w": [0, 1], "z": [4, 3], "x": [2, 0], "y": [0.8, 0.6]}.items()}
    assert similar("me", p, 3) == pytest.approx({"x": 1.0, "y": 0.8, "z": 0.8})
    assert list(similar("me", p, 3)) == ["x", "y", "z"]
    assert list(similar("me", p, 9)) == ["x", "y", "z", "w"]
    assert similar("me", {"me": p["me"]}, 3) == {}


def test_p_hat_by_hand():
    """Similarities .6 and .2: (.6 * .5 + .2 * .1) / .8 = .4 and (.6 * .5 + .2 * .9) / .8 = .6."""
    p = {"x": usage(A=[0.5, 0.5]), "y": usage(A=[0.1, 0.9]), "z": usage(A=[1.0, 0.0])}
    torch.testing.assert_close(p_hat({"x": 0.6, "y": 0.2}, p), usage(A=[0.4, 0.6]))
    assert p_hat({"x": 0.0}, p)["A"].tolist() == [0, 0]


# --- the server: stage one --------------------------------------------------------------------------------------------

Q = {"A": [40, 30, 10, 10, 5, 5, 0, 0], "B": [50, 20, 20, 6, 4, 0, 0, 0]}
ELSEWHERE = {"A": [0, 0, 0, 0, 0, 0, 0, 100], "B": [0, 0, 0, 0, 0, 0, 0, 100]}


def blocks_of(setup):
    return dict(zip("AB", setup.model.counts, strict=True))


def reply(setup, demand, n=10, validation=0.5, params=None, served=None):
    """What a client reports; blocks by their short names."""
    names = blocks_of(setup)
    groups = {
        "params": {key: torch.tensor(value) for key, value in (params or {}).items()},
        "demand": {names[s]: torch.tensor(v) for s, v in demand.items()},
        "served": {names[s]: torch.tensor(v) for s, v in (served or demand).items()},
    }
    return Payload(groups, {"num_examples": n, "validation": validation})


def short(server, client):
    """A client's structure under the short names."""
    return dict(zip("AB", server.map[client].values(), strict=True))


def lists(p):
    return [p_E.tolist() for p_E in p.values()]


def test_stage_one_asks_those_who_can_profile_the_whole_model():
    setup = tiny.setup(memory={k: tiny.bytes_for(1), b: tiny.bytes_for(1)})
    server = FedMoE().server(setup)
    sent = server.configure(1, setup.clients)
    assert server.stage == "one" and set(sent) == set(tiny.IDS) - {k, b}
    assert {c.id for c in setup.clients if server.unable(c)} == {k, b}
    for payload in sent.values():
        assert payload.scalars["stage"] == "one" and experts_from_scalars(payload.scalars) is None
        assert sum(router_row_of(key) is not None for key in payload.group("params")) == 16


def test_stage_one_cuts_structures_under_alpha_of_the_memory():
    """Even usage over 5 experts a layer (.2 each). k has 1/.8 of what 4 a layer need, and takes 4, not 5."""
    even = {"A": [20] * 5 + [0] * 3, "B": [0] * 3 + [20] * 5}
    setup = tiny.setup(memory={k: math.ceil(tiny.bytes_for(4) / 0.8), a: math.ceil(tiny.bytes_for(4) / 0.8) - 9})
    server = FedMoE(alpha=0.8).server(setup)
    before = dict(server.params)
    assert server.aggregate(1, iter([(c, reply(setup, even)) for c in tiny.IDS])) == {"profiled": 6.0}
    assert short(server, k) == {"A": (0, 1, 2, 3), "B": (3, 4, 5, 6)}
    assert short(server, a) == {"A": (0, 1, 2), "B": (3, 4, 5)}
    assert short(server, b) == {"A": (0, 1, 2, 3, 4), "B": (3, 4, 5, 6, 7)}, "unused experts are not kept"
    assert server.stage == "two" and tiny.same(server.params, before)
    assert all(server.unable(client) is None for client in setup.clients)
    events = server.events()
    assert {(e["event"], e["client"], e["source"]) for e in events} == {("structure", c, "measured") for c in tiny.IDS}
    assert server.events() == []


def test_one_expert_per_layer_that_fits_M_but_not_alpha_M():
    """The most used one of each layer, instead of none."""
    setup = tiny.setup(memory={k: tiny.bytes_for(1)})
    server = FedMoE(alpha=0.5).server(setup)
    server.aggregate(1, iter([(c, reply(setup, Q)) for c in (a, b)]))
    assert short(server, k) == {"A": (0,), "B": (0,)}


def test_a_client_too_small_for_one_expert_per_layer_ends_the_run():
    setup = tiny.setup(memory={b: tiny.bytes_for(1) - 1})
    with pytest.raises(BudgetError, match=r"client colour-00 cannot hold the smallest sub-MoE.*: needs .*, has "):
        FedMoE().server(setup)


def test_usage_of_the_poor_is_estimated():
    """x-2 has the task of x-0 (n = 10, expert 0 alone) and x-1 (n = 30, expert 1 alone): (10, 30) / 40.

    z-0 is alone with its task: all three measured clients count, y-0 (n = 5, expert 2) too: (10, 30, 5) / 45.
    """
    poor = tiny.bytes_for(1)
    clients = [
        ("x-0", 10, "x", None),
        ("x-1", 30, "x", None),
        ("x-2", 99, "x", poor),
        ("y-0", 5, "y", None),
        ("z-0", 1, "z", poor),
    ]
    setup = tiny.setup(clients=tuple(ClientInfo(*c) for c in clients))
    server = FedMoE().server(setup)
    assert set(server.configure(1, setup.clients)) == {"x-0", "x-1", "y-0"}
    one_hot = {c: [9 * (i == j) for i in range(8)] for j, c in enumerate(("x-0", "x-1", "y-0"))}
    server.aggregate(1, iter((c, reply(setup, {"A": n, "B": n})) for c, n in one_hot.items()))
    assert lists(server.p["x-2"]) == [[0.25, 0.75, 0, 0, 0, 0, 0, 0]] * 2
    for p in lists(server.p["z-0"]):
        assert p == pytest.approx([10 / 45, 30 / 45, 5 / 45, 0, 0, 0, 0, 0])
    assert {e["client"]: e["source"] for e in server.events()} == dict.fromkeys(one_hot, "measured") | {
        "x-2": "estimated", "z-0": "estimated"
    }  # fmt: skip
    assert short(server, "x-2") == {"A": (1,), "B": (1,)}


def test_a_client_that_drops_out_of_stage_one_is_estimated():
    setup = tiny.setup()
    server = FedMoE().server(setup)
    server.configure(1, setup.clients)
    server.aggregate(1, iter([(a, reply(setup, Q))]))
    assert lists(server.p[k]) == lists(server.p[a])
    assert server.stage == "two" and set(server.map) == set(tiny.IDS)


def test_who_can_profile_is_measured_by_lora_of_that_rank():
    """k has one byte less than LoRA of rank 8 on all experts takes, a just as much; full training would take more."""
    need = tiny.setup().footprint(dict.fromkeys(tiny.setup().model.counts, 8), "peft", rank=8).total
    assert need < tiny.bytes_for(8)
    setup = tiny.setup(memory={k: need - 1, a: need})
    able = [c.id for c in setup.clients if FedMoE().server(setup).unable(c) is None]
    assert k not in able and a in able
    assert FedMoE(lora_rank=64).server(setup).unable(setup.clients[1])


@pytest.mark.parametrize("card", [True, False])
def test_nobody_can_profile(card, monkeypatch):
    """Usage is the card's, or a random one of every client's own; the first round is one of stage two."""
    setup = tiny.setup(memory=tiny.bytes_for(1), clients_per_round=2)
    if card:
        public = dict(zip(setup.model.counts, ([0.1, 0.2, 0.7, 0, 0, 0, 0, 0], [0] * 7 + [1]), strict=True))
        monkeypatch.setattr(type(setup.model), "public_usage", lambda self: public)
    server = FedMoE(alpha=1.0).server(setup)
    sent = server.configure(1, setup.clients)
    assert server.stage == "two" and len(sent) == 2
    assert all(p.scalars["stage"] == "two" for p in sent.values())
    held = {str(short(server, client)) for client in tiny.IDS}
    assert held == {str({"A": (2,), "B": (7,)})} if card else len(held) > 1
    assert all(sum(p) == pytest.approx(1) for client in tiny.IDS for p in lists(server.p[client]))


def test_without_stage_one_structures_are_random_and_fit():
    setup = tiny.setup(memory={k: math.ceil(tiny.bytes_for(3) / 0.9)})
    server = FedMoE(stage1="none", alpha=0.9).server(setup)
    assert server.stage == "two"
    assert {len(ids) for ids in server.map[k].values()} == {3}
    assert server.map[k] != {block: (0, 1, 2) for block in server.map[k]}
    assert server.map == FedMoE(stage1="none", alpha=0.9).server(setup).map


# --- the server: modular aggregation ----------------------------------------------------------------------------------


def merged(algorithm, replies):
    """Server parameters -1 before the replies; A's experts by number."""
    setup = tiny.setup()
    server = FedMoE(stage1="none", stage2=False, **algorithm).server(setup)
    A = blocks_of(setup)["A"]
    keys = ["trunk", *(f"{A}.{part}.{i}.w" for part in ("experts", "router") for i in range(3))]
    server.params = {key: torch.tensor(-1.0) for key in keys}
    answers = []
    for client, n, params, served in replies:
        params = {key.replace("A.", f"{A}."): value for key, value in params.items()}
        answers.append((client, reply(setup, Q, n, params=params, served=served)))
    server.aggregate(1, iter(answers))
    return {key.replace(f"{A}.", "A."): t.item() for key, t in server.params.items()}


def test_modular_aggregation_by_hand():
    """n = 1 and 3. Trunk: (1 * 4 + 3 * 8) / 4 = 7. Expert 0 and its router row by both: (1 * 2 + 3 * 6) / 4 = 5.

    Expert 1 by the second alone: overwritten by 9. Expert 2 by nobody: unchanged.
    """
    one = {"trunk": 4.0, "A.experts.0.w": 2.0, "A.router.0.w": 2.0}
    two = {"trunk": 8.0, "A.experts.0.w": 6.0, "A.router.0.w": 6.0, "A.experts.1.w": 9.0, "A.router.1.w": 9.0}
    assert merged({}, [(k, 1, one, None), (a, 3, two, None)]) == {
        "trunk": 7.0, "A.experts.0.w": 5.0, "A.router.0.w": 5.0, "A.experts.1.w": 9.0, "A.router.1.w": 9.0,
        "A.experts.2.w": -1.0, "A.router.2.w": -1.0,
    }  # fmt: skip


def test_weight_by_tokens_by_hand():
    """Expert 0 served 30 and 10 tokens: (30 * 2 + 10 * 6) / 40 = 3; expert 1 served nothing: unchanged; trunk by n."""
    one = {"trunk": 4.0, "A.experts.0.w": 2.0, "A.router.0.w": 2.0, "A.experts.1.w": 5.0}
    two = {"trunk": 8.0, "A.experts.0.w": 6.0, "A.router.0.w": 6.0}
    served = [{"A": [n, *[0] * 7], "B": [0] * 8} for n in (30, 10)]
    result = merged({"weight": "tokens"}, [(k, 1, one, served[0]), (a, 3, two, served[1])])
    assert (result["trunk"], result["A.experts.0.w"], result["A.router.0.w"], result["A.experts.1.w"]) == (7, 3, 3, -1)


def test_nobody_answered():
    assert set(merged({}, []).values()) == {-1.0}


# --- the server: structures in stage two ------------------------------------------------------------------------------


def world(held_k, held_a, held_b, memory=None, **algorithm):
    """A server in stage two with structures (as counts: the first n of Q's ranking; or as ids) and usage as above."""
    setup = tiny.setup(memory=memory)
    server = FedMoE(stage1="none", K=2, **{"patience": 1} | algorithm).server(setup)
    server.events()
    for client, held in zip((k, a, b), (held_k, held_a, held_b), strict=True):
        sets = [tuple(range(ids)) if isinstance(ids, int) else ids for ids in held]
        server.map[client] = dict(zip(setup.model.counts, sets, strict=True))
    for client in tiny.IDS:
        table = Q if client in (k, a, b) else ELSEWHERE
        server.p[client] = {blocks_of(setup)[s]: torch.tensor(n, dtype=torch.float64) / 100 for s, n in table.items()}
    return setup, server


def takes_part(setup, server, *scores, client=k):
    """Replies of one client with these validation scores, one round each; returns its structure afterwards."""
    for number, score in enumerate(scores):
        server.aggregate(number, iter([(client, reply(setup, Q, validation=score))]))
    return short(server, client)


def names(server):
    return [event["event"] for event in server.events()]


def test_growing_by_hand():
    """k holds 2, a and b hold 5 and 6: n = 5.5 - 2 = 3.5, half away from zero: 4.

    Outside experts by p-hat: A1 .3, B1 .2, B2 .2, A2 .1 (A3 ties, higher id).
    """
    setup, server = world((1, 1), (2, 3), (3, 3))
    assert takes_part(setup, server, 0.5) == {"A": (0,), "B": (0,)}
    assert takes_part(setup, server, 0.5) == {"A": (0, 1, 2), "B": (0, 1, 2)}
    assert server.events() == [{"event": "grow", "client": k, "experts": 6, "neighbours": [a, b]}]


def test_growth_stops_at_M_and_not_at_alpha_M():
    """M_k holds 2 + 2 experts, alpha 0.01 of it none: A1 and B1 are added, B2 does not fit."""
    setup, server = world((1, 1), (2, 3), (3, 3), memory={k: tiny.bytes_for(2)}, alpha=0.01)
    assert takes_part(setup, server, 0.5, 0.5) == {"A": (0, 1), "B": (0, 1)}


def test_no_room_to_grow_leaves_the_structure():
    setup, server = world((1, 1), (2, 3), (3, 3), memory={k: tiny.bytes_for(1)})
    assert takes_part(setup, server, 0.5, 0.5) == {"A": (0,), "B": (0,)}
    assert names(server) == [] and server.progress[k].before is None


def test_shrinking_by_hand():
    """k holds 4 + 3, a and b hold 4 and 5: n = 4.5 - 7 = -2.5, half away from zero: 3 are removed.

    Inside experts by p-hat from below: A2 .1, A3 .1, B1 .2 (B2 ties, higher id).
    """
    setup, server = world((4, 3), (2, 2), (2, 3))
    assert takes_part(setup, server, 0.5, 0.5) == {"A": (0, 1), "B": (0, 2)}
    assert server.events() == [{"event": "shrink", "client": k, "experts": 4, "neighbours": [a, b]}]


def test_the_floor_keeps_a_share_of_the_demand():
    """floor .8. A covers .9, so .72 must stay: without A2 it is .8, without A3 too .7. B as well: .7 without B1."""
    setup, server = world((4, 3), (2, 2), (2, 3), floor=0.8)
    assert takes_part(setup, server, 0.5, 0.5) == {"A": (0, 1, 3), "B": (0, 1, 2)}


def test_no_layer_loses_its_last_expert():
    """n = 2 - 16 = -14 and no floor: the most wanted expert of each layer is left."""
    setup, server = world((8, 8), (1, 1), (1, 1), floor=0.0)
    assert takes_part(setup, server, 0.5, 0.5) == {"A": (0,), "B": (0,)}


@pytest.mark.parametrize(
    ("held_a", "held_b", "after"),
    [((2, 2), (2, 2), 4), ((2, 2), (3, 2), 5), ((2, 1), (2, 2), 3), ((2, 2), (2, 3), 5), ((3, 3), (1, 1), 4)],
)
def test_rounding(held_a, held_b, after):
    """k holds 4. Means 4, 4.5, 3.5, 4.5, 4: n = 0, half up to 1, half down to -1, 1, 0."""
    setup, server = world((2, 2), held_a, held_b, floor=0.0)
    held = takes_part(setup, server, 0.5, 0.5)
    assert sum(map(len, held.values())) == after
    if after == 4:
        assert names(server) == [] and server.progress[k].before is None


def test_the_rank_by_layer_takes_z_scores():
    """(.5, .3, .2): mean 1/3, variance (1/36 + 1/900 + 4/225) / 3 = .0155556, so z = (1.3363, -.2673, -1.0690).

    A flat layer has nothing to rank: zeros.
    """
    p = {"A": torch.tensor([0.5, 0.3, 0.2]).double(), "B": torch.full((3,), 1 / 3).double()}
    assert z_scores(p)["A"].tolist() == pytest.approx([1.3363, -0.2673, -1.0690], abs=1e-4)
    assert z_scores(p)["B"].abs().max() < 1e-3


def test_the_rank_by_layer_prefers_what_stands_out_in_its_layer():
    """A is even but for .22 (jointly first); in B .15 stands above four times .05: by layer B's comes first.

    z of B: mean .07, sd .04, (.15 - .07) / .04 = 2; z of A's .22: mean .2, sd .0126, but for .18, .22: (.02) / .0126.
    """
    p = {
        "A": torch.tensor([0.22, 0.18, 0.2, 0.2, 0.2]).double(),
        "B": torch.tensor([0.15, 0.05, 0.05, 0.05, 0.05]).double(),
    }
    z = z_scores(p)
    assert p["A"][0] > p["B"][0]
    assert z["B"][0].item() == pytest.approx(2.0) and z["A"][0].item() == pytest.approx(1.5811, abs=1e-4)


U = {"A": [50, 18, 2, 6, 6, 6, 6, 6], "B": [11, 17, 12, 12, 12, 12, 12, 12]}


@pytest.mark.parametrize(("rank", "after"), [("joint", ((0, 1), (0,))), ("layer", ((0,), (0, 1)))])
def test_the_server_ranks_as_it_is_told(rank, after):
    """n = 3 - 2 = 1. Jointly A1 (.18) comes before B1 (.17); by layer z(A1) = .055 / .148 and z(B1) = .045 / .017."""
    setup, server = world((1, 1), (1, 2), (1, 2), rank=rank)
    for client in (a, b):
        server.p[client] = {blocks_of(setup)[s]: torch.tensor(n).double() / 100 for s, n in U.items()}
    for number in (1, 2):
        server.aggregate(number, iter([(k, reply(setup, U))]))
    assert tuple(short(server, k).values()) == after


def test_the_more_similar_neighbour_weighs_more():
    """k uses A0 and B0 alone. a (cosine .98) uses A1 by .2, b (.20) uses A7 and B7 by .7: .196 against .138."""
    setup, server = world((1, 1), (1, 2), (1, 2))
    mine = {"A": [100] + [0] * 7, "B": [100] + [0] * 7}
    theirs = {a: {"A": [80, 20] + [0] * 6, "B": [100] + [0] * 7},
              b: {"A": [0, 0, 30, 0, 0, 0, 0, 70], "B": [30, 0, 0, 0, 0, 0, 0, 70]}}  # fmt: skip
    for client, table in theirs.items():
        server.p[client] = {blocks_of(setup)[s]: torch.tensor(n).double() / 100 for s, n in table.items()}
    for client in set(tiny.IDS) - {k, a, b}:
        server.p[client] = {block: torch.eye(8)[5].double() for block in setup.model.counts}
    for number in (1, 2):
        server.aggregate(number, iter([(k, reply(setup, mine))]))
    assert short(server, k) == {"A": (0, 1), "B": (0,)}


def test_neighbours_without_any_similarity_change_nothing():
    setup, server = world((1, 1), (3, 3), (3, 3))
    for client in set(tiny.IDS) - {k}:
        server.p[client] = {block: torch.eye(8)[5].double() for block in setup.model.counts}
    alone = {"A": [100] + [0] * 7, "B": [100] + [0] * 7}
    for number in (1, 2):
        server.aggregate(number, iter([(k, reply(setup, alone))]))
    assert short(server, k) == {"A": (0,), "B": (0,)} and server.progress[k].before is None


def test_usage_can_be_what_was_served():
    setup, server = world((1, 1), (2, 3), (3, 3), usage="served")
    server.aggregate(1, iter([(k, reply(setup, Q, served=ELSEWHERE))]))
    assert lists(server.p[k]) == [[0, 0, 0, 0, 0, 0, 0, 1]] * 2
    other = FedMoE(stage1="none").server(setup)
    other.aggregate(1, iter([(k, reply(setup, Q, served=ELSEWHERE))]))
    assert lists(other.p[k]) == [[n / 100 for n in Q["A"]], [n / 100 for n in Q["B"]]]


def test_patience_counts_participations_without_improvement():
    """patience 2: .5, .4 (1), .6 (0), .6 (1: equal is no improvement), .5 (2: a change)."""
    setup, server = world((1, 1), (2, 3), (3, 3), patience=2)
    assert takes_part(setup, server, 0.5, 0.4, 0.6, 0.6) == {"A": (0,), "B": (0,)}
    assert names(server) == []
    takes_part(setup, server, 0.5)
    assert names(server) == ["grow"]


def test_a_change_that_helps_is_accepted():
    """After accepting, patience starts over; then n = 5.5 - 6 = -.5, rounded to -1, and the least wanted A2 goes."""
    setup, server = world((1, 1), (2, 3), (3, 3), patience=2)
    grown = takes_part(setup, server, 0.5, 0.5, 0.5)
    assert takes_part(setup, server, 0.4, 0.6) == grown
    assert names(server) == ["grow", "accept"] and server.progress[k].before is None
    assert takes_part(setup, server, 0.6) == grown
    assert takes_part(setup, server, 0.6) == {"A": (0, 1), "B": (0, 1, 2)}


def test_a_change_that_does_not_help_is_rolled_back_and_frozen():
    setup, server = world((1, 1), (2, 3), (3, 3), patience=2)
    takes_part(setup, server, 0.5, 0.5, 0.5)
    assert takes_part(setup, server, 0.4) == {"A": (0, 1, 2), "B": (0, 1, 2)}, "judged too early"
    assert takes_part(setup, server, 0.5) == {"A": (0,), "B": (0,)}
    assert names(server) == ["grow", "rollback", "freeze"]
    assert takes_part(setup, server, *[0.1] * 6) == {"A": (0,), "B": (0,)}
    assert names(server) == []


def test_without_freezing_it_may_try_again():
    setup, server = world((1, 1), (2, 3), (3, 3), freeze=False)
    takes_part(setup, server, 0.5, 0.5, 0.5, 0.5)
    assert names(server) == ["grow", "rollback", "grow"]


def test_stage2_off_keeps_the_first_structure():
    setup, server = world((1, 1), (2, 3), (3, 3), stage2=False)
    assert takes_part(setup, server, *[0.5] * 5) == {"A": (0,), "B": (0,)}


def test_only_clients_that_answered_are_judged():
    setup, server = world((1, 1), (2, 3), (3, 3))
    takes_part(setup, server, 0.5, 0.5, client=a)
    assert short(server, k) == {"A": (0,), "B": (0,)} and server.progress[k].best == -1.0
    assert server.aggregate(9, iter(()))["experts"] > 0


@given(data=st.data())
def test_any_structure_stays_legal(data):
    """Whatever usage, structures and memory: one expert per layer, within M_k, and no further than the mean."""
    some = st.sets(st.integers(0, 7), min_size=1).map(lambda ids: tuple(sorted(ids)))
    held = [data.draw(st.tuples(some, some)) for _ in range(3)]
    room = data.draw(st.integers(1, 8))
    own = sum(map(len, held[0]))
    setup, server = world(*held, memory={k: tiny.bytes_for(room)}, floor=data.draw(st.sampled_from([0.0, 0.5, 0.9])))
    tables = st.lists(st.integers(0, 20), min_size=8, max_size=8)
    demand = {client: {"A": data.draw(tables), "B": data.draw(tables)} for client in tiny.IDS}
    server.aggregate(1, iter((client, reply(setup, demand[client])) for client in tiny.IDS))
    mean = sum(len(ids) for c in similar(k, server.p, 2) for ids in server.map[c].values()) / 2
    server.aggregate(2, iter([(k, reply(setup, demand[k]))]))
    after = server.map[k]
    sizes = {block: len(ids) for block, ids in after.items()}
    assert all(ids and list(ids) == sorted(set(ids)) for ids in after.values())
    total = sum(sizes.values())
    if total > own:
        assert total <= mean + 0.5 and setup.lacks(setup.clients[0], sizes) is None
    elif total < own:
        assert total >= mean - 0.5


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_in_the_middle_of_a_trial():
    """Grown and stale once: the copy rolls back at the same reply, to the same structure, with the same events."""
    setup, server = world((1, 1), (2, 3), (3, 3), patience=2)
    takes_part(setup, server, 0.5, 0.5, 0.5, 0.4)
    copy = FedMoE(stage1="none", K=2, patience=2).server(tiny.setup(seed=1))
    copy.restore(decode(encode(server.state())))
    assert copy.map == server.map and copy.progress == server.progress and copy.stage == "two"
    assert copy.events() == server.events() and list(copy.map[k].values()) == list(server.map[k].values())
    assert tiny.same(copy.params, server.params)
    assert copy.usage() == server.usage()
    assert takes_part(setup, copy, 0.4) == takes_part(setup, server, 0.4) == {"A": (0,), "B": (0,)}
    assert names(copy) == names(server) == ["rollback", "freeze"]


def test_state_before_and_after_stage_one():
    setup = tiny.setup(memory={k: tiny.bytes_for(3)})
    server, copy = FedMoE().server(setup), FedMoE().server(setup)
    copy.restore(decode(encode(server.state())))
    assert copy.stage == "one" and copy.map == {} and copy.structure() is None
    server.aggregate(1, iter([(a, reply(setup, Q))]))
    copy.restore(decode(encode(server.state())))
    assert copy.structure() == server.structure() and copy.measured == [a]


def test_ties_fall_the_same_way_after_bytes():
    """Encoded tensors come back sorted by name, block 11 before block 3; equal p-hat must still go by layer.

    Even usage in six layers, k holds one expert in each, a and b three: ties everywhere.
    """
    source = tiny.source(num_layers=12, num_sparse_encoder_layers=6)
    setup = tiny.setup(source)
    even = Payload(
        {"demand": {block: torch.ones(8, dtype=torch.int64) for block in source.counts}, "params": {}},
        {"num_examples": 1, "validation": 0.5},
    )
    structures = []
    for strict, restored in itertools.product((False, True), repeat=2):
        server = FedMoE(stage1="none", K=2, patience=1, floor=0.0).server(setup)
        for client in tiny.IDS:
            n = {k: 1, "colour-01": 8}.get(client, 3)
            server.map[client] = {block: tuple(range(n)) for block in source.counts}
        replies = [(c, decode(encode(even)) if strict else even) for c in tiny.IDS]
        server.aggregate(1, iter(replies))
        if restored:
            state = decode(encode(server.state()))
            server = FedMoE(stage1="none", K=2, patience=1, floor=0.0).server(setup)
            server.restore(state)
        server.aggregate(2, iter(replies))
        structures.append({client: dict(held) for client, held in server.map.items()})
    assert any(len(set(map(len, held.values()))) > 1 for held in structures[0].values()), "no tie was decided"
    assert all(other == structures[0] for other in structures)


# --- the client -------------------------------------------------------------------------------------------------------


def test_stage_one_on_the_client_sends_usage_alone_and_follows_its_seed():
    """LoRA's random matrices come from the context's seed, not from whatever ran before."""
    setup = tiny.setup(memory=None)
    algorithm = FedMoE(stage1_epochs=1, lora_rank=2)
    sent = algorithm.server(setup).configure(1, setup.clients)[k]
    replies = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        replies.append(algorithm.client(setup).train(sent, tiny.context(k)))
        assert torch.equal(torch.get_rng_state(), state)
    assert tiny.payloads_equal(*replies)
    assert set(replies[0].groups) == {"demand"}
    assert replies[0].scalars["steps"] == 2 and replies[0].scalars["experts"] == 16
    validation = setup.encode(tiny.context(k), tiny.context(k).data.validation)
    tokens = sum(len(ids) for ids in validation.sources)
    for n in replies[0].group("demand").values():
        assert n.shape == (8,) and n.sum() == tokens
    longer = FedMoE(stage1_epochs=3, lora_rank=2)
    assert longer.client(setup).train(sent, tiny.context(k)).scalars["steps"] == 6


def test_profiling_forward_trains_nothing():
    setup = tiny.setup()
    algorithm = FedMoE(stage1="forward")
    sent = algorithm.server(setup).configure(1, setup.clients)[k]
    reply = algorithm.client(setup).train(sent, tiny.context(k))
    again = algorithm.client(tiny.setup(seed=5)).train(sent, tiny.context(k, seed=9))
    assert tiny.payloads_equal(reply, again) and "steps" not in reply.scalars


def test_stage_two_measures_demand_over_all_experts(tmp_path):
    """A client that holds two experts a layer still says how much it would use the other six."""
    setup = tiny.setup(memory=tiny.bytes_for(2))
    algorithm = FedMoE(stage1="none", alpha=1.0, weight="tokens")
    server = algorithm.server(setup)
    sent = server.configure(1, setup.clients)
    client = next(iter(sent))
    assert sum(router_row_of(key) is not None for key in sent[client].group("router")) == 12
    assert sum(router_row_of(key) is not None for key in sent[client].group("params")) == 4
    reply = algorithm.client(setup).train(sent[client], tiny.context(client))
    for block, ids in server.map[client].items():
        outside = [i for i in range(8) if i not in ids]
        assert reply.group("demand")[block][outside].sum() > 0 == reply.group("served")[block][outside].sum()
    assert "router" not in reply.groups


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [{"alpha": 0}, {"alpha": 1.1}, {"floor": 1.0}, {"floor": -0.1}, {"K": 0}, {"patience": 0}, {"stage1_epochs": 0},
     {"lora_rank": 0}, {"alpha": math.nan}, {"stage1": "loraa"}, {"usage": "demands"}, {"rank": "layers"},
     {"weight": "token"}],
    ids=str,
)  # fmt: skip
def test_refused(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} is "):
        FedMoE(**bad)
