"""Slices of a model against an oracle: the full model with its router masked to the kept experts."""

import copy
from functools import cache, partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, flatten, parameters, table, unpack
from consilium.moe.routing import Tap
from consilium.moe.surgery import checked, slice_experts


def labels_of(form):
    return tiny.TASKS["animal"] if form == "classification" else ()


@cache
def full(model_type, form, **changes):
    """(source, server parameters with random heads, a padded batch) of a tiny model."""
    source = tiny.source(model_type, form, **changes)
    return source, source.load() | tiny.heads("animal", labels_of(form)), tiny.batch(source)


def build(model_type, form, held=None, **changes):
    source, params, _ = full(model_type, form, **changes)
    return source.build(params, "animal", labels_of(form), held).eval()


whole = cache(build)
"""The full model, shared: not to be changed."""


def sliced(model_type, form, held):
    """A slice of a live model; `build` cuts on the meta device."""
    return slice_experts(copy.deepcopy(whole(model_type, form)), held)


def kept_sets(model_type, form):
    """Any non-empty set of experts in every block: counts differ from layer to layer."""
    blocks = list(tiny.source(model_type, form).counts)
    some = st.sets(st.integers(0, 7), min_size=tiny.FAMILIES[model_type].least).map(lambda ids: tuple(sorted(ids)))
    return st.fixed_dictionaries(dict.fromkeys(blocks, some))


def mask_switch(router, kept):
    """-inf on the logits of all other experts, before the softmax."""
    outside = [i for i in range(router.num_experts) if i not in kept]

    def hook(_, __, logits):
        return logits.index_fill(-1, torch.tensor(outside, dtype=torch.int64), float("-inf"))

    router.classifier.register_forward_hook(hook)


def mask_top_k(weigh):
    """A router written out again: -inf on the logits of all others, weights and index by `weigh(router, logits, k)`."""

    def mask(router, kept):
        outside = torch.tensor([i for i in range(router.num_experts) if i not in kept], dtype=torch.int64)

        def forward(hidden):
            logits = hidden.reshape(-1, 32) @ router.weight.T + (
                0 if getattr(router, "bias", None) is None else router.bias
            )
            logits = logits.index_fill(-1, outside, float("-inf"))
            return logits, *weigh(router, logits, min(router.top_k, len(kept)))

        router.forward = forward

    return mask


def softmax_first(router, logits, k):
    weights, index = logits.softmax(-1).topk(k)
    return weights, index


def normalised(router, logits, k):
    weights, index = logits.softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True), index


def top_k_first(router, logits, k):
    best, index = logits.topk(k)
    return best.softmax(-1), index


def sparse_mixer(router, logits, k):
    """One after the other, each a softmax over the logits within twice the jitter of the best that is left."""
    weights, index = [], []
    left = logits
    for _ in range(2):
        best, place = left.max(-1, keepdim=True)
        near = (best - logits) / torch.maximum(logits.abs(), best) <= 2 * router.router_jitter_noise
        weights.append(left.masked_fill(~near, float("-inf")).softmax(-1).gather(-1, place))
        index.append(place)
        left = left.scatter(-1, place, float("-inf"))
    return torch.cat(weights, -1), torch.cat(index, -1)


def ungrouped(scores, router, best):
    return scores


def grouped(scores, router, best):
    """-inf outside of the `topk_group` groups whose `best` best experts sum to most."""
    size = 8 // router.num_group
    allowed = torch.full_like(scores, float("-inf"))
    for token, row in enumerate(scores.tolist()):
        sums = [sum(sorted(row[g * size : (g + 1) * size])[-best:]) for g in range(router.num_group)]
        for g in sorted(range(router.num_group), key=lambda g: -sums[g])[: router.topk_group]:
            allowed[token, g * size : (g + 1) * size] = scores[token, g * size : (g + 1) * size]
    return allowed


def deepseek_v2(router, logits, k, restrict=ungrouped):
    scores = restrict(logits.softmax(-1), router, 1)
    weights, index = scores.topk(k)
    return weights * router.routed_scaling_factor, index


def deepseek_v3(router, logits, k, restrict=ungrouped):
    scores = logits.sigmoid()
    corrected = (scores + router.e_score_correction_bias).masked_fill(logits == float("-inf"), float("-inf"))
    index = restrict(corrected, router, 2).topk(k).indices
    weights = scores.gather(-1, index)
    return weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor, index


def ernie(router, logits, k):
    scores = logits.softmax(-1)
    corrected = (scores + router.moe_statics.e_score_correction_bias[0]).masked_fill(scores == 0, float("-inf"))
    index = corrected.topk(k).indices
    weights = scores.gather(-1, index)
    return weights / weights.sum(-1, keepdim=True), index


WEIGH = {
    "olmoe": softmax_first,
    "mixtral": normalised,
    "qwen2_moe": softmax_first,
    "qwen3_moe": softmax_first,
    "granitemoe": top_k_first,
    "phimoe": sparse_mixer,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": top_k_first,
    "ernie4_5_moe": ernie,
    "glm4_moe": deepseek_v3,
}
MASKS = {"switch_transformers": mask_switch} | {name: mask_top_k(weigh) for name, weigh in WEIGH.items()}
GROUPED = tiny.GROUPED


def masked(model_type, form, held):
    """The oracle: nothing is cut, routers only may not choose what is not held, and groups are lifted from those."""
    model = copy.deepcopy(whole(model_type, form))
    for block, ids in held.items():
        if len(ids) == 8 and tiny.FAMILIES[model_type].groups:
            continue
        router = model.blocks()[block].get_submodule(model.family.router)
        MASKS[model_type](router, ids)
    return model


def outputs(model, batch):
    with torch.no_grad():
        return model(batch)[0]


def test_every_family_has_an_oracle():
    assert MASKS.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
@settings(max_examples=12)
@given(data=st.data())
def test_a_slice_equals_the_masked_model(model_type, form, data):
    held = data.draw(kept_sets(model_type, form))
    batch = full(model_type, form)[2]
    expected = outputs(masked(model_type, form, held), batch)
    torch.testing.assert_close(outputs(sliced(model_type, form, held), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_cutting_before_loading_is_the_same(model_type, form):
    """A slice cut on the meta device and filled later is the slice of the full model, bit for bit."""
    source, _, batch = full(model_type, form)
    held = {block: tiny.fewest(model_type, ((1, 2, 5), (6,), (0, 7))[i % 3]) for i, block in enumerate(source.counts)}
    built, cut = build(model_type, form, held), sliced(model_type, form, held)
    assert tiny.same(flatten(built, held), flatten(cut, held))
    assert torch.equal(outputs(built, batch), outputs(cut, batch))


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_so_do_its_gradients(model_type, form):
    """Every parameter of the slice gets the gradient that the masked model's has."""
    source, _, batch = full(model_type, form)
    held = {block: ((1, 2, 5), (0, 7))[i % 2] for i, block in enumerate(source.counts)}
    part, oracle = sliced(model_type, form, held), masked(model_type, form, held)
    for model in (part, oracle):
        logits, labels = model(batch)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        for parameter in parameters(model).values():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    expected = flatten(oracle)
    for key, gradient in flatten(part, held).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_the_masks_do_something(model_type, form):
    """The oracle is worth its name: masking half of the experts changes the output."""
    source, _, batch = full(model_type, form)
    held = dict.fromkeys(source.counts, (0, 1, 2, 3))
    assert not torch.allclose(
        outputs(masked(model_type, form, held), batch), outputs(build(model_type, form), batch), atol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_keeping_all_experts_changes_no_bit(model_type, form, dtype):
    source = tiny.source(model_type, form, dtype)
    params, labels = source.load(), ()
    model = source.build(params, "t", labels).eval()
    everything = all_experts(model)
    ids = torch.tensor([[5, 6, 7, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        before, tensors = model.backbone(**inputs)[0], dict(model.backbone.named_parameters())
        slice_experts(model, everything)
        after = model.backbone(**inputs)[0]
    assert torch.equal(before, after)
    assert all(p is tensors[name] for name, p in model.backbone.named_parameters())
    assert tiny.same(flatten(source.build(params, "t", labels, everything), everything), params)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_what_a_slice_says_of_itself(model_type, form):
    """Counts, top-k and capacity of each block follow the experts kept there; the configuration does not."""
    source, _, _ = full(model_type, form)
    held = {block: tiny.fewest(model_type, tuple(range(1 + 2 * i))) for i, block in enumerate(source.counts)}
    model = build(model_type, form, held)
    family, config = model.family, model.config.to_dict()
    assert all_experts(model) == held
    for name, block in model.blocks().items():
        kept = len(held[name])

        def value(path, block=block):
            owner, _, attribute = path.rpartition(".")
            return getattr(block.get_submodule(owner), attribute)

        assert [value(path) for path in family.counts] == [kept] * len(family.counts)
        if family.top_k is not None:
            assert value(family.top_k) == min(2, kept)
        if family.groups:
            router = block.get_submodule(family.router)
            assert (router.num_group, router.topk_group) == (1, 1)
        if family.capacity is not None:
            assert value(family.capacity) == -(-256 * 8 // kept)
    assert config == build(model_type, form).config.to_dict()


@pytest.mark.parametrize("model_type", ("phimoe", "deepseek_v3", "glm4_moe"))
def test_a_router_that_ranks_two_keeps_two(model_type):
    source, _, _ = full(model_type, "classification")
    first, second = source.counts
    model = build(model_type, "classification")
    with pytest.raises(ModelError, match=rf"{first} would keep 1 expert; the router of .* ranks its best 2"):
        slice_experts(model, {first: (3,), second: (0, 1)})
    assert set(map(len, all_experts(model).values())) == {8}


@pytest.mark.parametrize("model_type", GROUPED)
def test_groups_that_do_not_restrict(model_type):
    """Then a slice equals the full model with its groups as they are and its router masked."""
    changes = {"n_group": 4, "topk_group": 4}
    source, _, batch = full(model_type, "classification", **changes)
    held = dict(zip(source.counts, ((0, 3, 6), (1, 2)), strict=True))
    model = build(model_type, "classification", **changes)
    for block, ids in held.items():
        router = model.blocks()[block].get_submodule("gate")
        mask_top_k(partial(WEIGH[model_type], restrict=grouped))(router, ids)
    assert (router.num_group, router.topk_group) == (4, 4)
    expected = outputs(model, batch)
    actual = outputs(build(model_type, "classification", held, **changes), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", GROUPED)
def test_groups_that_restrict(model_type):
    """The full model obeys its groups; a slice has none, and is another model than the masked one that obeys them."""
    changes = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    source, _, batch = full(model_type, "classification", **changes)
    held = dict.fromkeys(source.counts, (0, 2, 4, 5, 6, 7))
    results = {}
    for name, ids in (("whole", tuple(range(8))), ("masked", (0, 2, 4, 5, 6, 7))):
        model = build(model_type, "classification", **changes)
        for block in model.blocks().values():
            mask_top_k(partial(WEIGH[model_type], restrict=grouped))(block.gate, ids)
        results[name] = outputs(model, batch)
    plain = outputs(build(model_type, "classification", **changes), batch)
    torch.testing.assert_close(plain, results["whole"], rtol=1e-5, atol=1e-5)
    cut = outputs(build(model_type, "classification", held, **changes), batch)
    assert not torch.allclose(cut, results["masked"], atol=1e-4)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_uneven_slices_train(model_type, form):
    """A few steps on one batch reduce its loss, and every expert that a token was sent to has a gradient."""
    source, params, batch = full(model_type, form)
    held = {block: ((1, 4, 6), (0, 7))[i % 2] for i, block in enumerate(source.counts)}
    model = build(model_type, form, held)  # without dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with Tap(model, held, counts=source.counts) as tap, tap.batch(batch, count=True):
            logits, labels = model(batch)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        losses.append(loss.item())
        slopes = unpack(
            table(model, held), {path: p.grad for path, p in parameters(model).items() if p.grad is not None}
        )
        for block, ids in held.items():
            for i in ids:
                mine = [g for key, g in slopes.items() if key.startswith(f"{block}.experts.{i}.")]
                if tap.usage.served[block][i]:
                    assert mine and all(g.abs().sum() > 0 for g in mine), f"expert {i} of {block} was hit"
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    corrections = [key for key in params if key.endswith("e_score_correction_bias")]
    assert bool(corrections) == (model.family.correction is not None)
    trained = flatten(model, held)
    assert all(torch.equal(trained[key], params[key]) for key in corrections if key in trained)


def test_capacity_is_rounded_up():
    """Capacity 10 of 8 experts; 3 are kept: 10 * 8 / 3 = 26.67, so 27."""
    model = build("switch_transformers", "classification", expert_capacity=10)
    slice_experts(model, dict.fromkeys(all_experts(model), (0, 3, 4)))
    assert {block.router.expert_capacity for block in model.blocks().values()} == {27}


def test_only_the_touched_block_changes():
    model = build("olmoe", "classification")
    first, second = model.blocks()
    before = dict(model.backbone.named_parameters())
    slice_experts(model, {first: (2,), second: tuple(range(8))})
    for name, parameter in model.backbone.named_parameters():
        touched = name.startswith(f"{first}.")
        assert (parameter is before[name]) != touched
        assert parameter.requires_grad


def test_frozen_parameters_stay_frozen():
    model = build("switch_transformers", "classification").requires_grad_(False)
    slice_experts(model, dict.fromkeys(all_experts(model), (1, 2)))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_slice_of_a_slice():
    """Places 0 and 2 of (1, 4, 6) are experts 1 and 6."""
    source, _, _ = full("olmoe", "classification")
    model = build("olmoe", "classification", dict.fromkeys(source.counts, (1, 4, 6)))
    slice_experts(model, dict.fromkeys(source.counts, (0, 2)))
    held = dict.fromkeys(source.counts, (1, 6))
    assert tiny.same(flatten(model, held), flatten(build("olmoe", "classification", held), held))


# --- errors -----------------------------------------------------------------------------------------------------------

COUNTS = {"a": 4, "b": 8}


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"a": (0,)}, "'b' is not both"),
        ({"a": (0,), "b": (0,), "c": (0,)}, "'c' is not both"),
        ({}, "'a' is not both"),
        ({"a": (), "b": (0,)}, "a would keep no expert; every layer needs at least one"),
        ({"a": (0,), "b": (8,)}, r"b: experts \[8\] must be ascending, distinct and within 0..7"),
        ({"a": (-1, 0), "b": (0,)}, r"a: experts \[-1, 0\] must be"),
        ({"a": (1, 1), "b": (0,)}, r"a: experts \[1, 1\] must be"),
        ({"a": (2, 1), "b": (0,)}, r"a: experts \[2, 1\] must be"),
    ],
)
def test_refused(keep, says):
    with pytest.raises(ModelError, match=says):
        checked(keep, COUNTS)


def test_checked_puts_blocks_in_order():
    assert list(checked({"b": [7], "a": [0, 3]}, COUNTS).items()) == [("a", (0, 3)), ("b", (7,))]


def test_a_refused_slice_leaves_the_model_whole():
    model = build("olmoe", "classification")
    first, second = model.blocks()
    with pytest.raises(ModelError):
        slice_experts(model, {first: (0, 1), second: (8,)})
    assert set(map(len, all_experts(model).values())) == {8}
