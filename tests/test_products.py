"""Matrix products: the same numbers whoever computes them, nothing written where others are at work."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from consilium import products
from consilium.products import QuickLinear, faster, inner, quicken, rows

ONEDNN = pytest.mark.skipif(not faster(), reason="on this processor torch's own products are as fast")
"""oneDNN is asked for products that may be less exact, which only here are not."""


@pytest.fixture(params=["usual", pytest.param("oneDNN", marks=ONEDNN)])
def way(request, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "NARROW", 1)
    monkeypatch.setattr(products, "faster", lambda: request.param == "oneDNN")
    return request.param


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 1100, 1120])
@pytest.mark.parametrize("spare", [0, 5, 40])
@pytest.mark.parametrize("add", [None, "bias", "out"])
def test_rows_are_written_up_to_where_they_may_be(way, n, spare, add):
    draw = torch.Generator().manual_seed(n + spare)
    x, b, bias = (torch.randn(*shape, generator=draw) for shape in ((n + spare, 7), (7, 9), (9,)))
    out = torch.full((n + spare, 9), 3.0)
    given = {"add": {"bias": bias, "out": out}.get(add), "alpha": 0.5 if add else 1.0}
    expected = x[:n].double() @ b.double() * given["alpha"] + {"bias": bias, "out": 3.0}.get(add, 0.0)
    assert rows(x, b, out, n, **given) is out
    torch.testing.assert_close(out[:n], expected.float(), rtol=1e-5, atol=1e-5)
    end = n if way == "usual" or n < 8 else list(products._pieces(n, n + spare))[-1][1]
    assert n <= end <= n + 47 and (out[end:] == 3.0).all()


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1.0, 0.25]))
def test_a_sum_over_rows_is_exact_to_float32(n, x, y, alpha):
    draw = torch.Generator().manual_seed(n)
    left, right = torch.randn(n, x, generator=draw), torch.randn(n, y, generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LARGE", 0)
        patch.setattr(products, "NARROW", 1)
        found = inner(left, right, alpha)
    expected = alpha * left.double().t() @ right.double()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-5)


@given(st.integers(1, 3000), st.integers(0, 70))
def test_pieces_are_of_three_sizes_and_hold_every_row_once(n, spare):
    """oneDNN compiles no more than three kernels for a matrix; what is of no such size, the usual way takes."""
    pieces = list(products._pieces(n, n + spare))
    assert pieces[0][0] == 0 and n <= pieces[-1][1] <= n + spare
    assert all(end == start for (_, end), (start, _) in pairwise(pieces)) and pieces[-1][0] < n
    assert all(end - start in products.SIZES for start, end in pieces[:-1])
    start, end = pieces[-1]
    assert end - start in products.SIZES or (end == n and end - start < 16)


@ONEDNN
def test_what_goes_to_onednn_are_large_float32_products_on_the_cpu(monkeypatch):
    asked = []
    real = products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda *args, **how: asked.append(args) or real(*args, **how))
    wide, narrow = torch.ones(256, 256), torch.ones(256, 31)
    for b, dtype, expected in (
        (wide, torch.float32, 1),
        (narrow, torch.float32, 0),
        (torch.ones(2048, 32), torch.float32, 1),
        (torch.ones(2047, 32), torch.float32, 0),
        (wide, torch.bfloat16, 0),
        (wide, torch.float64, 0),
    ):
        asked.clear()
        b = b.to(dtype)
        out = rows(torch.ones(256, len(b), dtype=dtype), b, torch.empty(256, b.shape[1], dtype=dtype))
        assert (out == len(b)).all() and len(asked) == expected


@ONEDNN
def test_the_precision_that_a_user_chose_is_left_as_it_was():
    former = precision()
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        rows(torch.ones(256, 256), torch.ones(256, 256), torch.empty(256, 256))
        with pytest.raises(RuntimeError):
            rows(torch.ones(256, 256), torch.ones(255, 256), torch.empty(256, 256))
        assert precision() == "tf32"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = former


@pytest.mark.parametrize("told", ["vendor_id\t: GenuineIntel\n", "CPU implementer\t: 0x41\n", OSError("no such file")])
def test_other_processors_are_left_alone(monkeypatch, told):
    def read(path, *args):
        if isinstance(told, str):
            return told
        raise told

    monkeypatch.setattr(Path, "read_text", read)
    assert not faster.__wrapped__()


def test_a_processor_that_would_round_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "read_text", lambda *_: "vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(products, "_by_onednn", lambda product, a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not faster.__wrapped__()


def steps(layer, x):
    """Output, and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(3, 5), (70, 5), (2, 50, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quick_layer_is_a_linear_layer(way, shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6, bias=bias), torch.randn(shape)
    quick = copy.deepcopy(quicken(nn.Sequential(copy.deepcopy(layer))))[0]
    assert type(quick) is (nn.Linear if way == "usual" else QuickLinear)
    assert quick.state_dict().keys() == layer.state_dict().keys()
    for found, expected in zip(steps(quick, x), steps(layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    quick.requires_grad_(False)
    assert quick(x).requires_grad is False
    if type(quick) is QuickLinear and x.numel() >= 40:
        assert quick(x.requires_grad_()).grad_fn.saved_tensors == (None, quick.weight)  # nothing for what is frozen


def test_a_quick_layer_is_as_any_other_where_torch_does_more_than_compute(way):
    """Lower precision, clients in step, and a model that is exported."""
    quick, plain = QuickLinear(5, 6), nn.Linear(5, 6)
    plain.load_state_dict(quick.state_dict())
    x = torch.randn(70, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(x).dtype == torch.bfloat16 and torch.equal(quick(x), plain(x))
    assert torch.equal(torch.vmap(quick)(x[None]), torch.vmap(plain)(x[None]))
    exported = torch.export.export(quick, (x,)).module()
    assert torch.equal(exported(x), plain(x))
    assert torch.equal(quick(x[:0]), plain(x[:0]))
