"""Replies of every method, each spoilt in one place: rejected whole, to the bits of that client's absence.

Each method trains once. Its replies are then given again by a client half that has them by heart.
"""

import dataclasses
import itertools
import math
from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_registry import METHODS, context, halves, setup

from consilium.algorithms.fedkd import compressed
from consilium.core import Client, Payload, Reveal, Sampling
from consilium.engine.checkpoint import ClientStore
from consilium.engine.codec import decode, encode
from consilium.engine.judge import objection
from consilium.errors import DataError
from consilium.params import checksum

every_method = pytest.mark.parametrize("name", METHODS)
_number = itertools.count()


@cache
def trained(name):
    """(set-up, what is sent, what is replied) in the first round, of three clients; of FedMoE in stage two."""
    made = setup(name)
    made = dataclasses.replace(made, sampling=Sampling(3))
    server, client = halves(name, made)
    sent = server.configure(1, made.clients)
    if name == "FedMoE":  # a variant of it is in stage one
        server.aggregate(1, ())
        sent = server.configure(1, made.clients)
    return made, sent, {c: client.train(sent[c], context(name, c)) for c in sorted(sent)}


class ByHeart(Client):
    """Replies as once before, and with whatever a liar adds; `spoil`: client -> what becomes of its reply."""

    def __init__(self, replies, spoil):
        self.replies, self.spoil = replies, spoil
        self.reveals = {"*": Reveal("update", "exact")}

    def train(self, payload, context):
        context.state.params["trained"] = torch.ones(1)
        reply = decode(encode(self.replies[context.info.id]))
        return self.spoil.get(context.info.id, lambda reply: reply)(reply)

    def evaluate(self, payload, context):
        return Payload(scalars={"score": 0.5, "examples": 1})


def absent(_):
    raise DataError("no data today")


def engine(name, spoil, **sampling):
    made, _, replies = trained(name)
    made = dataclasses.replace(made, sampling=Sampling(3, **sampling))
    server, _ = halves(name, made)
    if name == "FedMoE":
        server.aggregate(1, ())
    running = tiny.engine(server, ByHeart(replies, spoil), made, tiny.root / f"judged-{next(_number)}")
    running.sampling = made.sampling
    return running


def bits(server):
    state = server.state()
    return {group: checksum(params) for group, params in state.groups.items()}, state.scalars


# --- one thing changed ------------------------------------------------------------------------------------------------

HUGE = [0, -1, True, 1.5, math.nan, math.inf, 2**62, "7", [3]]
WRONG = {
    "num_examples": HUGE,
    "validation": [math.nan, math.inf, -0.1, 1.1, True, "0.5", [0.5]],
    "train_loss": [math.nan, -math.inf, "low", False],
    "steps": [-1, 1.5, True, math.nan, "3", 2**62],
}


def changed(reply, group, key, tensor):
    """A copy of the reply with one tensor changed; None: taken out."""
    params = {k: t for k, t in {**reply.groups.get(group, {}), key: tensor}.items() if t is not None}
    return Payload({**reply.groups, group: params}, reply.scalars)


def other_dtype(t):
    return t.to(torch.float64 if t.dtype != torch.float64 else torch.float32) if t.is_floating_point() else t.int()


def spoilt(t, place, value):
    t = t.clone()
    t.view(-1)[place % t.numel()] = value
    return t


@st.composite
def faults(draw, reply):
    """(what was done, the spoilt reply)."""
    places = [(group, key) for group, params in reply.groups.items() for key in sorted(params)]
    kinds = ["scalar", "no num_examples", "foreign group", "foreign key"] + ["tensor"] * 6 * bool(places)
    kind = draw(st.sampled_from(kinds))
    if kind == "scalar":
        name = draw(st.sampled_from(sorted(WRONG.keys() & reply.scalars.keys())))
        value = draw(st.sampled_from(WRONG[name]))
        return f"{name} = {value!r}", Payload(reply.groups, {**reply.scalars, name: value})
    if kind == "no num_examples":
        return kind, Payload(reply.groups, {k: v for k, v in reply.scalars.items() if k != "num_examples"})
    if kind == "foreign group":
        return kind, changed(reply, "backdoor", "w", torch.zeros(1))
    if kind == "foreign key":
        return kind, changed(reply, "params", "encoder.block.1.layer.1.mlp.experts.99.wi", torch.zeros(2, 2))
    group, key = draw(st.sampled_from(places))
    t = reply.groups[group][key]
    how = draw(st.sampled_from(["renamed", "missing", "shape", "one", "dtype", "range"]))
    if how == "missing" and (key.startswith("head.") or group in ("control", "prototypes")):
        how = "renamed"  # a client may lack a label, or an untrained part: nobody else can tell
    if how == "renamed":
        return f"{group} {key} renamed", changed(changed(reply, group, key, None), group, f"{key}x", t)
    if how == "missing":
        return f"{group} {key} missing", changed(reply, group, key, None)
    if how == "shape":
        return f"{group} {key} shape", changed(reply, group, key, t.unsqueeze(0))
    if how == "one":  # what broadcasting would take
        return f"{group} {key} one", changed(reply, group, key, t.reshape(-1)[:1].reshape([1] * (t.ndim + 1)))
    if how == "dtype":
        return f"{group} {key} dtype", changed(reply, group, key, other_dtype(t))
    bad = [math.nan, math.inf, -math.inf] if t.is_floating_point() else [-1, 2**41]
    if group in ("usage", "importance"):
        bad += [-0.01, 1.01]
    value = draw(st.sampled_from(bad))
    return f"{group} {key} = {value}", changed(reply, group, key, spoilt(t, draw(st.integers(0, 99)), value))


@every_method
def test_any_one_fault_is_found_and_nothing_else(name):
    made, sent, replies = trained(name)
    server = engine(name, {}).server
    infos = {info.id: info for info in made.clients}
    for client, reply in replies.items():
        assert objection(server, infos[client], sent[client], reply) is None

    @settings(max_examples=40)
    @given(st.data())
    def found(data):
        client = data.draw(st.sampled_from(sorted(replies)))
        what, reply = data.draw(faults(replies[client]))
        assert (reason := objection(server, infos[client], sent[client], reply)), what
        assert len(reason) <= 1000 and "\n" not in reason

    found()


@pytest.mark.parametrize(
    "counts",
    [{"a": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 2, "b": 0, "c": 1}, {"a": 1.0, "b": 1.0, "c": 1.0},
     {"a": 1, "b": 1, "c": 999}, {"a": True, "b": True, "c": True}, {"a": [1], "b": [1], "c": [1]},
     {"a": 3, "b": 3, "c": 4}],
)  # fmt: skip
def test_counts_of_prototypes(counts):
    """One whole number for each prototype, 1 at least, and no more than the client's nine examples together."""
    made, sent, replies = trained("FedProto:mixed")
    client = "colour-00" if "colour-00" in replies else max(replies, key=lambda c: len(replies[c].group("counts")))
    info = next(i for i in made.clients if i.id == client)
    wrong = {label: torch.tensor(n) for label, n in counts.items()}
    if sum(map(float, map(torch.sum, wrong.values()))) > 9 and info.num_examples > 9:
        wrong["c"] = torch.tensor(info.num_examples)
    reply = Payload({**replies[client].groups, "counts": wrong}, replies[client].scalars)
    assert "counts" in objection(engine("FedProto:mixed", {}).server, info, sent[client], reply)


def test_factors_of_fedkd():
    """Ranks that do not agree, a false shape, a tensor both whole and in factors, a product that overflows."""
    server, info = engine("FedKD:mixed", {}).server, setup("FedKD:mixed").clients[0]
    groups, shapes = compressed(server.params, 0.1)
    sent, reply = server.deliver(info), Payload(groups, {"num_examples": 1, **shapes})
    key = next(iter(shapes)).removeprefix("shape ")
    u, s = (reply.groups["factors"][f"{key}/{x}"] for x in "us")
    assert objection(server, info, sent, reply) is None
    for bad, said in [
        (changed(reply, "factors", f"{key}/s", torch.cat([s, s])), "ranks"),
        (changed(changed(reply, "factors", f"{key}/u", u * 1e38), "factors", f"{key}/s", s + 1e38), "finite"),
        (changed(reply, "params", key, server.params[key]), "neither whole nor"),
        (Payload(reply.groups, {**reply.scalars, f"shape {key}": [1]}), "neither whole nor"),
        (Payload(reply.groups, {**reply.scalars, "shape x": [1]}), "was not asked"),
    ]:
        assert said in objection(server, info, sent, bad)


def test_experts_of_hfedmoe():
    """An expert that was trained but not sent, trained without steps, or returned without having been trained."""
    name = "HFedMoE"
    made, sent, replies = trained(name)
    client = "animal-00" if "animal-00" in replies else next(iter(replies))
    info, server, reply = next(i for i in made.clients if i.id == client), engine(name, {}).server, replies[client]
    block, batches = next(iter(reply.groups["trained"].items()))
    place = int(batches.argmax())
    for bad, said in [
        (changed(reply, "trained", block, spoilt(batches, place, 99)), "more batches"),
        (changed(reply, "trained", block, spoilt(batches, place, 0)), "not those that were trained"),
        (Payload(reply.groups, {k: v for k, v in reply.scalars.items() if k != "steps"}), "steps is missing"),
    ]:
        assert said in objection(server, info, sent[client], bad)
    held = {key: t for key, t in sent[client].groups["params"].items() if f".experts.{place}." not in key}
    fewer = Payload({**sent[client].groups, "params": held}, sent[client].scalars)
    gone = {key: t for key, t in reply.groups["params"].items() if f".experts.{place}." not in key}
    lied = Payload({**reply.groups, "params": gone}, reply.scalars)
    assert "was not given" in objection(server, info, fewer, lied)


# --- every group of every method --------------------------------------------------------------------------------------


@every_method
def test_what_is_expected_of_a_reply_is_what_clients_send(name):
    """The groups are the same, and the server half expects of a tensor no less than its shape and dtype."""
    made, sent, replies = trained(name)
    server, infos = engine(name, {}).server, {info.id: info for info in made.clients}
    for client, reply in replies.items():
        expected = server.expects(infos[client], sent[client])
        assert {group for group, tensors in reply.groups.items() if tensors} <= set(expected)
        for group, tensors in reply.groups.items():
            assert set(tensors) <= set(expected[group])
            for key, t in tensors.items():
                like = expected[group][key]
                assert like.dtype == t.dtype and len(like.shape) == t.ndim
                assert group == "factors" or like.shape == tuple(t.shape)


@every_method
def test_each_group_is_refused_with_a_wrong_shape_dtype_or_key(name):
    """Up to eight tensors of each group, each spoilt in every way; counts below 0 and shares above 1 likewise."""
    made, sent, replies = trained(name)
    server, infos = engine(name, {}).server, {info.id: info for info in made.clients}
    client, reply = max(replies.items(), key=lambda item: sum(map(len, item[1].groups.values())))
    expected, tried = server.expects(infos[client], sent[client]), 0
    for group, tensors in reply.groups.items():
        keys = sorted(tensors)
        for key in keys[:: max(len(keys) // 8, 1)]:
            t, like = tensors[key], expected[group][key]
            spoils = [t.unsqueeze(0), other_dtype(t)]
            if t.ndim:
                spoils += [torch.cat([t, t]), t[:0]] if like.shape[0] is not None else []
            if like.needed:
                spoils.append(None)
            if group in ("usage", "importance"):
                spoils += [spoilt(t, 0, 1.001), spoilt(t, 0, -0.001)]
            elif not t.is_floating_point():
                spoils += [spoilt(t, 0, -1), spoilt(t, 0, 2**40 + 1)]
            for bad in spoils:
                spoilt_reply = changed(reply, group, key, bad)
                assert objection(server, infos[client], sent[client], spoilt_reply), (group, key, bad)
                tried += 1
        counted = [group for group in ("usage", "importance", "demand", "served", "trained") if group in expected]
        for group in counted:  # not one of them may be left out
            for key in expected[group]:
                assert objection(server, infos[client], sent[client], changed(reply, group, key, None))
            without = Payload({g: p for g, p in reply.groups.items() if g != group}, reply.scalars)
            if name == "AffinityMoE":  # to which a site tells one of two measures, or both
                assert objection(server, infos[client], sent[client], without) is None
                group = "contribution"
                without = Payload({g: p for g, p in without.groups.items() if g != group}, reply.scalars)
            assert "is missing" in objection(server, infos[client], sent[client], without)
    assert tried or not any(reply.groups.values())


# --- finite, but huge -------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("sign", [1, -1])
def test_a_huge_reply_never_leaves_a_state_that_is_not_finite(name, sign):
    """One client sends 3e38 wherever it may: the round is as without it, or merges it, or is abandoned and undone."""

    def huge(reply):
        groups = {
            group: {k: torch.full_like(t, sign * 3e38) if _may_be_huge(group, t) else t for k, t in tensors.items()}
            for group, tensors in reply.groups.items()
        }
        return Payload(groups, reply.scalars)

    client = sorted(trained(name)[2])[0]
    running = engine(name, {client: huge})
    before = bits(running.server)
    record = running.round(1, test=False)
    state = running.server.state()
    assert all(bool(t.isfinite().all()) for tensors in state.groups.values() for t in tensors.values())
    if record["abandoned"]:
        assert bits(running.server) == before and record["ledger"]["ok"] == record["ledger"]["selected"]
        assert "the server's new state is not finite (params " in record["abandoned"]
    if name.partition(":")[0] in ("FedGH", "FedTGP"):  # which train at the server
        assert record["abandoned"]


def _may_be_huge(group, t):
    return t.dtype == torch.float32 and group not in ("usage", "importance")


# --- absence, and a round that does not count -------------------------------------------------------------------------


@every_method
def test_a_rejected_reply_leaves_what_absence_leaves(name):
    """Bits of the server's whole state, of the clients' states, structure and usage."""
    client = sorted(trained(name)[2])[1]
    bad = {client: lambda reply: Payload(reply.groups, {**reply.scalars, "num_examples": -9})}
    outcomes = []
    for spoil in (bad, {client: absent}):
        running = engine(name, spoil)
        record = running.round(1, test=False)
        assert record["ledger"]["ok"] == record["ledger"]["selected"] - 1 >= 2
        server = running.server
        outcomes.append((bits(server), running.store.versions, server.structure(), server.usage(), server.events()))
    assert outcomes[0] == outcomes[1] and client not in outcomes[0][1]


@every_method
def test_an_abandoned_round_leaves_no_trace(name):
    """All replies but one are merged and then undone, events included; the round after it is as if it were the
    first. What a checkpoint said before the round stays what it is: nobody writes into its tensors."""
    client = max(trained(name)[2])
    running, never = engine(name, {client: absent}, min_fraction=1.0), engine(name, {})
    state = running.server.state()
    before, kept = bits(running.server), bits(type("", (), {"state": lambda: state}))
    record = running.round(1, test=True)
    n = len(trained(name)[2])
    assert record["abandoned"].startswith(f"{n - 1} of {n} selected clients counted, needed are {n}")
    assert record["ledger"]["ok"] == n - 1 and record["ledger"]["error"] == 1 and record["test"] is None
    assert bits(running.server) == before and running.store.versions == {}
    running.client.spoil.clear()
    for each in (running, never):
        assert each.round(1, test=False)["abandoned"] is None
    assert bits(running.server) == bits(never.server) and running.store.versions == never.store.versions
    assert kept[0] == before[0]
    assert running.server.events() == never.server.events()
    assert isinstance(running.store, ClientStore)
