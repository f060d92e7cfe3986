"""Sub-MoEs that plain transformers reads: the same logits after a save and a `from_pretrained` of the family's class."""

import pytest
import tiny
import torch
import transformers

from consilium.errors import ModelError
from consilium.moe.families import FAMILIES
from consilium.moe.surgery import slice_experts
from consilium.moe.uniform import uniform

FILLED = ("switch_transformers", "gpt_oss", "deepseek_v3", "glm4_moe")
LAYERS = {
    "uniform": ((1, 4, 6), (0, 5, 7)),
    "uneven": ((1, 4, 6), (0, 2, 5, 6, 7)),
    "few": ((3,), (0, 5, 7)),
    "partly whole": ((1, 4, 6), tuple(range(8))),
}


def cut(model_type, form, kind, **changes):
    """(source, model, a batch) with the experts of `kind`, every second layer alike."""
    source = tiny.source(model_type, form, **changes)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    held = {b: tiny.fewest(model_type, LAYERS[kind][i % 2]) for i, b in enumerate(source.counts)}
    return source, source.build(source.load() | tiny.heads("animal", labels), "animal", labels, held).eval(), held


def difference(source, model, folder):
    """Largest difference between the model's logits and those of the same weights, saved and loaded."""
    batch = tiny.batch(source)
    with torch.no_grad():
        want = model(batch)[0]
        model.backbone.config, longest = uniform(model)
        model.backbone.save_pretrained(folder)
        cls = getattr(transformers, source.family.classes[source.form])
        model.backbone, said = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(said.values()), said
        return (model.eval()(batch)[0] - want).abs().max().item(), longest


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_equal_counts_need_a_configuration_alone(model_type, form, tmp_path):
    source, model, _ = cut(model_type, form, "uniform")
    assert difference(source, model, tmp_path) == (0.0, None)
    assert getattr(model.backbone.config, source.family.number) == 3


@pytest.mark.parametrize(("kind", "form"), [("uneven", "text-to-text"), ("few", "text-to-text"),
                                            ("partly whole", "classification")])  # fmt: skip
@pytest.mark.parametrize("model_type", FILLED)
def test_filled_up_with_experts_that_no_token_reaches(model_type, kind, form, tmp_path):
    """DeepSeek-V3 has several groups in a whole layer, see below."""
    groups = {"n_group": 2, "topk_group": 2} if model_type == "deepseek_v3" else {}
    source, model, held = cut(model_type, form, kind, **groups)
    apart, longest = difference(source, model, tmp_path)
    assert apart < 1e-5
    counts = [len(ids) for ids in held.values()]
    fewest = max(counts[:2])  # of which the capacity, 256 of 8, grows least: ceil(256 * 8 / n)
    assert longest == ({3: 683, 5: 410, 8: 256}[fewest] if source.family.capacity else None)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - set(FILLED)))
def test_what_cannot_be_filled_up_exactly_is_refused(model_type):
    _, model, _ = cut(model_type, "classification", "uneven")
    with pytest.raises(ModelError, match=r"the layers hold 3, 5 experts.*(could be chosen|its router prefers)"):
        uniform(model)


def test_why_a_router_without_a_bias_cannot_lose():
    """A row that loses for a hidden state wins for its opposite: among random rows none is always below the best two."""
    rng = torch.Generator().manual_seed(0)
    rows_ED, hidden_ND = torch.randn(5, 32, generator=rng), torch.randn(4000, 32, generator=rng)
    for row_D in (torch.zeros(32), rows_ED.mean(0), -rows_ED.mean(0), rows_ED[0]):
        second = (hidden_ND @ rows_ED.t()).topk(2).values[:, 1]
        assert ((hidden_ND @ row_D) > second).any()


def test_a_share_of_the_weights_or_of_the_groups_is_refused():
    _, model, _ = cut("glm4_moe", "classification", "uneven", num_experts_per_tok=4)
    with pytest.raises(ModelError, match="a token takes 4 experts"):
        uniform(model)
    _, model, _ = cut("deepseek_v3", "classification", "partly whole")
    with pytest.raises(ModelError, match="choose among 4 groups"):
        uniform(model)


def test_the_model_it_began_with_stays_its_configuration():
    source, model, _ = cut("olmoe", "classification", "uniform")
    slice_experts(model, {block: (0,) for block in source.counts})
    config, _ = uniform(model)
    assert (config.num_experts, config.num_experts_per_tok) == (1, 1)
    assert (source.config.num_experts, source.config.num_experts_per_tok) == (8, 2)
