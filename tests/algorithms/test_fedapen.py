"""FedAPEN: the learned weight by hand, the ensemble, the slice that nobody trains on, and what travels."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedapen import FedAPEN, learned_share
from consilium.errors import ConfigError


def test_one_step_on_the_weight_by_hand():
    """Logits (l, 0) of the own model with l = 2, zeros of the small one; label 0. dCE/d lambda = -(1 - p) l with
    p = 1 / (1 + e^(-lambda l)). At lambda 1/2: p = 1 / (1 + 1/e) = .731059, slope -.537883; eta 0.1: .553788."""
    own, small, y = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    share = learned_share(own, small, y, 0.5, FedAPEN(steps=1, eta=0.1))
    assert math.isclose(share, 0.553788, rel_tol=1e-5)


def test_the_weight_ends_at_the_better_model():
    own, small, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([0])
    assert learned_share(own, small, y, 0.5, FedAPEN(steps=200)) == 1.0
    assert learned_share(own, small, 1 - y, 0.5, FedAPEN(steps=200)) == 0.0


def setting():
    setup = tiny.small_setup()
    return setup, FedAPEN(slice=0.25).server(setup), FedAPEN(slice=0.25).client(setup), tiny.small_context("animal-00")


def test_the_ensemble_predicts():
    _, server, half, context = setting()
    model = half._model(server.deliver(context.info), context)
    batch = context.data.test.batch(range(4), context.device)
    own, small = model.head(model.backbone(batch["x"])), model.backbone.small(batch["x"])
    torch.testing.assert_close(model.train()(batch)[0], own)
    model.backbone.share.fill_(0.25)
    torch.testing.assert_close(model.eval()(batch)[0], 0.25 * own + 0.75 * small)


def test_what_leaves_a_client_and_that_the_slice_is_not_trained_on():
    """A quarter of 8 examples is kept: 6 in batches of 4 are two steps."""
    _, server, half, context = setting()
    sent = server.deliver(context.info)
    reply = half.train(sent, context)
    assert sent.group("params").keys() == reply.group("params").keys()
    assert reply.groups.keys() == {"params"} and all(key.startswith("small.") for key in reply.group("params"))
    assert {key.split(".")[0] for key in context.state.params} == {"private", "head", "share"}
    assert reply.scalars["steps"] == 2 and 0 <= reply.scalars["report/ensemble weight"] <= 1
    assert context.state.params["share"].item() == pytest.approx(reply.scalars["report/ensemble weight"])


@pytest.mark.parametrize("options", [{"slice": 0.0}, {"slice": 0.6}, {"steps": 0}, {"eta": 0.0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=" is "):
        FedAPEN(**options)
