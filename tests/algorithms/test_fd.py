"""FD: mean logits per class and the loss by hand; what travels."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fd import FD, taught
from consilium.core import Payload
from consilium.errors import ConfigError


def zero_model():
    """Logits that are 0 whatever it sees."""
    setup, context = tiny.small_setup(), tiny.small_context("colour-00")
    model = setup.build(setup.own_params(context), context)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    return model, context.data.train.batch([0, 1], context.device)


def test_the_loss_by_hand():
    """CE of equal logits: ln 3. The first example's class has logits (3, 0, 0): mean square 3; the second's has none:
    0. Half of the batch, gamma 2: + 3."""
    model, batch = zero_model()
    first, second = (model.labels[i] for i in batch["labels"].tolist())
    assert first != second
    loss = taught({first: torch.tensor([3.0, 0.0, 0.0])}, model, FD(gamma=2.0))(model, batch)
    torch.testing.assert_close(loss.item(), math.log(3) + 3)


def test_the_divergence_by_hand():
    """Teacher (1/2, 1/4, 1/4), student thirds: 1/2 ln 3/2 + 1/2 ln 3/4, for half of the batch."""
    model, batch = zero_model()
    label = model.labels[batch["labels"][0]]
    loss = taught({label: torch.tensor([math.log(2), 0.0, 0.0])}, model, FD(distance="kl"))(model, batch)
    expected = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    torch.testing.assert_close(loss.item(), math.log(3) + expected / 2)


def test_without_any_logits_it_is_the_cross_entropy():
    model, batch = zero_model()
    torch.testing.assert_close(taught({}, model, FD())(model, batch).item(), math.log(3))


def test_the_cross_entropy_by_hand():
    """The paper's: probabilities (1/2, 1/4, 1/4) against thirds: ln 3, for half of the batch."""
    model, batch = zero_model()
    label = model.labels[batch["labels"][0]]
    loss = taught({label: torch.tensor([0.5, 0.25, 0.25])}, model, FD(distance="ce"))(model, batch)
    torch.testing.assert_close(loss.item(), 1.5 * math.log(3))


def test_the_others_mean_by_hand():
    """a: 1, 3 and 8 of x, y and z, whatever their sizes: for x (3 + 8) / 2, for a fourth client 4. b is of x alone."""
    setup = tiny.small_setup()
    x, y, z, fourth = setup.clients[:4]

    def reply(**values):
        return Payload({"prototypes": {label: torch.full((3,), value) for label, value in values.items()}})

    for own, of_x in ((False, {"a": 5.5}), (True, {"a": 4.0, "b": 5.0})):
        server = FD(own=own).server(setup)
        server.aggregate(1, iter([(x.id, reply(a=1.0, b=5.0)), (y.id, reply(a=3.0)), (z.id, reply(a=8.0))]))
        for client, expected in ((x, of_x), (fourth, {"a": 4.0, "b": 5.0})):
            sent = server.deliver(client).group("prototypes")
            assert {label: t.tolist() for label, t in sent.items()} == {c: [v] * 3 for c, v in expected.items()}
        server.aggregate(2, iter([(x.id, reply(a=2.0))]))  # a is now of x alone
        assert server.deliver(y).group("prototypes")["a"].tolist() == [2.0] * 3
        assert ("a" in server.deliver(x).group("prototypes")) == own


@pytest.mark.parametrize("distance", ["mse", "ce"])
def test_what_leaves_a_client_key_by_key(distance):
    """The mean output of each class, here checked against the trained model's own."""
    setup = tiny.small_setup()
    half, context = FD(distance=distance).client(setup), tiny.small_context("colour-00")
    reply = half.train(Payload(), context)
    assert reply.groups.keys() == {"prototypes"} and reply.group("prototypes").keys() == {"a", "b", "c"}
    model, data = setup.build(context.state.params, context), context.data.train
    rows = [i for i, target in enumerate(data.targets) if target == "b"]
    with torch.no_grad():
        z = model.eval()(data.batch(rows, context.device))[0]
    expected = (z.softmax(1) if distance == "ce" else z).mean(0)
    torch.testing.assert_close(reply.group("prototypes")["b"], expected)
    assert FD().server(setup).params["a"].shape == (3,)


@pytest.mark.parametrize(("options", "message"), [({"gamma": -1.0}, "gamma is"), ({"distance": "x"}, "distance is")])
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FD(**options)
