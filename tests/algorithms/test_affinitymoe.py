"""AffinityMoE: choice, budget and likeness by hand, and one merge to the number."""

import dataclasses

import pytest
import tiny
import torch

from consilium.algorithms.affinitymoe import AffinityMoE, AffinityMoEServer, affinities, most
from consilium.core import Payload
from consilium.moe.layers import shapes


def test_the_experts_that_contribute_most():
    scores = {"a": torch.tensor([0.1, 0.4, 0.4, 0.2]), "b": torch.tensor([3.0, 0.0, 1.0, 2.0])}
    assert most(scores, {"a": 1, "b": 3}) == {"a": (1,), "b": (0, 2, 3)}  # of equal ones the lower id


def test_affinities_by_hand():
    """Usage (1,0), (1,0), (0,1): less the mean (2/3, 1/3) they are (1,-1)/3 twice and (-2,2)/3: cosines 1 and -1."""
    usage = {c: {"a": torch.tensor(row)} for c, row in {"x": [1.0, 0.0], "y": [1.0, 0.0], "z": [0.0, 1.0]}.items()}
    alike = affinities(usage, floor=0.1)
    assert alike["x"]["y"] == pytest.approx(1.0) and alike["x"]["z"] == pytest.approx(0.1)
    assert all(alike[c][c] == pytest.approx(1.0) for c in usage)
    assert all(s == 1.0 for row in affinities(usage, floor=1.0).values() for s in row.values())


def test_the_cosine_is_squared():
    """Usage (1,0,0), (0,1,0), (1/2,1/2,0), (1/2,1/2,2) less the mean (1/2,1/2,1/2): (1/2,-1/2,-1/2), (-1/2,1/2,-1/2),
    (0,0,-1/2), (0,0,3/2). The cosine of the first and the third is 1/sqrt(3), its square 1/3; of the first two -1/3."""
    rows = {"w": [1.0, 0.0, 0.0], "x": [0.0, 1.0, 0.0], "y": [0.5, 0.5, 0.0], "z": [0.5, 0.5, 2.0]}
    usage = {c: {"a": torch.tensor(row)} for c, row in rows.items()}
    assert affinities(usage, 0.0)["w"] == pytest.approx({"w": 1.0, "x": 0.0, "y": 1 / 3, "z": 0.0})
    assert affinities(usage, 0.4)["w"] == pytest.approx({"w": 1.0, "x": 0.4, "y": 0.6, "z": 0.4})


def test_clients_that_are_all_alike_weigh_the_floor_but_for_themselves():
    """Usage less its mean is zero for all: nothing says who is alike."""
    usage = {c: {"a": torch.tensor([0.5, 0.5])} for c in "xy"}
    assert affinities(usage, 0.2) == {"x": {"x": 1.0, "y": 0.2}, "y": {"x": 0.2, "y": 1.0}}


def server(algorithm: AffinityMoE, clients: int = 3) -> AffinityMoEServer:
    infos = tuple(dataclasses.replace(info, task="animal") for info in tiny.infos()[:clients])
    return algorithm.server(tiny.setup(clients=infos))


def profiled(half: AffinityMoEServer, usage: dict[str, list[float]]) -> None:
    """Send the server replies of a first round with these shares of usage in every block."""
    counts = half.setup.model.counts
    replies = []
    for client, row in usage.items():
        told = {b: (torch.tensor(row) * 1000).long() for b in counts}
        groups = {
            "demand": told,
            "contribution": {b: n.float() for b, n in told.items()},
            "losses": {"shapes": torch.arange(len(shapes(len(counts))), dtype=torch.float32).flip(0)},
        }
        replies.append((client, Payload(groups, {"num_examples": 1})))
    half.aggregate(1, replies)


@pytest.mark.parametrize(
    ("likeness", "moved"),
    [
        ("self", {"x": 3.0, "y": 6.0, "z": -9.0}),
        ("none", {"x": 0.0, "y": 0.0, "z": 0.0}),
        # x and y: s = 1 to each other, 0.5 to z. (3 + 6 - 0.5 * 9) / 2.5 = 1.8; z: (0.5 * 9 - 9) / 2 = -2.25
        ("usage", {"x": 1.8, "y": 1.8, "z": -2.25}),
    ],
)
def test_one_merge_to_the_number(likeness, moved):
    """Three clients of one example each change a tensor of the trunk by 3, 6 and -9."""
    half = server(AffinityMoE(likeness=likeness, floor=0.5, budget="even"))
    names = [c.id for c in half.setup.clients]
    experts = max(half.setup.model.counts.values())
    one, other = [1.0] + [0.0] * (experts - 1), [0.0] * (experts - 1) + [1.0]
    profiled(half, dict(zip(names, (one, one, other), strict=True)))
    key = next(k for k in half.params if ".experts." not in k and ".router." not in k and not k.startswith("head"))
    before = half.params[key].clone()
    replies = []
    for name, change in zip(names, (3.0, 6.0, -9.0), strict=True):
        params = {k: t.clone() for k, t in half.states[name].items()}
        params[key] = params[key] + change
        replies.append((name, Payload({"params": params}, {"num_examples": 1})))
    half.aggregate(2, replies)
    for name, change in zip(names, moved.values(), strict=True):
        torch.testing.assert_close(half.states[name][key], before + change, atol=1e-5, rtol=0)
    torch.testing.assert_close(half.params[key], before, atol=1e-5, rtol=0)  # (3 + 6 - 9) / 3


def test_an_expert_moves_by_those_who_hold_it():
    half = server(AffinityMoE(likeness="none", budget="even"), clients=2)
    first, second = (c.id for c in half.setup.clients)
    block = next(iter(half.setup.model.counts))
    profiled(half, {first: [1.0, 0.0, 0.0, 0.0][: half.setup.model.counts[block]], second: [0.0, 0.0, 0.0, 1.0]})
    half.map[first] = {b: (0,) for b in half.setup.model.counts}
    for key in [k for k in half.states[first] if ".experts." in k and ".experts.0." not in k]:
        del half.states[first][key]
    key = next(k for k in half.states[first] if k.startswith(f"{block}.experts.0."))
    replies = []
    for name, change in ((first, 2.0), (second, 4.0)):
        params = {k: t.clone() for k, t in half.states[name].items()}
        if key in params:
            params[key] = params[key] + change
        other = key.replace(".experts.0.", ".experts.1.")
        if other in params:
            params[other] = params[other] + change
        replies.append((name, Payload({"params": params}, {"num_examples": 3})))
    was, only = half.states[first][key].clone(), half.states[second][key.replace(".experts.0.", ".experts.1.")].clone()
    half.aggregate(2, replies)
    torch.testing.assert_close(half.states[first][key], was + 3.0, atol=1e-5, rtol=0)
    moved = half.states[second][key.replace(".experts.0.", ".experts.1.")]
    torch.testing.assert_close(moved, only + 4.0, atol=1e-5, rtol=0)


def test_the_shape_with_the_lowest_mean_loss_is_taken():
    """`profiled` gives the last shape the lowest loss."""
    half = server(AffinityMoE())
    experts = max(half.setup.model.counts.values())
    profiled(half, {c.id: [1.0] + [0.0] * (experts - 1) for c in half.setup.clients})
    assert half.shape == len(shapes(len(half.setup.model.counts))) - 1
    even = server(AffinityMoE(budget="even"))
    profiled(even, {c.id: [1.0] + [0.0] * (experts - 1) for c in even.setup.clients})
    assert even.shape == 0


def test_its_state_comes_back():
    half = server(AffinityMoE())
    experts = max(half.setup.model.counts.values())
    profiled(half, {c.id: [1.0] + [0.0] * (experts - 1) for c in half.setup.clients})
    again = server(AffinityMoE())
    again.restore(half.state())
    assert again.map == half.map and again.alike == half.alike and again.shape == half.shape
    assert all(torch.equal(t, again.states[c][k]) for c, params in half.states.items() for k, t in params.items())
