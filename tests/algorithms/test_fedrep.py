"""FedPer and FedRep: what is personal stays, what is shared returns; FedRep trains one after the other."""

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedrep import FedPer, FedRep
from consilium.moe.addressing import router_row_of

PARTS = {
    "head": lambda key: key.startswith("head."),
    "router": lambda key: router_row_of(key) is not None,
    "both": lambda key: key.startswith("head.") or router_row_of(key) is not None,
}


@pytest.mark.parametrize("private", PARTS)
@pytest.mark.parametrize("method", [FedPer, FedRep])
def test_what_travels_and_what_stays(method, private):
    setup, context, made = tiny.setup(), tiny.context(), method(private=private)
    server = made.server(setup)
    sent = server.deliver(context.info)
    reply = made.client(setup).train(sent, context)
    stays = {key for key in sent.group("params") if PARTS[private](key)}
    assert stays and context.state.params.keys() == stays
    assert reply.group("params").keys() == sent.group("params").keys() - stays
    assert server.expects(context.info, sent)["params"].keys() == reply.group("params").keys()
    before = dict(server.params)
    server.aggregate(1, [(context.info.id, reply)])
    assert all(torch.equal(server.params[key], before[key]) for key in stays)


def test_fedper_trains_as_fedavg_does():
    setup, context = tiny.setup(), tiny.context()
    sent = FedAvg().server(setup).deliver(context.info)
    expected = FedAvg().client(setup).train(sent, tiny.context()).group("params")
    reply = FedPer().client(setup).train(sent, context)
    assert tiny.same({**reply.group("params"), **context.state.params}, expected)


def test_fedrep_trains_the_head_first_and_then_the_rest():
    setup = tiny.setup(optimizer="sgd", clip=0.0, lr=0.1, head_lr=0.1)
    sent = FedRep().server(setup).deliver(tiny.context().info)
    heads, bodies = {}, {}
    for epochs in (1, 3):
        context = tiny.context()
        reply = FedRep(head_epochs=epochs).client(setup).train(sent, context)
        heads[epochs], bodies[epochs] = context.state.params, reply.group("params")
    assert not tiny.same(heads[1], heads[3])  # more epochs of the head
    assert not tiny.same(bodies[1], bodies[3])  # which the representation was then trained with
    key = next(key for key in heads[1] if key.endswith("weight"))
    assert not torch.equal(heads[1][key], sent.group("params")[key])


def test_the_personal_part_is_scored():
    setup, context = tiny.small_setup("cohort"), tiny.small_context(world="cohort")
    client, sent = FedPer().client(setup), FedPer().server(setup).deliver(context.info)
    client.train(sent, context)
    model = client._mine(sent, context).group("params")
    assert all(torch.equal(model[key], t) for key, t in context.state.params.items())
