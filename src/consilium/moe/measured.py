"""The memory of layers that `parts.PARTS` has no row for, measured on a tiny twin.

The measurement takes the formula for decoders and multiplies it by a share. The share is the size of the tensors that a
tiny model of the same configuration saves for its backward pass, divided by the formula's result for that model. State
space layers and linear attention keep the sizes of their states, because the saved tensors depend on them. The share is
at least 1, and `MARGIN` is added: the result is a bound, not a count.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from consilium.machine import quietly
from consilium.moe.discovery import Key, family_of
from consilium.moe.experts import Experts
from consilium.moe.families import Family, experts_per_token
from consilium.moe.lora import Lora, add_lora
from consilium.moe.model import TaskModel, text_config
from consilium.moe.parts import Cost, Mode, Parts, decoder
from consilium.moe.routing import Tap
from consilium.moe.twin import shrink, twin

__all__ = ["measured_parts"]

MARGIN = 1.15
B, N = 2, 64
"""The number of sequences of the measured batch, and the number of tokens of each."""
STATES = ("ssm_state_size", "mamba_d_state", "state_size", "mamba_chunk_size", "chunk_size")


def measured_parts(config: PretrainedConfig, family: Family, w: int) -> dict[Mode, Parts]:
    """Return the memory of the layers, in elements of the weights' dtype.

    Args:
        config: the configuration of the model.
        family: the family of the model.
        w: 1 for weights below 32 bits.
    """
    shares = _shares(Key(config))
    parts = decoder(text_config(config), w)
    if family.dense:  # Adapters on all linear layers save the inputs of each.
        parts["lora"] = parts["peft"] = parts["full"]
    return {mode: _scale(part, shares[mode]) for mode, part in parts.items()}


@lru_cache(maxsize=32)
def _shares(key: Key) -> dict[Mode, float]:
    family = family_of(key.config)
    text = text_config(key.config)
    state_sizes = {name: getattr(text, name) for name in STATES if isinstance(getattr(text, name, None), int)}
    small_config = shrink(key.config, **state_sizes)
    form = "classification" if "classification" in family.classes else "text-to-text"
    share_by_mode: dict[str, float] = {}
    for mode in ("full", "lora") if family.dense else ("full", "lora", "chosen"):
        with quietly(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = twin(small_config, getattr(transformers, family.classes[form]))
            labels = ("a", "b") if form == "classification" else ()
            model = TaskModel(backbone, family, "t", labels, torch.float32).train()
            if mode == "lora":
                add_lora(model, Lora(2))
            share_by_mode[mode] = _saved(model, mode == "chosen") / _said(model, mode)
    largest_share = max(1.0, *share_by_mode.values()) * MARGIN
    return {mode: largest_share for mode in ("full", "lora", "peft", "forward")}


def _saved(model: TaskModel, chosen: bool) -> float:
    """Return the number of elements that a forward pass saves for the backward pass, without parameters."""
    ids = torch.randint(2, 100, (B, N), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if model.head is not None else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model_pointers = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved_storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_pointers:
            saved_storages[storage.data_ptr()] = storage
        return tensor

    saving_hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with Tap(model) as tap, saving_hooks, Experts(model) if chosen else nullcontext(), tap.batch(batch):
        logits, targets = model(batch)
        loss = F.cross_entropy(logits, targets)
    del loss
    logit_bytes = 3 * logits.numel() * 4  # These bytes belong to the logits, which are counted separately.
    return max(sum(storage.nbytes() for storage in saved_storages.values()) - logit_bytes, 0) / 4


def _said(model: TaskModel, mode: str) -> float:
    """Return the formula's number of elements for the same pass."""
    config = model.config
    parts = decoder(config, 0)["full" if mode == "chosen" or model.family.dense else mode]
    sparse_cost = parts.chosen if mode == "chosen" else parts.sparse
    blocks, layers = model.blocks(), int(config.num_hidden_layers)
    k, experts = experts_per_token(config), 8
    attention, dense, ends = (part(B, N, N) for part in (parts.attention, parts.dense, parts.ends))
    sparse_size = sparse_cost(B, N, N, k, experts)
    return layers * attention + max(layers - len(blocks), 0) * dense + len(blocks) * sparse_size + ends


def _scale(parts: Parts, share: float) -> Parts:
    def scaled(cost: Cost) -> Cost:
        values: Mapping[str, int] = {f.name: getattr(cost, f.name) for f in fields(Cost)}
        return Cost(**{name: math.ceil(v * share) if v > 0 else v for name, v in values.items()})

    return Parts(**{f.name: scaled(getattr(parts, f.name)) for f in fields(Parts)})
