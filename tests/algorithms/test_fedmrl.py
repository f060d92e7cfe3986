"""FedMRL: the nested representation and the loss by hand; only the small model travels."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from consilium.algorithms.fedmrl import FedMRL, Nested, coarse_and_fine
from consilium.errors import ConfigError
from consilium.models.cohort import SplitModel


def test_the_representation_and_the_loss_by_hand():
    """G(x) = [x1], F(x) = [x1, x2], the projector adds: R = [2 x1, x2], of which the small header reads 2 x1."""
    small, private = nn.Linear(2, 1, bias=False), nn.Linear(2, 2, bias=False)
    small.width, private.width = 1, 2
    model = SplitModel(Nested(private, small, 2), "t", ("a", "b"))
    nested = model.backbone
    with torch.no_grad():
        small.weight.copy_(torch.tensor([[1.0, 0.0]]))
        private.weight.copy_(torch.eye(2))
        nested.projector.weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        nested.projector.bias.zero_()
    x, y = torch.tensor([[1.0, 5.0]]), torch.tensor([1])
    torch.testing.assert_close(nested(x), torch.tensor([[2.0, 5.0]]))
    coarse = F.cross_entropy(nested.small["head"](torch.tensor([[2.0]])), y)
    fine = F.cross_entropy(model.head(torch.tensor([[2.0, 5.0]])), y)
    torch.testing.assert_close(coarse_and_fine(model, {"x": x, "labels": y}), coarse + fine)


def test_what_travels_key_by_key():
    """The small model ends in d1 = 2 numbers, the own one in 6."""
    setup = tiny.small_setup()
    server, half, context = FedMRL(d1=2).server(setup), FedMRL(d1=2).client(setup), tiny.small_context("animal-00")
    sent = server.deliver(context.info)
    reply = half.train(sent, context)
    small = {f"small.extractor.{i}.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}
    small |= {"small.head.weight", "small.head.bias"}
    assert sent.group("params").keys() == reply.group("params").keys() == small
    assert reply.groups.keys() == {"params"} and reply.group("params")["small.head.weight"].shape == (3, 2)
    assert {key.split(".")[0] for key in context.state.params} == {"private", "projector", "head"}
    assert context.state.params["projector.weight"].shape == (6, 8)


def test_refused():
    with pytest.raises(ConfigError, match="d1 is 0"):
        FedMRL(d1=0)
    with pytest.raises(ConfigError, match="d1 is 7; it must be at most 6"):
        FedMRL(d1=7).server(tiny.small_setup())
