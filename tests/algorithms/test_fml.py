"""FML: the divergence by hand, no gradient through the other model, and only the meme model travels."""

import math

import pytest
import tiny
import torch
from torch.nn import functional as F

from consilium.algorithms.fedapen import FedAPEN
from consilium.algorithms.fedmrl import FedMRL
from consilium.algorithms.fml import FML, FMLClient, kl, pair_model
from consilium.core import Payload
from consilium.errors import ConfigError


def test_the_divergence_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    value = kl(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2))
    assert math.isclose(value.item(), 0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel_tol=1e-5)


def gradients(alpha, beta):
    setup, context = tiny.small_setup(), tiny.small_context("animal-01")
    model = pair_model(setup, FML().server(setup).params, context)
    batch = context.data.train.batch(range(5), context.device)
    FMLClient(setup, FML(alpha, beta)).objective(model, batch).backward()
    return model, batch


def test_each_learns_from_its_own_loss_alone():
    """With alpha = beta = 1 the gradients are those of two unconnected cross-entropies."""
    model, batch = gradients(1.0, 1.0)
    own, meme = model.head.weight.grad.clone(), model.backbone.small.head.weight.grad.clone()
    model.zero_grad()
    (F.cross_entropy(model(batch)[0], batch["labels"])).backward()
    torch.testing.assert_close(model.head.weight.grad, own)
    assert model.backbone.small.head.weight.grad is None
    F.cross_entropy(model.backbone.small(batch["x"]), batch["labels"]).backward()
    torch.testing.assert_close(model.backbone.small.head.weight.grad, meme)


def test_the_gradient_of_the_distillation_by_hand():
    """d KL(t || softmax(z)) / dz = softmax(z) - t: with alpha = 0, the mean over the batch of p_own - p_meme."""
    model, batch = gradients(0.0, 1.0)
    own, meme = model(batch)[0].softmax(1), model.backbone.small(batch["x"]).softmax(1)
    torch.testing.assert_close(model.head.bias.grad, (own - meme).mean(0))


def test_what_leaves_a_client_key_by_key():
    setup = tiny.small_setup()
    server, half, context = FML().server(setup), FML().client(setup), tiny.small_context("animal-00")
    sent = server.deliver(context.info)
    reply = half.train(sent, context)
    small = {f"small.extractor.{i}.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}
    small |= {"small.head.weight", "small.head.bias"}
    assert sent.groups.keys() == reply.groups.keys() == {"params"}
    assert sent.group("params").keys() == reply.group("params").keys() == small
    assert {key.split(".")[0] for key in context.state.params} == {"private", "head"}


@pytest.mark.parametrize("method", [FML(), FedAPEN(), FedMRL()])
def test_averaging_by_hand(method):
    """n_k = 1 and 3 of whatever shares a small model: (1 * 4 + 3 * 8) / 4 = 7."""
    server = method.server(tiny.small_setup())
    replies = [
        (c, Payload({"params": {key: torch.full_like(t, v) for key, t in server.params.items()}}, {"num_examples": n}))
        for c, v, n in (("x", 4.0, 1), ("y", 8.0, 3))
    ]
    server.aggregate(1, iter(replies))
    assert all((t == 7).all() for t in server.params.values()) and "small.head.bias" in server.params


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": 1.1}])
def test_refused(options):
    with pytest.raises(ConfigError, match=r"must be within \[0, 1\]"):
        FML(**options)
