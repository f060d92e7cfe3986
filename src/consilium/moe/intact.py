"""Checks of a model's folder before use: links that lead out of it, pointers, missing shards, truncated files."""

import json
import struct
from pathlib import Path

from consilium.errors import ModelError
from consilium.inside import refuse_outside, shards_of
from consilium.pointers import refuse_pointers

__all__ = ["check_folder"]

_INDEX = "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")
"""The length of a safetensors file's header. The header follows it, and the tensors follow the header."""


def check_folder(folder: Path) -> None:
    """Check the files of a model without reading its weights.

    Raises:
        ModelError: if a link, an index of shards or an adapter leads out of the folder, if a file is a pointer of
            Git LFS, if a shard is missing, or if a file is truncated.
    """
    refuse_pointers(folder, ModelError)
    refuse_outside(folder, ModelError)
    if (folder / "adapter_config.json").exists():  # transformers would load the base model that it names from anywhere.
        raise ModelError(f"{folder} holds adapters (adapter_config.json) for another model: merge them first")
    for index in folder.glob("*.index.json"):
        shards = shards_of(index, ModelError)
        if index.name == _INDEX and not (folder / "model.safetensors").exists():
            _check_shards(index, shards)
    for path in sorted(folder.glob("*.safetensors")):
        _check_size(path)


def _check_shards(index: Path, shards: list[str]) -> None:
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ModelError(
            f"{index.parent / missing[0]} is missing: {index.name} names {len(shards)} shards, of which {len(missing)} "
            "are not there; get them again"
        )


def _check_size(path: Path) -> None:
    """Raise ModelError if the size of a safetensors file differs from the size that its header announces."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(_LENGTH.size)
        length = _LENGTH.unpack(length_bytes)[0] if len(length_bytes) == _LENGTH.size else 0
        data_start = _LENGTH.size + length
        if size < _LENGTH.size or size < data_start:
            requirement = f"a header of {length} bytes" if length else "a header"
            raise ModelError(f"{path} is cut off: it has {size} bytes, too few for {requirement}; get it again")
        try:
            header = json.loads(file.read(length))
            end = data_start + max(
                (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} is no safetensors file ({type(error).__name__}): get it again") from error
    if size != end:
        defect = "cut off" if size < end else "too long"
        raise ModelError(f"{path} is {defect}: its header announces {end} bytes, it has {size}; get it again")
