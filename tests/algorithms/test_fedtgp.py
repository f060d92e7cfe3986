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


def test_the_loss_by_hand():
    """A prototype at distance 1 of its own and 3 of the other, margin 1: -log e^-2 / (e^-2 + e^-3) = log(1 + 1 / e)."""
    prototypes = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    loss = contrast(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), prototypes, 1.0)
    torch.testing.assert_close(loss.item(), math.log(1 + math.exp(-1)))


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


@pytest.mark.parametrize("options", [{"lam": -1.0}, {"tau": math.inf}, {"server_epochs": 0}, {"eta_s": 0.0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=" is "):
        FedTGP(**options)
