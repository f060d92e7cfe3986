"""A payload as one blob: safetensors for the tensors, JSON in its header for everything else. No pickle, ever."""

import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from consilium.core import Payload
from consilium.errors import PayloadError
from consilium.params import Params

__all__ = ["decode", "encode"]


def encode(payload: Payload) -> bytes:
    """The payload's bytes; `decode` gives the same payload back, bit for bit, bfloat16 and 0-d tensors included."""
    tensors = {f"{group}/{key}": t for group, params in payload.groups.items() for key, t in params.items()}
    # One entry: safetensors writes several in any order, and equal payloads shall be equal bytes.
    header = {"payload": json.dumps({"groups": list(payload.groups), "scalars": dict(payload.scalars)})}
    return safetensors.torch.save(_unshared(tensors), metadata=header)


def decode(blob: bytes) -> Payload:
    """The payload in a blob.

    Raises:
        PayloadError: if the blob is not one that `encode` could have made.
    """
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["payload"])
        groups: dict[str, Params] = {group: {} for group in header["groups"]}
        scalars = {**header["scalars"]}
        for name, tensor in safetensors.torch.load(blob).items():
            group, _, key = name.partition("/")
            groups[group][key] = tensor
        return Payload(groups, scalars)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError(f"a blob of {len(blob)} bytes is not a payload: {type(error).__name__}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, which safetensors asks for; most pass through uncopied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        own[name] = (
            tensor if alone and storage.data_ptr() not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage.data_ptr())
    return own
