"""LoRA on the experts alone, by PEFT, injected in place: module paths and hooks stay where they are."""

import re
import warnings

from torch import nn

from consilium.moe.model import TaskModel

__all__ = ["add_expert_lora"]


def add_expert_lora(model: TaskModel, rank: int) -> list[nn.Parameter]:
    """Freeze the model, attach LoRA adapters of this rank to every expert, leave the head trainable.

    The scale is 1 (alpha = rank). Adapters start as the identity: B is zero, so outputs do not change.

    Returns:
        The adapters' parameters.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import, and only stage one needs it

    family = model.family
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    paths = [f"{block}.{family.experts}" for block in model.blocks()]
    if family.layout == "modules":
        leaves = "|".join(family.lora_targets)
        joined = "|".join(re.escape(path) for path in paths)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"({joined})\..*\.({leaves})")
    else:
        targets = [f"{path}.{tensor}" for path in paths for tensor in family.lora_targets]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets)
    model_type = model.config.model_type
    model.config.model_type = "custom"  # keeps PEFT from rewriting expert paths for families it knows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model.backbone)
    finally:
        model.config.model_type = model_type
    return [p for name, p in model.backbone.named_parameters() if "lora_" in name]
