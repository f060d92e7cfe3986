"""A deployed model as a directory that others can read.

config.json, model*.safetensors, generation_config.json   the backbone, for `from_pretrained` of its class
adapter_config.json, adapter_model.safetensors            instead of these, for PEFT on the base
sub-moe.json, sub-moe.safetensors                         or these: every layer as it is, with the ids of its experts
tokenizer files, chat template
head.safetensors, labels.json     for classification: [C, D] `<task>.weight` and [C] `<task>.bias`; task -> labels.
                                  The heads apply to the mean of the last hidden states over all tokens but padding.
                                  The *ForSequenceClassification classes of these families use the last token, without
                                  a bias, so there is no class to save the heads in
consilium.json                    how the model is used: kind, lengths, tasks; for `consilium predict` and `chat`
README.md                         the card
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from consilium.errors import ConfigError, ModelError
from consilium.export.card import card
from consilium.export.deployed import Deployed
from consilium.machine import quietly
from consilium.moe.adapter_files import save_adapters
from consilium.moe.addressing import is_adapter, load_flat
from consilium.moe.files import save_sub_moe
from consilium.moe.gates import fold_gates
from consilium.moe.lora import add_lora, merged
from consilium.moe.model import TaskModel, text_config
from consilium.moe.rules import FOLDS
from consilium.moe.uniform import uniform
from consilium.params import Params

__all__ = ["USE", "Format", "new_folder", "use_of", "write"]

Format = Literal["transformers", "adapter", "consilium"]
USE = "consilium.json"
"""The file that says how an exported model is used."""


@contextmanager
def new_folder(out: Path, keep: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that replaces `out` if the block succeeds; otherwise nothing of it is left.

    Args:
        keep: False: only find out whether the folder could be made.

    Raises:
        ConfigError: if `out` exists and is not empty, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: choose another --out, or remove it first")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}; choose another --out") from error
    try:
        yield temporary
        if keep:
            _share(temporary)
            temporary.replace(out.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give a folder and its files the permissions that the umask leaves.

    The permissions of a temporary folder, and of the files that safetensors writes, are narrower.
    """
    os.umask(mask := os.umask(0o077))
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def use_of(folder: Path) -> dict[str, Any]:
    """Return the content of consilium.json in an exported folder.

    Raises:
        ConfigError: for another folder.
    """
    try:
        use = json.loads((folder / USE).read_text())
        use["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{folder} is not what `consilium export` makes: {USE} {type(error).__name__}") from error
    return use


def write(out: Path, deployed: Deployed, format: Format) -> list[str]:
    """Write the model into the new directory `out`, and return the notes for the user, one per line.

    Raises:
        ConfigError: for a format that cannot hold this model, naming the one that can.
    """
    writers: dict[str, Callable[[Path, Deployed], list[str]]] = {
        "transformers": _plain,
        "adapter": _adapters,
        "consilium": _sub_moe,
    }
    with new_folder(out) as folder:
        notes = [*writers[format](folder, deployed), *deployed.notes]
        source, fit = deployed.experiment.model, deployed.experiment.fit
        if format != "consilium":  # that format brings the tokenizer
            source.tokenizer().save_pretrained(folder)
        use = {
            "format": format,
            "kind": deployed.kind,
            "form": source.form,
            "dtype": source.dtype,
            "max_length": fit.max_length,
            "target_length": fit.target_length,
            "tasks": {task: list(labels) for task, labels in deployed.labels.items()},
        }
        (folder / USE).write_text(json.dumps(use, indent=1) + "\n")
        (folder / "README.md").write_text(card(deployed, format, source.family, notes))
    return notes


def _whole(deployed: Deployed) -> Params:
    """Return the parameters with the adapters merged into them."""
    experiment = deployed.experiment
    if not experiment.fit.lora.rank:
        return deployed.params
    source = experiment.model
    base = source.load(deployed.held)
    return merged(source.skeleton("", ()), base, deployed.params, experiment.fit.lora)


def _plain(folder: Path, deployed: Deployed) -> list[str]:
    """Write the merged model with one number of experts in all layers, and return notes."""
    source = deployed.experiment.model
    model = source.build(_whole(deployed), "", (), deployed.held, deployed.gates)
    try:
        config, length = uniform(fold_gates(model))
    except ModelError as error:
        raise ConfigError(f"{error}; use --format consilium, which keeps every layer as it is") from error
    backbone = model.backbone  # `uniform` may have replaced it by a wider one
    backbone.config = config
    if backbone.can_generate():
        backbone.generation_config = _generation(source.location, source.revision, config)
    with quietly():
        backbone.save_pretrained(folder)
    _heads(folder, deployed, text_config(config).hidden_size)
    notes, is_rounded = [], source.dtype != "float32"
    if any(factor != 1 for factor in deployed.gates.scale.values()):
        notes.append(
            "the constants that keep the gates of a slice on the scale of the full model (fit.gates) were "
            "multiplied into the experts" + (f", which rounds them to {source.dtype}" if is_rounded else "")
        )
    if length is not None:
        notes.append(
            f"the layers serve up to {length} to {config.expert_capacity} tokens per expert, and the configuration "
            f"has the largest: the same model for texts of up to {length} tokens"
        )
    if (width := text_config(config).hidden_size) != text_config(source.config).hidden_size:
        notes.append(
            f"the hidden size is {width} in place of {text_config(source.config).hidden_size}, so that layers with "
            "different numbers of experts could be filled up to one number; the logits are the same"
            + (f" but for the rounding of {source.dtype}" if is_rounded else "")
        )
    if deployed.experiment.fit.lora.rank and is_rounded:
        notes.append(f"the adapters were merged into weights of {source.dtype}, which rounds them")
    return notes


def _adapters(folder: Path, deployed: Deployed) -> list[str]:
    """Write the adapters for the base that the run began with, including trained routers, and return notes."""
    experiment, source = deployed.experiment, deployed.experiment.model
    lora = experiment.fit.lora
    if not lora.rank:
        raise ConfigError("the run trained whole experts, no adapters (fit.lora.rank 0): use --format transformers")
    if lora.rule in FOLDS:
        raise ConfigError(
            f"the rule {lora.rule!r} changed the base itself, so adapters alone are not the model: use --format "
            "transformers"
        )
    experts = deployed.held
    if experts is not None and any(len(ids) < source.counts[block] for block, ids in experts.items()):
        raise ConfigError(
            f"adapters fit the whole base, and {deployed.client} holds a part of its experts: use --format transformers"
        )
    model = source.build(source.load() | deployed.params, "", ())
    rank = next(len(tensor) for key, tensor in deployed.params.items() if is_adapter(key) and key.endswith("_A"))
    load_flat(add_lora(model, replace(lora.at(rank), base="full")), deployed.params)
    save_adapters(model, folder, source.path)
    if lora.router and not source.family.dense:
        _add_routers(folder, model)
    _heads(folder, deployed, text_config(source.config).hidden_size)
    return [] if lora.base == "full" else ["the run had its base in 4 bits (NF4): load the base so, or scores differ"]


def _add_routers(folder: Path, model: TaskModel) -> None:
    """Add routers that were trained in full as PEFT's `modules_to_save`."""
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    paths = [f"{block}.{model.family.router}" for block in model.blocks()]
    for path in paths:
        router = model.backbone.get_submodule(path)
        for name, tensor in router.state_dict().items():
            tensors[f"base_model.model.{path}.{name}"] = tensor.detach().cpu().contiguous()
    config_path.write_text(json.dumps({**config, "modules_to_save": paths}, indent=2) + "\n")
    save_file(tensors, weights_path, {"format": "pt"})


def _sub_moe(folder: Path, deployed: Deployed) -> list[str]:
    source = deployed.experiment.model
    if len(deployed.labels) > 1:
        raise ConfigError("a directory with a keep-map has one task: name a client, --client")
    task, labels = next(iter(deployed.labels.items()), ("", ()))
    model = source.build(_whole(deployed), task, labels, deployed.held, deployed.gates)
    experts = deployed.held or {block: tuple(range(n)) for block, n in source.counts.items()}
    save_sub_moe(folder, source, model, experts)
    return ["plain transformers cannot read it: consilium.moe.files.load_sub_moe does"]


def _heads(folder: Path, deployed: Deployed, width: int) -> None:
    """Write heads for a hidden state of `width`; dimensions that training did not know have weight zero."""
    tensors = {}
    for task, labels in deployed.labels.items():
        for leaf in ("weight", "bias"):
            rows = [deployed.params[f"head.{task}.{label}.{leaf}"] for label in labels]
            tensors[f"{task}.{leaf}"] = torch.stack(rows)
        weight_CD = tensors[f"{task}.weight"]
        tensors[f"{task}.weight"] = nn.functional.pad(weight_CD, (0, width - weight_CD.shape[1]))
    if tensors:
        save_file(tensors, folder / "head.safetensors", {"format": "pt"})
        labels_by_task = {task: list(labels) for task, labels in deployed.labels.items()}
        (folder / "labels.json").write_text(json.dumps(labels_by_task, indent=1, ensure_ascii=False) + "\n")


def _generation(location: str, revision: str | None, config: object) -> GenerationConfig:
    """Return the base's own generation settings, else those in its configuration."""
    try:
        return GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(config)
