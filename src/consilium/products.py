"""Faster float32 matrix products on CPUs for which torch's usual library is slow.

torch uses MKL for the float32 products of a CPU, and MKL uses no AVX-512 on processors of other makers than Intel.
oneDNN, which torch uses for convolutions and for bfloat16, does use it, and is twice as fast there. torch passes
float32 products to oneDNN only if it may compute them in bfloat16. A processor with units for bfloat16 (AMX) would then
do so. Others gain nothing from it and compute in float32, and `faster` verifies that.

oneDNN compiles a kernel for every new shape. This takes longer than a small product, and keeps 0.7 MB per kernel.
Therefore only products with large matrices use it, in pieces of a few fixed numbers of rows (`SIZES`). A model then
needs some dozens of kernels, whatever its batches. The way of computation depends on shapes alone, never on timings.

Shapes: N rows, X and Y columns.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["QuickLinear", "faster", "inner", "quicken", "rows"]

Model = TypeVar("Model", bound=nn.Module)

LARGE = 2**16
"""Elements of a matrix from which on oneDNN pays off."""
NARROW = 32
"""Smallest number of rows and of columns of such a matrix."""
SIZES = (256, 64, 16)
"""Rows of x that are multiplied together."""


@cache
def faster() -> bool:
    """Return True if this processor computes float32 products faster by oneDNN, and no less exactly."""
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        if "vendor_id\t: AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return False
    except OSError:
        return False
    a = torch.full((256, 256), 1 + 2**-12)  # bfloat16 would round it to 1
    return bool((_by_onednn(torch.mm, a, torch.ones(256, 256)) == 256 + 2**-4).all())


def _by_onednn(product: Callable[..., Tensor], *tensors: Tensor, **how: Any) -> Tensor:
    matmul = torch.backends.mkldnn.matmul
    former, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return product(*tensors, **how)
    finally:
        matmul.fp32_precision = former


def _quick(n: int, x: int, y: int, like: Tensor) -> bool:
    """Return True if oneDNN should compute a product of n rows with a matrix [X, Y], or the sum over n rows of such."""
    too_small = n < 8 or x * y < LARGE or min(x, y) < NARROW
    return not too_small and like.dtype == torch.float32 and like.device.type == "cpu" and faster()


def _pieces(n: int, room: int) -> Iterator[tuple[int, int]]:
    """Yield rows 0 .. n in pieces (from, to) of the lengths in `SIZES`.

    The last piece may extend beyond n, but not beyond `room`; otherwise it is shorter than any of `SIZES`.
    """
    start, least = 0, SIZES[-1]
    for size in SIZES:
        while n - start >= size:
            if size == least and n - start > least and start + SIZES[-2] <= room:
                break  # one piece that is a little too long replaces several
            yield start, start + size
            start += size
    if start < n:
        end = start + (least if n - start <= least else SIZES[-2])
        yield start, end if end <= room else n


def rows(
    x_NX: Tensor, b_XY: Tensor, out: Tensor, n: int | None = None, add: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Write alpha x b, or add + alpha x b, into `out` [N, Y], and return it.

    Args:
        n: rows of x and `out` to compute; a few rows after them may be written, too. None: all.
        add: [Y], or `out` itself.
    """
    n = len(x_NX) if n is None else n
    if not _quick(n, *b_XY.shape, x_NX):
        x_NX, out_rows = (x_NX, out) if n == len(x_NX) else (x_NX[:n], out[:n])
        _rows(x_NX, b_XY, out_rows, out_rows if add is out else add, alpha)
        return out
    for start, end in _pieces(n, len(x_NX)):
        out_rows = out[start:end]
        _rows(x_NX[start:end], b_XY, out_rows, out_rows if add is out else add, alpha, end - start in SIZES)
    return out


def inner(left_NX: Tensor, right_NY: Tensor, alpha: float = 1.0) -> Tensor:
    """Return alpha left^T right, [X, Y]: a sum over rows."""
    n, left_XN = len(left_NX), left_NX.t()
    out = left_NX.new_empty(len(left_XN), right_NY.shape[1])
    if not _quick(n, *out.shape, left_NX):
        _rows(left_XN, right_NY, out, None, alpha)
        return out
    for start, end in _pieces(n, n):
        add = out if start else None
        _rows(left_XN[:, start:end], right_NY[start:end], out, add, alpha, end - start in SIZES)
    return out


def _rows(x_NX: Tensor, b_XY: Tensor, out: Tensor, add: Tensor | None, alpha: float, by_onednn: bool = False) -> None:
    product, tensors, options = torch.mm, (x_NX, b_XY), {"out": out}
    if add is not None or alpha != 1:
        product, tensors = torch.addmm, (out if add is None else add, x_NX, b_XY)
        options |= {"alpha": alpha, "beta": 0 if add is None else 1}
    if by_onednn:
        _by_onednn(product, *tensors, **options)
    else:
        product(*tensors, **options)


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear`, computed by `rows` and `inner`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_YX: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight_YX if to_x else None)
        ctx.shape = x.shape
        x_NX = x.reshape(-1, x.shape[-1])
        out = rows(x_NX, weight_YX.t(), x.new_empty(len(x_NX), len(weight_YX)), add=bias)
        return out.view(*x.shape[:-1], len(weight_YX))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_YX = ctx.saved_tensors
        g_NY = grad.reshape(-1, grad.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            rows(g_NY, weight_YX, g_NY.new_empty(len(g_NY), ctx.shape[-1])).view(ctx.shape) if to_x else None,
            inner(g_NY, x.reshape(len(g_NY), -1)) if to_weight else None,
            g_NY.sum(0) if to_bias else None,
        )


class QuickLinear(nn.Linear):
    """A linear layer that uses the fastest library for large float32 products on a CPU.

    Gradients through it cannot be differentiated again.
    """

    rowwise = True  # see `batched`

    def forward(self, input: Tensor) -> Tensor:
        n = input.numel() // self.in_features
        if (
            not _quick(n, self.in_features, self.out_features, input)
            or self.weight.dtype != input.dtype
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch._C._functorch.is_functorch_wrapped_tensor(input)
        ):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


def quicken(model: Model) -> Model:
    """Turn the linear layers of a model into `QuickLinear` in place if that is faster, and return the model."""
    if faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = QuickLinear
    return model
