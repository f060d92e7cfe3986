"""Convolutions of small models on a CPU, in oneDNN's blocked layout.

torch runs convolutions on a CPU through oneDNN, but pools with its own kernel, which writes eight bytes of index next
to every number that it keeps. Here, consecutive convolutions, max-pools and ReLUs all run in oneDNN and stay in its own
layout, blocks of channels. The result is the same up to the order of sums.

Shapes: B examples, C channels, H and W sides.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["through"]

BLOCKED = nn.MaxPool2d, nn.ReLU
"""Layers, other than convolutions, that accept and return the blocked layout."""


def through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Apply the layers to x in turn; x is [B, C, H, W] before the first convolution."""
    dtype = _dtype(x)
    for layer in layers:
        if dtype and type(layer) is nn.Conv2d and _simple(layer, dtype):
            x = _convolved(layer, x if x.is_mkldnn else x.to_mkldnn(dtype), dtype)
        else:
            x = layer(x.to_dense() if x.is_mkldnn and type(layer) not in BLOCKED else x)
    return x.to_dense() if x.is_mkldnn else x


def _dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which oneDNN should compute convolutions, or None to leave them to torch."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    if x.device.type != "cpu" or x.dim() != 4 or len(x) == 0:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if _works(dtype) else None


def _simple(layer: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Return True if oneDNN can compute this layer.

    Its padding must be of zeros and given as numbers, and its weight must have this dtype unless autocast is on.
    """
    same_dtype = layer.weight.dtype == dtype or torch.is_autocast_enabled("cpu")
    return same_dtype and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _convolved(layer: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    return torch.ops.aten.mkldnn_convolution(x, layer.weight.to(dtype), bias, *sizes)


@cache
def _works(dtype: torch.dtype) -> bool:
    """Return True if this processor and torch support the layout and match torch's own results, gradients included."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x, w = (torch.arange(float(n)).cos().to(dtype) for n in (2 * 2 * 8 * 8, 4 * 2 * 3 * 3))
        x, w = x.view(2, 2, 8, 8), w.view(4, 2, 3, 3).requires_grad_()
        expected = F.max_pool2d(F.conv2d(x, w), 2).relu()
        try:
            y = torch.ops.aten.mkldnn_convolution(x.to_mkldnn(), w, None, [0, 0], [1, 1], [1, 1], 1)
            result = F.max_pool2d(y, 2, 2).relu().to_dense()
            gradients = [torch.autograd.grad(out.sum(), w)[0] for out in (expected, result)]
        except (RuntimeError, AttributeError):
            return False
    tolerances = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {}
    return torch.allclose(result, expected, **tolerances) and torch.allclose(*gradients, **tolerances)
