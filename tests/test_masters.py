"""Optimisers of float32 masters: the numbers of torch's own optimisers, to the bit, and weights that move."""

from functools import partial

import pytest
import tiny
import torch
from torch import nn

from consilium import masters, training
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.pfedmoe import BatchNorm
from consilium.algorithms.standalone import Standalone
from consilium.core import Payload
from consilium.fit import Fit
from consilium.masters import MasterOptimizer, Masters
from consilium.moe.addressing import select
from consilium.moe.lora import Lora
from consilium.training import local_round


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


# --- mixtures of experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 2**24])  # a weight in many pieces, all weights as one
@pytest.mark.parametrize("how", ["adamw", "sgd"])
def test_masters_move_as_torch_moves_float32(monkeypatch, how, chunk):
    monkeypatch.setattr(masters, "CHUNK", chunk)
    make = partial(
        Fit(optimizer=how, momentum=0.9 * (how == "sgd"), weight_decay=0.1).descent, rates={"b": 1e-3, "": 1e-5}
    )
    draw = torch.Generator().manual_seed(0)
    low = {name: torch.randn(5, 4, generator=draw).bfloat16().requires_grad_() for name in ("a", "b", "c")}
    whole = {name: p.detach().float().requires_grad_() for name, p in low.items()}
    optimizer, expected = MasterOptimizer(low, make), make(whole)
    for _ in range(3):
        optimizer.zero_grad()
        for name in ("a", "b"):
            low[name].grad = torch.randn(5, 4, generator=draw).bfloat16()
            whole[name].grad = low[name].grad.float()
        optimizer.step()
        expected.step()
    for name, p in low.items():
        assert torch.equal(optimizer.masters[name], whole[name])
        assert p.dtype == torch.bfloat16 and torch.equal(p, whole[name].bfloat16())


def test_a_forgotten_parameter_begins_anew():
    low = {name: torch.ones(3).bfloat16().requires_grad_() for name in ("a", "b")}
    optimizer = MasterOptimizer(low, partial(Fit().descent, rates={"": 1e-3}))
    for p in low.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.forget(low["a"])
    assert len(optimizer.optimizer.state) == 1


def test_masters_start_where_they_are_told_to():
    low, exact = {"a": torch.ones(2).bfloat16().requires_grad_()}, {"a": torch.tensor([1.001, 1.002])}
    optimizer = MasterOptimizer(low, partial(Fit().descent, rates={"": 1e-3}), start := dict(exact))
    assert torch.equal(optimizer.masters["a"], exact["a"]) and not start
    assert optimizer.masters["a"].data_ptr() != exact["a"].data_ptr()


CHOICES = {"all": None, "some": lambda tap: {block: [0, 1, 2, 3] for block in tap.gates()}}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe", "deepseek_v3"])
def test_bfloat16_moves_as_many_weights_as_float32(model_type, rank, choice):
    """At the rate of the recipes of language models, and to the same loss; what a client sends has moved as well."""
    if choice == "some" and rank:
        pytest.skip("adapters are trained by the same leaves")
    moved, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        setup = tiny.setup(tiny.source(model_type, dtype=dtype), lr=1e-5, head_lr=1e-5, epochs=2, lora=Lora(rank=rank))
        sent = Payload({"params": select(setup.initial_params(), "animal")})
        _, reply = local_round(setup, sent, tiny.context(), choose=CHOICES[choice])
        before, after = sent.group("params"), reply.group("params")
        assert {t.dtype for t in after.values()} == {torch.float32} and after.keys() == before.keys()
        changed = sum(int((after[key] != t).sum()) for key, t in before.items())
        moved[dtype] = changed / sum(t.numel() for t in before.values())
        losses[dtype] = reply.scalars["train_loss"]
    assert moved["float32"] > 0.1 and abs(moved["float32"] - moved["bfloat16"]) < 0.05
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_a_federation_in_bfloat16_loses_nothing_from_round_to_round(tmp_path):
    """Ten rounds at 1e-5 end where float32 does: the same distance moved, in the same direction."""
    changes = {}
    for dtype in ("float32", "bfloat16"):
        setup = tiny.setup(tiny.source("olmoe", dtype=dtype), lr=1e-5, head_lr=1e-5)
        server, client = FedAvg().server(setup), FedAvg().client(setup)
        before = server.params
        engine = tiny.engine(server, client, setup, tmp_path / dtype)
        for number in range(1, 11):
            engine.round(number, False)
        changes[dtype] = torch.cat([(server.params[key] - t).flatten() for key, t in before.items()])
    exact, low = changes["float32"], changes["bfloat16"]
    assert float(low.norm() / exact.norm()) == pytest.approx(1, abs=0.1)
    assert float(nn.functional.cosine_similarity(exact, low, dim=0)) > 0.8


def test_a_client_alone_goes_on_from_its_masters():
    setup = tiny.setup(tiny.source("olmoe", dtype="bfloat16"), lr=1e-6, head_lr=1e-6)
    client, context = Standalone().client(setup), tiny.context()
    begun = select(setup.initial_params(), "animal")
    client.train(Payload(), context)
    once = context.state.params
    client.train(Payload(), context)
    twice = context.state.params
    expert = next(key for key in once if ".experts." in key)
    steps = [(a[expert] - b[expert]).abs().max() for a, b in ((once, begun), (twice, once))]
    assert all(0 < step < 1e-4 for step in steps)  # bfloat16 would jump or stand still
