"""The five CNNs' sizes as the paper's authors have them, initial weights, and what is refused."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn

from consilium.errors import ConfigError
from consilium.models.cohort import ARCHITECTURES, Cohort, SplitModel, initial
from consilium.moe.addressing import flatten, load_flat

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "extractor", "whole"),
    [("cnn-1", 2_616_548, 2_621_558), ("cnn-2", 1_810_132, 1_815_142), ("cnn-3", 1_315_548, 1_320_558),
     ("cnn-4", 1_055_348, 1_060_358), ("cnn-5", 665_048, 670_058)],
)  # fmt: skip
def test_sizes(name, extractor, whole):
    with torch.device("meta"):
        model = SplitModel(Cohort().extractor(name, CIFAR), "t", tuple("0123456789"))
    assert sum(p.numel() for p in model.backbone.parameters()) == extractor
    assert sum(p.numel() for p in model.parameters()) == whole


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_extractor_ends_in_the_same_width(name):
    cohort = Cohort((name,), width=7, kernel=3, padding=1)
    made = cohort.extractor(name, (1, 8, 8))
    assert made(torch.zeros(2, 1, 8, 8)).shape == (2, 7) and made.width == 7
    assert not torch.equal(made(torch.zeros(1, 1, 8, 8)), made(torch.ones(1, 1, 8, 8)))


def test_clients_take_turns():
    cohort = Cohort()
    assert [cohort.architecture(k) for k in range(7)] == [f"cnn-{i}" for i in (1, 2, 3, 4, 5, 1, 2)]
    assert cohort.world == "mixed" and Cohort(("cnn-1",)).world == "cohort" == Cohort(("cnn-1", "cnn-1")).world


def test_equal_seeds_give_equal_weights():
    setup = tiny.small_setup("mixed")
    first, second, third = (c for c in setup.clients[:3])
    torch.manual_seed(1)
    begun = setup.initial_params(first)
    assert tiny.same(begun, tiny.small_setup("mixed").initial_params(third))  # the same architecture, another Setup
    assert begun.keys() != setup.initial_params(second).keys()
    other = tiny.small_setup("mixed", seed=1).initial_params(first)
    assert all(not torch.equal(begun[key], other[key]) for key in begun)
    generator = torch.random.get_rng_state()
    setup.initial_params(first)
    assert torch.equal(generator, torch.random.get_rng_state())


def test_methods_that_average_need_one_architecture():
    with pytest.raises(ConfigError, match=r"mnist-5, mlp-3, and there is no model that all could share; give --model"):
        tiny.small_setup("mixed").initial_params()
    one = tiny.small_setup("cohort")
    assert tiny.same(one.initial_params(), one.initial_params(one.clients[3]))


def test_a_model_goes_out_and_comes_home():
    setup, context = tiny.small_setup(), tiny.small_context()
    params = setup.initial_params(context.info)
    model = setup.build(params, context)
    assert tiny.same(flatten(model), params)
    assert model.head.weight[1].tolist() == params["head.corner.b.weight"].tolist()


def test_what_norms_keep_in_buffers_travels_too():
    """And is copied, not shared: a model in training writes into its own."""

    def make():
        made = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
        made.width = 16
        return made

    model = SplitModel(make(), "corner", ("a", "b"))
    flat = flatten(model)
    assert {"1.running_mean", "1.running_var"} < flat.keys() and "1.num_batches_tracked" not in flat
    load_flat(model, flat)
    model.train()(tiny.images().clients["animal-00"].train.batch(range(4), torch.device("cpu")))
    assert (flat["1.running_mean"] == 0).all() and not (flatten(model)["1.running_mean"] == 0).all()
    assert initial(make, 0).keys() == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_module_of_ones_own(monkeypatch):
    class Own(nn.Module):
        width = 2

        def __init__(self, shape, cohort):
            super().__init__()
            self.linear = nn.Linear(math.prod(shape), 2)

        def forward(self, x):
            return self.linear(x.flatten(1))

    monkeypatch.setitem(ARCHITECTURES, "own", Own)
    setup = tiny.small_setup()
    made = Cohort(("own",)).extractor("own", setup.shape)
    assert made(torch.zeros(3, *setup.shape)).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"architectures": ()}, "is empty"), ({"architectures": ("cnn-9",)}, "'cnn-9' is unknown; allowed are cnn-1"),
     ({"small": "x"}, "'x' is unknown"), ({"width": 0}, "width is 0"), ({"padding": -1}, "padding is -1")],
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Cohort(**options)


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 8, 8), "too small for two convolutions of kernel 5"), ((13,), "use mlp-1")]
)
def test_images_that_a_cnn_cannot_read(shape, message):
    with pytest.raises(ConfigError, match=message):
        Cohort().extractor("cnn-1", shape)


def test_filters_lie_channels_last_and_compute_the_same():
    """Of one channel too, from which the pooling after it takes its layout; the loss and its gradients are the same."""
    setup, context = tiny.small_setup("cohort"), tiny.small_context(world="cohort")
    model = setup.split_model(lambda: setup.model.extractor("mnist-5", setup.shape), setup.own_params(context), context)
    filters = [p for p in model.parameters() if p.dim() == 4]
    assert len(filters) == 2 and all(p.stride(1) == 1 for p in filters)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    batch = context.data.train.batch(range(4), context.device)
    for one in (model, plain):
        logits, labels = one(batch)
        torch.nn.functional.cross_entropy(logits, labels).backward()
    for key, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, p.grad, rtol=1e-5, atol=1e-7)
