"""A client's best model by its own validation data: when it is kept, where, and what is scored with it."""

from typing import ClassVar

import pytest
import tiny
import torch

from consilium.core import ClientState, Payload
from consilium.engine import rounds
from consilium.moe.addressing import select
from consilium.privacy import Privacy
from consilium.training import local_round, local_test


class Half:
    """A client half that trains and scores what it is sent; `seen`: what it found in its state."""

    reveals: ClassVar[dict] = {}

    def __init__(self, setup):
        self.setup = setup
        self.seen = []

    def train(self, payload, context):
        self.seen.append(dict(context.state.params))
        return local_round(self.setup, payload, context)[1]

    def evaluate(self, payload, context):
        return local_test(self.setup, payload, context)


def sent(setup, noise: float = 0.0) -> Payload:
    """The client's model as it begins, its head moved at random."""
    params = select(setup.initial_params(), "animal")
    generator = torch.Generator().manual_seed(1)
    for key in params:
        if key.startswith("head."):
            params[key] = params[key] + noise * torch.randn(params[key].shape, generator=generator)
    return Payload({"params": params})


def scored(monkeypatch, values):
    """Let validation and test scores be these, one after the other."""
    left = iter(values)
    monkeypatch.setattr("consilium.training.assess", lambda *args, **kwargs: {"score": next(left)})


def test_the_best_round_is_kept_in_the_state_and_out_of_the_methods_sight(monkeypatch):
    """Validation 0.1 before and 0.4, 0.6, 0.5 after each of three rounds; what the second trained stays."""
    setup, state = tiny.setup(personal="best"), ClientState()
    replies = []
    for value in (0.4, 0.6, 0.5):
        context = tiny.context(state=state, round=len(replies) + 1)
        scored(monkeypatch, [0.1, value])
        half = Half(setup)
        replies.append(rounds.trained(half, sent(setup, noise=len(replies)), context, Privacy())[0])
        state = context.state
        assert half.seen == [{}]
    best = {key.removeprefix("engine/best/"): t for key, t in state.params.items()}
    second = replies[1].group("params")
    assert best.keys() == second.keys() and all(torch.equal(best[key], second[key]) for key in best)
    assert state.scalars["engine/best/score"] == 0.6


def test_a_model_that_training_makes_worse_is_kept_as_it_was_sent(monkeypatch):
    """Validation 0.6 before and 0.5 after training: the weights that were sent stay."""
    setup, context = tiny.setup(personal="best"), tiny.context()
    scored(monkeypatch, [0.6, 0.5])
    payload = sent(setup, noise=1.0)
    reply = rounds.trained(Half(setup), payload, context, Privacy())[0]
    best = {key.removeprefix("engine/best/"): t for key, t in context.state.params.items()}
    assert all(torch.equal(best[key], payload.group("params")[key]) for key in best) and best
    assert not all(torch.equal(best[key], reply.group("params")[key]) for key in best)
    assert reply.scalars["validation"] == 0.5


@pytest.mark.parametrize(
    ("values", "score", "personal"),
    [
        ([0.3, 0.5, 0.9], 0.3, 0.9),  # test of what is delivered, its validation below the best: the best's test
        ([0.3, 0.7], 0.3, 0.3),  # what is delivered is better than the best so far
    ],
)
def test_the_better_of_the_best_and_the_delivered_is_scored(monkeypatch, values, score, personal):
    setup = tiny.setup(personal="best")
    context = tiny.context()
    scored(monkeypatch, [0.1, 0.6])
    half = Half(setup)
    rounds.trained(half, sent(setup), context, Privacy())
    scored(monkeypatch, values)
    reply = rounds.tested(half, sent(setup), tiny.context(state=context.state), Privacy())[1]
    assert reply.scalars["score"] == score and reply.scalars["personal"] == personal
    assert reply.scalars["personal_validation"] == max(0.6, values[1])


def test_bits_per_byte_decide_where_there_are_any(monkeypatch):
    setup, state = tiny.setup(personal="best"), ClientState()
    found = [(0.1, 3.0), (0.5, 2.0), (0.9, 2.5), (0.9, 2.4)]
    told = iter([{"score": score, "bits_per_byte": bits} for score, bits in found])
    monkeypatch.setattr("consilium.training.assess", lambda *args, **kwargs: next(told))
    for number in (1, 2):
        context = tiny.context(state=state, round=number)
        rounds.trained(Half(setup), sent(setup), context, Privacy())
        state = context.state
    assert state.scalars["engine/best/bits_per_byte"] == 2.0


def test_without_it_nothing_is_kept():
    setup, context = tiny.setup(), tiny.context()
    rounds.trained(Half(setup), sent(setup), context, Privacy())
    assert context.state.empty
    assert "personal" not in rounds.tested(Half(setup), sent(setup), context, Privacy())[1].scalars
