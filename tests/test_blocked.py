"""Filters in oneDNN's own layout: what torch computes otherwise, gradients too, wherever it is used."""

import pytest
import torch
from torch import nn

from consilium import blocked
from consilium.blocked import through

HERE = pytest.mark.skipif(not blocked._works(torch.float32), reason="this processor or torch does not compute so")


def filters(**how) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 8, 3, **how), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(),
    ]  # fmt: skip


def gradients(out, layers, x):
    parameters = [p for layer in layers for p in layer.parameters()]
    return torch.autograd.grad(out.float().square().sum(), [x, *parameters])


def apart(found, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def far(found, expected):
    """Of the whole, by its norm."""
    found, expected = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@HERE
@pytest.mark.parametrize("how", [{}, {"padding": 2}, {"stride": 2, "dilation": 2, "padding": (1, 2)}])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_numbers_and_gradients_are_torchs_own(how, form, rows):
    layers = filters(**how)
    x = torch.randn(rows, 3, 17, 19).to(memory_format=form).requires_grad_()
    expected = nn.Sequential(*layers)(x)
    for layer in layers:
        layer.to(memory_format=form)
    found = through(layers, x)
    assert _blocked_below(found)
    assert not found.is_mkldnn and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert apart(gradients(found, layers, x), gradients(expected, layers, x)) < 1e-5


def _blocked_below(out) -> bool:
    """Whether a convolution that made this was computed in the layout."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [below for below, _ in node.next_functions]
    return any("MkldnnConvolution" in node.name() for node in seen)


@HERE
def test_in_bfloat16_as_torch_does_under_autocast():
    if not blocked._works(torch.bfloat16):
        pytest.skip("no bfloat16 by oneDNN here")
    layers, x = filters(), torch.randn(16, 3, 17, 19).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = nn.Sequential(*layers)(x), through(layers, x)
    assert _blocked_below(found) and found.dtype == expected.dtype == torch.bfloat16
    exact = nn.Sequential(*layers)(x)
    goal = gradients(exact, layers, x)
    ours, theirs = (far(gradients(out, layers, x), goal) for out in (found, expected))
    assert far([found], [exact]) < 1.5 * far([expected], [exact]) < 0.01
    assert ours < 1.5 * theirs < 0.1


@HERE
def test_filters_learn_the_same_by_either_way():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 3, 17, 19, generator=draw), torch.randint(0, 5, (64,), generator=draw)
    learned = []
    for forward in (through, lambda layers, x: nn.Sequential(*layers)(x)):
        layers = filters()
        forward(layers, x[:2])  # the lazy layer finds its size
        optimizer = torch.optim.SGD(nn.ModuleList(layers).parameters(), lr=0.05)
        for rows in torch.arange(64).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(layers, x[rows]), y[rows]).backward()
            optimizer.step()
        learned.append([p.detach() for layer in layers for p in layer.parameters()])
    assert apart(*learned) < 1e-5


@HERE
@pytest.mark.parametrize(
    "make",
    [
        lambda: (filters(), torch.randn(4, 3, 17, 19, dtype=torch.float64)),
        lambda: (filters(padding="same"), torch.randn(4, 3, 17, 19)),
        lambda: (filters(padding=1, padding_mode="reflect"), torch.randn(4, 3, 17, 19)),
        lambda: (filters(), torch.randn(3, 17, 19)),
        lambda: (filters(), torch.randn(0, 3, 17, 19)),
    ],
    ids=["float64", "same", "reflect", "one image", "none"],
)
def test_what_onednn_does_not_have_is_torchs_to_compute(make):
    layers, x = make()
    first = [layers[0].to(x.dtype)]
    found = through(first, x.requires_grad_())
    assert not _blocked_below(found) and torch.equal(found, first[0](x))


@HERE
def test_one_call_for_many_models_and_an_export_are_left_to_torch():
    layers, x = filters()[:3], torch.randn(2, 4, 3, 17, 19)
    found = torch.func.vmap(lambda x: through(layers, x))(x)
    assert torch.allclose(found[1], nn.Sequential(*layers)(x[1]), atol=1e-6)

    class Net(nn.Sequential):
        def forward(self, x):
            return through(self, x)

    rows = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(Net(*layers).eval(), (x[0],), dynamic_shapes=rows)
    assert "mkldnn" not in str(program.graph)
    assert torch.allclose(program.module()(x[1, :3]), found[1, :3], atol=1e-6)


def test_a_processor_that_cannot_computes_as_torch_does(monkeypatch):
    monkeypatch.setattr(blocked, "_works", lambda dtype: False)
    layers, x = filters(), torch.randn(4, 3, 17, 19)
    found = through(layers, x)
    assert not _blocked_below(found) and torch.equal(found, nn.Sequential(*layers)(x))


def test_asking_draws_nothing_and_changes_nothing():
    blocked._works.cache_clear()
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = blocked._works(torch.float32)
    assert found == blocked._works(torch.float32) and torch.equal(torch.get_rng_state(), before)
    assert not blocked._works(torch.float16)
