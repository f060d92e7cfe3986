"""A base in 4 bits under adapters: it is the model whose weights were rounded, and says what is missing."""

import sys

import pytest
import tiny
import torch

from consilium.core import Payload
from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, flatten, parameters, select
from consilium.moe.lora import Lora, add_lora, merged
from consilium.moe.quantise import dequantise, quantise
from consilium.training import fit, local_test

NF4 = Lora(rank=2, base="nf4")
FAMILIES = ("olmoe", "switch_transformers", "gpt_oss")


def built(model_type, params=None):
    source = tiny.source(model_type)
    labels = tiny.TASKS["animal"]
    model = source.build((params or source.load()) | tiny.heads("animal", labels), "animal", labels).eval()
    return source, model, tiny.batch(source)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    _, model, _ = built("olmoe")
    with pytest.raises(ModelError, match=r"pip install 'consilium\[quant\]'"):
        add_lora(model, NF4)


@pytest.fixture
def library():
    pytest.importorskip("bitsandbytes")


def test_what_the_library_cannot_do_is_said(library):
    with pytest.raises(ModelError, match=r"cannot store torch\.int64 on cpu in 4 bits"):
        quantise(torch.ones(8, 8, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(32, 16), (16, 64), (24, 40), (7, 10)], ids=str)
def test_rounding_is_small(library, shape):
    """The widest gap between two of NF4's 16 levels is 0.304 (from -1 to -0.696) of the largest value of a block."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, scheme = quantise(matrix)
    assert packed.dtype == torch.uint8 and packed.numel() == matrix.numel() // 2
    error, size = (dequantise(packed, scheme) - matrix).flatten(), matrix.flatten().abs()
    for start in range(0, len(error), 64):
        assert error[start : start + 64].abs().max() <= 0.153 * size[start : start + 64].max()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_the_model_with_rounded_weights(library, model_type):
    source, model, batch = built(model_type)
    add_lora(model, NF4, seed=3)
    rounded = source.load()
    for name, (packed, state) in model.quantised.items():
        rounded[name] = dequantise(packed, state)
    _, other, _ = built(model_type, rounded)
    add_lora(other, Lora(rank=2), seed=3)
    outcomes = []
    for m in (model, other):
        for p in m.adapters.parameters():
            p.data.fill_(0.05)
        logits, labels = m(batch)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        outcomes.append((logits.detach(), {n: p.grad for n, p in m.adapters.named().items() if p.grad is not None}))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-5)
    assert outcomes[0][1].keys() == outcomes[1][1].keys()
    for name, gradient in outcomes[0][1].items():
        torch.testing.assert_close(gradient, outcomes[1][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_matrix_of_an_expert_stays_in_full(library, model_type):
    _, model, _ = built(model_type)
    full = sum(p.nbytes for p in model.parameters())
    experts = sum(len(places) for places in all_experts(model).values())
    add_lora(model, NF4)
    assert len(model.quantised) == 2 * experts
    left = [p for p in model.parameters() if not p.is_meta]
    assert sum(p.nbytes for p in left) + sum(q.nbytes for q, _ in model.quantised.values()) < 0.8 * full


def test_a_round_on_four_bits(library):
    """Training, evaluation, and what travels are those of adapters on any base."""
    setup = tiny.setup(tiny.source("olmoe"), lora=NF4)
    sent, context = select(setup.initial_params(), "animal"), tiny.context()
    model = setup.build(sent, context)
    fitted = fit(model, setup.encode(context, context.data.train), setup.fit, context)
    after = flatten(model)
    assert fitted.steps == 2 and after.keys() == sent.keys() and not tiny.same(after, sent)
    assert any(p.is_meta for p in parameters(model).values())
    assert 0 <= local_test(setup, Payload({"params": after}), context).scalars["score"] <= 1


@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_it_is_the_same_model_without_adapters(model_type, base, request):
    """What `consilium export` writes: W + alpha / R B A for some experts of a sub-MoE, W rounded as in training."""
    if base == "nf4":
        request.getfixturevalue("library")
    lora, labels = Lora(rank=2, alpha=3.0, base=base), tiny.TASKS["animal"]
    source = tiny.source(model_type)
    held = {block: ((1, 4), (0, 5, 7))[i % 2] for i, block in enumerate(source.counts)}
    params = source.load() | tiny.heads("animal", labels)
    live = add_lora(source.build(params, "animal", labels, held).eval(), lora)
    rng = torch.Generator().manual_seed(0)
    for tensor in live.adapters.parameters():
        tensor.data.normal_(std=0.2, generator=rng)
    whole = merged(source.skeleton("", ()), select(source.load(), "", held), flatten(live, held), lora)
    plain, batch = source.build(whole, "animal", labels, held).eval(), tiny.batch(source)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch)[0], live(batch)[0], rtol=0, atol=1e-5)
