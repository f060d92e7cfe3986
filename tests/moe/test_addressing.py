"""The flat name space: exact round trips for every family, form and dtype; names; errors that name the key."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ModelError
from consilium.moe.addressing import (
    all_experts,
    expert_of,
    flatten,
    load_flat,
    pack,
    parameters,
    router_row_of,
    select,
    table,
    unpack,
)
from consilium.moe.surgery import slice_experts
from consilium.params import nbytes

CASES = [(*case, dtype) for case in tiny.CASES for dtype in ("float32", "bfloat16")]
LABELS = ("cat", "dog", "fish")


def labels_of(form):
    return LABELS if form == "classification" else ()


def heads(dtype=torch.float32):
    """Head rows of two tasks with recognisable values."""
    rows = {}
    for task in ("animal", "colour"):
        for n, label in enumerate(LABELS):
            rows[f"head.{task}.{label}.weight"] = torch.full((32,), float(n + 1), dtype=dtype)
            rows[f"head.{task}.{label}.bias"] = torch.tensor(float(-n), dtype=dtype)
    return rows


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """(source, form, everything its server holds)."""
    model_type, form, dtype = request.param
    source = tiny.source(model_type, form, dtype)
    return source, form, source.load() | (heads(source.torch_dtype) if labels_of(form) else {})


def test_round_trip_is_exact(case):
    """The built model's parameters under flat names are what it was built from, bit for bit, dtype included."""
    source, form, params = case
    model = source.build(params, "animal", labels_of(form))
    assert tiny.same(flatten(model), select(params, "animal"))
    assert tiny.same(
        flatten(load_flat(source.build(params, "animal", labels_of(form)), params)), select(params, "animal")
    )


def test_round_trip_of_a_sub_moe_is_exact(case):
    """Uneven slices come back under the ids of the full model."""
    source, form, params = case
    few = source.family.least
    held = {block: (1, 4, 6)[: max(few, 1 + i % 3)] for i, block in enumerate(source.counts)}
    model = source.build(params, "animal", labels_of(form), held)
    assert tiny.same(flatten(model, held), select(params, "animal", held))


def test_every_expert_and_row_has_its_own_name(case):
    source, _, params = case
    for block, total in source.counts.items():
        ids = {expert_of(key) for key in params if expert_of(key) and expert_of(key)[0] == block}
        assert ids == {(block, i) for i in range(total)}
        assert {router_row_of(key)[1] for key in params if (router_row_of(key) or [0])[0] == block} == set(range(total))


def test_flat_parameters_share_no_memory(case):
    source, form, params = case
    model = source.build(params, "animal", labels_of(form))
    flat = flatten(model)
    before = {key: t.clone() for key, t in flat.items()}
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.add_(1)
    assert tiny.same(flat, before)
    storages = [t.untyped_storage().data_ptr() for t in flat.values()]
    assert len(set(storages)) == len(storages)
    assert nbytes(flat.values()) == sum(t.untyped_storage().nbytes() for t in flat.values())
    assert all(t.is_contiguous() and not t.requires_grad for t in flat.values())


def test_the_model_does_not_share_memory_with_what_it_was_built_from(case):
    source, form, params = case
    before = {key: t.clone() for key, t in params.items()}
    model = source.build(params, "animal", labels_of(form))
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.add_(1)
    assert tiny.same(params, before)


def test_heads_go_by_task_and_label():
    source = tiny.source()
    params = source.load() | heads()
    model = source.build(params, "colour", ("fish", "cat"))
    assert model.head.weight[:, 0].tolist() == [3.0, 1.0]
    assert model.head.bias.tolist() == [-2.0, 0.0]
    assert {k for k in flatten(model) if k.startswith("head.")} == {
        f"head.colour.{label}.{leaf}" for label in ("fish", "cat") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_tied_weights_stay_tied(model_type):
    """One tensor under one name, and after loading the output layer still is the embedding."""
    source = tiny.source(model_type, "text-to-text", tie_word_embeddings=True)
    params = source.load()
    model = source.build(params, "t", ())
    embedding, output = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    assert embedding.weight is output.weight
    assert sum(t.shape == (tiny.VOCABULARY, 32) for t in params.values()) == 1
    load_flat(model, {key: t + 1 for key, t in params.items()})
    assert embedding.weight is output.weight
    assert torch.equal(
        output.weight, params[next(k for k in params if k.endswith(("shared.weight", "embed_tokens.weight")))] + 1
    )


def test_untied_weights_are_two():
    params = tiny.source("olmoe", "text-to-text").load()
    assert not torch.equal(params["model.embed_tokens.weight"], params["lm_head.weight"])


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_a_missing_key_is_named(model_type, form):
    source = tiny.source(model_type, form)
    for part in (".experts.5.", ".router.3.", "norm"):
        params = source.load()
        key = next(k for k in params if part in k)
        del params[key]
        with pytest.raises(ModelError, match=rf"lack '{key.replace('.', r'.')}', which '.*' of the model needs"):
            source.build(params, "t", ())


def test_another_shape_is_refused():
    source = tiny.source()
    params = source.load()
    params["shared.weight"] = params["shared.weight"][:-1]
    with pytest.raises(ModelError, match=r"'shared.weight' has shape \(160, 32\), the parameters \(159, 32\)"):
        source.build(params, "t", ())


def test_names_must_fit_the_places():
    source = tiny.source()
    model = source.skeleton("", ())
    held = {block: (0, 1) for block in source.counts}
    with pytest.raises(ModelError, match="experts per block"):
        table(model, held)
    slice_experts(model, held)
    with pytest.raises(ModelError, match="experts per block"):
        table(model, {next(iter(held)): (0, 1)})
    assert all_experts(model) == held


def test_existing_parameters_keep_their_dtype():
    """float32 values into a bfloat16 model, and back: rounded to bfloat16, nothing else."""
    source = tiny.source("olmoe", dtype="bfloat16")
    params = source.load()
    model = source.build(params, "t", ())
    finer = {key: t.float() + 1e-3 for key, t in params.items()}
    assert tiny.same(flatten(load_flat(model, finer)), {key: t.bfloat16() for key, t in finer.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", tiny.CORRECTED)
def test_correction_biases_travel_with_the_router_rows(model_type, dtype):
    """Parameter or buffer, [E] or [1, E]: a row of the router, in float32, whatever the model's dtype."""
    source = tiny.source(model_type, dtype=dtype)
    params = source.load()
    rng = torch.Generator().manual_seed(0)
    names = [key for key in params if key.endswith(".e_score_correction_bias")]
    assert {router_row_of(key) for key in names} == {(b, i) for b in source.counts for i in range(8)}
    params |= {key: torch.rand(params[key].shape, generator=rng) for key in names}
    held = {block: ((1, 4, 6), (0, 7))[i % 2] for i, block in enumerate(source.counts)}
    mine = select(params, "t", held)
    assert sum(key in mine for key in names) == 5
    for model in (source.build(mine, "t", (), held), slice_experts(source.build(params, "t", ()), held)):
        assert tiny.same(flatten(model, held), mine)
        load_flat(model, mine, held)
        assert tiny.same(flatten(model, held), mine)
        path = f"{next(iter(held))}.{source.family.correction}"
        assert model.backbone.state_dict()[path].shape in ((3,), (1, 3))
        assert model.backbone.state_dict()[path].dtype == torch.float32


def test_pack_is_the_inverse_of_unpack():
    source = tiny.source("olmoe")
    model = source.build(source.load() | heads(), "animal", LABELS)
    tensors = {path: p.detach() for path, p in parameters(model).items()}
    names = table(model)
    assert tiny.same(pack(names, unpack(names, tensors)), tensors)


# --- names ------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["layers.0.mlp", "encoder.block.11.layer.1.mlp"]),
    st.integers(0, 999),
    st.sampled_from(["down_proj", "wi.weight"]),
)
def test_names_say_block_and_id(block, i, tensor):
    assert expert_of(f"{block}.experts.{i}.{tensor}") == (block, i)
    assert router_row_of(f"{block}.router.{i}.weight") == (block, i)
    assert router_row_of(f"{block}.experts.{i}.{tensor}") is None
    assert expert_of(f"{block}.router.{i}.weight") is None


@pytest.mark.parametrize(
    "key",
    [
        "shared.weight",
        "layers.0.self_attn.q_proj.weight",
        "head.topic.numpy.weight",
        "b.experts.gate_up_proj",
        "b.experts.x1.w",
    ],
)
def test_other_names_are_neither(key):
    assert expert_of(key) is None and router_row_of(key) is None


def test_select():
    tensors = dict.fromkeys(
        ("trunk", "b.experts.0.w", "b.experts.1.w", "b.router.0.weight", "b.router.1.weight", "c.experts.0.w",
         "head.animal.cat.weight", "head.colour.red.weight"),
        torch.zeros(()),
    )  # fmt: skip
    common = {"trunk", "head.animal.cat.weight"}
    assert set(select(tensors, "animal", {"b": (1,), "c": (0,)})) == common | {
        "b.experts.1.w",
        "b.router.1.weight",
        "c.experts.0.w",
    }
    assert set(select(tensors, "animal", {"b": (1,)})) == common | {"b.experts.1.w", "b.router.1.weight"}
    assert set(select(tensors, "colour")) == set(tensors) - {"head.animal.cat.weight"}
    assert select(tensors, "animal")["trunk"] is tensors["trunk"]
