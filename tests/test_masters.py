"""SGD in bfloat16 from float32 masters: the numbers of autocast and torch's own optimiser, to the bit."""

import pytest
import tiny
import torch
from torch import nn

from consilium import masters, training
from consilium.algorithms.pfedmoe import BatchNorm
from consilium.masters import Masters
from consilium.setup import Fit


def net():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20), BatchNorm(20), nn.ReLU(), nn.Linear(20, 4)
    )  # fmt: skip
    made[0].to(memory_format=torch.channels_last)
    return made


def learn(model, optimizer, steps=4):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(5, 3, 8, 8, generator=draw), torch.randint(4, (5,), generator=draw)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        nn.functional.cross_entropy(out.float(), y).backward()
        optimizer.step()


def groups(model):
    """Two learning rates."""
    return [{"params": list(model[:4].parameters()), "lr": 0.5}, {"params": list(model[4:].parameters()), "lr": 0.25}]


@pytest.mark.parametrize("piece", [100, 2**17])  # a weight in many pieces, all of a group's as one
def test_the_numbers_are_torchs_own_to_the_bit(monkeypatch, piece):
    monkeypatch.setattr(masters, "PIECE", piece)
    expected, model = net(), net()
    learn(expected, torch.optim.SGD(groups(expected)))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with Masters(model, groups(model)) as optimizer:
        low = {name: p.dtype for name, p in model.named_parameters()}
        learn(model, optimizer)
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert {name for name, dtype in low.items() if dtype == torch.float32} == {"4.weight", "4.bias"}  # the norm's
    assert tiny.same(model.state_dict(), expected.state_dict())
    assert not tiny.same(model.state_dict(), net().state_dict())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.stride() == q.stride()


def test_what_no_gradient_reaches_does_not_move():
    model = net()
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Masters(model, groups(model)) as optimizer:
        optimizer.step()
        model[6](torch.ones(1, 20, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, begun[name])}
    assert moved == {"6.weight", "6.bias"}
    assert torch.equal(begun["6.bias"] - 0.25, model[6].bias)  # its gradient is 1


def test_only_those_that_learn_are_lowered():
    model = net()
    with Masters(model, [{"params": [model[6].weight], "lr": 1.0}]):
        assert [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16] == ["6.weight"]


def test_a_weight_with_gaps_in_memory_learns_as_it_is():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.ones(2, 6)[:, ::2]
    with Masters(layer, [{"params": [layer.weight, layer.bias], "lr": 1.0}]) as optimizer:
        assert layer.weight.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
        layer.weight.grad = torch.full((2, 3), 0.5)
        optimizer.step()
    assert (layer.weight == 0.5).all()


def test_a_weight_that_is_a_part_of_something_longer_learns_in_its_place():
    layer, longer = nn.Linear(3, 2, bias=False), torch.arange(10.0)
    layer.weight.data = longer[2:8].view(2, 3)
    with Masters(layer, [{"params": [layer.weight], "lr": 1.0}]) as optimizer:
        layer.weight.grad = torch.full((2, 3), 0.5, dtype=torch.bfloat16)
        optimizer.step()
    assert longer.tolist() == [0, 1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 8, 9]
    assert layer.weight.data_ptr() == longer[2:].data_ptr()


def test_after_an_error_the_weights_are_there():
    model = net()
    with pytest.raises(ValueError, match="stop"), Masters(model, groups(model)) as optimizer:
        learn(model, optimizer, steps=1)
        raise ValueError("stop")
    expected = net()
    learn(expected, torch.optim.SGD(groups(expected)), steps=1)
    assert tiny.same(model.state_dict(), expected.state_dict())


class _Seen(Masters):
    def __init__(self, *args):
        type(self).times += 1
        super().__init__(*args)


@pytest.mark.parametrize(
    ("fit", "times"),
    [({}, 1), ({"precision": "float32"}, 0), ({"momentum": 0.9}, 0), ({"weight_decay": 0.1}, 0), ({"clip": 1.0}, 0),
     ({"optimizer": "adamw"}, 0)],
    ids=str,
)  # fmt: skip
def test_when_training_uses_them(monkeypatch, fit, times):
    """And then it changes nothing."""
    _Seen.times = 0
    monkeypatch.setattr(training, "Masters", _Seen)
    used = weights(**fit)
    assert _Seen.times == times
    monkeypatch.setattr(Fit, "plain", False)
    assert tiny.same(used, weights(**fit))
    assert _Seen.times == times


def weights(**fit):
    given = {"optimizer": "sgd", "clip": 0.0, "precision": "bfloat16", "batch_size": 16, **fit}
    setup = tiny.small_setup("cohort", **given)
    context = tiny.small_context("animal-00", "cohort")
    model = setup.build(setup.initial_params(context.info), context)
    training.fit(model, context.data.train, setup.fit, context)
    return {name: p.detach() for name, p in model.named_parameters()}
