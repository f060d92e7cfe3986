"""FedProx: the gradient of mu/2 * ||w - w_t||^2, and FedAvg when mu is 0."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedprox import FedProx, proximal
from consilium.errors import ConfigError
from consilium.moe.addressing import parameters
from consilium.training import fit


def test_the_gradient_by_hand():
    """mu = 0.1, w_t = 1, w = 3, gradient 5: 5 + 0.1 * (3 - 1) = 5.2; without a gradient: 0.2."""
    setup = tiny.setup()
    model = setup.build(setup.initial_params(), tiny.context())
    trainable = parameters(model)
    with torch.no_grad():
        for p in trainable.values():
            p.fill_(1.0)
        correct = proximal(model, 0.1)
        for i, p in enumerate(trainable.values()):
            p.fill_(3.0)
            p.grad = torch.full_like(p, 5.0) if i % 2 else None
    correct(trainable, trainable)
    for i, p in enumerate(trainable.values()):
        torch.testing.assert_close(p.grad, torch.full_like(p, 5.2 if i % 2 else 0.2))


def test_it_is_the_gradient_of_the_penalty():
    """Against autograd on mu/2 * ||w - w_t||^2."""
    setup = tiny.setup()
    model = setup.build(setup.initial_params(), tiny.context())
    correct = proximal(model, 0.7)
    received = {path: p.detach().clone() for path, p in parameters(model).items()}
    with torch.no_grad():
        for p in parameters(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    (0.7 / 2 * sum(((p - received[path]) ** 2).sum() for path, p in parameters(model).items())).backward()
    expected = {path: p.grad.clone() for path, p in parameters(model).items()}
    model.zero_grad(set_to_none=True)
    correct(parameters(model), parameters(model))
    for path, p in parameters(model).items():
        torch.testing.assert_close(p.grad, expected[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_mu_0_is_fedavg_bit_for_bit(model_type, tmp_path):
    """Switch is the hard case: an expert that a batch does not reach has no gradient, and Adam must not touch it."""
    params = []
    for algorithm in (FedAvg(), FedProx(mu=0.0)):
        setup = tiny.setup(tiny.source(model_type), batch_size=2)
        server = algorithm.server(setup)
        engine = tiny.engine(server, algorithm.client(setup), setup, tmp_path / type(algorithm).__name__)
        for number in (1, 2):
            engine.round(number, test=False)
        params.append(server.params)
    assert tiny.same(*params)


def test_the_pull_keeps_clients_near_what_they_received():
    """The larger mu, the shorter the way from w_t."""
    ways = []
    for mu in (0.0, 1.0, 100.0):
        setup = tiny.setup(epochs=3, optimizer="sgd", lr=0.005, head_lr=0.005, clip=0.0)
        context = tiny.context()
        model = setup.build(setup.initial_params(), context)
        before = {path: p.detach().clone() for path, p in parameters(model).items()}
        fit(model, setup.encode(context, context.data.train), setup.fit, context, proximal(model, mu))
        ways.append(
            math.sqrt(sum(float((p.detach() - before[path]).norm()) ** 2 for path, p in parameters(model).items()))
        )
    assert ways[0] > ways[1] > ways[2]


@pytest.mark.parametrize("mu", [-0.1, math.nan, math.inf])
def test_refused(mu):
    with pytest.raises(ConfigError, match=r"mu is .*; it must be (at least 0|within)"):
        FedProx(mu)


def test_the_received_weights_count_in_the_memory():
    """A client that can just train the model as FedAvg's cannot hold w^t beside it."""
    setup = tiny.setup(memory=tiny.bytes_for(8))
    client = setup.clients[0]
    assert FedAvg().server(setup).unable(client) is None
    assert FedProx().server(setup).unable(client) is not None
    enough = tiny.setup(memory=tiny.bytes_for(8, references=1))
    assert FedProx().server(enough).unable(enough.clients[0]) is None


def test_the_step_after_the_optimiser_by_hand():
    """w <- (w + lr mu w0) / (1 + lr mu) after each step of SGD: with one step, the move shrinks by 1 + lr mu."""
    setup = tiny.small_setup("cohort", batch_size=64, lr=0.5, head_lr=0.5)
    sent = FedProx().server(setup).deliver(tiny.small_context(world="cohort").info)
    moves = {}
    for mu in (0.0, 2.0):
        reply = FedProx(mu=mu, pull="step").client(setup).train(sent, tiny.small_context(world="cohort"))
        moves[mu] = {key: t - sent.group("params")[key] for key, t in reply.group("params").items()}
    for key, move in moves[0.0].items():
        torch.testing.assert_close(moves[2.0][key], move / (1 + 0.5 * 2.0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("pull", "felt"), [("gradient", False), ("step", True)])
def test_only_the_step_is_felt_under_adamw(pull, felt):
    """mu is 100: AdamW normalises a pull away that is far below the gradient, a step of its own it cannot."""
    setup = tiny.setup(lr=1e-3, epochs=4, batch_size=2)
    sent = FedProx().server(setup).deliver(tiny.context().info)
    distance = {}
    for mu in (0.0, 100.0 if felt else 0.01):
        reply = FedProx(mu=mu, pull=pull).client(setup).train(sent, tiny.context()).group("params")
        moved = torch.cat([(t - sent.group("params")[key]).flatten() for key, t in reply.items()])
        distance[mu > 0] = float(moved.norm())
    assert (distance[True] < 0.9 * distance[False]) is felt
