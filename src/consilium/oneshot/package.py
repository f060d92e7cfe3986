"""The file that a site submits: a safetensors file with JSON in its metadata, signed with the site's key.

    adapter   <module>.lora_A [R, X], <module>.lora_B [Y, R]; with router "vector" also <module>.gate [X]
    expert    <block>.guest.<i>.<tensor of the family>, <block>.guest.<i>.row [D]; with "row+bias" also .bias [1]
    moments   <module or block>.moment [X + 1, X + 1], float32: the sum over training tokens of (x, 1)(x, 1)^T, for the
              ridge router; optional in both kinds

The JSON names the site, the public model and the settings, and gives the scores; see `Package`. It contains nothing
executable. A file from outside is measured before any of it is read into memory: its size, the length of its header,
the number of tensors, and the name, dtype, shape and place of every tensor. After that, the digest, the signature, and
the finiteness of all values are checked.
"""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load, save
from torch import Tensor

from consilium.core import CLIENT_ID
from consilium.errors import ConfigError, PackageError
from consilium.escape import one_line
from consilium.oneshot.adapters import Pair
from consilium.oneshot.base import digest_of
from consilium.oneshot.guests import Guest
from consilium.oneshot.layout import Layout

__all__ = [
    "Kind",
    "Package",
    "RouterPart",
    "check_site",
    "file_digest",
    "read",
    "read_with_bytes",
    "to_bytes",
]

FORMAT = 1
HEADER, TENSORS, CARD = 4 << 20, 100_000, 64 << 10
"""Maximum bytes of a header, number of tensors, and bytes of the JSON in a package."""
SIZES = {"F32": 4, "BF16": 2}
"""Allowed dtypes in a file and their bytes."""

Kind = Literal["adapter", "expert"]
RouterPart = Literal["none", "vector", "row", "row+bias"]
KINDS_OF_TEXT = ("text-to-text", "conversation", "document")
_ALLOWED = {"adapter": ("none", "vector"), "expert": ("row", "row+bias")}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Package:
    """The part that a site submits.

    Args:
        site: name of the site.
        kind: kind of the tensors.
        router: router part of the tensors.
        fingerprint: fingerprint of the public model, see `Layout`.
        frozen: sha256 of the public model's tensors, see `Layout`.
        examples: training examples.
        scale: alpha / rank of adapters; 1 for experts.
        settings: settings of the training, JSON.
        card: scores, licence, contact, privacy; JSON, shown to people.
        tensors: tensors by the names above.
        key: the site's public key, a line of OpenSSH.
        signature: hex; "": not signed yet.
    """

    site: str
    kind: Kind
    router: RouterPart
    fingerprint: str
    frozen: str
    examples: int
    scale: float
    settings: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    key: str = ""
    signature: str = ""

    @property
    def message(self) -> bytes:
        """Return the bytes to sign: all fields but the signature, as canonical JSON, with the tensors' digest."""
        fields = {name: value for name, value in self.metadata.items() if name != "signature"}
        return json.dumps(fields, sort_keys=True, allow_nan=False).encode()

    @property
    def metadata(self) -> dict[str, Any]:
        """Return all fields, with the tensors replaced by their digest."""
        fields = {k: v for k, v in asdict(replace(self, tensors={})).items() if k != "tensors"}
        return {"format": FORMAT, "tensors": digest_of(self.tensors), **fields}

    def signed(self, key: Any) -> "Package":
        """Return the package, signed with a secret key."""
        from consilium.certificates import public_text, sign  # imported here because it needs the extra `flower`

        draft = replace(self, key=public_text(key), signature="")
        return replace(draft, signature=sign(key, draft.message))

    def pairs(self) -> dict[str, Pair]:
        """Return module -> adapter, for kind "adapter"."""
        names = [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]
        return {n: Pair(self.tensors[f"{n}.lora_A"], self.tensors[f"{n}.lora_B"], self.scale) for n in sorted(names)}

    def part(self, leaf: str) -> dict[str, Tensor]:
        """Return module or block -> tensor of that leaf: "gate" or "moment"."""
        end = f".{leaf}"
        return {name.removesuffix(end): t for name, t in sorted(self.tensors.items()) if name.endswith(end)}

    def guests(self) -> dict[str, list[Guest]]:
        """Return block -> experts, for kind "expert", in the order of their numbers."""
        tensors_by_block: dict[str, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in self.tensors.items():
            block, infix, suffix = name.partition(".guest.")
            if infix:
                number, _, leaf = suffix.partition(".")
                tensors_by_block.setdefault(block, {}).setdefault(int(number), {})[leaf] = tensor
        return {
            block: [_guest(dict(tensors)) for _, tensors in sorted(guests.items())]
            for block, guests in sorted(tensors_by_block.items())
        }

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def _guest(tensors: dict[str, Tensor]) -> Guest:
    row, bias = tensors.pop("row"), tensors.pop("bias", None)
    return Guest(tensors, row, None if bias is None else bias.reshape(()))


def to_bytes(package: Package) -> bytes:
    """Return the contents of the package's file."""
    metadata = json.dumps(package.metadata, sort_keys=True, allow_nan=False)
    tensors = {name: tensor.contiguous() for name, tensor in sorted(package.tensors.items())}
    return save(tensors, {"consilium": metadata})


def read(path: Path, layout: Layout | None = None, max_bytes: int = 8 << 30) -> Package:
    """Read and check a package, see `read_with_bytes`."""
    return read_with_bytes(path, layout, max_bytes)[0]


def read_with_bytes(path: Path, layout: Layout | None = None, max_bytes: int = 8 << 30) -> tuple[Package, bytes]:
    """Read and check a package, and return it with the very bytes that were checked.

    Args:
        layout: layout of the public model that it must fit; None: any, e.g. for a package that was made here.
        max_bytes: largest file that is read.

    Raises:
        PackageError: for anything that is not a whole, signed package for that model; checks of sizes fail before the
            file is in memory.
    """
    blob = _measured(path, layout, max_bytes)
    package = _decoded(path, blob)
    if digest_of(package.tensors) != _metadata(blob)["tensors"]:
        raise PackageError(f"{path} has other tensors than its digest says: get it again")
    from consilium.certificates import is_signed  # imported here because it needs the extra `flower`

    if not is_signed(package.key, package.signature, package.message):
        raise PackageError(f"{path} is not signed by the key that it names: get it again from site {package.site}")
    for name, tensor in package.tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackageError(f"{path}: tensor {name!r} has numbers that are not finite")
    return package, blob


# --- checks before anything is trusted --------------------------------------------------------------------------------


def _measured(path: Path, layout: Layout | None, max_bytes: int) -> bytes:
    """Check the file's sizes and header, then return its bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackageError(f"{path} cannot be opened: {error.strerror}") from error
    file_status = os.fstat(descriptor)
    if not stat.S_ISREG(file_status.st_mode):
        os.close(descriptor)
        raise PackageError(f"{path} is not an ordinary file")
    with os.fdopen(descriptor, "rb") as file:
        size = file_status.st_size
        if not _LENGTH.size <= size <= max_bytes:
            raise PackageError(f"{path} has {size} bytes; a package has {_LENGTH.size} to {max_bytes}")
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        if not 2 <= length <= min(HEADER, size - _LENGTH.size):
            raise PackageError(f"{path} announces a header of {length} bytes; allowed are 2 to {HEADER} in the file")
        header = _header(path, file.read(length))
        _check_tensors(path, header, size - _LENGTH.size - length, layout)
        file.seek(0)
        blob = file.read(size)
    if len(blob) != size:
        raise PackageError(f"{path} changed while it was read")
    return blob


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
        metadata = header["__metadata__"]["consilium"]
        if len(metadata) > CARD:
            raise ValueError(f"its JSON has {len(metadata)} characters, allowed are {CARD}")
        if set(header["__metadata__"]) != {"consilium"} or len(header) - 1 > TENSORS:
            raise ValueError(f"it has other metadata, or more than {TENSORS} tensors")
        _check_metadata(json.loads(metadata, object_pairs_hook=_without_repetition))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PackageError(f"{path} is no package: {one_line(error, 300) or type(error).__name__}") from error
    return header


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


_FIELDS = {
    "format": int, "tensors": str, "site": str, "kind": str, "router": str, "fingerprint": str, "frozen": str,
    "examples": int, "scale": float, "settings": dict, "card": dict, "key": str, "signature": str,
}  # fmt: skip


def _check_metadata(told: Any) -> None:
    """Raise ValueError unless the JSON has the fields of a package, of the right types and ranges."""
    if not isinstance(told, dict) or set(told) != set(_FIELDS):
        raise ValueError(f"its JSON must have the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = told[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    settings = told["settings"]
    lengths = [settings.get("fit", {}).get(name) for name in ("max_length", "target_length")]
    if settings.get("kind_of_text") not in KINDS_OF_TEXT or any(type(n) is not int or n < 1 for n in lengths):
        raise ValueError("settings must say kind_of_text, and max_length and target_length in fit")
    if told["format"] != FORMAT:
        raise ValueError(f"format is {told['format']}; this version reads {FORMAT}")
    if not CLIENT_ID.fullmatch(told["site"]):
        raise ValueError(f"site is {one_line(told['site'], 80)!r}; allowed are 1 to 64 of A-Z a-z 0-9 . _ -")
    if told["kind"] not in get_args(Kind) or told["router"] not in _ALLOWED[told["kind"]]:
        raise ValueError("kind and router must be adapter with none or vector, or expert with row or row+bias")
    if not 1 <= told["examples"] <= 10**12 or not 0 < told["scale"] <= 1e6:
        raise ValueError(f"examples is {told['examples']} and scale {told['scale']}; both must be greater than 0")


def _check_tensors(path: Path, header: Mapping[str, Any], room: int, layout: Layout | None) -> None:
    """Check dtype, shape and place of every tensor; places must fill the file without a gap."""
    metadata = json.loads(header["__metadata__"]["consilium"])
    if layout is not None:
        _check_base(path, metadata, layout)
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            valid_shape = all(type(n) is int and n >= 1 for n in shape) and len(shape) <= 4
            if dtype not in SIZES or not valid_shape or end - start != SIZES[dtype] * prod(shape) or start < 0:
                raise ValueError
        except (ValueError, TypeError, KeyError) as error:
            short_name = one_line(name, 100)
            raise PackageError(
                f"{path}: tensor {short_name!r} must be F32 or BF16, not empty, and as long as its shape"
            ) from error
        spans.append((start, end))
        if layout is not None:
            _check_shape(path, name, shape, metadata, layout)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != room or not spans:
        raise PackageError(f"{path}: its tensors overlap, leave gaps, or do not fill the file: get it again")
    if layout is not None:
        _check_complete(path, set(header) - {"__metadata__"}, metadata, layout)


def _check_base(path: Path, told: Mapping[str, Any], layout: Layout) -> None:
    for key, expected in (("fingerprint", layout.fingerprint), ("frozen", layout.frozen)):
        if told[key] != expected:
            raise PackageError(
                f"{path} was trained on another public model: {key} {one_line(told[key], 24)}, here {expected[:24]}"
            )


def _check_shape(path: Path, name: str, shape: tuple[int, ...], told: Mapping[str, Any], layout: Layout) -> None:
    """Raise PackageError unless a package of this kind may contain a tensor of that name and shape."""
    owner, _, leaf = name.rpartition(".")
    is_allowed: bool
    if leaf == "moment":
        sides = {layout.modules[owner][0]} if owner in layout.modules else set()
        sides |= {layout.width} if owner in layout.experts else set()
        is_allowed = len(shape) == 2 and shape[0] == shape[1] and shape[0] - 1 in sides
    elif told["kind"] == "adapter":
        x, y = layout.modules.get(owner, (0, 0))
        rank = shape[0] if leaf == "lora_A" else shape[-1]
        expected = {"lora_A": (rank, x), "lora_B": (y, rank)}
        if told["router"] == "vector":
            expected["gate"] = (x,)
        is_allowed = x > 0 and shape == expected.get(leaf) and (leaf == "gate" or 1 <= rank <= min(x, y))
    else:
        block, infix, suffix = name.partition(".guest.")
        number, _, leaf = suffix.partition(".")
        expected = dict(layout.experts.get(block, {})) | {"row": (layout.width,)}
        if told["router"] == "row+bias":
            expected["bias"] = (1,)
        is_allowed = bool(infix) and block in layout.experts and number.isdecimal() and len(number) <= 3
        is_allowed = is_allowed and str(int(number)) == number and shape == expected.get(leaf)
    if not is_allowed:
        raise PackageError(
            f"{path}: tensor {one_line(name, 100)!r} of shape {shape} does not belong into a package of kind "
            f"{told['kind']} with router part {told['router']} for this model"
        )


def _check_complete(path: Path, names: set[str], told: Mapping[str, Any], layout: Layout) -> None:
    """Raise PackageError if a part of an adapter or of an expert is missing."""
    needed_names: set[str] = set()
    if told["kind"] == "adapter":
        owners = {n.rpartition(".")[0] for n in names if not n.endswith(".moment")}
        leaves = ("lora_A", "lora_B", *(("gate",) if told["router"] == "vector" else ()))
        needed_names = {f"{owner}.{leaf}" for owner in owners for leaf in leaves} or {"a .lora_A"}
    else:
        counts = {int(n.partition(".guest.")[2].partition(".")[0]) for n in names if ".guest." in n}
        for block, tensors in layout.experts.items():
            leaves = (*tensors, "row", *(("bias",) if told["router"] == "row+bias" else ()))
            needed_names |= {f"{block}.guest.{i}.{leaf}" for i in range(max(counts, default=0) + 1) for leaf in leaves}
    if missing := sorted(needed_names - names):
        raise PackageError(f"{path} lacks {len(missing)} tensors, e.g. {one_line(missing[0], 100)!r}")


def _metadata(blob: bytes) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(blob[: _LENGTH.size])
    header = json.loads(blob[_LENGTH.size : _LENGTH.size + length])
    return json.loads(header["__metadata__"]["consilium"])


def _decoded(path: Path, blob: bytes) -> Package:
    metadata = _metadata(blob)
    fields = {name: value for name, value in metadata.items() if name not in ("format", "tensors")}
    return Package(**fields, tensors=load(blob))


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_site(name: str) -> str:
    """Return the name of a site; raise ConfigError if it cannot be one."""
    if not CLIENT_ID.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; use 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot")
    return name
