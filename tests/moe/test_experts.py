"""Our own computation of the experts against transformers' own: values, gradients, the active ones alone."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from consilium.moe.addressing import parameters
from consilium.moe.experts import Experts

KEEP = (False, True)


def build(model_type, form, dtype="float32", **changes):
    """A model with random heads, in eval mode (no dropout, no jitter), and a batch."""
    source = tiny.source(model_type, form, dtype, **changes)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    heads = {key: t.to(source.torch_dtype) for key, t in tiny.heads("animal", labels).items()}
    return source.build(source.load() | heads, "animal", labels).eval(), tiny.batch(source)


@pytest.fixture(params=tiny.CASES, ids="-".join)
def case(request):
    return build(*request.param)


def loss_of(model, batch):
    logits, labels = model(batch)
    return F.cross_entropy(logits.float(), labels)


def unfused(model, grads):
    """Gradients by path -> by flat local name, as `Experts.leaves` are called."""
    from consilium.moe.addressing import table, unpack

    return unpack(table(model), {path: g for path, g in grads.items() if g is not None})


def stock(model, batch):
    """Loss and gradients by flat name as transformers and autograd have them; nothing is left on the model."""
    loss = loss_of(model, batch)
    loss.backward()
    grads = unfused(model, {path: p.grad for path, p in parameters(model).items()})
    model.zero_grad()
    return loss.detach(), grads


def own(model, batch, experts, active=None):
    with experts:
        loss = loss_of(model, batch)
        experts.active = active
        loss.backward()
    grads = {name: leaf.grad for name, leaf in experts.leaves.items() if leaf.grad is not None}
    fused = {path: p.grad for path, p in parameters(model).items() if p.grad is not None}
    grads = unfused(model, fused) | grads
    model.zero_grad()
    for leaf in experts.leaves.values():
        leaf.grad = None
    return loss.detach(), grads


def assert_equal(model, found, expected, rtol=1e-5, atol=1e-5):
    """An expert without a token has no gradient here and zeros in a fused tensor."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    for name, gradient in expected[1].items():
        if name in found[1]:
            torch.testing.assert_close(
                found[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("keep", KEEP)
def test_values_and_gradients_are_those_of_transformers(case, keep):
    model, batch = case
    expected = stock(model, batch)
    assert_equal(model, own(model, batch, Experts(model, keep)), expected)
