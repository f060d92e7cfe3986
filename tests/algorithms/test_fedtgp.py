"""FedTGP: margin and contrastive loss by hand; the trained prototypes move apart."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedtgp import FedTGP, contrast, margin
from consilium.core import Payload
from consilium.errors import ConfigError

SENT = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 4.0]])
Y = torch.tensor([0, 0, 1])


def test_the_margin_by_hand():
    """Means (1, 0) and (1, 4): 4 apart; tau cuts; one class is no distance apart."""
    assert margin(SENT, Y, 100.0) == 4.0 and margin(SENT, Y, 1.5) == 1.5
    assert margin(SENT[:2], Y[:2], 100.0) == 0.0


def test_the_margin_of_three_classes_by_hand():
    """At 0, 1 and 5: the largest distance is 5; the nearest others are 1, 1 and 4 away."""
    sent, y = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 1, 2])
    assert margin(sent, y, 100.0) == 5.0 and margin(sent, y, 100.0, "nearest") == 4.0
    assert margin(sent[:1], y[:1], 100.0, "nearest") == 0.0


def test_the_loss_by_hand():
    """A prototype at distance 1 of its own and 3 of the other, margin 1: -log e^-2 / (e^-2 + e^-3) = log(1 + 1 / e)."""
    prototypes = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    loss = contrast(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), prototypes, 1.0)
    torch.testing.assert_close(loss.item(), math.log(1 + math.exp(-1)))


def test_one_step_by_hand():
    """phi the identity, prototypes 0 and 2 e_1, of class a (6 e_1) was sent: d = 6 and 4, one class gives no margin.
    p_b = e^-4 / (e^-6 + e^-4) = 1 / (1 + e^-2) = .880797; dL/dP^a = -p_b e_1, dL/dP^b = p_b e_1. With eta 1/2 their
    vectors v go to .440399 and 1.559601; phi moves as well."""
    server = FedTGP(eta_s=0.5, server_epochs=1).server(tiny.small_setup())
    eye, zero = torch.eye(6), torch.zeros(6)
    vectors = torch.stack([zero, 2 * eye[0], zero])
    layers = {f"phi.{i}.weight": eye.clone() for i in (0, 2)} | {f"phi.{i}.bias": zero.clone() for i in (0, 2)}
    layers["phi.0.bias"] = torch.ones(6)  # so that no unit of the ReLU is at its corner
    layers["phi.2.bias"] = -torch.ones(6)
    server.params = {"vectors.weight": vectors, **layers}
    server.known = {"a", "b"}
    server.aggregate(1, iter([("x", Payload({"prototypes": {"a": 6 * eye[0]}}))]))
    torch.testing.assert_close(server.params["vectors.weight"][:2, 0], torch.tensor([0.440399, 1.559601]))
    assert torch.equal(server.params["vectors.weight"][2], zero) and server.params["phi.0.weight"][0, 0] != 1


def test_what_travels_key_by_key():
    """Class means up, one trained vector per known class down; neither weights nor counts of them reach a client."""
    setup = tiny.small_setup()
    server, half, context = FedTGP().server(setup), FedTGP().client(setup), tiny.small_context("animal-01")
    reply = half.train(server.deliver(context.info), context)
    assert reply.groups.keys() == {"prototypes"} and reply.group("prototypes").keys() == {"a", "b", "c"}
    server.aggregate(1, iter([("animal-01", reply)]))
    sent = server.deliver(context.info)
    assert sent.groups.keys() == {"prototypes"} and sent.group("prototypes").keys() == {"a", "b", "c"}
    assert {t.shape for t in (*reply.group("prototypes").values(), *sent.group("prototypes").values())} == {(6,)}
    assert not sent.scalars


def test_the_server_draws_its_prototypes_to_their_classes():
    server = FedTGP(eta_s=0.1, server_epochs=200).server(tiny.small_setup())
    point = {"a": torch.zeros(6), "b": torch.full((6,), 2.0)}
    assert server.deliver(server.setup.clients[0]).group("prototypes") == {}
    told = server.aggregate(1, iter([("x", Payload({"prototypes": point}))]))
    assert math.isclose(told["margin"], math.sqrt(24), rel_tol=1e-6)
    trained = server.deliver(server.setup.clients[0]).group("prototypes")
    assert trained.keys() == {"a", "b"}
    for mine, other in (("a", "b"), ("b", "a")):
        assert (trained[mine] - point[mine]).norm() < (trained[mine] - point[other]).norm()


@pytest.mark.parametrize(
    "options", [{"lam": -1.0}, {"tau": math.inf}, {"gap": "x"}, {"server_epochs": 0}, {"eta_s": 0.0}]
)
def test_refused(options):
    with pytest.raises(ConfigError, match=" is "):
        FedTGP(**options)


def test_the_servers_rate_is_that_of_training():
    """Without `eta_s` the server moves as far as with fit.lr given."""
    replies = [("a", Payload({"prototypes": {"a": torch.ones(6), "b": torch.zeros(6)}}))]
    found = []
    for method in (FedTGP(server_epochs=1), FedTGP(server_epochs=1, eta_s=0.3), FedTGP(server_epochs=1, eta_s=0.01)):
        server = method.server(tiny.small_setup(lr=0.3))
        server.aggregate(1, replies)
        found.append(server.params)
    assert tiny.same(found[0], found[1]) and not tiny.same(found[0], found[2])
