"""Tiny models of a configuration: the same classes and switches, with few layers and narrow tensors.

`moe.discovery` finds a model's structure on such a twin, which takes milliseconds to build and run, however large the
model is. Fields that name a size are lowered, and all others are kept. At least one layer of each kind is kept, so a
twin of a hybrid model has its attention, its state space layer, its dense and its sparse block.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

__all__ = ["EXPERTS", "shrink", "twin"]

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Fields that hold the number of routed experts per layer."""
WIDTH, INNER, HEADS, HEAD, RANK, VOCABULARY = 32, 16, 4, 16, 16, 160

_AT_MOST = {
    **dict.fromkeys(EXPERTS, 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "share_expert_num"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 4),
    **dict.fromkeys(
        ("hidden_size", "d_model", "moe_hidden_size", "out_hidden_size", "moe_latent_size", "n_embd"), WIDTH
    ),
    **dict.fromkeys(("projection_dim", "text_hidden_size", "router_hidden_size", "adapter_dim"), WIDTH),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "model_max_length", "n_positions", "rel_extent"), 256),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "block_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("ssm_state_size", "mamba_d_state", "state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("depth", "o_groups", "n_groups", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_layers_per_attn_res_block"), 2),
    **dict.fromkeys(("index_topk", "expert_capacity"), 256),
    "image_size": 64,
    "output_channels": WIDTH,
    "mlp_dim": INNER,
    "d_kv": 8,
    "d_rel": 8,
    "d_ff": INNER,
    "mamba_dt_rank": 4,
    "zero_expert_num": 2,
}
_ENDS = (
    ("key_value_heads", 2),
    ("_heads", HEADS),
    ("head_dim", HEAD),
    ("lora_rank", RANK),
    ("intermediate_size", INNER),
    ("ffn_hidden_size", INNER),
    ("expert_dim", INNER),
)
"""(ending of a field name, largest value in a twin); the first ending that matches applies."""
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers")
LAYERS = 3


def shrink(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Return a configuration of the same class with small sizes.

    Args:
        config: the configuration.
        changes: fields of the text configuration that get these values instead.
    """
    return _shrunk(config, config.get_text_config(), changes)


def _shrunk(config: PretrainedConfig, text: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    fields = _small(config, changes if config is text else {})
    parts = {name: _shrunk(part, text, changes) for name, part in _parts(config).items()}
    return type(config)(**fields, **parts)


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    return {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}


def _small(config: PretrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    fields = config.to_dict()
    layer_field = next((name for name in _LAYERS if isinstance(fields.get(name), int)), None)
    total = fields[layer_field] if layer_field else 0
    layer_ids = _kept_layers(fields, total)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, list) and total > 1 and len(value) == total:
            is_numbering = value == list(range(total))  # A list of layer numbers is renumbered.
            small[name] = list(range(len(layer_ids))) if is_numbering else [value[i] for i in layer_ids]
        elif name == "per_layer_config" and value:
            small[name] = {new_id: _sizes(value[old_id], fields) for new_id, old_id in _pairs(layer_ids, value)}
        elif name in _LAYERS and layer_field:
            small[name] = min(len(layer_ids), value)
        elif not name.startswith("_") and name not in ("model_type", "transformers_version"):
            small[name] = _size(name, value)
    small = _consistent(small, fields) | changes
    return {name: value for name, value in small.items() if name not in _parts(config)}


def _kept_layers(given: dict[str, Any], total: int) -> list[int]:
    """Return the layers that a twin keeps: one or two of each kind, and at least `LAYERS` if there are as many."""
    lists = [value for value in given.values() if isinstance(value, list) and len(value) == total and total > 1]
    parts = given.get("per_layer_config") or {}
    kinds: dict[str, list[int]] = {}
    for i in range(total):
        layer_values = [value[i] for value in lists if isinstance(value[i], str | bool) or value[i] in (0, 1)]
        kinds.setdefault(repr((layer_values, i in parts or str(i) in parts)), []).append(i)
    per_kind = 2 if len(kinds) < LAYERS else 1
    layer_ids = {i for layers in kinds.values() for i in layers[:per_kind]} if len(kinds) > 1 else set()
    layer_ids |= set([i for i in range(total) if i not in layer_ids][: max(min(LAYERS, total) - len(layer_ids), 0)])
    return sorted(layer_ids)


def _pairs(kept: list[int], parts: dict[Any, Any]) -> list[tuple[int, Any]]:
    """Return (new number, key) of the kept layers that have a configuration of their own."""
    keys = {int(key): key for key in parts}
    return [(new_id, keys[old_id]) for new_id, old_id in enumerate(kept) if old_id in keys]


def _sizes(part: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the small sizes of a layer with a configuration of its own, within the whole configuration `given`."""
    sizes = _consistent({name: _size(name, value) for name, value in part.items()}, part)
    if part.get("head_dim") and part["head_dim"] == given.get("qk_nope_head_dim", 0) + given.get("qk_rope_head_dim", 0):
        sizes["head_dim"] = _size("qk_nope_head_dim", given["qk_nope_head_dim"]) + HEAD
    return sizes


def _size(name: str, value: Any) -> Any:
    if name in _IDS:
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
        return None if value is None else ids[name]
    if isinstance(value, list) and value and all(type(item) is int for item in value) and name.endswith("_size"):
        return [_size(name, item) for item in value]
    if type(value) is not int:
        return copy.deepcopy(value)
    if name in EXPERTS and value == 1:  # In a slice with one expert, several are needed to recognise experts.
        return 4
    if name in _AT_MOST:
        return min(value, _AT_MOST[name])
    limit = next((limit for end, limit in _ENDS if name.endswith(end)), None)
    return value if limit is None else min(value, limit)


def _consistent(small: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Adjust sizes that depend on each other, and return all sizes."""
    if small.get("n_group") or small.get("num_expert_group"):
        groups = small.get("n_group") or small.get("num_expert_group")
        if small.get("topk_group"):
            small["topk_group"] = min(small["topk_group"], max(groups // 2, 1))
    if "qk_nope_head_dim" in small and "qk_rope_head_dim" in small:
        key_width = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
        for name in ("qk_head_dim", "head_dim"):
            if given.get(name) == key_width:
                small[name] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    rope = small.get("rope_parameters")
    for part in [rope, *rope.values()] if isinstance(rope, dict) else ():
        if isinstance(part, dict) and part.get("mrope_section"):
            head = small.get("head_dim") or WIDTH // HEADS
            pairs = int(head * (part.get("partial_rotary_factor") or 1.0)) // 2
            part["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    heads, width = small.get("num_attention_heads"), small.get("hidden_size")
    if heads and width and not given.get("head_dim"):  # The width of a head is the model's width divided by `heads`.
        small["num_attention_heads"] = max(n for n in range(1, heads + 1) if width % n == 0)
    if given.get("num_key_value_heads") and given.get("num_key_value_heads") == given.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    for name, value in {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2}.items():
        if name in small:
            small[name] = value
    small.pop("moe_layers", None)
    return small


def twin(config: PretrainedConfig, cls: type, seed: int = 0) -> nn.Module:
    """Return a live tiny model of a configuration in float32, in evaluation mode; global random state is restored.

    Args:
        config: a configuration from `shrink`.
        cls: the transformers class.
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _stir(name, tensor)
    return model.eval()


@torch.no_grad()
def _stir(name: str, tensor: torch.Tensor) -> None:
    """Randomise tensors that have almost no effect in a new model, such as biases of a choice, which are 0."""
    if tensor.is_floating_point() and tensor.ndim and "bias" in name and not tensor.requires_grad:
        tensor.normal_(std=0.1)
    if name == "lm_head.weight":  # Large logits make a cap of the logits visible.
        tensor.mul_(100)
