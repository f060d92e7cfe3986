"""FedKD: the compression and the adaptive loss by hand; what travels is the small model, compressed."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedkd import FedKD, Mentored, adaptive, compressed, restored
from consilium.algorithms.fml import pair_model, small_params
from consilium.core import Payload
from consilium.errors import ConfigError


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
    assert [round(method.energy(r), 6) for r in (1, 2, 5, 99)] == [0.5, 0.6, 0.9, 0.9]


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


@pytest.mark.parametrize("options", [{"T_s": 0.0}, {"T_e": 1.1}, {"rounds": 0}])
def test_refused(options):
    with pytest.raises(ConfigError, match="it must be"):
        FedKD(**options)
