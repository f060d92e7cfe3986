"""The memory of the layers of each family, counted from the shapes: one row for all decoders, one for Switch.

The counts are the tensors that autograd saves in the families' own code, in elements of the weights' dtype.
`tests/moe/test_parts.py` compares the two. Symbols: B examples, n tokens per sequence (S of the source), D width, F
width inside an expert, H heads, K experts per token, E experts held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

__all__ = ["PARTS", "Cost", "Mode", "Parts", "decoder"]

Mode = Literal["full", "lora", "peft", "forward"]
"""Training of all parameters; of adapters and routers (`moe.lora.add_lora`); of PEFT's adapters (`add_expert_lora`); no
training."""


@dataclass(frozen=True)
class Cost:
    """The elements that a part of a model holds, for B sequences of n tokens and a source of S tokens.

    B * (n * (token + slot * K + choice * E + n * pair + S * cross) + S * source)  +  n * n * bias
    """

    token: int = 0
    slot: int = 0
    choice: int = 0
    pair: int = 0
    source: int = 0
    cross: int = 0
    bias: int = 0

    def __call__(self, B: int, n: int, S: int, K: int = 0, E: int = 0) -> int:
        per_token = self.token + self.slot * K + self.choice * E + n * self.pair + S * self.cross
        return B * n * per_token + B * S * self.source + n * n * self.bias


@dataclass(frozen=True)
class Parts:
    """The elements that each part of a stack of layers holds: saved for backward, or alive at once ("forward").

    Args:
        attention: norm, self-attention, residual.
        sparse: norm, router and experts, residual.
        dense: norm, feed-forward, residual.
        cross: norm, attention over the encoder's output, residual; decoder layers only.
        ends: embedding, final norm, and tensors that all layers share.
        last: temporaries of the last layer, on top of all that is saved.
        chosen: `sparse` if `moe.experts` computes the experts and saves no slots. (For "lora", `moe.experts` also
            computes `sparse`, and saves the tensors between the matrices.)
        expert: temporaries of the backward pass of `moe.experts`, which runs through one expert after the other, in the
            case that all tokens choose the same one.
    """

    attention: Cost
    sparse: Cost
    dense: Cost = Cost()
    cross: Cost = Cost()
    ends: Cost = Cost()
    last: Cost = Cost()
    chosen: Cost = Cost()
    expert: Cost = Cost()


def _switch(c: Any, w: int) -> dict[Mode, Parts]:
    """Return the parts of Switch: T5 layers, eager attention, top-1.

    In the code, d is 1 with dropout, where masks are saved as floats, and j is 1 with jitter.

    Args:
        c: the configuration.
        w: 1 for weights below 32 bits; norms and routers then keep float32 copies of their inputs (2 elements each).
    """
    D, F, H, inner = c.d_model, c.d_ff, c.num_heads, c.num_heads * c.d_kv
    d, j = int(c.dropout_rate > 0), int(c.router_jitter_noise > 0)
    # norm: input, scaled input, output (the input of the next matrices); dropout mask
    trained_norm = (3 + d + 2 * w) * D
    frozen_norm = (1 + d + 2 * w) * D  # input of the norm and mask: frozen weights need no input saved
    noise = (j + 3 * w) * D  # of the router
    scores = (1 + 2 * d) * H  # softmax, and with dropout its mask and product
    hidden = (1 + 2 * d) * F  # activation, and with dropout its mask and product
    slot = 3 * D + hidden  # tokens gathered for the expert, its output before and after the gate
    expert = Cost(token=6 * D + 2 * hidden + F)  # gathered, gradients of input and output; twice the inner tensors
    return {
        "full": Parts(
            attention=Cost(token=trained_norm + 4 * inner, pair=scores),  # queries, keys, values, attention output
            cross=Cost(token=trained_norm + 2 * inner, source=2 * inner, cross=scores),
            dense=Cost(token=trained_norm + hidden),
            sparse=Cost(token=trained_norm + noise, slot=slot, choice=3),  # router softmax twice, logits for the tap
            ends=Cost(token=(3 + 2 * d + 2 * w) * D, bias=H + 2),  # norm, output, masks; position bias and buckets
            last=Cost(token=2 * D),
            chosen=Cost(token=trained_norm + noise, slot=4, choice=3),
            expert=expert,
        ),
        "lora": Parts(
            attention=Cost(token=frozen_norm + 3 * inner, pair=scores),
            cross=Cost(token=frozen_norm + inner, source=2 * inner, cross=scores),
            dense=Cost(token=frozen_norm + (1 + d) * F),
            sparse=Cost(token=frozen_norm + D + noise, slot=F + 4, choice=3),
            ends=Cost(token=(2 + d + 2 * w) * D, bias=H + 2),
            chosen=Cost(token=frozen_norm + D + noise, slot=4, choice=3),
            expert=expert,
        ),
        "peft": Parts(
            attention=Cost(token=frozen_norm + 3 * inner, pair=scores),
            cross=Cost(token=frozen_norm + inner, source=2 * inner, cross=scores),
            dense=Cost(token=frozen_norm + (1 + d) * F),
            sparse=Cost(token=frozen_norm + D + noise, slot=slot, choice=3),
            ends=Cost(token=(2 + d + 2 * w) * D, bias=H + 2),
            last=Cost(token=4 * D + F),
        ),
        "forward": Parts(  # two sets of scores: one operation's input and output
            attention=Cost(token=2 * D + 6 * inner, pair=2 * H),
            cross=Cost(token=2 * D + 2 * inner, source=4 * inner, cross=2 * H),
            dense=Cost(token=3 * D + 2 * F),
            sparse=Cost(token=3 * D, slot=2 * D + 2 * F, choice=6),  # three int64 dispatch masks
            ends=Cost(token=D, bias=H + 2),
        ),
    }


def decoder(
    c: Any, w: int, *, norm: int = 3, query_norm: bool = False, dropout: bool = True, copied: int = 0, gate: int = 4
) -> dict[Mode, Parts]:
    """Return the parts of a decoder with gated experts.

    The decoder has fused or latent attention, and any number of shared experts and dense layers. Fused attention saves
    no scores. Attention is not fused with dropout, with sinks (gpt-oss), or with values of another width than keys
    (DeepSeek). Keys and values are counted as repeated for every query head, because padding causes that.

    Args:
        c: the configuration.
        w: 1 for weights below 32 bits, see `_switch`.
        norm: elements per channel that a norm saves: input, scaled input, output (LayerNorm: input, output).
        query_norm: queries and keys always have norms; otherwise only if `use_qk_norm` is set.
        dropout: attention applies the dropout that the configuration names.
        copied: 1 if the output projection must copy the output of fused attention into another order.
        gate: elements per channel between the two matrices of an expert: gate and up, activated gate, product.
    """
    D, H = c.hidden_size, c.num_attention_heads
    F = _inner(c)
    shared_width, d = _shared(c, F), int(dropout and (getattr(c, "attention_dropout", 0.0) or 0.0) > 0)
    dense_width = max(_widths(c, "intermediate_size", "ffn_hidden_size")) or F
    unfused_heads = H if c._attn_implementation != "sdpa" or hasattr(c, "kv_lora_rank") else 0
    scores = (1 + 2 * d) * H if unfused_heads or d else 1  # 1: the padding mask, as numbers
    trained_attention, frozen_attention, live_attention = _attention(
        c, w, query_norm or getattr(c, "use_qk_norm", False), copied, bool(scores > 1)
    )
    slot, choice = 2 * D + gate * F + 12, 5  # gathered, output; indices; logits, softmax, masks of groups
    trained_norm, frozen_norm = (norm + w) * D, (1 + w) * D
    expert = Cost(token=6 * D + (gate + 3) * F)  # gathered, gradients of input and output; twice the inner tensors
    shared_gate = D * hasattr(c, "shared_expert_intermediate_size")  # its output, before its own gate
    return {
        "full": Parts(
            attention=Cost(token=trained_norm + trained_attention, pair=scores),
            sparse=Cost(token=trained_norm + 4 * shared_width + shared_gate, slot=slot, choice=choice),
            dense=Cost(token=trained_norm + 4 * dense_width),
            ends=Cost(token=trained_norm),
            # weighted, reordered; freed before the ends
            last=Cost(token=-trained_norm, slot=2 * D, pair=2 * unfused_heads),
            chosen=Cost(token=trained_norm + 4 * shared_width + shared_gate, slot=4, choice=choice),
            expert=expert,
        ),
        "lora": Parts(
            attention=Cost(token=frozen_norm + frozen_attention, pair=scores),
            sparse=Cost(token=frozen_norm + D + 3 * shared_width + shared_gate, slot=2 * F + 4, choice=choice),
            dense=Cost(token=frozen_norm + 3 * dense_width),
            ends=Cost(token=frozen_norm + D),
            chosen=Cost(token=frozen_norm + D + 3 * shared_width + shared_gate, slot=4, choice=choice),
            expert=expert,
        ),
        "peft": Parts(
            attention=Cost(token=frozen_norm + frozen_attention, pair=scores),
            sparse=Cost(token=frozen_norm + 3 * shared_width + shared_gate, slot=slot, choice=choice),
            dense=Cost(token=frozen_norm + 3 * dense_width),
            ends=Cost(token=frozen_norm + D),
            last=Cost(token=-frozen_norm - D, slot=2 * D, pair=2 * unfused_heads),
        ),
        "forward": Parts(
            attention=Cost(token=3 * D + live_attention, pair=3 * unfused_heads or 1),
            sparse=Cost(token=2 * D + 3 * shared_width + shared_gate, slot=3 * D + (gate - 1) * F + 12, choice=choice),
            dense=Cost(token=3 * D + 3 * dense_width),
            ends=Cost(token=D),
        ),
    }


def _attention(c: Any, w: int, query_norm: bool, copied: int, scored: bool) -> tuple[int, int, int]:
    """Return elements per token between the norm and the output projection: saved when trained, when frozen; alive.

    Args:
        c: the configuration.
        w: 1 for weights below 32 bits.
        query_norm: queries and keys have norms.
        copied: see `decoder`.
        scored: attention saves its scores and not its output, which only a trained output projection needs.
    """
    H = c.num_attention_heads
    if hasattr(c, "kv_lora_rank"):  # latents with their norms; combined queries and keys, values, attention output
        query, value = H * (c.qk_nope_head_dim + c.qk_rope_head_dim), H * c.v_head_dim
        latent_width = c.kv_lora_rank + (getattr(c, "q_lora_rank", None) or 0)
        saved_size = 2 * query + value + c.qk_rope_head_dim
        return saved_size + value + (3 + w) * latent_width, saved_size + (1 + w) * latent_width, 4 * (query + value)
    size = getattr(c, "head_dim", None) or c.hidden_size // H
    query, key = H * size, (getattr(c, "num_key_value_heads", None) or H) * size
    qkv = (3 + w) * query + w * key + H  # queries, keys and values; sums of the softmax
    norms = query + key if query_norm else 0  # before and after the norm; if frozen, only its input
    trained_size = qkv + query * (1 if scored else 1 + copied) + 2 * norms
    return trained_size, qkv + norms + (0 if scored else query), 4 * (query + max(query, key))


def _widths(c: Any, *names: str) -> list[int]:
    """Return the widths that a configuration has under these names; for a list of widths, the largest counts."""
    values = [getattr(c, name, None) for name in names]
    return [max(value) if isinstance(value, list | tuple) else int(value) for value in values if value] or [0]


def _inner(c: Any) -> int:
    """Return the width inside an expert."""
    widths = _widths(c, "moe_intermediate_size", "expert_ffn_hidden_size")
    return max(widths) or max(_widths(c, "intermediate_size"))


def _shared(c: Any, F: int) -> int:
    """Return the width of the shared experts together."""
    count_names = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
    count = max(getattr(c, name, None) or 0 for name in count_names)
    width_names = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    return max([*_widths(c, *width_names), count * F])


PARTS: dict[str, Callable[[Any, int], dict[Mode, Parts]]] = {
    "switch_transformers": _switch,
    "olmoe": partial(decoder, query_norm=True),
    "mixtral": decoder,
    "qwen2_moe": decoder,
    "qwen3_moe": partial(decoder, query_norm=True),
    "granitemoe": decoder,
    "phimoe": partial(decoder, norm=2),
    "deepseek_v2": decoder,
    "deepseek_v3": decoder,
    "gpt_oss": partial(decoder, gate=7),
    "ernie4_5_moe": partial(decoder, dropout=False),
    "glm4_moe": partial(decoder, copied=1),
}
"""Model type -> function from a configuration and w (1 for weights below 32 bits, else 0) to the memory of layers."""
