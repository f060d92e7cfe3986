"""FedSSA: the fading coefficient, the mixed rows and the mean by hand; rows of own classes travel."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedssa import FedSSA
from consilium.core import Payload
from consilium.errors import ConfigError


def test_the_coefficient_by_hand():
    """mu0 cos(pi t / (2 T)): 0.5, 0.5 cos(pi / 8), .., 0 from t = T on."""
    method = FedSSA(mu0=0.5, T_stable=4)
    assert method.mu(0) == 0.5 and math.isclose(method.mu(2), 0.5 * math.sqrt(0.5))
    assert method.mu(4) == method.mu(100) == 0.0


def test_rows_are_mixed_by_hand():
    """Own row 1, received 3, mu 0.25: 0.25 + 0.75 * 3 = 2.5."""
    setup, context = tiny.small_setup(), tiny.small_context("colour-00")
    own = setup.own_params(context)
    context.state.params = {k: torch.ones_like(t) if k.startswith("head.") else t for k, t in own.items()}
    received = {k: torch.full_like(t, 3.0) for k, t in own.items() if k.startswith("head.")}
    model = FedSSA(mu0=0.25).client(setup)._model(Payload({"params": received}, {"t": 0}), context)
    assert (model.head.weight == 2.5).all() and (model.head.bias == 2.5).all()


def test_the_mean_is_plain_and_over_whoever_has_the_class():
    """a: (2 + 6) / 2 = 4 whatever the clients' sizes; b is one client's; c keeps its value."""
    server = FedSSA().server(tiny.small_setup())
    key, before = "head.corner.{}.bias".format, server.params["head.corner.c.bias"]
    one = {key("a"): torch.tensor(2.0), key("b"): torch.tensor(5.0)}
    two = {key("a"): torch.tensor(6.0)}
    replies = [
        ("x", Payload({"params": one}, {"num_examples": 1})),
        ("y", Payload({"params": two}, {"num_examples": 9})),
    ]
    server.aggregate(1, iter(replies))
    assert [server.params[key(c)].item() for c in "abc"] == [4.0, 5.0, before.item()]


def test_what_leaves_a_client_key_by_key():
    setup = tiny.small_setup()
    server, half, context = FedSSA().server(setup), FedSSA().client(setup), tiny.small_context("animal-01")
    sent = server.configure(1, setup.clients)
    assert {payload.scalars["t"] for payload in sent.values()} == {0}
    reply = half.train(next(iter(sent.values())), context)
    rows = {f"head.corner.{label}.{leaf}" for label in "abc" for leaf in ("weight", "bias")}
    assert reply.groups.keys() == {"params"} and reply.group("params").keys() == rows


@pytest.mark.parametrize("options", [{"mu0": 1.1}, {"T_stable": 0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=r" is .*; it must be (within|at least) "):
        FedSSA(**options)
