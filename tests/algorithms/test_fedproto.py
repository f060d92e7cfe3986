"""FedProto: class means, their aggregation and the loss by hand; no weight ever travels."""

import pytest
import tiny
import torch
from torch import nn

from consilium.algorithms.fedproto import FedProto, Nearest, class_means, drawn
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.models.cohort import SplitModel


def plain():
    """A model whose representation is the image itself."""
    backbone = nn.Flatten()
    backbone.width = 16
    return SplitModel(backbone, "corner", ("a", "b", "c"))


def test_class_means_by_hand():
    setup, context = tiny.small_setup(), tiny.small_context("colour-00")
    data = context.data.train
    means, counts = class_means(plain(), setup, context)
    assert {label: int(n) for label, n in counts.items()} == {"a": 3, "b": 3, "c": 3}
    for label, mean in means.items():
        rows = [row for row, target in zip(data.index.tolist(), data.targets, strict=True) if target == label]
        torch.testing.assert_close(mean, sum(data.x[row] for row in rows).flatten() / 3)


def test_aggregation_by_hand():
    """Counts 1 and 3: (1 * 2 + 3 * 6) / 4 = 5. Of b one client knows: 4. Nobody knows c: it is not sent."""
    server = FedProto().server(tiny.small_setup())
    assert server.deliver(server.setup.clients[0]).group("prototypes") == {}
    one = torch.ones(6)

    def reply(prototypes, **counts):
        return Payload({"prototypes": prototypes, "counts": {label: torch.tensor(n) for label, n in counts.items()}})

    replies = [("x", reply({"a": 2 * one, "b": 4 * one}, a=1, b=5)), ("y", reply({"a": 6 * one}, a=3))]
    server.aggregate(1, iter(replies))
    sent = server.deliver(server.setup.clients[0]).group("prototypes")
    assert sent.keys() == {"a", "b"} and (sent["a"] == 5).all() and (sent["b"] == 4).all()


def test_the_loss_by_hand():
    """Distances: of an image of ones to a prototype of threes 4; b has no prototype: 0. Mean 2, times lam 0.5: 1."""
    model = plain()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    batch = {"x": torch.ones(2, 1, 4, 4), "labels": torch.tensor([0, 1])}
    loss = drawn({"a": torch.full((16,), 3.0)}, model, 0.5)(model, batch)
    torch.testing.assert_close(loss.item(), 1.0 + torch.log(torch.tensor(3.0)).item())


def test_what_leaves_a_client_key_by_key():
    setup = tiny.small_setup()
    server, half, context = FedProto().server(setup), FedProto().client(setup), tiny.small_context("animal-01")
    reply = half.train(server.deliver(context.info), context)
    assert reply.groups.keys() == {"prototypes", "counts"} and reply.group("prototypes").keys() == {"a", "b", "c"}
    assert {t.shape for t in reply.group("prototypes").values()} == {(6,)}
    assert sum(int(n) for n in reply.group("counts").values()) == 5
    assert "1.weight" in context.state.params and "head.corner.a.weight" in context.state.params


def test_the_nearest_prototype_decides():
    logits = Nearest({"a": torch.zeros(2), "c": torch.ones(2)}, ("a", "b", "c"))(torch.tensor([[0.1, 0.0], [0.9, 1.2]]))
    assert logits.argmax(1).tolist() == [0, 2] and logits[0, 1] == -torch.inf


def test_prototypes_can_be_the_classifier():
    setup, context = tiny.small_setup(), tiny.small_context("colour-00")
    half = FedProto(infer="prototype").client(setup)
    reply = half.train(Payload(), context)
    assert 0 <= half.evaluate(reply, context).scalars["score"] <= 1


@pytest.mark.parametrize(("options", "message"), [({"lam": -1.0}, "lam is -1"), ({"infer": "x"}, "infer is 'x'")])
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FedProto(**options)
