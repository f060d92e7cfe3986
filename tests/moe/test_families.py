"""The table of families against transformers' own modules: what a row says is what the model has."""

import pytest
import tiny
import torch
import transformers
from torch import nn

from consilium.errors import ModelError
from consilium.moe.families import FAMILIES, blocks, family_of


@pytest.fixture(scope="module", params=tiny.CASES, ids="-".join)
def backbone(request):
    model_type, form = request.param
    row = FAMILIES[model_type]
    model = getattr(transformers, row.classes[form]).from_pretrained(tiny.directory(model_type, form))
    return row, model


def test_the_key_is_the_model_type():
    for model_type, row in FAMILIES.items():
        assert row.model_type == model_type == tiny.configuration(model_type).model_type
        assert family_of(model_type) is row
        assert set(row.classes) == set(tiny.FORMS)


def test_an_unknown_type_is_refused():
    with pytest.raises(ModelError, match=r"model type 'bert' is not .* known are olmoe, switch_transformers"):
        family_of("bert")


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
        for path in filter(None, (row.top_k, row.capacity)):
            owner, _, attribute = path.rpartition(".")
            assert isinstance(getattr(block.get_submodule(owner), attribute), int)


def test_the_routers_output_is_where_the_row_says(backbone):
    """Logits are the router's rows times its input; the decision is their top-k, as indices or as a 0/1 mask."""
    row, model = backbone
    block = next(iter(blocks(model, row).values()))
    router = block.get_submodule(row.router)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = router.eval()(hidden)
    logits = hidden.reshape(-1, 32) @ router.get_parameter(row.rows[0]).T
    torch.testing.assert_close(output[row.logits].reshape(-1, 8), logits)
    if row.dispatch:
        expected = nn.functional.one_hot(logits.argmax(-1), 8)
        assert torch.equal(output[row.routed].reshape(-1, 8).bool(), expected.bool())
    else:
        expected = logits.topk(router.top_k).indices.sort().values
        assert torch.equal(output[row.routed].reshape(10, -1).sort().values, expected)


def test_a_model_without_sparse_layers_is_refused():
    row = FAMILIES["switch_transformers"]
    config = tiny.configuration("switch_transformers", num_layers=1, num_sparse_encoder_layers=0)
    config.encoder_sparse_step = 7
    model = transformers.SwitchTransformersEncoderModel(config)
    with pytest.raises(ModelError, match="no sparse layer, so there are no experts to federate"):
        blocks(model, row)
