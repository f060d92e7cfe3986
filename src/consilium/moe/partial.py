"""Partial loading of a model: only the weights of some experts are read, so that a device never holds the others.

Checkpoints name tensors in many ways, for example one tensor per expert, or one for all experts of a layer.
transformers renames, stacks and joins them on loading. This module removes the tensors of unwanted experts from the
input of transformers and renumbers the others. transformers then loads them into a model that has been sliced before.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from consilium.core import ExpertSet
from consilium.errors import ModelError
from consilium.inside import shards_of
from consilium.moe.addressing import expert_of, router_row_of, table
from consilium.moe.families import Family
from consilium.moe.model import TaskModel
from consilium.moe.surgery import slice_experts

__all__ = ["held_weights", "sliced"]

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_NAMES = ("model.safetensors", "model.safetensors.index.json")


def sliced(cls: type, family: Family, keep: ExpertSet) -> type:
    """Return a transformers class with models that hold only these experts from their construction.

    The weights are not initialised at random, so all of them must come from a checkpoint.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        slice_experts(TaskModel(self, family, "", (), self.dtype), keep)

    namespace = {"__init__": init, "__module__": cls.__module__, "initialize_weights": lambda self: None}
    return type(cls.__name__, (cls,), namespace)


def held_weights(location: str, revision: str | None, full: TaskModel, held: ExpertSet) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under its own names, as if a model with only these experts had been saved.

    Args:
        location: a directory or a hub name.
        revision: for hub names, the commit.
        full: the whole model on the meta device.
        held: block -> ids of the experts, ascending.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # slow to import
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    names, family = table(full), full.family
    transforms = get_model_conversion_mapping(full.backbone)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    meta, prefix = full.backbone.state_dict(), full.backbone.base_model_prefix
    state = {}
    for file in _files(location, revision):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no dict)
                path, _ = rename_source_key(key, renamings, converters, prefix, meta)
                name = names.get(path)
                first_name = name if isinstance(name, str) else (name or [""])[0]
                block, number = expert_of(first_name) or router_row_of(first_name) or ("", 0)
                if not block:
                    state[key] = tensors.get_tensor(key)
                elif isinstance(name, str):  # This expert is a module of its own.
                    if number in held[block]:
                        old_name, new_name = (
                            family.module.format(number),
                            family.module.format(held[block].index(number)),
                        )
                        state[key.replace(f".{old_name}.", f".{new_name}.")] = tensors.get_tensor(key)
                elif match := _NUMBER.search(key):
                    if int(match[0]) in held[block]:
                        state[_NUMBER.sub(str(held[block].index(int(match[0]))), key)] = tensors.get_tensor(key)
                else:
                    state[key] = _rows(tensors.get_slice(key), len(name), held[block])
    return state


def _rows(part: Any, total: int, ids: tuple[int, ...]) -> Tensor:
    """Return the rows `ids` of a tensor [E, ..] or [1, E]."""
    if part.get_shape()[0] == total:
        return torch.cat([part[i : i + 1] for i in ids])
    return part[:][:, list(ids)]


def _files(location: str, revision: str | None) -> Iterator[str]:
    """Yield the paths of a model's safetensors files, from a directory or the hub."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    for name in _NAMES:
        path = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path:
            if shards := name.endswith(".json"):
                shards_of(Path(path), ModelError)
            yield from get_checkpoint_shard_files(location, path, revision=revision)[0] if shards else [path]
            return
    raise ModelError(f"model {location!r} has no {' or '.join(_NAMES)}; weights are read from safetensors only")
