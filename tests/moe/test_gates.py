"""Gates of slices on the scale of the full model: the equations by hand, every family, export, ways to run.

The numbers by hand: logits (ln 4, ln 3, 0) of three experts, so that the softmax over all is (1/2, 3/8, 1/8); experts 1
and 2 are held, over which it is (3/4, 1/4).
"""

import copy
import json
import shutil
from functools import cache

import pytest
import tiny
import torch
import transformers

from consilium.core import Algorithm
from consilium.errors import ConfigError, ModelError, PayloadError
from consilium.fit import Fit
from consilium.moe.addressing import flatten, parameters
from consilium.moe.build import ModelSource
from consilium.moe.experts import Experts
from consilium.moe.files import MAP, WEIGHTS, load_sub_moe, save_sub_moe
from consilium.moe.gates import (
    KINDS,
    NEED_ROWS,
    Gates,
    absent_rows,
    attach_gates,
    default_scale,
    fold_gates,
    gates_from_scalars,
    gates_to_scalars,
    measure_scales,
    shares_gates,
)
from consilium.moe.lora import Lora
from consilium.moe.routing import Tap
from consilium.moe.uniform import uniform
from consilium.training import local_round, local_test, seeded

SHARING = ("switch_transformers", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2")
"""Families of which the tiny models have gates that depend on absent experts."""


@cache
def full(model_type, form="classification"):
    """(source, parameters, a batch) of a router with preferences: its logits have a standard deviation of about 1.5."""
    source = tiny.source(model_type, form)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    params = source.load() | tiny.heads("animal", labels)
    rows = {k: t / t.std() * 1.5 / 32**0.5 for k, t in params.items() if ".router." in k and k.endswith(".weight")}
    params |= rows
    return source, params, tiny.batch(source)


@cache
def scales(model_type, form="classification"):
    source, params, batch = full(model_type, form)
    return measure_scales(source.build(params, "animal", labels_of(form)), [batch])


def labels_of(form):
    return tiny.TASKS["animal"] if form == "classification" else ()


def gates_of(kind, model_type, held, form="classification"):
    measured = scales(model_type, form)
    scale = {block: measured[block][len(ids) - 1] for block, ids in held.items() if block in measured}
    rows = absent_rows(full(model_type, form)[1], held)
    return Gates(kind, scale if kind == "constant" else {}, rows if kind in NEED_ROWS else {})


def cut(model_type, kind, held, form="classification"):
    source, params, _ = full(model_type, form)
    return source.build(params, "animal", labels_of(form), held, gates_of(kind, model_type, held, form)).eval()


def uneven(source):
    return {
        block: tiny.fewest(source.config.model_type, ((1, 4, 6), (0, 3, 5, 6, 7))[i % 2])
        for i, block in enumerate(source.counts)
    }


def logits_of(model, batch):
    with torch.no_grad():
        return model(batch)[0]


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "top_k", "expected"),
    [
        ("slice", 2, [3 / 4, 1 / 4]),
        ("constant", 2, [0.8 * 3 / 4, 0.8 * 1 / 4]),
        ("full", 2, [3 / 8, 1 / 8]),
        ("mass", 2, [3 / 4 * 7 / 8, 1 / 4 * 7 / 8]),  # the best two of all have 1/2 + 3/8; those held 1
        ("slice", 1, [3 / 4]),
        ("full", 1, [3 / 8]),
        ("mass", 1, [3 / 4 * (1 / 2) / (3 / 4)]),
    ],
)
def test_gates_by_hand(kind, top_k, expected):
    source = tiny.source("olmoe", num_experts=3, num_experts_per_tok=top_k)
    block = next(iter(source.counts))
    params = source.load()
    for i, share in enumerate((4.0, 3.0, 1.0)):
        params[f"{block}.router.{i}.weight"] = torch.zeros(32)
        params[f"{block}.router.{i}.weight"][0] = torch.tensor(share).log()
    held = dict.fromkeys(source.counts, (1, 2))
    gates = Gates(kind, dict.fromkeys(held, 0.8), absent_rows(params, held))
    router = source.build(params, "", (), held, gates).blocks()[block].gate
    hidden = torch.zeros(1, 32)
    hidden[0, 0] = 1.0
    _, weights, chosen = router(hidden)
    torch.testing.assert_close(weights, torch.tensor([expected]))
    assert chosen.tolist() == [[0, 1][:top_k]]


def test_full_gates_are_those_of_the_full_router():
    """Switch, DeepSeek-V2 with its factor: an expert that both routers choose has one gate."""
    for model_type in SHARING:
        source, params, _ = full(model_type)
        held = dict.fromkeys(source.counts, (0, 1, 2, 3, 4, 5))
        whole, part = source.build(params, "animal", labels_of("classification")).eval(), cut(model_type, "full", held)
        block, family = next(iter(source.counts)), source.family
        with torch.no_grad():
            hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
            wide, narrow = (m.blocks()[block].get_submodule(family.router)(hidden) for m in (whole, part))
        logits_TE = wide[family.logits].reshape(12, 8).float()
        factor = getattr(source.config, "routed_scaling_factor", 1.0)
        p_TE = logits_TE.softmax(-1)[:, :6] * factor
        best_TK = p_TE.topk(narrow[1].reshape(12, -1).shape[-1]).values
        torch.testing.assert_close(narrow[1].reshape(12, -1).sort(descending=True).values, best_TK)


def test_constants_are_measured_by_hand():
    """Two tokens, three experts, one chosen: shares (1/2, 3/8, 1/8) and (1/8, 3/8, 1/2); the best of all have 1/2 each.

    Two experts: {0, 1}: 4/7 and 3/4; {0, 2}: 4/5 twice; {1, 2}: 3/4 and 4/7. One expert: always 1, so c(1) = 1/2.
    """
    source = tiny.source("olmoe", "text-to-text", num_experts=3, num_experts_per_tok=1, num_hidden_layers=1)
    model = source.build(source.load(), "", ())
    (block,) = source.counts
    shares = torch.tensor([[4.0, 3.0, 1.0], [1.0, 3.0, 4.0]]).log()
    model.blocks()[block].gate.register_forward_hook(lambda m, args, out: (shares, *out[1:]))
    ids = torch.tensor([[3, 4]])
    found = measure_scales(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    one, two, three = found[block]
    assert (one, three) == (0.5, 1.0)
    assert two == pytest.approx(0.5 / ((4 / 7 + 3 / 4 + 2 * 4 / 5 + 3 / 4 + 4 / 7) / 6), abs=1e-4)


def test_constants_that_nothing_was_measured_for():
    """Between a uniform router (max(n, k) / E) and a certain one (1): their geometric mean."""
    assert default_scale(16, 16, 2) == 1.0
    assert default_scale(4, 16, 2) == 0.5
    assert default_scale(1, 32, 2) == 0.25  # two of 32 experts at least
    source = tiny.source("olmoe")
    first, second = source.counts
    assert source.gate_scales({first: (0, 1), second: tuple(range(8))}) == {first: 0.5}


def test_the_card_tells_constants(tmp_path):
    shutil.copytree(tiny.directory("olmoe"), tmp_path / "m")
    first, second = tiny.source("olmoe").counts
    told = {first: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], second: [0.3, 1.0]}  # the second has another number
    (tmp_path / "m/card.json").write_text(json.dumps({"gates_public": told}))
    held = {first: (2, 5, 7), second: (0, 1)}
    assert ModelSource(str(tmp_path / "m")).gate_scales(held) == {first: 0.5, second: 0.5}


# --- every family -----------------------------------------------------------------------------------------------------


def test_which_families_are_touched():
    assert {name for name in tiny.FAMILIES if shares_gates(tiny.FAMILIES[name])} == set(SHARING)
    for name in ("olmoe", "qwen2_moe", "qwen3_moe"):
        source = tiny.source(name, norm_topk_prob=True)
        assert not shares_gates(source.family)


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_a_layer_of_a_slice_stays_near_the_full_layer(model_type):
    """The experts' output for the same hidden states, the most used kept: nearer than with the gates as they are.

    `apart` is |slice - full| / |full|. The experts of these models are random, so their outputs are about orthogonal:
    with the total gate of the full layer and no common expert it is sqrt(2), with "full" gates at most 1. Where gates
    do not depend on absent experts all kinds are the same bits.
    """
    source, params, batch = full(model_type)
    whole = source.build(params, "animal", labels_of("classification")).eval()
    block, inner = next(iter(source.counts)), source.family.experts
    seen, usage = {}, {}
    hooks = [
        whole.blocks()[block].register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0].detach())),
        whole.blocks()[block].get_submodule(inner).register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    with torch.no_grad(), Tap(whole) as tap, tap.batch(batch, count=True):
        whole(batch)
    usage = tap.usage.probability("demand")[block]
    [hook.remove() for hook in hooks]
    want = seen["out"]
    for n in (6, 4, 3, 2, 1):
        if n < source.family.least:
            continue
        held = dict.fromkeys(source.counts, tuple(sorted(usage.argsort(descending=True)[:n].tolist())))
        apart = {}
        for kind in KINDS:
            part, found = cut(model_type, kind, held).blocks()[block], {}
            part.get_submodule(inner).register_forward_hook(lambda m, a, out, found=found: found.update(out=out))
            with torch.no_grad():
                part(seen["hidden"])
            apart[kind] = ((found["out"] - want).norm() / want.norm()).item()
        if model_type in SHARING:
            assert apart["full"] < apart["constant"] < apart["slice"], (n, apart)
            assert apart["full"] < 1.0 and apart["constant"] < 1.42, (n, apart)
            assert apart["mass"] < min(1.42, 1.001 * apart["slice"]), (n, apart)
        else:
            assert len(set(apart.values())) == 1, (n, apart)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", SHARING)
def test_keeping_all_experts_changes_no_bit(model_type, kind):
    """Of one layer whole and one cut, the whole one computes as it always did, and a whole model altogether."""
    source, params, batch = full(model_type)
    everything = {block: tuple(range(n)) for block, n in source.counts.items()}
    plain = source.build(params, "animal", labels_of("classification")).eval()
    assert torch.equal(logits_of(cut(model_type, kind, everything), batch), logits_of(plain, batch))
    half = everything | {next(iter(source.counts)): (0, 1, 2)}
    model = cut(model_type, kind, half)
    hooked = [bool(block.get_submodule(source.family.router)._forward_hooks) for block in model.blocks().values()]
    assert hooked == [kind != "slice", *[False] * (len(hooked) - 1)]


@pytest.mark.parametrize(("model_type", "form"), [case for case in tiny.CASES if case[0] in SHARING])
def test_the_export_is_the_model(model_type, form, tmp_path):
    """Folded into the experts, filled up to one number and read by plain transformers: the same logits."""
    source, _, batch = full(model_type, form)
    groups = {"topk_group": 4} if model_type == "deepseek_v2" else {}
    if groups:  # a layer with all experts and groups that restrict is refused, see test_uniform
        source = tiny.source(model_type, form, **groups)
    held = uneven(source)
    model = cut(model_type, "constant", held, form)
    want = logits_of(model, batch)
    assert (logits_of(cut(model_type, "slice", held, form), batch) - want).abs().max() > 1e-3
    model.backbone.config, _ = uniform(fold_gates(model))
    model.backbone.save_pretrained(tmp_path)
    cls = getattr(transformers, source.family.classes[form])
    model.backbone = cls.from_pretrained(tmp_path)
    if model.head is not None:
        more = model.backbone.config.hidden_size - model.head.in_features
        model.head.weight.data = torch.nn.functional.pad(model.head.weight.data, (0, more))
    torch.testing.assert_close(logits_of(model.eval(), batch), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", NEED_ROWS)
def test_no_weights_hold_gates_of_absent_rows(kind):
    source, _, _ = full("olmoe")
    with pytest.raises(ModelError, match=rf"fit.gates is '{kind}'.*no configuration of OLMoE can say so"):
        fold_gates(cut("olmoe", kind, uneven(source)))
    everything = {block: tuple(range(n)) for block, n in source.counts.items()}
    fold_gates(cut("olmoe", kind, everything))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe", "deepseek_v2", "mixtral"])
def test_a_saved_sub_moe_comes_back(model_type, kind, tmp_path):
    source, _, batch = full(model_type)
    held = uneven(source)
    model = cut(model_type, kind, held)
    save_sub_moe(tmp_path / "m", source, model, held)
    _, again, _ = load_sub_moe(tmp_path / "m")
    assert torch.equal(logits_of(again.eval(), batch), logits_of(model, batch))


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"kind": "best", "scale": {}}, "gates are 'best'; they must be one of constant, full, mass, slice"),
        ({"kind": "constant", "scale": {"layers.0.mlp": 0}}, "it must be a number in"),
        ({"kind": "constant", "scale": {"layers.0.mlp": "x"}}, "is no keep-map"),
        ({"kind": "constant"}, "is no keep-map"),
        ([], "is no keep-map"),
    ],
)
def test_a_wrong_map_is_told(told, says, tmp_path):
    source, _, _ = full("olmoe")
    held = uneven(source)
    save_sub_moe(tmp_path, source, cut("olmoe", "constant", held), held)
    whole = json.loads((tmp_path / MAP).read_text())
    (tmp_path / MAP).write_text(json.dumps({**whole, "gates": told}))
    with pytest.raises(ModelError, match=says):
        load_sub_moe(tmp_path)


def test_an_old_map_has_the_gates_of_its_time(tmp_path):
    source, _, batch = full("olmoe")
    held = uneven(source)
    save_sub_moe(tmp_path, source, cut("olmoe", "slice", held), held)
    whole = json.loads((tmp_path / MAP).read_text())
    del whole["gates"]
    (tmp_path / MAP).write_text(json.dumps(whole))
    assert torch.equal(
        logits_of(load_sub_moe(tmp_path)[1].eval(), batch), logits_of(cut("olmoe", "slice", held), batch)
    )
    assert (tmp_path / WEIGHTS).exists()


# --- the ways a model runs --------------------------------------------------------------------------------------------


def gradients(model, batch):
    logits, labels = model(batch)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    return {path: p.grad for path, p in parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("kind", ["constant", "full", "mass"])
@pytest.mark.parametrize("model_type", SHARING)
def test_our_kernel_gives_the_same(model_type, kind):
    source, _, batch = full(model_type)
    held = dict.fromkeys(source.counts, (0, 2, 3, 5))
    model = cut(model_type, kind, held)
    want, plain = logits_of(model, batch), gradients(model, batch)
    routers = [name for name in plain if f".{source.family.router}." in name and "weight" in name]
    assert len(routers) == len(held) and all(plain[name].abs().sum() > 0 for name in routers)
    again = cut(model_type, kind, held)
    with Experts(again) as experts:
        torch.testing.assert_close(logits_of(again, batch), want, rtol=1e-5, atol=1e-5)
        ours = gradients(again, batch)
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-5)
    assert any(leaf.grad is not None for leaf in experts.leaves.values())


@pytest.mark.parametrize("kind", ["constant", "full", "mass"])
@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_checkpointing_gives_the_same(model_type, kind):
    """With dropout of attention, drawn from one seed."""
    source, _, batch = full(model_type)
    held, found = dict.fromkeys(source.counts, (0, 2, 3, 5)), []
    for on in (False, True):
        model = cut(model_type, kind, held).train()
        if on:
            model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with seeded(0):
            found.append(gradients(model, batch))
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "full", "mass"])
@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_it_generates(model_type, kind):
    """Also in the decoder of Switch; token by token through the cache as in one pass."""
    source, _, batch = full(model_type, "text-to-text")
    held = dict.fromkeys(source.counts, (0, 2, 3, 5))
    model = cut(model_type, kind, held, "text-to-text")
    with_cache = model.generate(batch, 4)
    model.backbone.generation_config.use_cache = False
    assert torch.equal(model.generate(batch, 4), with_cache)
    assert (logits_of(model, batch) - logits_of(cut(model_type, "slice", held, "text-to-text"), batch)).abs().max() > 0


def test_absent_rows_are_no_parameters():
    """They are neither trained, named, returned nor saved."""
    source, _, batch = full("olmoe")
    held = uneven(source)
    model, plain = cut("olmoe", "full", held), cut("olmoe", "slice", held)
    assert parameters(model).keys() == parameters(plain).keys()
    assert flatten(model, held).keys() == flatten(plain, held).keys()
    assert model.backbone.state_dict().keys() == plain.backbone.state_dict().keys()
    before = model.blocks()[next(iter(held))].gate.absent_weight.clone()
    gradients(model, batch)
    assert torch.equal(model.blocks()[next(iter(held))].gate.absent_weight, before)


def test_a_copy_has_its_own_gates():
    source, _, batch = full("olmoe")
    model = cut("olmoe", "constant", uneven(source))
    copied = copy.deepcopy(model)
    want = logits_of(model, batch)
    fold_gates(copied)
    assert torch.equal(logits_of(model, batch), want)
    torch.testing.assert_close(logits_of(copied, batch), want, rtol=1e-5, atol=1e-6)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_missing_are_told():
    source, params, _ = full("olmoe")
    held = uneven(source)
    rows = absent_rows(params, held)
    first = next(iter(held))
    rows.pop(f"{first}.router.0.weight")
    with pytest.raises(ModelError, match=f"{first} lacks 5 experts, and there are router rows of 4 of them"):
        source.build(params, "animal", labels_of("classification"), held, Gates("full", rows=rows))


def test_gates_are_scaled_once():
    source, _, _ = full("olmoe")
    model = cut("olmoe", "constant", uneven(source))
    with pytest.raises(ModelError, match="scaled already"):
        attach_gates(model, Gates("constant"))


def test_the_setting_is_checked():
    with pytest.raises(ConfigError, match=r"fit\.gates is 'best'; it must be one of constant, full, mass, slice"):
        Fit(gates="best")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e5, "x", True, [0.5]])
def test_constants_that_arrive_are_checked(value):
    with pytest.raises(PayloadError, match=r"gates/a is .*; it must be a number in"):
        gates_from_scalars("constant", {"gates/a": value}, {})
    assert gates_from_scalars("constant", gates_to_scalars({"a": 0.5}), {}).scale == {"a": 0.5}


# --- methods ----------------------------------------------------------------------------------------------------------

METHODS = [name for name, kind in sorted(Algorithm.registry.items()) if kind.worlds == ("moe",) or "moe" in kind.worlds]


def algorithm(name):
    given = {"experts": 3} if name in ("FedAvg", "FedProx", "SCAFFOLD", "Standalone", "RandomMoE") else {}
    given |= {"stage1": "none"} if name == "FedMoE" else {}
    given |= {"budget": (0.5,), "resident": (0.6,)} if name == "HFedMoE" else {}
    return Algorithm.registry[name](**given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "SCAFFOLD", "RandomMoE", "FedMoE", "HFedMoE", "Standalone"])
def test_clients_of_every_method_train_at_that_scale(name, kind, monkeypatch):
    """In training and in scoring the model is built with gates of that kind, with the rows or constants it needs."""
    source = tiny.source("olmoe")
    memory = tiny.bytes_for(3, source) if name == "FedMoE" else None
    setup = tiny.setup(source, memory, gates=kind)
    method = algorithm(name)
    server, client = method.server(setup), method.client(setup)
    built, build = [], ModelSource.build

    def watched(self, params, task, labels, held=None, gates=None):
        model = build(self, params, task, labels, held, gates)
        built.append((model.gates, held, [len(b.gate._forward_hooks) for b in model.blocks().values()]))
        return model

    monkeypatch.setattr(ModelSource, "build", watched)
    sent = server.configure(1, setup.clients)
    who = sorted(sent)[0]
    context = tiny.context(who)
    client.train(sent[who], context)
    client.evaluate(server.deliver(context.info), context)
    assert len(built) == 2
    for gates, held, hooks in built:
        assert gates.kind == kind
        cut_blocks = [len(ids) < 8 for ids in held.values()]
        assert any(cut_blocks)
        assert [n > 0 for n in hooks] == [was and kind != "slice" for was in cut_blocks]
        assert gates.scale == (source.gate_scales(held) if kind == "constant" else {})
        if kind in NEED_ROWS:
            assert len(gates.rows) == sum(8 - len(ids) for ids in held.values())
    if name == "Standalone":  # what it keeps is enough for the next round
        client.train(sent[who], context)
        assert built[-1][0].kind == kind


def test_adapters_train_at_that_scale():
    setup = tiny.setup(tiny.source("olmoe"), lora=Lora(rank=2))
    held = dict.fromkeys(setup.model.counts, (0, 3, 5))
    sent = setup.sub_moe(setup.initial_params(), "animal", held)
    model, reply = local_round(setup, sent, tiny.context())
    assert model.gates.scale == dict.fromkeys(held, default_scale(3, 8, 2))
    assert reply.group("params").keys() == sent.group("params").keys()
    assert 0 <= local_test(setup, sent, tiny.context()).scalars["score"] <= 1
