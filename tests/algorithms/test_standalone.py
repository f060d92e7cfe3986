"""Standalone: no tensor travels, the model lives in the client's state."""

import tiny
import torch

from consilium.algorithms.standalone import Standalone
from consilium.core import Payload, experts_from_scalars
from consilium.training import local_round


def test_nothing_travels(tmp_path):
    setup = tiny.setup(clients_per_round=6)
    algorithm = Standalone()
    server, client = algorithm.server(setup), algorithm.client(setup)
    for payload in server.configure(1, setup.clients).values():
        assert payload.nbytes == 0 and not payload.groups
    reply = client.train(server.configure(1, setup.clients)["animal-00"], tiny.context())
    assert reply.nbytes == 0 and not reply.groups and reply.scalars["num_examples"] == 8
    record = tiny.engine(server, client, setup, tmp_path).round(1, test=True)
    assert record["bytes_down"] == record["bytes_up"] == 0
    assert server.params == {} and server.state().nbytes == 0


def test_a_client_goes_on_from_where_it_was():
    """Two rounds here are two local rounds on one model."""
    setup = tiny.setup()
    client, sent = Standalone().client(setup), Standalone().server(setup).sent
    context = tiny.context()
    client.train(sent, context)
    first = dict(context.state.params)
    later = tiny.context(round=2, state=context.state)
    client.train(sent, later)
    _, expected = local_round(setup, Payload({"params": first}), tiny.context(round=2))
    assert tiny.same(later.state.params, expected.group("params"))
    assert any(not torch.equal(first[key], t) for key, t in later.state.params.items())


def test_an_untrained_client_is_scored_on_the_pretrained_model():
    setup = tiny.setup()
    context = tiny.context()
    score = Standalone().client(setup).evaluate(Standalone().server(setup).sent, context)
    assert 0 <= score.scalars["score"] <= 1 and not context.state.params


def test_evaluation_does_not_touch_the_state():
    setup = tiny.setup()
    client, sent, context = Standalone().client(setup), Standalone().server(setup).sent, tiny.context()
    client.train(sent, context)
    before = {key: t.clone() for key, t in context.state.params.items()}
    client.evaluate(sent, context)
    assert tiny.same(context.state.params, before)


def test_the_common_sub_moe_is_cut_on_the_client():
    setup = tiny.setup(memory=tiny.bytes_for(2), clients_per_round=6)
    assert all(Standalone().server(setup).unable(c) for c in setup.clients)
    server = Standalone("fit").server(setup)
    sent = server.configure(1, setup.clients)["number-01"]
    held = experts_from_scalars(sent.scalars)
    assert {len(ids) for ids in held.values()} == {2}
    context = tiny.context("number-01")
    Standalone("fit").client(setup).train(sent, context)
    kept = {key.split(".experts.")[1].split(".")[0] for key in context.state.params if ".experts." in key}
    assert kept == {str(i) for ids in held.values() for i in ids}


def test_in_a_cohort_every_client_has_its_own_architecture():
    """The MLP of animal-01 and the CNN of animal-00; nobody says anything about experts."""
    setup = tiny.small_setup("mixed")
    sent, kept = Standalone().server(setup).sent, {}
    for name in ("animal-00", "animal-01"):
        context = tiny.small_context(name)
        reply = Standalone().client(setup).train(sent, context)
        assert not reply.groups and "experts" not in reply.scalars
        kept[name] = {key: tuple(t.shape) for key, t in context.state.params.items() if not key.startswith("head.")}
    assert kept["animal-00"]["0.weight"] == (20, 1, 3, 3) and kept["animal-01"]["1.weight"] == (32, 16)
