"""A codec that stores a payload as one blob: tensors as safetensors, the rest as JSON in its header."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from consilium.core import Payload
from consilium.errors import PayloadError
from consilium.params import Like, Params

__all__ = ["Bounds", "Buffer", "Header", "check", "decode", "encode", "mapped", "parts"]


Buffer = bytes | memoryview


def encode(payload: Payload) -> bytes:
    """Return the payload's bytes; `decode` restores the payload bit for bit, including bfloat16 and 0-d tensors."""
    return b"".join(parts(payload))


def parts(payload: Payload) -> list[Buffer]:
    """Return the payload's bytes in parts: the header, then every tensor as it lies in memory.

    A contiguous tensor is not copied. The writer of safetensors copies everything more than once and blocks all other
    threads meanwhile.
    """
    tensors = {f"{group}/{key}": t for group, params in payload.groups.items() for key, t in params.items()}
    # A single entry has a single order, so equal payloads give equal bytes.
    metadata = {"payload": json.dumps({"groups": list(payload.groups), "scalars": dict(payload.scalars)})}
    header: dict[str, Any] = {"__metadata__": metadata}
    end, buffers = 0, []
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # so that all are aligned
        tensor = tensors[name].detach().contiguous()
        buffers.append(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        start, end = end, end + len(buffers[-1])
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    return [len(header_bytes).to_bytes(8, "little") + header_bytes, *buffers]


@dataclass(frozen=True)
class Bounds:
    """The most that the header of a blob may hold; a blob with more is refused before its header is parsed.

    Args:
        tensors: number of tensors.
        header: bytes of the header.
        about: bytes of the JSON that names groups and scalars.
        data: bytes of the tensors.
    """

    tensors: int
    header: int
    about: int
    data: int

    @property
    def blob(self) -> int:
        """Return the largest size of the whole blob in bytes."""
        return 8 + self.header + self.data

    @classmethod
    def of(cls, group: str, likes: Mapping[str, Like]) -> "Bounds":
        """Return the bounds of a blob that holds some of these tensors of one group.

        They leave room for a few more names and for any dtype, so that the judge can name the error in a blob that is
        nearly right.
        """
        header, data = _SPARE_BYTES, _SPARE_BYTES
        for key, like in likes.items():
            header += len(json.dumps(f"{group}/{key}")) + _ENTRY_BYTES + 21 * len(like.shape)
            data += ANY.data if None in like.shape else math.prod(like.shape) * _WIDEST
        return cls(len(likes) + 16, header, _SPARE_BYTES // 4, data)


ANY = Bounds(tensors=2**62, header=2**62, about=2**62, data=2**62)
"""Bounds of a blob that this machine wrote itself."""


class Header(NamedTuple):
    """The result of `check`.

    Args:
        about: the JSON that names groups and scalars.
        tensors: number of tensors.
        size: bytes of the header.
    """

    about: str
    tensors: int
    size: int


def check(blob: Buffer, bounds: Bounds = ANY) -> Header:
    """Check that a blob's header is one that `parts` or safetensors could have written, within bounds.

    The header is read once from left to right, and no list or object in it is ever built.

    Raises:
        PayloadError: if it is not such a header, or exceeds the bounds.
    """
    size = int.from_bytes(blob[:8], "little")
    try:
        if len(blob) < 8 + size:
            raise ValueError("the header is cut")
        if size > bounds.header:
            raise PayloadError(f"the header of a blob is {size} bytes; at most {bounds.header} are allowed")
        description, tensors = _scan(str(blob[8 : 8 + size], "utf-8"), bounds)
    except (ValueError, RecursionError) as error:
        raise PayloadError(_not_one(len(blob), error)) from error
    return Header(description, tensors, size)


def decode(blob: bytes, bounds: Bounds = ANY) -> Payload:
    """Return the payload in a blob.

    Raises:
        PayloadError: if the blob is not one that `encode` could have made, or its header is beyond the bounds.
    """
    header = check(blob, bounds)
    try:
        return _payload(header.about, safetensors.torch.load(blob))
    except _BROKEN as error:
        raise PayloadError(_not_one(len(blob), error)) from error


def mapped(path: Path) -> Payload:
    """Return the payload of a blob in a file; the file may be removed afterwards.

    The tensors are mapped from the file, so they take no memory that the system could not reclaim. `check` must have
    seen the header of the blob.

    Raises:
        PayloadError: if the blob is not one that `encode` could have made.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _payload((file.metadata() or {})["payload"], tensors)
    except _BROKEN as error:
        raise PayloadError(_not_one(path.stat().st_size, error)) from error


_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BROKEN = (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError)


def _not_one(size: int, error: Exception) -> str:
    return f"a blob of {size} bytes is not a payload: {type(error).__name__}"


def _scan(text: str, bounds: Bounds) -> tuple[str, int]:
    """Return a header's entry "payload" and its number of tensors; see `check`."""
    if text.count('"dtype"') > bounds.tensors:
        raise PayloadError(f"the header of a blob has more than {bounds.tensors} tensors")
    if not text.startswith(_FIRST):
        raise ValueError("there is no entry payload")
    description, position = _string(text, len(_FIRST), bounds.about)
    if not text.startswith("}", position):
        raise ValueError("there is more metadata than the entry payload")
    position, tensors = position + 1, 0
    while text.startswith(",", position):
        _, position = _string(text, position + 1, _NAME)
        entry = _ENTRY.match(text, position)
        if not entry:
            raise ValueError("an entry is not a tensor's")
        position, tensors = entry.end(), tensors + 1
    if not text.startswith("}", position) or len(text) - position > 64 or text[position + 1 :].strip(" "):
        raise ValueError("the header does not end after its last entry")
    return description, tensors


_FIRST = '{"__metadata__":{"payload":'
_ENTRY = re.compile(
    r':\{"dtype":"[A-Z0-9_]{2,12}","shape":\[(?:\d{1,19}(?:,\d{1,19}){0,63})?\],"data_offsets":\[\d{1,19},\d{1,19}\]\}'
)
_ENTRY_BYTES = 112
"""Largest size of an entry in bytes, without its name and its shape."""
_SPARE_BYTES = 4096
_NAME = 4096
"""Largest length of a tensor's name in characters."""
_WIDEST = 8
"""Bytes of a number in the widest dtype."""
_read_json = json.JSONDecoder().raw_decode


def _string(text: str, place: int, most: int) -> tuple[str, int]:
    """Return the JSON text of at most `most` characters that begins at `place`, and the place where it ends."""
    if not text.startswith('"', place):
        raise ValueError("a text is missing")
    value, end = _read_json(text, place)
    if len(value) > most:
        raise ValueError("a text is too long")
    return value, end


def _payload(about: str, tensors: Mapping[str, Tensor]) -> Payload:
    header = json.loads(about)
    groups: dict[str, Params] = {group: {} for group in header["groups"]}
    scalars = {**header["scalars"]}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups[group][key] = tensor
    return Payload(groups, scalars)
