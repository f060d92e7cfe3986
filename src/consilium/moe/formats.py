"""Checkpoints other than plain safetensors, which are read as bfloat16 or float32: GGUF files and weights in FP8 or
MXFP4."""

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from consilium.errors import ModelError

__all__ = ["gguf_place", "plain_config", "reading"]

DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""`quant_method` of a configuration -> transformers class that dequantises the weights on loading."""


def gguf_place(path: str, gguf: str) -> tuple[str, str]:
    """Return the directory and the name of a GGUF file.

    Args:
        path: `model.path`.
        gguf: `model.gguf`, a name in that directory, or the path of a file.

    Raises:
        ModelError: if there is no such file, or the package that reads it is missing.
    """
    file = Path(gguf).expanduser()
    file = file if file.is_file() else Path(path).expanduser() / gguf
    if not file.is_file():
        raise ModelError(f"model.gguf is {gguf!r}, which is neither a file nor one in {path!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs the gguf package: pip install 'consilium[gguf]'")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file: it does not begin with 'GGUF'")
    return str(file.parent), file.name


def reading(config: Any, path: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that dequantise the weights; {} if they are not quantised.

    Raises:
        ModelError: if the kind of quantisation is not supported; the message says what to do.
    """
    quantisation = getattr(config, "quantization_config", None)
    if not quantisation:
        return {}
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", None)
    )
    method = str(getattr(method, "value", method))
    if method not in DEQUANTISED:
        raise ModelError(
            f"the weights of {path!r} are quantised ({method}), and training needs them in full: take the checkpoint "
            f"that they were made from, or one in {', '.join(DEQUANTISED)}, which are turned back on loading"
        )
    return {"quantization_config": getattr(transformers, DEQUANTISED[method])(dequantize=True)}


def plain_config(config: Any) -> Any:
    """Remove the quantisation settings of a configuration in place, since trained and exported weights are in full."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
