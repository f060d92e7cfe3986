"""A constant in the hidden state, so that a router without a bias can have experts that always lose.

A router row w gives the logit w . h, and h = g * x / rms(x) has no coordinate of which the sign is known. So the model
gets some more hidden coordinates, all zero but one, which the embedding sets to c > 0 for every token and no layer
writes. An RMS norm over D' = D + more coordinates then divides by

    (sum x^2 + c^2) / D' + eps'  =  D/D' (sum x^2 / D + eps)      for  c^2 = eps D / 2,  eps' = eps D / (2 D')

so with weights g sqrt(D/D') it gives what the old one gave: the constant and the new epsilon take the place of the old
epsilon, exactly. Every norm has weight 0 at the constant, but those before a sparse block, of which the output there
is then positive for every token, and a row with -ROW there and 0 elsewhere has a logit below any other. All other new
entries of the weights are zero.

Norms of queries and keys have the same epsilon and no constant: s q in place of q, s^2 = eps' n' / (eps n), leaves them
what they were (n their width). Where they are as wide as the hidden state (OLMoE), whole attention heads of zeros are
added, so that heads keep their size; elsewhere the configuration says `head_dim`.
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
"""Weight of the norms before sparse blocks at the constant, and minus the weight of a new router row there: the logit
is -ROW GAIN c / rms(x), below -1e5 up to an rms of 10,000 at the sizes in use, and finite in float32 and bfloat16."""
BEFORE = "post_attention_layernorm"
"""The norm before a sparse block, beside it, in all families that this is for."""


def widens(model: TaskModel) -> bool:
    """Whether this can be done: norms before all sparse blocks that do not subtract a mean."""
    return all(type(_before(model.backbone, block)).__name__.endswith("RMSNorm") for block in model.blocks())


def widen(model: TaskModel, config: Any, counts: Mapping[str, int]) -> None:
    """Widen a model in place, and its configuration, so that of every block the experts from `counts` on lose always.

    Args:
        model: with a backbone whose blocks are already filled up to one number of experts.
        config: with that number; gets the new sizes.
    """
    old, width, eps = model.backbone, config.hidden_size, config.rms_norm_eps
    _grow(config, old)
    constant = math.sqrt(eps * width / 2)
    config.rms_norm_eps = eps * width / (2 * config.hidden_size)
    with init_empty_weights(include_buffers=False), no_init_weights():
        new = type(old)._from_config(config, dtype=model.dtype)
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    state = {name: _padded(tensor.detach(), shapes[name]) for name, tensor in old.state_dict().items()}
    norms = dict(old.named_modules())
    for path, norm in new.named_modules():
        if type(norm).__name__.endswith("RMSNorm") and norm.variance_epsilon != norms[path].variance_epsilon:
            _rescale(state, path, norms[path], norm)
    embedding = next(name for name, module in new.named_modules() if module is new.get_input_embeddings())
    state[f"{embedding}.weight"][:, width] = constant / getattr(config, "embedding_multiplier", 1.0)
    for block, count in counts.items():
        state[f"{_beside(block)}.weight"][width] = GAIN
        state[f"{block}.{model.family.router}.weight"][count:, width] = -ROW
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    model.backbone = new


def _grow(config: Any, backbone: nn.Module) -> None:
    """Set the new hidden size, a multiple of the number of heads, and heads of the old size."""
    width, heads = config.hidden_size, config.num_attention_heads
    norms = {path.rpartition(".")[2]: module for path, module in backbone.named_modules()}
    if "q_norm" in norms and norms["q_norm"].weight.numel() == width:
        shared = heads // config.num_key_value_heads
        config.hidden_size += shared * (width // heads)
        config.num_attention_heads += shared
        config.num_key_value_heads += 1
        return
    if getattr(config, "kv_lora_rank", None) is None:  # of latent attention the heads have sizes of their own
        config.head_dim = getattr(config, "head_dim", None) or width // heads
    config.hidden_size += math.lcm(heads, 8)


def _rescale(state: dict[str, Tensor], path: str, old: nn.Module, new: nn.Module) -> None:
    """Weights with which the new norm, of another width or epsilon, gives what the old one gave."""
    n, wide = old.weight.numel(), new.weight.numel()
    state[f"{path}.weight"] *= math.sqrt(n / wide)
    parent, _, name = path.rpartition(".")
    if name in ("q_norm", "k_norm"):
        scale = math.sqrt(new.variance_epsilon * wide / (old.variance_epsilon * n))
        for leaf in ("weight", "bias"):
            key = f"{parent}.{name[0]}_proj.{leaf}"
            if key in state:
                state[key] *= scale


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A copy, with zeros at the ends of its dimensions."""
    grown = tensor.new_zeros(shape)
    grown[tuple(slice(n) for n in tensor.shape)] = tensor
    return grown


def _before(backbone: nn.Module, block: str) -> nn.Module | None:
    try:
        return backbone.get_submodule(_beside(block))
    except AttributeError:
        return None


def _beside(block: str) -> str:
    return f"{block.rpartition('.')[0]}.{BEFORE}"
