"""A payload as a Flower RecordDict and back, bit for bit: one blob per payload group, one record of scalars.

    "payload"   ArrayRecord: group -> Array of raw bytes, the codec's safetensors, whatever dtypes are inside
    "scalars"   ConfigRecord: the payload's scalars
    "engine"    ConfigRecord: metadata that the two ends of the engine exchange

A group is one blob and not one array per tensor, because Flower stores and fetches every array separately, at about 25
ms each. A long blob continues in "group/1", "group/2", ..., because Flower assembles an array from its chunks with two
more copies of it in memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from consilium.core import Payload, Scalar
from consilium.engine.codec import Bounds, decode, encode, mapped
from consilium.errors import PayloadError, shown
from consilium.escape import one_line
from consilium.moe.budget import human
from consilium.params import Like

__all__ = [
    "PROTOCOL",
    "SAID",
    "STYPE",
    "TOLD",
    "blobs_of",
    "checked",
    "from_record",
    "parsed",
    "payload_in",
    "payload_of",
    "stamp",
    "to_record",
    "unpacked",
]

PROTOCOL = 1
"""Version of the metadata that the two ends of the engine exchange, and of the layout of payloads in a message."""

STYPE, PACKED = "consilium.safetensors", "consilium.safetensors.zstd"
MAGIC = zstandard.MAGIC_NUMBER.to_bytes(4, "little")
"""First bytes of a zstd frame. A safetensors blob begins with the length of its header, and these bytes would mean 4
GB."""
PART = 32 * 1024 * 1024
"""Largest size of one Array in bytes."""
MOST = Bounds(tensors=2**18, header=2**25, about=2**12, data=2**62)
"""Bounds of each blob in a message with tensors that the receiver cannot foresee."""
GROUPS = 64
"""Largest number of groups in such a message."""
_LEAST, _MOST = -(2**63), 2**64 - 1


def to_record(payload: Payload, told: Mapping[str, Scalar], compress: bool = False) -> RecordDict:
    """Return the payload and the engine's metadata as one message's content.

    Args:
        compress: compress the blobs with zstd.

    Raises:
        PayloadError: for an integer beyond 64 bits, which Flower's records cannot hold, or a text that is not Unicode.
    """
    arrays: dict[str, Array] = {}
    for group, params in payload.groups.items():
        blob = encode(Payload({group: params}))
        size, stype = len(blob), STYPE
        if compress:
            blob, stype = zstandard.compress(blob, 1), PACKED
        for i, start in enumerate(range(0, len(blob), PART)):
            part = blob[start : start + PART]
            whole_size = 0 if i else size  # of the whole blob, before compression: see `grid.within`
            arrays[f"{group}/{i}" if i else group] = Array("uint8", (whole_size,), stype, part)
        del blob
    return RecordDict(
        {
            "payload": ArrayRecord(array_dict=arrays, keep_input=True),
            "scalars": _config(payload.scalars),
            "engine": _config(told),
        }
    )


def blobs_of(record: RecordDict) -> tuple[dict[str, bytes], dict[str, Scalar], dict[str, Scalar]]:
    """Return a message's content without decoding it: group -> blob, the payload's scalars, the engine's metadata.

    Raises:
        PayloadError: if the content is not one that `to_record` could have made.
    """
    try:
        arrays, scalars, metadata = record["payload"], record["scalars"], record["engine"]
    except KeyError as error:
        raise PayloadError(f"a message without {error}: the other side does not speak this protocol") from error
    if not (
        isinstance(arrays, ArrayRecord) and isinstance(scalars, ConfigRecord) and isinstance(metadata, ConfigRecord)
    ):
        raise PayloadError("a message with records of other types: the other side does not speak this protocol")
    for name, array in arrays.items():
        if array.stype not in (STYPE, PACKED):
            raise PayloadError(f"group {shown(name)} arrived as {shown(array.stype)}; it must be {STYPE}")
    parts: dict[str, list[bytes]] = {}
    for name, array in arrays.items():
        group, _, part_number = name.partition("/")
        group_parts = parts.setdefault(group, [])
        if part_number != (str(len(group_parts)) if group_parts else ""):
            raise PayloadError(
                f"{shown(name)} is not the next part of {shown(group)}, of which {len(group_parts)} came"
            )
        group_parts.append(array.data)
    blobs = {group: b"".join(pieces) if len(pieces) > 1 else pieces[0] for group, pieces in parts.items()}
    return blobs, dict(scalars), dict(metadata)


def payload_of(blobs: Mapping[str, bytes], scalars: Mapping[str, Scalar], cap: int = 2**40) -> Payload:
    """Return the payload of these blobs and scalars.

    Args:
        cap: largest size of all blobs together in bytes, decompressed.

    Raises:
        PayloadError: if a blob is not one that `to_record` could have made, or the blobs exceed the cap.
    """
    return _joined({group: decode(blob, bounds) for group, blob, bounds in unpacked(blobs, cap)}, scalars)


def unpacked(
    blobs: Mapping[str, bytes], cap: int, expected: Mapping[str, Mapping[str, Like]] | None = None
) -> Iterator[tuple[str, bytes, Bounds]]:
    """Yield each group with its decompressed blob, and the bounds of that blob's header, which is not read yet.

    Args:
        cap: largest size of all blobs together in bytes, both compressed and decompressed.
        expected: the tensors that each group may have; None: any.

    Raises:
        PayloadError: for a group that is not expected, before any is decompressed, and for more bytes than are allowed.
    """
    if expected is not None and (unknown_groups := [group for group in blobs if group not in expected]):
        raise PayloadError(f"group {shown(unknown_groups[0])} was not asked of this client")
    if len(blobs) > GROUPS:
        raise PayloadError(f"the message has {len(blobs)} groups; at most {GROUPS} are allowed")
    if (size := sum(map(len, blobs.values()))) > cap:
        raise PayloadError(
            f"the payload is {human(size)}; at most {human(cap)} are allowed (wire.cap, or a site's --max-bytes)"
        )
    remaining_bytes = cap
    for group, blob in blobs.items():
        bounds = MOST if expected is None else Bounds.of(group, expected[group])
        blob = _unfolded(group, blob, min(remaining_bytes, bounds.blob))
        remaining_bytes -= len(blob)
        yield group, blob, bounds


def payload_in(files: Mapping[str, Path], scalars: Mapping[str, Scalar]) -> Payload:
    """Return the payload of decompressed blobs in files; its tensors are mapped from there (`codec.mapped`).

    Raises:
        PayloadError: if a blob is not one that `to_record` could have made.
    """
    return _joined({group: mapped(path) for group, path in files.items()}, scalars)


def _unfolded(group: str, blob: bytes, most: int) -> bytes:
    """Return a group's blob, decompressed if it is a zstd frame.

    Args:
        most: largest size of the result in bytes.

    Raises:
        PayloadError: if the result would be larger, or the blob cannot be decompressed.
    """
    is_packed = blob.startswith(MAGIC)
    try:
        size = zstandard.frame_content_size(blob) if is_packed else len(blob)
        if not 0 <= size <= most:
            raise PayloadError(
                f"the blob of group {shown(group)} {'unfolds to' if is_packed else 'is'} {size} bytes; at most {most} "
                "are allowed"
            )
        return zstandard.decompress(blob, max_output_size=size) if is_packed else blob
    except zstandard.ZstdError as error:
        raise PayloadError(f"a compressed blob is broken: {error}") from error


def _joined(parts: Mapping[str, Payload], scalars: Mapping[str, Scalar]) -> Payload:
    groups = {}
    for group, part in parts.items():
        if set(part.groups) != {group}:
            raise PayloadError(f"the blob of group {shown(group)} holds {shown(list(part.groups))}")
        groups |= part.groups
    return Payload(groups, dict(scalars))


SAID = {"protocol": int, "experiment": str, "heads": str, "run": str, "model": str}
TOLD = SAID | {"client": str, "round": int, "version": int, "seed": int, "cap": str, "reply": str, "zstd": bool}
TOLD |= {"deadline": float, "base": str, "hold": bool}
"""Metadata in the server's messages and its types: `SAID` to ask a site for its description, `TOLD` to have it work."""


def checked(told: dict[str, Scalar], kinds: dict[str, type]) -> dict[str, Scalar]:
    """Return the engine's metadata if it follows this protocol.

    Raises:
        PayloadError: naming the value that does not, and the form that it must have.
    """
    if told.get("protocol") != PROTOCOL:
        raise PayloadError(
            one_line(
                f"the server speaks protocol {shown(told.get('protocol'))}, this client {PROTOCOL}: install one version"
            )
        )
    for name, kind in kinds.items():
        if type(told.get(name)) is not kind:
            raise PayloadError(one_line(f"the server says {name} {shown(told.get(name))}; it must be {kind.__name__}"))
    if "round" in kinds and not 0 <= int(told["version"]) <= int(told["round"]) > 0:
        raise PayloadError(f"the server says round {told['round']}, and to go on from that of round {told['version']}")
    return told


def parsed(what: str, text: str) -> dict[str, Any]:
    """Return the JSON that the server sent.

    Args:
        what: "experiment", or "heads", task -> labels.
        text: the JSON.

    Raises:
        PayloadError: if the text is not JSON of that form.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the server's {what} is no JSON: {type(error).__name__}") from error
    if not isinstance(value, dict) or (what == "heads" and not all(map(_are_labels, value.values()))):
        raise PayloadError(one_line(f"the server's {what} is {shown(text)}"))
    return value


def _are_labels(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def stamp(told: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return what an answer must repeat from its message: the protocol, the run, the round and the configuration."""
    config = hashlib.sha256(str(told["experiment"]).encode("utf-8", "replace")).hexdigest()[:16]
    return {"protocol": PROTOCOL, "run": told["run"], "round": told["round"], "config": config}


def from_record(record: RecordDict) -> tuple[Payload, dict[str, Scalar]]:
    """Return the payload and the engine's metadata that `to_record` was given.

    Raises:
        PayloadError: if the content is not one that `to_record` could have made.
    """
    blobs, scalars, metadata = blobs_of(record)
    return payload_of(blobs, scalars), metadata


def _config(scalars: Mapping[str, Scalar]) -> ConfigRecord:
    for key, value in scalars.items():
        items = value if isinstance(value, list) else [value]
        wide_integers = [item for item in items if type(item) is int and not _LEAST <= item <= _MOST]
        # One integer above 2^63 makes Flower send the whole list unsigned.
        if wide_integers or (max(map(_int, items), default=0) >= 2**63 and min(map(_int, items)) < 0):
            raise PayloadError(
                f"scalar {shown(key)} = {shown(value)} does not fit 64 bits; send it as a float or a text"
            )
        texts = [key, *(item for item in items if isinstance(item, str))]
        if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
            raise PayloadError(f"scalar {shown(key)} holds half a surrogate pair, which is not Unicode text")
    return ConfigRecord(dict(scalars))


def _int(item: object) -> int:
    return item if type(item) is int else 0
