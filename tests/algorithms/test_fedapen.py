"""FedAPEN: the learned weight by hand, the ensemble, the slice that nobody trains on, and what travels."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedapen import FedAPEN, FedAPENClient, learned_share
from consilium.core import Payload
from consilium.errors import ConfigError


def test_one_step_on_the_weight_by_hand():
    """Logits (l, 0) of the own model with l = 2, zeros of the small one; label 0. dCE/d lambda = -(1 - p) l with
    p = 1 / (1 + e^(-lambda l)). At lambda 1/2: p = 1 / (1 + 1/e) = .731059, slope -.537883; eta 0.1: .553788."""
    own, small, y = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    share = learned_share(own, small, y, 0.5, FedAPEN(steps=1, eta=0.1))
    assert math.isclose(share, 0.553788, rel_tol=1e-5)


def test_the_weight_ends_at_the_better_model():
    own, small, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([0])
    assert learned_share(own, small, y, 0.5, FedAPEN(steps=200, eta=0.1)) == 1.0
    assert learned_share(own, small, 1 - y, 0.5, FedAPEN(steps=200, eta=0.1)) == 0.0


def setting():
    setup = tiny.small_setup()
    return setup, FedAPEN(slice=0.25).server(setup), FedAPEN(slice=0.25).client(setup), tiny.small_context("animal-00")


def test_the_loss_by_hand():
    """Both say thirds: CE ln 3 each, no divergence, and the ensemble's ln 3; its gradient reaches both heads, by their
    shares 1/4 and 3/4: of the own bias (1 + 1/4) (p - y), of the small one (1 + 3/4) (p - y)."""
    _, server, half, context = setting()
    model = half._model(server.deliver(context.info), context)
    heads = model.head, model.backbone.small.head
    with torch.no_grad():
        for head in heads:
            head.weight.zero_()
            head.bias.zero_()
    model.backbone.share.fill_(0.25)
    loss = half.objective(model, context.data.train.batch([0], context.device))
    loss.backward()
    torch.testing.assert_close(loss.item(), 3 * math.log(3))
    apart = torch.full((3,), 1 / 3)
    apart[context.data.train.y[context.data.train.index[0]]] -= 1
    torch.testing.assert_close(heads[0].bias.grad, 1.25 * apart)
    torch.testing.assert_close(heads[1].bias.grad, 1.75 * apart)
    alone = FedAPENClient(half.setup, FedAPEN(ensemble=False)).objective(
        model, context.data.train.batch([0], context.device)
    )
    torch.testing.assert_close(alone.item(), 2 * math.log(3))


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
    assert reply.scalars["steps"] == 2 and reply.scalars["report/ensemble weight"] == 0.5


def test_the_weight_is_learned_on_the_received_model_and_the_slice():
    """In the second round, from 1/2 on; prediction starts from what the round learned, and leaves it as it was."""
    _, server, half, context = setting()
    half.train(server.deliver(context.info), context)
    sent = Payload({"params": {key: t + 0.5 for key, t in server.params.items()}})
    model, (kept, rest) = half._model(sent, context), half._slices(context)
    assert len(kept) == 2 and sorted([*kept.index, *rest.data.train.index]) == sorted(context.data.train.index)
    batch = kept.batch(range(2), context.device)
    with torch.no_grad():
        z = model.eval().head(model.backbone(batch["x"])), model.backbone.small(batch["x"])
    share = learned_share(*z, batch["labels"], 0.5, half.algorithm)
    told = half.train(sent, context).scalars["report/ensemble weight"]
    assert told == pytest.approx(share) and told != 0.5
    assert context.state.params["share"].item() == told
    half.evaluate(sent, context)
    assert context.state.params["share"].item() == told


@pytest.mark.parametrize("options", [{"slice": 0.0}, {"slice": 0.6}, {"steps": 0}, {"eta": 0.0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=" is "):
        FedAPEN(**options)


def test_the_rate_of_the_weight_is_that_of_training():
    setup = tiny.small_setup(lr=0.3)
    assert FedAPENClient(setup, FedAPEN()).algorithm.eta == 0.3
    assert FedAPENClient(setup, FedAPEN(eta=0.1)).algorithm.eta == 0.1
