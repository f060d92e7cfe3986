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


def test_what_leaves_a_client_key_by_key():
    """The mean logits of each class, here checked against the trained model's own."""
    setup = tiny.small_setup()
    half, context = FD().client(setup), tiny.small_context("colour-00")
    reply = half.train(Payload(), context)
    assert reply.groups.keys() == {"prototypes"} and reply.group("prototypes").keys() == {"a", "b", "c"}
    model, data = setup.build(context.state.params, context), context.data.train
    rows = [i for i, target in enumerate(data.targets) if target == "b"]
    with torch.no_grad():
        expected = model.eval()(data.batch(rows, context.device))[0].mean(0)
    torch.testing.assert_close(reply.group("prototypes")["b"], expected)
    assert FD().server(setup).params["a"].shape == (3,)


@pytest.mark.parametrize(("options", "message"), [({"gamma": -1.0}, "gamma is"), ({"distance": "x"}, "distance is")])
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FD(**options)
