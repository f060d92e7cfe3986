"""FedAvgM, FedAdam and FedYogi: two rounds worked out by hand, and state that a checkpoint carries."""

import pytest
import tiny
import torch

from consilium.algorithms.fedopt import FedAdam, FedAvgM, FedYogi
from consilium.core import Payload
from consilium.errors import ConfigError

BY_HAND = [
    # d = 0.5 in both rounds, eta 1, beta1 0.5, beta2 0.5, tau 0.1 (v_0 = 0.01).
    # m 0.5, 0.75; x 0.5, 1.25
    (FedAvgM(eta=1.0, beta1=0.5), [0.5, 1.25]),
    # m 0.25, 0.375; v 0.13, 0.19; 0.25 / (0.360555 + 0.1) = 0.542823; + 0.375 / (0.435890 + 0.1) = 1.242594
    (FedAdam(eta=1.0, beta1=0.5, beta2=0.5, tau=0.1), [0.542823, 1.242594]),
    # d^2 = 0.25 > v: v 0.01 + 0.125 = 0.135, 0.26; 0.25 / (0.367423 + 0.1) = 0.534847; + 0.375 / 0.609902 = 1.149700
    (FedYogi(eta=1.0, beta1=0.5, beta2=0.5, tau=0.1), [0.534847, 1.149700]),
]


def reply(server, change, examples, keys):
    params = {key: server.params[key] + change for key in keys}
    return Payload({"params": params}, {"num_examples": examples})


@pytest.mark.parametrize(("method", "expected"), BY_HAND)
def test_two_rounds_by_hand(method, expected):
    """Two clients, 1 and 3 examples, changes of -0.25 and 0.75: the mean change is 0.5."""
    setup = tiny.small_setup("cohort")
    server, before = method.server(setup), method.server(setup).params
    keys = sorted(server.params)
    returned, absent = keys[1:], keys[0]
    for round, moved in enumerate(expected, 1):
        state = server.state()
        server = method.server(setup)
        server.restore(state)  # nothing but the state is remembered
        server.aggregate(round, [("a", reply(server, -0.25, 1, returned)), ("b", reply(server, 0.75, 3, returned))])
        for key in returned:
            torch.testing.assert_close(server.params[key], before[key] + moved, atol=2e-5, rtol=0)
        assert torch.equal(server.params[absent], before[absent])


def test_a_round_without_replies_changes_nothing():
    server = FedAdam().server(tiny.small_setup("cohort"))
    state = server.state()
    server.aggregate(1, [])
    assert tiny.payloads_equal(server.state(), state)


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"beta1": 1.0}, {"beta2": 1.0}, {"tau": 0.0}])
def test_settings_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FedAdam(**options)
