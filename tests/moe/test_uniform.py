"""Sub-MoEs that plain transformers reads: the same logits after a save and `from_pretrained` of the family's class."""

import pytest
import tiny
import torch
import transformers

from consilium.errors import ModelError
from consilium.moe.surgery import slice_experts
from consilium.moe.uniform import uniform
from consilium.moe.widen import GAIN, ROW

BIASED = ("switch_transformers", "gpt_oss", "deepseek_v3", "glm4_moe")
LAYERS = {
    "uniform": ((1, 4, 6), (0, 5, 7)),
    "uneven": ((1, 4, 6), (0, 2, 5, 6, 7)),
    "few": ((3,), (0, 5, 7)),
    "partly whole": ((1, 4, 6), tuple(range(8))),
}


def cut(model_type, form, kind, **changes):
    """(source, model) with the experts of `kind`, every second layer alike."""
    source = tiny.source(model_type, form, **changes)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    held = {b: tiny.fewest(model_type, LAYERS[kind][i % 2]) for i, b in enumerate(source.counts)}
    return source, source.build(source.load() | tiny.heads("animal", labels), "animal", labels, held).eval()


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
        if model.head is not None:
            more = model.backbone.config.hidden_size - model.head.in_features
            model.head.weight.data = torch.nn.functional.pad(model.head.weight.data, (0, more))
        return (model.eval()(batch)[0] - want).abs().max().item(), longest


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_equal_counts_need_a_configuration_alone(model_type, form, tmp_path):
    source, model = cut(model_type, form, "uniform")
    assert difference(source, model, tmp_path) == (0.0, None)
    assert getattr(model.backbone.config, source.family.number) == 3


@pytest.mark.parametrize(("kind", "form"), [("few", "text-to-text"), ("partly whole", "classification")])
@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_filled_up_with_experts_that_no_token_reaches(model_type, kind, form, tmp_path):
    """Also where a layer holds fewer experts than a token takes. DeepSeek's groups are for another test."""
    groups = {"topk_group": 4} if model_type.startswith("deepseek") else {}
    source, model = cut(model_type, form, kind, **groups)
    apart, longest = difference(source, model, tmp_path)
    assert apart < 1.5e-5  # of logits up to 8
    config = model.backbone.config
    assert (config.hidden_size == source.config.hidden_size) == (model_type in BIASED)
    # The capacity, 256 of 8, grows least where most are held.
    assert longest == ({"few": 683, "partly whole": 256}[kind] if source.family.capacity else None)


def test_sigmoids_with_fewer_experts_than_a_token_takes(tmp_path):
    source, model = cut("glm4_moe", "text-to-text", "uneven", num_experts_per_tok=4)
    assert difference(source, model, tmp_path)[0] < 1.5e-5
    assert (model.backbone.config.num_experts_per_tok, model.backbone.config.hidden_size) == (4, 40)


def test_greedy_texts_are_the_same_through_the_cache(tmp_path):
    source, model = cut("qwen3_moe", "text-to-text", "uneven")
    batch = tiny.batch(source)
    want = model.generate(batch, 8)
    difference(source, model, tmp_path)
    assert torch.equal(model.generate(batch, 8), want)


def test_what_cannot_be_filled_up_exactly_is_refused():
    """PhiMoE's embeddings must be changed, which are not to be where they are the output's too; DeepSeek's groups."""
    _, model = cut("phimoe", "classification", "uneven", tie_word_embeddings=True)
    with pytest.raises(
        ModelError, match=r"the layers hold 3, 5 experts, and a PhiMoE .*no bias and its output is tied"
    ):
        uniform(model)
    _, model = cut("deepseek_v3", "classification", "partly whole")
    with pytest.raises(ModelError, match="choose among 4 groups"):
        uniform(model)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_constant_takes_the_place_of_epsilon(scale):
    """By hand: D = 4, D' = 8, eps = 2e-3: c^2 = 4e-3, eps' = 5e-4, and (sum x^2 + c^2) / 8 + eps' = half of the old."""
    x = scale * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    old = x / (x.square().mean() + 2e-3).sqrt()
    wide = torch.cat([x, torch.tensor([4e-3**0.5, 0, 0, 0], dtype=torch.float64)])
    new = wide / (wide.square().mean() + 5e-4).sqrt()
    torch.testing.assert_close(new[:4] * 0.5**0.5, old, rtol=1e-12, atol=0)
    assert -ROW * GAIN * new[4] < -1e5


def test_why_a_router_without_a_bias_cannot_lose():
    """A row that loses for a hidden state wins for its opposite: of these rows none is always below the best two."""
    rng = torch.Generator().manual_seed(0)
    rows_ED, hidden_ND = torch.randn(5, 32, generator=rng), torch.randn(4000, 32, generator=rng)
    for row_D in (torch.zeros(32), rows_ED.mean(0), -rows_ED.mean(0), rows_ED[0]):
        second = (hidden_ND @ rows_ED.t()).topk(2).values[:, 1]
        assert ((hidden_ND @ row_D) > second).any()


def test_the_model_it_began_with_stays_its_configuration():
    source, model = cut("olmoe", "classification", "uniform")
    slice_experts(model, {block: (0,) for block in source.counts})
    config, _ = uniform(model)
    assert (config.num_experts, config.num_experts_per_tok) == (1, 1)
    assert (source.config.num_experts, source.config.num_experts_per_tok) == (8, 2)
