"""The table of families against transformers' own modules: what a row says is what the model has."""

import pytest
import tiny
import torch
import transformers
from torch import nn

from consilium.errors import ModelError
from consilium.moe.discovery import family_of
from consilium.moe.families import blocks


@pytest.fixture(scope="module", params=tiny.CASES, ids="-".join)
def backbone(request):
    model_type, form = request.param
    row = tiny.FAMILIES[model_type]
    model = getattr(transformers, row.classes[form]).from_pretrained(tiny.directory(model_type, form))
    return row, model


def test_what_is_found_is_found_once():
    for model_type, row in tiny.FAMILIES.items():
        assert row.model_type == model_type
        assert family_of(tiny.configuration(model_type)) is row
        assert set(row.classes) == set(tiny.FORMS)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match=r"is neither a mixture of experts .* nor a causal language"):
        family_of("clip")
    with pytest.raises(ModelError, match="model type 'perceptron' is not known to transformers"):
        family_of("perceptron")


def test_nllb_moe_is_refused_for_what_transformers_makes_of_it():
    """Whatever the router chooses, only experts 0 and 1 run; when this fails, a row for it may be due."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    with pytest.raises(ModelError, match=r"'nllb-moe' cannot be federated: .* experts 0 and 1 alone"):
        family_of("nllb-moe")
    config = transformers.NllbMoeConfig(d_model=32, num_experts=8, expert_capacity=64)
    block = NllbMoeSparseMLP(config, ffn_dim=16).eval()
    ran = set()
    for i in range(8):
        block.experts[f"expert_{i}"].register_forward_hook(lambda *_, i=i: ran.add(i))
    hidden = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen = block.router(hidden.reshape(-1, 32))[0].argmax(-1)
        block(hidden)
    assert len(chosen.unique()) > 2 and ran == {0, 1}


def test_rows_and_counts(backbone):
    row, model = backbone
    found = blocks(model, row)
    assert len(found) == (4 if model.config.is_encoder_decoder and "Conditional" in type(model).__name__ else 2)
    for name, block in found.items():
        assert model.get_submodule(name) is block
        router, experts = block.get_submodule(row.router), block.get_submodule(row.experts)
        assert router.get_parameter(row.rows[0]).shape == (8, 32)
        for path in row.counts:
            owner, _, attribute = path.rpartition(".")
            assert getattr(block.get_submodule(owner), attribute) == 8
        if row.layout == "fused":
            assert {n for n, _ in experts.named_parameters()} == set(row.tensors)
            assert all(experts.get_parameter(tensor).shape[0] == 8 for tensor in row.tensors)
        else:
            assert [n for n, _ in experts.named_children()] == [row.module.format(i) for i in range(8)]
        for path in row.rows[1:]:
            owner, _, name = path.rpartition(".")
            tensor = getattr(router.get_submodule(owner), name)
            assert tensor is None or tensor.shape in ((8,), (1, 8))
        if row.groups:
            assert (router.num_group, router.topk_group) == (model.config.n_group, model.config.topk_group)
        for path in filter(None, (row.top_k, row.capacity)):
            owner, _, attribute = path.rpartition(".")
            assert isinstance(getattr(block.get_submodule(owner), attribute), int)


def test_the_routers_output_is_where_the_row_says(backbone):
    """Logits are the router's rows times its input; the decision is their top-k, as indices or as a 0/1 mask.

    Where a router corrects its scores or chooses groups first, `tests/moe/test_routing.py` has the decision by hand.
    """
    row, model = backbone
    block = next(iter(blocks(model, row).values()))
    router = block.get_submodule(row.router)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = router.eval()(hidden)
    logits = hidden.reshape(-1, 32) @ router.get_parameter(row.rows[0]).T
    if "bias" in row.rows:
        logits = logits + router.bias
    torch.testing.assert_close(output[row.logits].reshape(-1, 8), logits)
    if row.dispatch:
        expected = nn.functional.one_hot(logits.argmax(-1), 8)
        assert torch.equal(output[row.routed].reshape(-1, 8).bool(), expected.bool())
    elif row.correction or row.groups:
        assert output[row.routed].reshape(10, -1).shape == (10, router.top_k)
    else:
        expected = logits.topk(router.top_k).indices.sort().values
        assert torch.equal(output[row.routed].reshape(10, -1).sort().values, expected)


@pytest.mark.parametrize("model_type", tiny.CORRECTED)
def test_correction_biases_are_not_trained(model_type):
    """They are in the state of the model, and none of its trainable parameters; also where transformers' are."""
    source = tiny.source(model_type)
    model = source.build(source.load(), "t", ())
    for block in source.counts:
        path = f"{block}.{model.family.correction}"
        assert path not in {name for name, p in model.backbone.named_parameters() if p.requires_grad}
        assert path in model.backbone.state_dict()


def test_a_model_without_sparse_layers_is_refused():
    row = tiny.FAMILIES["switch_transformers"]
    config = tiny.configuration("switch_transformers", num_layers=1, num_sparse_encoder_layers=0)
    config.encoder_sparse_step = 7
    model = transformers.SwitchTransformersEncoderModel(config)
    with pytest.raises(ModelError, match="no sparse layer, so there are no experts to federate"):
        blocks(model, row)
