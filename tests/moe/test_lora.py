"""Adapters on the experts: nothing changes at first, only they and the head are trained, hooks still see routers."""

import pytest
import tiny
import torch

from consilium.moe.lora import add_expert_lora
from consilium.moe.routing import Tap


@pytest.fixture(params=tiny.CASES, ids="-".join)
def case(request):
    source = tiny.source(*request.param)
    labels = tiny.TASKS["animal"] if source.form == "classification" else ()
    return source.build(source.load() | tiny.heads("animal", labels), "animal", labels).eval(), tiny.batch(source)


def test_the_output_does_not_change(case):
    model, batch = case
    with torch.no_grad():
        before = model(batch)[0]
        add_expert_lora(model, 2)
        torch.testing.assert_close(model(batch)[0], before, rtol=0, atol=1e-6)


def test_only_adapters_and_head_are_trained(case):
    model, batch = case
    model_type = model.config.model_type
    adapters = add_expert_lora(model, 2)
    assert model.config.model_type == model_type
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("head.")}
    assert {id(p) for p in adapters} == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    logits, labels = model(batch)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trainable
    for block in model.blocks():
        gradients = [
            p.grad for n, p in model.backbone.named_parameters() if n.startswith(block + ".") and "lora_B" in n
        ]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), f"{block} has no adapter that learns"


def test_every_expert_of_every_block_has_adapters(case):
    """Two adapted matrices (in and out) per expert, each with A and B of rank 2: 8 experts * 2 * (D + F) * 2."""
    model, _ = case
    fused = 32 + 2 * 16 + 16 + 32  # gate and up in one
    shapes = {"switch_transformers": 32 + 16 + 16 + 32}
    size = sum(p.numel() for p in add_expert_lora(model, 2))
    assert size == len(model.blocks()) * 8 * 2 * shapes.get(model.family.model_type, fused)


def test_hooks_still_see_the_routers(case):
    model, batch = case
    with Tap(model) as tap, torch.no_grad(), tap.batch(batch, count=True):
        model(batch)
    before = tap.usage
    add_expert_lora(model, 2)
    with Tap(model) as tap, torch.no_grad(), tap.batch(batch, count=True):
        model(batch)
    assert all(torch.equal(before.demand[b], n) for b, n in tap.usage.demand.items())
    assert tap.usage.slots == before.slots
