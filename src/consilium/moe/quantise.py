"""A base in 4 bits (NF4, QLoRA) through bitsandbytes, an optional dependency: expert tensors one by one.

bitsandbytes' own loading passes over fused expert tensors; here every expert's matrix is packed by itself, the
parameter it came from stays as a shape on the meta device, and `moe/experts.py` unpacks a matrix where it is used.
"""

from typing import Any

from torch import Tensor

from consilium.errors import ModelError

__all__ = ["dequantise", "quantise"]

BLOCK = 64
"""Values that share a scale; a matrix whose size is no multiple of it is padded by bitsandbytes."""


def _library() -> Any:
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise ModelError(
            "fit.lora.base is 'nf4', which needs bitsandbytes: pip install 'consilium[quant]', or set it to 'full'"
        ) from error
    return library


def quantise(weight: Tensor) -> tuple[Tensor, Any]:
    """A matrix as NF4: packed bytes (uint8), and what turns them back.

    Raises:
        ModelError: if bitsandbytes is missing or cannot do it for this device or dtype.
    """
    library = _library()
    try:
        return library.quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"bitsandbytes cannot store {weight.dtype} on {weight.device} in 4 bits "
            f"({str(error).splitlines()[0]}); set fit.lora.base to 'full'"
        ) from error


def dequantise(packed: Tensor, state: Any) -> Tensor:
    """The matrix again, in its dtype; it differs from the original by the rounding to 16 levels per block."""
    return _library().dequantize_4bit(packed, state)
