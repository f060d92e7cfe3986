"""Experts in 4 bits (NF4, QLoRA) through bitsandbytes, an optional dependency.

The loading code of bitsandbytes skips fused expert tensors. Here every expert's matrix is packed by itself, its
original parameter is replaced by a shape on the meta device, and `moe/experts.py` unpacks a matrix when it is used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilium.errors import ModelError, first_line

__all__ = ["Scheme", "dequantise", "quantise"]

BLOCK = 64
"""The number of values that share a scale, counted along the rows one after the other."""


@dataclass(frozen=True)
class Scheme:
    """The shape, the dtype and bitsandbytes' own state, which turn packed bytes back into a matrix."""

    state: Any
    shape: tuple[int, ...]
    dtype: torch.dtype


def _library() -> Any:
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise ModelError(
            "fit.lora.base is 'nf4', which needs bitsandbytes: pip install 'consilium[quant]', or set it to 'full'"
        ) from error
    return library


def quantise(weight: Tensor) -> tuple[Tensor, Scheme]:
    """Convert a matrix to NF4: packed bytes (uint8), and the scheme that converts them back.

    bitsandbytes gets the matrix as one long row, which changes no value. Version 0.50 on the CPU silently reads a
    matrix back wrongly if a block crosses the end of a row.

    Raises:
        ModelError: if bitsandbytes is missing or does not support this device or dtype.
    """
    library = _library()
    try:
        row = weight.detach().reshape(1, -1).contiguous()
        packed, state = library.quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
        return packed, Scheme(state, tuple(weight.shape), weight.dtype)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"bitsandbytes cannot store {weight.dtype} on {weight.device} in 4 bits "
            f"({first_line(error)}); set fit.lora.base to 'full'"
        ) from error


def dequantise(packed: Tensor, scheme: Scheme) -> Tensor:
    """Return the matrix in its dtype; it differs from the original by the rounding to 16 levels per block."""
    return _library().dequantize_4bit(packed, scheme.state).view(scheme.shape)
