"""A constant in the hidden state, so that a router without a bias can have experts that always lose.

A router row w gives the logit w . h, and h = g * x / rms(x) has no coordinate with a known sign. The model therefore
gets some more hidden coordinates. All are zero except one, which the embedding sets to c > 0 for every token and no
layer writes. An RMS norm over D' = D + more coordinates then divides by

    (sum x^2 + c^2) / D' + eps'  =  D/D' (sum x^2 / D + eps)      for  c^2 = eps D / 2,  eps' = eps D / (2 D')

With weights g sqrt(D/D') its output is that of the old norm: the constant and the new epsilon replace the old epsilon
exactly. Every norm has weight 0 at the constant, except those before a sparse block. Their output there is positive for
every token, so a row with -ROW there and 0 elsewhere has a logit below any other. All other new entries of the weights
are zero.

A layer norm (PhiMoE) has a bias, which can be the constant: weight 0, bias GAIN. It also subtracts the mean, which
would change with the number of coordinates. But its output does not depend on the mean of x, so all values written to
the hidden state (embeddings, attention, experts) are given mean 0 over its D entries. With eps' = eps D / D' and
weights g sqrt(D/D') its output is then that of the old norm.

Norms of queries and keys have the same epsilon and no constant. Replacing q by s q, with s^2 = eps' n' / (eps n),
preserves their output (n is their width). If they are as wide as the hidden state (OLMoE), whole attention heads of
zeros are added, so that heads keep their size. Otherwise the configuration names `head_dim`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from consilium.moe.model import TaskModel

__all__ = ["widen", "widens"]

GAIN, ROW = 1e3, 1e9
"""GAIN is the weight, at the constant, of the norms before sparse blocks. A new router row has the weight -ROW there.
The logit is -ROW GAIN c / rms(x), below -1e5 up to an rms of 10,000 at the sizes in use, and finite in float32 and
bfloat16."""
BEFORE = "post_attention_layernorm"
"""The norm before a sparse block, next to the block, in all families that this module supports."""


def widens(model: TaskModel) -> bool:
    """Return True if a model can be widened.

    There must be a norm before all sparse blocks. If it subtracts the mean, the embeddings must not be tied to the
    output, which must not be changed.
    """
    norms = [_before(model.backbone, block) for block in model.blocks()]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return all(_is_rms(norm) or (isinstance(norm, nn.LayerNorm) and not tied) for norm in norms)


def widen(model: TaskModel, config: Any, counts: Mapping[str, int]) -> None:
    """Widen a model and its configuration in place, so that in every block the experts from `counts` on always lose.

    Args:
        model: a model with a backbone where all blocks are already padded to one number of experts.
        config: a configuration with that number; it gets the new sizes.
        counts: block -> the number of experts before padding.
    """
    old_backbone, width, eps = model.backbone, config.hidden_size, config.rms_norm_eps
    _grow(config, old_backbone)
    mean_free = any(isinstance(norm, nn.LayerNorm) for norm in old_backbone.modules())
    config.rms_norm_eps = eps * width / config.hidden_size / (1 if mean_free else 2)
    with init_empty_weights(include_buffers=False), no_init_weights():
        new_backbone = type(old_backbone)._from_config(config, dtype=model.dtype)
    shapes = {name: tensor.shape for name, tensor in new_backbone.state_dict().items()}
    embedding = next(
        name for name, module in new_backbone.named_modules() if module is new_backbone.get_input_embeddings()
    )
    old_state = {name: tensor.detach() for name, tensor in old_backbone.state_dict().items()}
    if mean_free:
        old_state |= _centred(old_state, f"{embedding}.weight")
    state = {name: _padded(tensor, shapes[name]) for name, tensor in old_state.items()}
    norms = dict(old_backbone.named_modules())
    for path, norm in new_backbone.named_modules():
        if (_is_rms(norm) or isinstance(norm, nn.LayerNorm)) and _eps(norm) != _eps(norms[path]):
            _rescale(state, path, norms[path], norm)
    if not mean_free:
        constant = math.sqrt(eps * width / 2) / getattr(config, "embedding_multiplier", 1.0)
        state[f"{embedding}.weight"][:, width] = constant
    for block, count in counts.items():
        state[f"{_beside(block)}.{'bias' if mean_free else 'weight'}"][width] = GAIN
        state[f"{block}.{model.family.router}.weight"][count:, width] = -ROW
    new_backbone.load_state_dict(state, assign=True)
    new_backbone.tie_weights()
    model.backbone = new_backbone


def _grow(config: Any, backbone: nn.Module) -> None:
    """Set the new hidden size, a multiple of the number of heads, and keep the size of heads."""
    width, heads = config.hidden_size, config.num_attention_heads
    norms = {path.rpartition(".")[2]: module for path, module in backbone.named_modules()}
    if "q_norm" in norms and norms["q_norm"].weight.numel() == width:
        query_group = heads // config.num_key_value_heads
        config.hidden_size += query_group * (width // heads)
        config.num_attention_heads += query_group
        config.num_key_value_heads += 1
        return
    if getattr(config, "kv_lora_rank", None) is None:  # The heads of latent attention have sizes of their own.
        config.head_dim = getattr(config, "head_dim", None) or width // heads
    config.hidden_size += math.lcm(heads, 8)


def _rescale(state: dict[str, Tensor], path: str, old: nn.Module, new: nn.Module) -> None:
    """Scale weights so that the new norm, of another width or epsilon, gives the output of the old one."""
    old_width, new_width = old.weight.numel(), new.weight.numel()
    state[f"{path}.weight"] *= math.sqrt(old_width / new_width)
    parent, _, name = path.rpartition(".")
    if name in ("q_norm", "k_norm"):
        scale = math.sqrt(_eps(new) * new_width / (_eps(old) * old_width))
        for leaf in ("weight", "bias"):
            key = f"{parent}.{name[0]}_proj.{leaf}"
            if key in state:
                state[key] *= scale


def _centred(state: Mapping[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """Return the weights that write to the hidden state, changed so that their output has mean 0 over coordinates."""
    new_tensors = {embedding: state[embedding] - state[embedding].mean(1, keepdim=True)}
    for name, tensor in state.items():
        if name.rpartition(".")[0].endswith("o_proj"):  # [D, in], or a bias [D]
            new_tensors[name] = tensor - tensor.mean(0, keepdim=True)
        elif name.endswith("experts.down_proj"):  # [E, D, I]
            new_tensors[name] = tensor - tensor.mean(1, keepdim=True)
    return new_tensors


def _is_rms(norm: nn.Module | None) -> bool:
    return type(norm).__name__.endswith("RMSNorm")


def _eps(norm: nn.Module) -> float:
    return norm.variance_epsilon if _is_rms(norm) else norm.eps


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a copy with zeros at the ends of its dimensions."""
    padded_tensor = tensor.new_zeros(shape)
    padded_tensor[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded_tensor


def _before(backbone: nn.Module, block: str) -> nn.Module | None:
    try:
        return backbone.get_submodule(_beside(block))
    except AttributeError:
        return None


def _beside(block: str) -> str:
    return f"{block.rpartition('.')[0]}.{BEFORE}"
