"""A payload as one blob: safetensors for the tensors, JSON in its header for everything else. No pickle, ever."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from consilium.core import Payload
from consilium.errors import PayloadError
from consilium.params import Params

__all__ = ["decode", "encode", "mapped"]


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
        header = json.loads(blob[8 : 8 + size])
        return _payload(header["__metadata__"], safetensors.torch.load(blob))
    except _BROKEN as error:
        raise PayloadError(_not_one(len(blob), error)) from error


def mapped(path: Path) -> Payload:
    """The payload of a blob that lies in a file, which may go afterwards: its tensors are mapped from there, so they
    take no memory that the system could not have back.

    Raises:
        PayloadError: if the blob is not one that `encode` could have made.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _payload(file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except _BROKEN as error:
        raise PayloadError(_not_one(path.stat().st_size, error)) from error


_BROKEN = (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError)


def _not_one(size: int, error: Exception) -> str:
    return f"a blob of {size} bytes is not a payload: {type(error).__name__}"


def _payload(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Payload:
    header = json.loads(metadata["payload"])
    groups: dict[str, Params] = {group: {} for group in header["groups"]}
    scalars = {**header["scalars"]}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups[group][key] = tensor
    return Payload(groups, scalars)


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
