"""Reading and writing adapters on experts in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Fused tensors: lora_A.weight [E R, X] is expert-major and lora_B.weight [Y, R E] is rank-major. PEFT nests one wrapper
per fused tensor, with the first target innermost, so all paths but the last contain `base_layer`. Modules (Switch): the
file has one pair per expert. Experts are numbered by their local places. Routers and heads are trained in full and are
not part of the file.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from consilium.errors import ModelError
from consilium.moe.addressing import all_experts
from consilium.moe.lora import Lora, add_lora, peft_targets
from consilium.moe.model import TaskModel

__all__ = ["load_adapters", "save_adapters"]


def _peft_keys(model: TaskModel) -> Iterator[tuple[str, list[str]]]:
    """Yield each key of the file with the flat names of its adapters, both without `lora_A` and what follows it."""
    family = model.family
    names = {name.rsplit(".", 1)[0] for name in model.adapters.names}
    if family.dense:
        yield from ((f"base_model.model.{name}", [name]) for name in sorted(names))
    for block, places in all_experts(model).items():
        path = f"base_model.model.{block}.{family.experts}"
        targets = [t for t in family.lora_targets if f"{block}.experts.0.{t}" in names]
        for depth, target in enumerate(reversed(targets)):
            adapter_names = [f"{block}.experts.{place}.{target}" for place in places]
            if family.layout == "modules":
                for place in places:
                    yield f"{path}.{family.module.format(place)}.{target}", [adapter_names[place]]
            else:
                yield path + ".base_layer" * depth, adapter_names


def save_adapters(model: TaskModel, folder: Path, base: str = "") -> None:
    """Write the adapters of a model into a directory in PEFT's format.

    Args:
        base: name or directory of the base model, written into the configuration.
    """
    from peft import LoraConfig

    adapters, tensors = model.adapters.named(), {}
    for key, adapter_names in _peft_keys(model):
        a_ERX = torch.stack([adapters[f"{name}.lora_A"].detach() for name in adapter_names])
        b_EYR = torch.stack([adapters[f"{name}.lora_B"].detach() for name in adapter_names])
        tensors[f"{key}.lora_A.weight"] = a_ERX.flatten(0, 1).cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = b_EYR.permute(1, 2, 0).flatten(1).cpu().contiguous()
    rank = next(iter(adapters.values())).shape[0]
    targets = tuple(t for t in model.family.lora_targets if any(f".{t}.lora_A" in name for name in adapters))
    config = LoraConfig(
        r=rank, lora_alpha=model.adapters.scale * rank, base_model_name_or_path=base, **peft_targets(model, targets)
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def load_adapters(model: TaskModel, folder: Path, router: bool = True) -> TaskModel:
    """Load adapters written by PEFT or `save_adapters` into a live model.

    Raises:
        ModelError: if the method is not plain LoRA on the experts, or if the tensors do not fit the model.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    unsupported_keys = [
        key for key in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or unsupported_keys:
        raise ModelError(
            f"{str(folder)!r} is not plain LoRA ({', '.join(unsupported_keys) or config.get('peft_type')})"
        )
    target_names = config.get("target_parameters") or [re.sub(r".*\\\.", "", str(config.get("target_modules")))]
    targets = tuple(t for t in model.family.lora_targets if any(re.search(rf"\b{t}\b", name) for name in target_names))
    add_lora(model, Lora(config["r"], config["lora_alpha"], targets, router))
    adapters, used_keys = model.adapters.named(), set()
    for key, adapter_names in _peft_keys(model):
        try:
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            a_ERX, b_EYR = a.view(len(adapter_names), config["r"], -1), b.view(len(b), config["r"], -1).permute(2, 0, 1)
            for i, name in enumerate(adapter_names):
                adapters[f"{name}.lora_A"].data.copy_(a_ERX[i])
                adapters[f"{name}.lora_B"].data.copy_(b_EYR[i])
        except (KeyError, RuntimeError, IndexError) as error:
            raise ModelError(f"{str(folder)!r} does not fit the model at {key!r}: {error}") from error
        used_keys |= {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    if unsupported_keys := sorted(set(tensors) - used_keys):
        raise ModelError(f"{str(folder)!r} adapts more than experts, e.g. {unsupported_keys[0]!r}")
    return model
