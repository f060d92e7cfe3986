"""FedKD: the compression and the adaptive loss by hand; what travels is the small model, compressed."""

import dataclasses
import math

import pytest
import tiny
import torch

from consilium.algorithms.fedkd import FedKD, Mentored, adaptive, compressed, restored
from consilium.algorithms.fml import pair_model, small_params
from consilium.core import Payload
from consilium.errors import ConfigError, PayloadError


def test_the_rank_by_hand():
    """diag(3, 1) in 4 x 5: energies 9 and 1. 0.9 of them is kept by one value (10 numbers instead of 20), 0.95 by two,
    whose factors would be as large as the matrix: it goes whole. A vector always does."""
    w = torch.zeros(4, 5)
    w[0, 0], w[1, 1] = 3.0, 1.0
    groups, shapes = compressed({"w": w, "b": torch.ones(3)}, 0.9)
    assert groups["params"].keys() == {"b"} and groups["factors"].keys() == {"w/u", "w/s", "w/v"}
    assert groups["factors"]["w/s"].tolist() == [3.0] and shapes == {"shape w": [4, 5]}
    back = restored(Payload(groups, shapes))
    w[1, 1] = 0.0
    torch.testing.assert_close(back["w"], w)
    w[1, 1] = 1.0
    assert compressed({"w": w}, 0.95)[0] == {"params": {"w": w}, "factors": {}}


def test_a_convolution_goes_as_a_matrix():
    w = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        1, 27, generator=torch.Generator().manual_seed(1)
    )
    groups, shapes = compressed({"conv": w.reshape(8, 3, 3, 3)}, 0.99)
    assert groups["factors"]["conv/s"].shape == (1,)
    torch.testing.assert_close(restored(Payload(groups, shapes))["conv"], w.reshape(8, 3, 3, 3))


def test_the_energy_grows():
    method = FedKD(T_s=0.5, T_e=0.9, rounds=4)
    assert [round(method.energy(r, 100), 6) for r in (1, 2, 5, 99)] == [0.5, 0.6, 0.9, 0.9]


def test_the_energy_follows_the_rounds_of_the_run():
    method = FedKD(T_s=0.5, T_e=0.9)
    assert [round(method.energy(r, 60), 6) for r in (1, 31, 61)] == [0.5, 0.7, 0.9]
    setup = dataclasses.replace(tiny.small_setup(), rounds=60)
    server = method.server(setup)
    server.configure(31, setup.clients)
    assert server.deliver(setup.clients[0]).scalars["energy"] == pytest.approx(0.7)


def test_changes_are_added_by_hand():
    """n_k = 1 and 3, changes 4 and 8 of a bias: it moves by (1 * 4 + 3 * 8) / 4 = 7. A matrix nobody sent stays."""
    server = FedKD().server(tiny.small_setup())
    before = dict(server.params)
    replies = [(c, Payload({"params": {BIAS: torch.full((3,), g)}}, {"num_examples": n})) for c, g, n in CHANGES]
    server.aggregate(1, iter(replies))
    torch.testing.assert_close(server.params[BIAS], before[BIAS] + 7)
    assert all(torch.equal(server.params[key], t) for key, t in before.items() if key != BIAS)


def test_weights_are_averaged_by_hand():
    server = FedKD(exchange="weights").server(tiny.small_setup())
    replies = [(c, Payload({"params": {BIAS: torch.full((3,), g)}}, {"num_examples": n})) for c, g, n in CHANGES]
    server.aggregate(1, iter(replies))
    assert (server.params[BIAS] == 7).all()


BIAS = "small.head.bias"
CHANGES = [("x", 4.0, 1), ("y", 8.0, 3)]


@pytest.mark.parametrize("exchange", ["changes", "weights"])
def test_all_of_the_energy_loses_nothing(exchange):
    """At T = 1 a client starts from the server's model, and the server arrives at the client's."""
    setup, method, context = tiny.small_setup(), FedKD(1.0, 1.0, exchange=exchange), tiny.small_context("animal-00")
    server, half = method.server(setup), method.client(setup)
    moved = {
        key: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(3))
        for key, t in server.params.items()
    }
    server.averaging.params = moved
    sent = server.deliver(context.info)
    model = half._model(half._small(sent), context)
    torch.testing.assert_close(model.backbone.small.head.weight, moved["small.head.weight"])
    server.aggregate(1, iter([("animal-00", half.train(sent, context))]))
    again = half._model(half._small(server.deliver(context.info)), context)
    for path, tensor in again.backbone.small.named_parameters():
        torch.testing.assert_close(tensor.detach(), server.params[f"small.{path}"])
    assert not torch.equal(server.params["small.head.weight"], moved["small.head.weight"])


def test_another_beginning_is_refused():
    setup, context = tiny.small_setup(), tiny.small_context()
    sent = FedKD().server(setup).deliver(context.info)
    other = FedKD().client(tiny.small_setup(seed=1))
    with pytest.raises(PayloadError, match="begins otherwise here"):
        other.train(sent, context)


def test_the_loss_by_hand():
    """Both say (1/2, ..) everywhere: CE = ln 3 each, no divergence; representations 1 apart in every place: MSE 1."""
    setup, context = tiny.small_setup(), tiny.small_context("animal-01")
    params = small_params(setup) | {"hidden.weight": torch.zeros(6, 6)}
    model = pair_model(setup, params, context, Mentored)
    with torch.no_grad():
        for linear in (model.head, model.backbone.small.head, model.backbone.private[3]):
            linear.weight.zero_()
            linear.bias.zero_()
        model.backbone.private[3].bias.fill_(1.0)  # after the ReLU: ones
    loss = adaptive(model, context.data.train.batch([0, 1, 2], context.device))
    torch.testing.assert_close(loss.item(), 2 * math.log(3) + 1 / (2 * math.log(3)))


def test_what_leaves_a_client_key_by_key():
    setup = tiny.small_setup()
    server, half, context = FedKD().server(setup), FedKD().client(setup), tiny.small_context("animal-00")
    sent = server.deliver(context.info)
    reply = half.train(sent, context)
    for payload in (sent, reply):
        keys = {*payload.group("params"), *(key.rpartition("/")[0] for key in payload.group("factors"))}
        assert keys == server.params.keys() and all(key.startswith("small.") for key in keys)
        assert payload.groups.keys() == {"params", "factors"}
    assert {key.split(".")[0] for key in context.state.params} == {"private", "hidden", "head"}


@pytest.mark.parametrize("options", [{"T_s": 0.0}, {"T_e": 1.1}, {"rounds": 0}, {"exchange": "x"}])
def test_refused(options):
    with pytest.raises(ConfigError, match="it must be"):
        FedKD(**options)
