"""A sub-MoE in a directory of its own: safetensors and a keep-map, exact to the bit.

    config.json, tokenizer files   of the full model, as transformers writes them
    sub-moe.safetensors            the sub-model's parameters under flat names with the ids of the full model, and the
                                   router rows of absent experts if its gates depend on them
    sub-moe.json                   the keep-map (block -> ids), the form, the dtype, the task and its labels, and the
                                   scaling of gates (see `gates`); without it, the scaling is "slice"

No configuration can express different numbers of experts per layer, so transformers cannot read such a model back.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from consilium.core import ExpertSet
from consilium.errors import ConfigError, ModelError, PayloadError, first_line
from consilium.moe.addressing import expert_of, flatten
from consilium.moe.build import ModelSource
from consilium.moe.gates import KINDS, Gates, absent_rows, gates_from_scalars, gates_to_scalars
from consilium.moe.model import TaskModel
from consilium.moe.surgery import checked

__all__ = ["load_sub_moe", "save_sub_moe"]

WEIGHTS, MAP = "sub-moe.safetensors", "sub-moe.json"


def save_sub_moe(folder: Path, source: ModelSource, model: TaskModel, held: ExpertSet) -> None:
    """Write a model that holds the experts `held` of `source` into a directory, which is created if needed.

    Raises:
        ModelError: if `held` does not name as many experts as the model has, or `source` has no tokenizer.
    """
    gates = model.gates or Gates()
    params = {**gates.rows, **flatten(model, held)}
    folder.mkdir(parents=True, exist_ok=True)
    source.config.save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    save_file(params, folder / WEIGHTS)
    keep_map = {
        "form": source.form,
        "dtype": source.dtype,
        "task": model.task,
        "labels": list(model.labels),
        "experts": {block: list(ids) for block, ids in held.items()},
        "gates": {"kind": gates.kind, "scale": dict(gates.scale)},
    }
    (folder / MAP).write_text(json.dumps(keep_map, indent=1) + "\n")


def load_sub_moe(folder: Path) -> tuple[ModelSource, TaskModel, dict[str, tuple[int, ...]]]:
    """Load a sub-MoE: its source, the model and the experts that it holds.

    The source provides the tokenizer and the sizes; it has no full weights.

    Raises:
        ModelError: if a file is missing or broken, if the map does not fit the configuration, or if the weights hold
            other experts than the map names.
    """
    keep_map = _map(folder)
    try:
        source = ModelSource(str(folder.resolve()), keep_map["form"], keep_map["dtype"])
        named_experts = {block: tuple(ids) for block, ids in keep_map["experts"].items()}
        task, labels = keep_map["task"], tuple(keep_map["labels"])
        gates = _gates(keep_map.get("gates", {"kind": "slice", "scale": {}}))
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError, PayloadError) as error:
        raise ModelError(
            f"{folder / MAP} is no keep-map ({type(error).__name__}: {error}); save the model anew"
        ) from error
    experts = checked(named_experts, source.counts, source.family)
    try:
        params = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {first_line(error)}") from error
    stored_pairs = {place for key in params if (place := expert_of(key))}
    named_pairs = {(block, i) for block, ids in experts.items() for i in ids}
    if differences := sorted(stored_pairs ^ named_pairs):
        block, i = differences[0]
        location = "the weights but not in the map" if (block, i) in stored_pairs else "the map but not in the weights"
        raise ModelError(f"expert {i} of {block} is in {location} of {folder}; they are not of the same model")
    gates = replace(gates, rows=absent_rows(params, experts))
    return source, source.build(params, task, labels, experts, gates), experts


def _gates(told: Mapping[str, Any]) -> Gates:
    """Return the gates that a keep-map names, without the rows of absent experts."""
    if told["kind"] not in KINDS:
        raise ValueError(f"gates are {told['kind']!r}; they must be one of {', '.join(KINDS)}")
    return gates_from_scalars(told["kind"], gates_to_scalars(told["scale"]), {})


def _map(folder: Path) -> dict[str, Any]:
    try:
        keep_map = json.loads((folder / MAP).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no sub-MoE: {MAP} cannot be read ({type(error).__name__})") from error
    if not isinstance(keep_map, dict):
        raise ModelError(f"{folder / MAP} is no keep-map: it holds a {type(keep_map).__name__}; save the model anew")
    return keep_map
