"""A base in 4 bits (NF4, QLoRA) through bitsandbytes, an optional dependency: expert tensors one by one.

bitsandbytes' own loading passes over fused expert tensors; here every expert's matrix is packed by itself, the
parameter it came from stays as a shape on the meta device, and `moe/experts.py` unpacks a matrix where it is used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilium.errors import ModelError, first_line

__all__ = ["Scheme", "dequantise", "quantise"]

BLOCK = 64
"""Values that share a scale, counted along the rows one after the other."""


@dataclass(frozen=True)
class Scheme:
    """What turns packed bytes back into a matrix of this shape and dtype. `state`: bitsandbytes' own."""

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
    """A matrix as NF4: packed bytes (uint8), and what turns them back.

    bitsandbytes gets it as one long row, which changes no value: 0.50 on the CPU reads a matrix back wrongly, without a
    word, where a block goes over the end of a row.

    Raises:
        ModelError: if bitsandbytes is missing or cannot do it for this device or dtype.
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
    """The matrix again, in its dtype; it differs from the original by the rounding to 16 levels per block."""
    return _library().dequantize_4bit(packed, scheme.state).view(scheme.shape)
