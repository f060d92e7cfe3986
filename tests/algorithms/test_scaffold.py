"""SCAFFOLD: control variates against option II of the paper, the server's update by hand."""

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import ClientState, Payload
from consilium.errors import ConfigError
from consilium.moe.addressing import select

RATE = {"lr": 0.05, "head_lr": 0.05, "clip": 0.0}


def payload_of(setup, control):
    params = select(setup.initial_params(), "animal")
    return Payload({"params": params, "control": {key: control(t) for key, t in params.items()}})


def noise(seed, scale=0.01):
    rng = torch.Generator().manual_seed(seed)
    return lambda t: torch.randn(t.shape, generator=rng) * scale


def test_the_control_variate_is_option_2():
    """c_i+ = c_i - c + (x - y_i) / (K eta_l): 8 examples in batches of 4 for 2 epochs are K = 4 steps of 0.05."""
    setup = tiny.setup(epochs=2, **RATE)
    client = SCAFFOLD(eta_l=0.05).client(setup)
    sent = payload_of(setup, noise(0))
    c_i = {key: noise(1)(t) for key, t in sent.group("params").items()}
    context = tiny.context(state=ClientState({key: t.clone() for key, t in c_i.items()}))
    reply = client.train(sent, context)
    assert reply.scalars["steps"] == 4
    x, c, y = sent.group("params"), sent.group("control"), reply.group("params")
    for key, fresh in context.state.params.items():
        expected = c_i[key] - c[key] + (x[key] - y[key]) / (4 * 0.05)
        torch.testing.assert_close(fresh, expected, rtol=1e-6, atol=3e-6)  # x - y in float32
        torch.testing.assert_close(reply.group("control")[key], fresh - c_i[key], rtol=0, atol=1e-6)
    assert context.state.params.keys() == reply.group("control").keys() == y.keys()


def test_the_first_round_is_plain_sgd():
    """c = c_i = 0: the client does what FedAvg's does with SGD of eta_l, and returns its mean gradient as c_i."""
    setup = tiny.setup(**RATE)
    sent = payload_of(setup, torch.zeros_like)
    reply = SCAFFOLD(eta_l=0.05).client(setup).train(sent, tiny.context())
    plain = (
        FedAvg()
        .client(tiny.setup(optimizer="sgd", **RATE))
        .train(Payload({"params": sent.group("params")}), tiny.context())
    )
    assert tiny.same(reply.group("params"), plain.group("params"))


def test_the_heads_rate_keeps_its_ratio():
    """fit.lr 1e-3 and fit.head_lr 1e-2 with eta_l = 0.1: heads step with 1.0."""
    fit = SCAFFOLD(eta_l=0.1).client(tiny.setup()).setup.fit
    assert (fit.optimizer, fit.lr, fit.head_lr) == ("sgd", 0.1, pytest.approx(1.0))


def test_the_server_by_hand():
    """Two of N = 6 clients answer; x = 1, y = 2 and 5, eta_g = 0.5: x + 0.5 * (1 + 4) / 2 = 2.25.

    c = 0.3 and deltas 0.6 and 1.2: c + (0.6 + 1.2) / 6 = 0.6. The examples (1 and 9) do not weigh. Nobody held u.
    """
    server = SCAFFOLD(eta_g=0.5).server(tiny.setup())
    server.restore(
        Payload({"params": {"w": torch.tensor(1.0), "u": torch.tensor(4.0)},
                 "control": {"w": torch.tensor(0.3), "u": torch.tensor(-1.0)}})
    )  # fmt: skip
    replies = [
        (
            client,
            Payload({"params": {"w": torch.tensor(y)}, "control": {"w": torch.tensor(delta)}}, {"num_examples": n}),
        )
        for client, y, delta, n in (("animal-00", 2.0, 0.6, 1), ("colour-00", 5.0, 1.2, 9))
    ]
    server.aggregate(1, iter(replies))
    assert server.params["w"].item() == pytest.approx(2.25)
    assert server.control["w"].item() == pytest.approx(0.6)
    assert (server.params["u"].item(), server.control["u"].item()) == (4.0, -1.0)


def test_nobody_answered():
    server = SCAFFOLD().server(tiny.setup())
    before = dict(server.params)
    server.aggregate(1, iter(()))
    assert tiny.same(server.params, before) and not any(t.any() for t in server.control.values())


def heard(server, *deltas):
    """Replies of animal-00, animal-01, ... that hold a head row each, the c_i of which moves by delta."""
    key = "head.animal.cat.bias"
    for i, delta in deltas:
        group = {key: torch.tensor(delta)}
        server.aggregate(1, iter([(f"animal-{i:02d}", Payload({"params": group, "control": group}))]))
    return server.control[key].item()


def test_N_of_the_trunk_counts_the_able_clients():
    """Six clients, two of them too small: four are able."""
    assert SCAFFOLD().server(tiny.setup(memory={"animal-00": 1, "colour-00": 1})).able == 4


def test_c_of_a_head_row_is_the_mean_of_the_c_i_of_those_who_have_it():
    """c_0 = 0.6 alone; then c_1 = 0.2: (0.6 + 0.2) / 2 = 0.4; then c_0 = 0.6 + 0.4 = 1.0: (1.0 + 0.2) / 2 = 0.6."""
    server = SCAFFOLD().server(tiny.setup())
    assert heard(server, (0, 0.6)) == pytest.approx(0.6)
    assert heard(server, (1, 0.2)) == pytest.approx(0.4)
    other = SCAFFOLD().server(tiny.setup())
    other.restore(server.state())
    assert heard(other, (0, 0.4)) == heard(server, (0, 0.4)) == pytest.approx(0.6)


def test_the_control_travels_like_the_parameters():
    setup = tiny.setup(clients_per_round=6)
    server = SCAFFOLD(experts=2).server(setup)
    for client, payload in server.configure(1, setup.clients).items():
        assert payload.group("control").keys() == payload.group("params").keys()
        assert payload.nbytes == 2 * server.deliver(next(c for c in setup.clients if c.id == client)).nbytes


def test_the_state_holds_the_control():
    setup = tiny.setup()
    server, other = SCAFFOLD().server(setup), SCAFFOLD().server(setup)
    server.control = {key: torch.ones_like(t) for key, t in server.control.items()}
    other.restore(server.state())
    assert tiny.same(other.control, server.control) and tiny.same(other.params, server.params)


@pytest.mark.parametrize(("name", "value"), [("eta_l", 0), ("eta_g", -1.0), ("eta_l", float("nan"))])
def test_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be (greater than 0|within)"):
        SCAFFOLD(**{name: value})


@pytest.mark.parametrize("fit", [{"optimizer": "sgd", "momentum": 0.9}, {"weight_decay": 0.1}])
def test_what_breaks_the_identity_is_refused(fit):
    """c_i is the mean gradient only if a step is the rate times the gradient."""
    with pytest.raises(ConfigError, match="with SCAFFOLD it must be 0"):
        SCAFFOLD().server(tiny.setup(**fit))
