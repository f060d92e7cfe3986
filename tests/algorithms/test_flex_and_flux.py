"""FLEx and Flux: grafted and merged experts by hand; key by key what leaves a client and what stays."""

import pytest
import tiny
import torch

from consilium.algorithms.flex import FLEx, is_trunk
from consilium.algorithms.flux import MERGED, Flux, chosen_experts, merged_expert
from consilium.moe.addressing import expert_of, flatten, load_flat
from consilium.moe.surgery import graft
from consilium.scoring import profile


@pytest.mark.parametrize("model_type", ["olmoe", "switch_transformers", "mixtral"])
def test_a_grafted_expert_that_no_token_asks_for_changes_nothing(model_type):
    """Its router row is made to lose against every other."""
    source = tiny.source(model_type)
    params = source.load() | tiny.heads("animal", tiny.TASKS["animal"])
    plain = source.build(params, "animal", tiny.TASKS["animal"]).eval()
    held = {block: tuple(range(9)) for block in source.counts}
    for block in source.counts:
        for infix in ("experts", "router"):
            prefix = f"{block}.{infix}.0."
            params |= {f"{block}.{infix}.8.{k[len(prefix) :]}": t for k, t in params.items() if k.startswith(prefix)}
        row = f"{block}.router.8.weight"
        params[row] = torch.zeros_like(params[row])
        if f"{block}.router.8.bias" in params:
            params[f"{block}.router.8.bias"] = torch.tensor(-1e4)
    grown = load_flat(graft(source.skeleton("animal", tiny.TASKS["animal"])), params, held).eval()
    assert flatten(grown, held).keys() == params.keys()
    batch = tiny.batch(source)
    for block in grown.blocks().values():  # logit -1e4 where the family has no bias
        router = block.get_submodule(grown.family.router)
        weight = router.get_parameter(grown.family.rows[0])
        assert weight.shape[0] == 9
    if model_type == "switch_transformers":
        return  # its capacity is of the whole layer; counts are what is tested
    with torch.no_grad():
        logits = grown(batch)[0]
    assert torch.isfinite(logits).all() and plain(batch)[0].shape == logits.shape


def flex(client="animal-00"):
    setup = tiny.setup(tiny.source("olmoe"), clients_per_round=6)
    method = FLEx()
    server, half = method.server(setup), method.client(setup)
    context = tiny.context(client)
    sent = server.deliver(next(c for c in setup.clients if c.id == client))
    return setup, sent, half.train(sent, context), context


def test_flex_sends_the_trunk_and_keeps_the_grafted_experts():
    setup, sent, reply, context = flex()
    assert sent.group("params").keys() == reply.group("params").keys()
    assert all(is_trunk(key) for key in sent.group("params")) and set(reply.groups) == {"params"}
    kept = context.state.params
    prefixes = tuple(f"{block}.{infix}.8." for block in setup.model.counts for infix in ("experts", "router"))
    assert kept and all(key.startswith(prefixes) for key in kept)
    assert {key.split(".8.")[0] for key in kept} == {prefix[:-3] for prefix in prefixes}


def test_flex_trains_the_grafted_expert_alone_beginning_with_the_largest_contribution():
    setup, sent, _, context = flex()
    base = setup.model.load()
    fresh = tiny.context()
    half = FLEx().client(setup)
    own = half._begin(base, sent, fresh)
    model = setup.build(base | sent.group("params"), fresh)
    _, contribution = profile(setup, model, setup.encode(fresh, fresh.data.train), fresh, 64)
    for block in setup.model.counts:
        best = int(contribution[block].argmax())
        assert torch.equal(own[f"{block}.experts.8.down_proj"], base[f"{block}.experts.{best}.down_proj"])
        assert torch.equal(own[f"{block}.router.8.weight"], base[f"{block}.router.{best}.weight"])
        assert not torch.equal(
            context.state.params[f"{block}.experts.8.down_proj"], own[f"{block}.experts.8.down_proj"]
        )
    built = half._build(base, own, sent, fresh)
    correct = half._only_the_grafted(built)
    from consilium.moe.addressing import parameters

    trainable = parameters(built)
    for p in trainable.values():
        p.grad = torch.ones_like(p)
    correct(trainable, trainable)
    for path, p in trainable.items():
        if path.endswith(("gate_up_proj", "down_proj", "gate.weight")) and ".mlp." in path:
            assert not p.grad[:8].any() and p.grad[8].all()
        else:
            assert p.grad.all()


# --- Flux -------------------------------------------------------------------------------------------------------------


def test_the_merged_expert_by_hand():
    """Usage 1 and 3 of experts 1 and 2: (1 * 4 + 3 * 8) / 4 = 7, under the name of expert 2; even if unused."""
    params = {f"b.experts.{e}.w": torch.tensor([4.0 * e]) for e in range(3)}
    params |= {f"b.router.{e}.weight": torch.tensor([float(e)]) for e in range(3)}
    found = merged_expert(params, "b", [1, 2], torch.tensor([9.0, 1.0, 3.0]))
    assert found == {"b.experts.2.w": torch.tensor([7.0]), "b.router.2.weight": torch.tensor([1.75])}
    found = merged_expert(params, "b", [0, 2], torch.tensor([0.0, 1.0, 0.0]))
    assert found == {"b.experts.0.w": torch.tensor([4.0]), "b.router.0.weight": torch.tensor([1.0])}


def test_choosing_by_hand():
    """Two of four by utility: 1 and 3. With half explored: one that was tried least (2), then the best of the rest."""
    utility, tried = torch.tensor([0.0, 5.0, 1.0, 4.0]), torch.tensor([3.0, 2.0, 0.0, 1.0])
    rng = torch.Generator().manual_seed(0)
    assert chosen_experts(utility, tried, 2, 0.0, rng) == (1, 3)
    assert chosen_experts(utility, tried, 2, 0.5, rng) == (1, 2)
    assert chosen_experts(utility, tried, 2, 1.0, rng) == (2, 3)


def test_flux_holds_what_fits_and_sends_back_all_but_the_merged_expert():
    source = tiny.source("olmoe")
    setup = tiny.setup(source, memory={"animal-00": tiny.bytes_for(4, source)}, clients_per_round=6)
    method = Flux()
    server, client = method.server(setup), method.client(setup)
    info = next(c for c in setup.clients if c.id == "animal-00")
    sent, context = server.deliver(info), tiny.context()
    context.info = info
    merged = {k.removeprefix(MERGED): v for k, v in sent.scalars.items() if k.startswith(MERGED)}
    for block, trains in server.map["animal-00"].items():
        ids = {expert_of(k)[1] for k in sent.group("params") if (expert_of(k) or ("",))[0] == block}
        assert len(trains) == 3 and ids == {*trains, merged[block]} and merged[block] not in trains
    whole = server.deliver(next(c for c in setup.clients if c.id == "animal-01"))
    assert all(v == -1 for k, v in whole.scalars.items() if k.startswith(MERGED))
    reply = client.train(sent, context)
    gone = sent.group("params").keys() - reply.group("params").keys()
    assert gone and all(
        (expert_of(k) or (k.split(".router.")[0], int(k.split(".router.")[1][0])))[1] in merged.values() for k in gone
    )
    assert set(reply.groups) == {"params", "demand", "utility"}
    for block, trains in server.map["animal-00"].items():
        told = reply.group("utility")[block]
        others = [e for e in range(8) if e not in trains]
        assert not told[others].any() and told[list(trains)].any()
    before = {key: t for key, t in server.params.items()}
    server.aggregate(1, iter([("animal-00", reply)]))
    moved = {key for key, t in server.params.items() if not torch.equal(t, before[key])}
    trained = {
        (block, e) for block, trains in server.tried["animal-00"].items() for e in trains.nonzero().flatten().tolist()
    }
    assert {expert_of(key) for key in moved if expert_of(key)} <= trained and moved


def test_a_merged_expert_is_not_trained():
    source = tiny.source("olmoe")
    setup = tiny.setup(source, memory={"animal-00": tiny.bytes_for(4, source)}, clients_per_round=6)
    method = Flux()
    server, client = method.server(setup), method.client(setup)
    info = next(c for c in setup.clients if c.id == "animal-00")
    sent, context = server.deliver(info), tiny.context()
    context.info = info
    from consilium.algorithms import flux

    seen, work = [], flux.local_round
    flux.local_round = lambda *a, **k: seen.append(work(*a, **k)) or seen[-1]
    try:
        client.train(sent, context)
    finally:
        flux.local_round = work
    after = seen[0][1].group("params")
    for block in setup.model.counts:
        place = sent.scalars[f"{MERGED}{block}"]
        for key in (k for k in after if expert_of(k) == (block, place)):
            assert torch.equal(after[key], sent.group("params")[key])
