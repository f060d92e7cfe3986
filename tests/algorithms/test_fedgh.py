"""FedGH: one step of the server's header by hand; prototypes go up, head rows come down."""

import pytest
import tiny
import torch

from consilium.algorithms.fedgh import FedGH
from consilium.core import Payload
from consilium.errors import ConfigError


def server(**options):
    made = FedGH(**options).server(tiny.small_setup())
    for key, t in made.params.items():
        made.averaging.params[key] = torch.zeros_like(t)
    return made


def replies():
    return iter([("animal-00", Payload({"prototypes": {"a": torch.tensor([1.0, 2.0, 0, 0, 0, 0])}}))])


def test_one_step_by_hand():
    """Zero header: p = 1/3 each. The gradient of row c is (p_c - [c = a]) r: -2/3 r for a, 1/3 r for b and c; eta 0.3:
    row a is 0.2 r = (0.2, 0.4, 0, ..), the others -0.1 r; biases 0.2 and -0.1."""
    made = server(eta_s=0.3)
    made.aggregate(1, replies())
    torch.testing.assert_close(made.params["head.corner.a.weight"], torch.tensor([0.2, 0.4, 0, 0, 0, 0]))
    torch.testing.assert_close(made.params["head.corner.c.weight"], torch.tensor([-0.1, -0.2, 0, 0, 0, 0]))
    torch.testing.assert_close(made.params["head.corner.a.bias"], torch.tensor(0.2))
    torch.testing.assert_close(made.params["head.corner.b.bias"], torch.tensor(-0.1))


def test_the_released_codes_frozen_header_is_an_option():
    made = server(eta_s=0.0)
    made.aggregate(1, replies())
    assert all((t == 0).all() for t in made.params.values())


def test_what_travels_key_by_key():
    setup = tiny.small_setup()
    made, half, context = FedGH().server(setup), FedGH().client(setup), tiny.small_context("animal-01")
    sent = made.deliver(context.info)
    rows = {f"head.corner.{label}.{leaf}" for label in "abc" for leaf in ("weight", "bias")}
    assert sent.groups.keys() == {"params"} and sent.group("params").keys() == rows
    reply = half.train(sent, context)
    assert reply.groups.keys() == {"prototypes"} and reply.group("prototypes").keys() == {"a", "b", "c"}


@pytest.mark.parametrize(("options", "message"), [({"eta_s": -1.0}, "eta_s is"), ({"epochs": 0}, "epochs is 0")])
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FedGH(**options)


def test_the_rate_of_the_header_is_that_of_heads():
    setup = tiny.small_setup(head_lr=0.3)
    assert FedGH().server(setup).eta_s == 0.3 and FedGH(eta_s=0.1).server(setup).eta_s == 0.1
