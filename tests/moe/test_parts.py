"""What the layers of every decoder hold, counted against what autograd really saves in one more layer of each kind."""

import pytest
import tiny
import torch
import transformers
from torch.nn import functional as F

from consilium.moe.experts import Experts
from consilium.moe.lora import Lora, add_expert_lora, add_lora
from consilium.moe.model import TaskModel
from consilium.moe.parts import PARTS
from consilium.moe.routing import Tap

DECODERS = [name for name in tiny.FAMILIES if name != "switch_transformers"]
B, N, K, E = 3, 14, 2, 8
WIDE = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "first_k_dense_replace": 0,
    "mlp_only_layers": [], "moe_layer_start_index": 0, "q_lora_rank": 28, "kv_lora_rank": 20, "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}  # fmt: skip
"""Sizes that differ from each other; a family takes from these what it has. All layers are sparse."""


def model_of(model_type, layers, mode, dropout):
    settings = tiny.configuration(model_type).to_dict()
    wide = {key: value for key, value in WIDE.items() if key in settings}
    wide |= {"num_hidden_layers": layers, "attention_dropout": dropout, "head_dim": 16} | {
        key: 40 for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    }
    if "kv_lora_rank" in settings:
        wide |= {"num_key_value_heads": 4, "head_dim": settings.get("head_dim")}
    wide = {key: value for key, value in wide.items() if key in settings}
    family = tiny.FAMILIES[model_type]
    config = tiny.configuration(model_type, **wide)
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:1] * layers
    cls = getattr(transformers, family.classes["classification"])
    model = TaskModel(cls._from_config(config, dtype=torch.float32), family, "t", ("a", "b"), torch.float32).train()
    if mode == "peft":
        add_expert_lora(model, 2)
    if mode == "lora":
        add_lora(model, Lora(2))
    return model


def saved(model, chosen):
    """Elements per sequence that a forward pass leaves for the backward pass, and for the loss, parameters apart."""
    ids = torch.randint(2, 100, (B, N), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    experts = Experts(model) if chosen else None
    with Tap(model) as tap, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if experts:
            experts.__enter__()
        with tap.batch(batch):
            logits, labels = model(batch)
        loss = F.cross_entropy(logits, labels) + tap.balance_loss()
        for logits_TE in tap.logits.values():
            keep(logits_TE)
        if experts:
            experts.__exit__()
    del loss
    return sum(storage.nbytes() for storage in held.values()) / 4 / B


@pytest.mark.parametrize(
    ("mode", "dropout"), [("full", 0.0), ("full", 0.1), ("chosen", 0.0), ("lora", 0.0), ("peft", 0.1)]
)
@pytest.mark.parametrize("model_type", DECODERS)
def test_one_more_layer_saves_what_is_said(model_type, mode, dropout):
    """At most 2 % less and 5 % more; adapters of PEFT also keep the merged weights of their layer."""
    three, two = (model_of(model_type, layers, mode, dropout) for layers in (3, 2))
    parts = PARTS[model_type](three.config, 0)["full" if mode == "chosen" else mode]
    sparse = parts.chosen if mode == "chosen" else parts.sparse
    said = parts.attention(1, N, N) + sparse(1, N, N, K, E)
    if mode == "peft":
        family, block = three.family, three.blocks()[next(iter(three.blocks()))]
        experts = block.get_submodule(family.experts)
        weights = [p for name, p in experts.named_parameters() if "lora_" not in name and "bias" not in name]
        said += sum(p.numel() for p in weights) / B
    found = saved(three, mode == "chosen") - saved(two, mode == "chosen")
    assert 0.98 * found <= said <= 1.05 * found
