"""CoMiGS, FedLEASE and pFedMoAP: numbers by hand, and key by key what leaves a client."""

import numpy as np
import pytest
import tiny
import torch

from consilium.algorithms.comigs import CoMiGS
from consilium.algorithms.fedlease import FedLEASE, clusters, distances
from consilium.algorithms.pfedmoap import pFedMoAP
from consilium.core import ClientState, Payload
from consilium.moe.mixtures import AdapterMixture, Mixing, layers

HEADS = {f"head.animal.{label}.{leaf}" for label in ("cat", "dog", "fish") for leaf in ("weight", "bias")}


def made(**fit):
    return tiny.setup(tiny.source("olmoe"), clients_per_round=6, **fit)


def keys(setup, *names):
    return {f"{path}.pairs.{name}.{leaf}" for path in layers(setup.model) for name in names for leaf in "ab"}


def routes(setup):
    return {f"{path}.route" for path in layers(setup.model)}


# --- CoMiGS -----------------------------------------------------------------------------------------------------------


def test_comigs_sends_the_generalist_and_keeps_specialists_and_router():
    setup = made()
    method = CoMiGS(r=2, specialists=2)
    server, client = method.server(setup), method.client(setup)
    sent, context = server.configure(1, setup.clients)["animal-00"], tiny.context()
    assert sent.group("params").keys() == keys(setup, "general") | HEADS
    reply = client.train(sent, context)
    assert reply.group("params").keys() == sent.group("params").keys() and set(reply.groups) == {"params"}
    assert context.state.params.keys() == keys(setup, "s0", "s1") | routes(setup)


def test_comigs_trains_adapters_on_the_first_rows_and_the_router_on_the_last(monkeypatch):
    """8 rows, a quarter held out: rows 0..5 with V fixed, then 6 and 7 with all else fixed."""
    setup, seen = made(), []
    method = CoMiGS(r=2, held_out=0.25)
    server, client = method.server(setup), method.client(setup)
    from consilium.algorithms import mixed

    fit = mixed.fit

    def spy(model, data, *args, **kwargs):
        learns = {path for path, p in model.named_parameters() if p.requires_grad}
        seen.append((list(data.texts), any(p.endswith("route") for p in learns), any(".pairs." in p for p in learns)))
        return fit(model, data, *args, **kwargs)

    monkeypatch.setattr(mixed, "fit", spy)
    context = tiny.context()
    client.train(server.configure(1, setup.clients)["animal-00"], context)
    texts = list(setup.encode(context, context.data.train).texts)
    assert seen == [(texts[:6], False, True), (texts[6:], True, False)]


# --- FedLEASE ---------------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    """One layer at right angles (1), one the same (0): 1/2. Opposite in both: 2."""
    one, other = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    d = distances([[one, one], [other, 3 * one], [-one, -one]])
    np.testing.assert_allclose(d, [[0, 0.5, 2], [0.5, 0, 1.5], [2, 1.5, 0]], atol=1e-12)


def test_clusters_are_as_many_as_the_silhouette_prefers():
    """Three pairs, near in themselves and far from each other."""
    place = np.array([0.0, 5.0, 0.1, 5.1, 12.0, 12.1])
    d = abs(place[:, None] - place[None])
    assert clusters(d, 4) == [0, 1, 0, 1, 2, 2]
    assert clusters(d, 2) in ([0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1])
    assert clusters(d[:2, :2], 4) == [0, 0] and clusters(d[:1, :1], 4) == [0]


def test_fedlease_from_the_warm_up_to_the_experts():
    """Two clients with equal adapters and one with another: two clusters, experts by n_k, slots and own again."""
    setup = made()
    method = FedLEASE(r=1, warmup=1)
    server, client = method.server(setup), method.client(setup)
    infos = [c for c in setup.clients if c.id in ("animal-00", "animal-01", "colour-00")]
    sent = server.configure(1, infos)
    assert server.stage == "warm-up" and sent["animal-00"].group("params").keys() == keys(setup, "own") | HEADS
    replies = []
    for client_id, direction, n in (("animal-00", 1.0, 1), ("animal-01", 2.0, 3), ("colour-00", -1.0, 5)):
        params = {k: torch.full_like(t, direction) for k, t in sent[client_id].group("params").items()}
        replies.append((client_id, Payload({"params": params}, {"num_examples": n})))
    server.aggregate(1, iter(replies))
    assert server.cluster == {"animal-00": 0, "animal-01": 0, "colour-00": 1} and server.stage == "experts"
    path = next(iter(layers(setup.model)))
    assert (server.params[f"{path}.pairs.e0.b"] == 1.75).all()  # (1 * 1 + 3 * 2) / 4
    assert (server.params[f"{path}.pairs.e1.b"] == -1).all()
    sent = server.configure(2, infos)["animal-00"]
    assert sent.group("params").keys() == keys(setup, "e0", "e1") | HEADS
    context = tiny.context()
    reply = client.train(sent, context)
    assert reply.group("params").keys() == keys(setup, "e0") | HEADS
    assert context.state.params.keys() == routes(setup)
    assert all(t.shape[0] == 3 for t in context.state.params.values())  # 2 M - 1
    late = next(c for c in setup.clients if c.id == "number-00")
    assert server.deliver(late).scalars["M"] == 0  # a warm-up of its own
    params = {k: torch.full_like(t, -0.5) for k, t in server.deliver(late).group("params").items()}
    server.aggregate(2, iter([("number-00", Payload({"params": params}, {"num_examples": 1}))]))
    assert server.cluster["number-00"] == 1


def test_slots_that_stand_for_one_adapter_add_their_weights():
    """M = 2: slots e0, e1, e0 with z = 0, 1, 2; the top two are 1 and 2: e1 has 1 / (1 + e), e0 e / (1 + e)."""
    layer = AdapterMixture(
        torch.nn.Linear(1, 1, bias=False), ("e0", "e1"), (), ("e0", "e1", "e0"), Mixing(1, 1.0, 2, "rows")
    )
    layer.base.weight.data.zero_()
    layer.route.data = torch.tensor([[0.0], [1.0], [2.0]])
    for name, value in (("e0", 10.0), ("e1", 100.0)):
        layer.pairs[name].a.data, layer.pairs[name].b.data = torch.ones(1, 1), torch.tensor([[value]])
    g = torch.tensor([1.0, 2.0]).softmax(0)
    assert layer.eval()(torch.ones(1, 1)).item() == pytest.approx(float(100 * g[0] + 10 * g[1]), rel=1e-5)


# --- pFedMoAP ---------------------------------------------------------------------------------------------------------


def test_the_nearest_are_sent_frozen_and_do_not_return():
    setup = made()
    method = pFedMoAP(K=2, r=2)
    server, client = method.server(setup), method.client(setup)
    sent = server.configure(1, setup.clients)
    assert all(not p.group("near") for p in sent.values())  # nobody has taken part
    replies = []
    for client_id, value in (("animal-00", 1.0), ("animal-01", -1.0), ("colour-00", 0.5)):
        params = {k: torch.full_like(t, value) for k, t in sent[client_id].group("params").items()}
        replies.append((client_id, Payload({"params": params}, {"num_examples": 1})))
    server.aggregate(1, iter(replies))
    sent, context = server.configure(2, setup.clients), tiny.context()
    mine = sent["animal-00"]
    assert mine.group("near").keys() == keys(setup, "near0")
    assert all((t == 0.5).all() for t in mine.group("near").values())  # colour-00, by the angle
    assert not sent["number-00"].group("near")
    reply = client.train(mine, context)
    assert reply.group("params").keys() == keys(setup, "own") | HEADS and set(reply.groups) == {"params"}
    assert context.state.params.keys() == routes(setup)


def test_k_of_one_is_fedavg_on_adapters():
    setup = made()
    method = pFedMoAP(K=1, r=2)
    server, client = method.server(setup), method.client(setup)
    context = tiny.context()
    reply = client.train(server.configure(1, setup.clients)["animal-00"], context)
    server.aggregate(1, iter([("animal-00", reply)]))
    assert not server.last and not server.deliver(setup.clients[0]).group("near") and not context.state.params


def test_lam_weighs_the_adapter_that_is_always_on():
    layer = AdapterMixture(torch.nn.Linear(1, 1, bias=False), ("own",), ("own",), ("own",), Mixing(1, 1.0, 1, "rows"))
    layer.base.weight.data.zero_()
    layer.route.data = torch.zeros(1, 1)
    layer.pairs["own"].a.data, layer.pairs["own"].b.data = torch.ones(1, 1), torch.full((1, 1), 4.0)
    layer.always_weight = 0.5
    assert layer.eval()(torch.ones(1, 1)).item() == 6.0  # half of it, and all of it through the gate


@pytest.mark.parametrize(
    "method", [CoMiGS(r=2), pFedMoAP(r=2), FedLEASE(r=2, warmup=1)], ids=lambda m: type(m).__name__
)
def test_the_best_model_of_a_client_is_scored_as_it_was(method, monkeypatch, tmp_path):
    """Two rounds, in which mixtures grow; the first round's validation is the best."""
    setup = made(personal="best")
    server, client = method.server(setup), method.client(setup)
    engine = tiny.engine(server, client, setup, tmp_path)
    left = iter([0.9] * 6)
    from consilium.algorithms import mixed

    assess = mixed.assess

    def first_is_best(*args, **kwargs):
        return {"score": next(left, assess(*args, **kwargs)["score"] * 0.5)}

    monkeypatch.setattr(mixed, "assess", first_is_best)
    engine.round(1, test=False)
    record = engine.round(2, test=True)
    assert set(record["personal"]) == set(tiny.IDS)
    assert isinstance(engine.store.load("animal-00"), ClientState)
