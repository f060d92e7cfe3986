"""A payload as one blob: safetensors for the tensors, JSON in its header for everything else. No pickle, ever."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from consilium.core import Payload
from consilium.errors import PayloadError
from consilium.params import Params

__all__ = ["Buffer", "decode", "encode", "mapped", "parts"]


Buffer = bytes | memoryview


def encode(payload: Payload) -> bytes:
    """The payload's bytes; `decode` gives the same payload back, bit for bit, bfloat16 and 0-d tensors included."""
    return b"".join(parts(payload))


def parts(payload: Payload) -> list[Buffer]:
    """The payload's bytes in parts: the header, and then every tensor as it lies in memory, of which nothing is copied
    (safetensors' own writer copies everything, more than once, while no other thread can work)."""
    tensors = {f"{group}/{key}": t for group, params in payload.groups.items() for key, t in params.items()}
    # One entry, so that it has one order: equal payloads shall be equal bytes.
    about = {"payload": json.dumps({"groups": list(payload.groups), "scalars": dict(payload.scalars)})}
    header: dict[str, Any] = {"__metadata__": about}
    end, buffers = 0, []
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # so that all are aligned
        tensor = tensors[name].detach().contiguous()
        buffers.append(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        start, end = end, end + len(buffers[-1])
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    return [len(told).to_bytes(8, "little") + told, *buffers]


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


_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
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
