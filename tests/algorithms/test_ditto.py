"""Ditto: the common model is FedAvg's; the personal one minimises its loss plus lambda / 2 of the squared distance."""

import dataclasses

import pytest
import tiny
import torch

from consilium.algorithms.ditto import Ditto
from consilium.algorithms.fedavg import FedAvg
from consilium.core import ClientState, Payload
from consilium.moe.addressing import select


@pytest.mark.parametrize("world", ["moe", "cohort"])
def test_the_common_model_is_fedavgs(world):
    setup, make = (tiny.setup(), tiny.context) if world == "moe" else (tiny.small_setup("cohort"), small)
    method, plain = Ditto(), FedAvg()
    info = make().info
    sent = method.server(setup).deliver(info)
    one, other = make(), make()
    a, b = method.client(setup).train(sent, one), plain.client(setup).train(sent, other)
    assert tiny.same(a.group("params"), b.group("params"))
    assert not tiny.same(one.state.params, a.group("params")) and one.state.params.keys() == a.group("params").keys()


def small():
    return tiny.small_context(world="cohort")


def test_one_step_by_hand():
    """Plain SGD from v with w elsewhere: v <- v - lr (g(v) + lam (v - w))."""
    setup = tiny.small_setup("cohort", batch_size=64, lr=0.1, head_lr=0.1)
    context = small()
    w = select(setup.initial_params(context.info), "corner")
    v = {key: t + 0.01 for key, t in w.items()}
    moved = {}
    for lam in (0.0, 2.0):
        mine = small()
        mine.state = ClientState(dict(v))
        Ditto(lam=lam).client(setup).train(Payload({"params": w}), mine)
        moved[lam] = mine.state.params
    for key in w:
        torch.testing.assert_close(moved[2.0][key], moved[0.0][key] - 0.1 * 2.0 * 0.01, atol=1e-6, rtol=0)


def test_the_personal_model_is_scored():
    setup = tiny.small_setup("cohort")
    context, client = small(), Ditto().client(setup)
    sent = Ditto().server(setup).deliver(context.info)
    client.train(sent, context)
    wrong = {key: torch.full_like(t, 5.0) for key, t in sent.group("params").items()}
    delivered = client.evaluate(Payload({"params": wrong}), context)
    assert delivered.scalars["score"] == client.evaluate(sent, context).scalars["score"]
    fresh = dataclasses.replace(context, state=ClientState())
    assert client.evaluate(sent, fresh).scalars["score"] is not None
