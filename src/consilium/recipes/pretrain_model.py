"""The parts of the shipped model: tokenizer, architecture, initial weights, routing, and export."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersEncoderModel

if TYPE_CHECKING:
    from consilium.recipes.pretrain import Pretrain

__all__ = [
    "EOS",
    "MASK",
    "PAD",
    "balance_loss",
    "build",
    "byte_level_bpe",
    "export",
    "initialise",
    "sort_experts",
    "train_tokenizer",
    "watch_routers",
]

SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>")
PAD, EOS, UNK, MASK = range(4)


def byte_level_bpe(
    texts: list[str],
    vocabulary: int,
    special: Sequence[str],
    prefix: bool,
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Train byte-level BPE, which needs no unknown token, with every digit as a separate token.

    Args:
        vocabulary: tokens, the special ones included.
        special: the special tokens.
        prefix: add a space before each text.
        normalizer: applied to the texts; None: texts as they are.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer over the texts; it ends every text with </s>."""
    tokenizer = byte_level_bpe(texts, vocabulary, SPECIAL, prefix=True, normalizer=normalizers.NFC())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        mask_token=SPECIAL[MASK],
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build(settings: "Pretrain", vocabulary: int) -> SwitchTransformersEncoderModel:
    """Build a Switch encoder with every layer sparse, from a config, in float32."""
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=settings.hidden,
        num_layers=settings.layers,
        num_sparse_encoder_layers=settings.layers,
        num_decoder_layers=settings.layers,
        num_sparse_decoder_layers=settings.layers,
        num_heads=settings.heads,
        num_experts=settings.experts,
        expert_capacity=1024,  # per text: above any length in use, so no token is ever dropped
        router_jitter_noise=0.0,
        dropout_rate=settings.dropout,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    config.architectures = ["SwitchTransformersEncoderModel"]
    model = SwitchTransformersEncoderModel(config)
    initialise(model)
    return sort_experts(model)


def sort_experts(model: SwitchTransformersEncoderModel) -> SwitchTransformersEncoderModel:
    """Make every sparse layer of this model compute on tokens sorted by expert; it still saves as the stock class."""
    for block in model.encoder.block:
        block.layer[1].mlp.experts.forward = _sorted_experts.__get__(block.layer[1].mlp.experts)
    return model


@torch.no_grad()
def initialise(model: SwitchTransformersEncoderModel) -> None:
    """Set initial weights from which AdamW learns in minutes; the stock ones were made for Adafactor and long runs.

    - Embeddings are small. At AdamW's step size, those of rare words, which tell most, would hardly move from unit
      variance.
    - Outputs of attention and experts are small, so that they do not drown the embeddings.
    - Router logits have unit deviation instead of sqrt(d_model), so that no token belongs to one expert from the start.
    - Attention heads look one word back, one ahead, nearby, around, and everywhere. Relative positions are learnt
      slowly; until then, the masked-word loss stays at the level of word frequencies.
    """
    width = model.config.d_model
    model.shared.weight.normal_(std=0.05)
    for block in model.encoder.block:
        block.layer[0].SelfAttention.o.weight.mul_(0.2)
        mlp = block.layer[1].mlp
        mlp.router.classifier.weight.normal_(std=width**-0.5)
        for expert in mlp.experts.values():
            expert.wo.weight.mul_(0.5)
    attention = model.encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-127, 128)
    buckets = attention._relative_position_bucket(distances, num_buckets=32, max_distance=128)
    for bucket in buckets.unique():
        d = distances[buckets == bucket].float().mean()
        neighbour_biases = [-4 * (d + 1).abs().clamp(max=2), -4 * (d - 1).abs().clamp(max=2)]
        biases = [*neighbour_biases, -2 * d.abs().log1p(), -d.abs().log1p()]
        for head in range(attention.n_heads):
            attention.relative_attention_bias.weight[bucket, head] = biases[head] if head < len(biases) else 0.0


def _sorted_experts(experts: nn.ModuleDict, hidden_TD: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
    """Return the stock experts' result, computed on tokens sorted by expert.

    This takes one gather instead of one search per expert.
    """
    expert_T = chosen_T1E.squeeze(1).argmax(-1)
    order_T = expert_T.argsort()
    counts = expert_T.bincount(minlength=len(experts)).tolist()
    pieces = hidden_TD[order_T].split(counts)
    outputs = [experts[f"expert_{e}"](piece) for e, piece in enumerate(pieces) if len(piece)]
    sorted_TD = torch.cat(outputs) * weights_T1[order_T]
    return torch.zeros_like(hidden_TD).index_copy(0, order_T, sorted_TD.to(hidden_TD.dtype))


def watch_routers(model: SwitchTransformersEncoderModel) -> list[Tensor]:
    """Return a list to which each forward pass appends every layer's router logits [B, T, E], first layer first."""
    logits: list[Tensor] = []
    for block in model.encoder.block:
        block.layer[1].mlp.router.register_forward_hook(lambda module, args, output: logits.append(output[2]))
    return logits


def balance_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Return Switch's load balance of one layer, E * sum_e f_e P_e over real tokens: 1 if even, E if collapsed.

    f_e is the share of tokens with first choice e; P_e is the mean probability of e.

    Args:
        logits: [B, T, E].
        real: [B, T] bool.
    """
    token_logits = logits[real].float()
    experts = token_logits.shape[-1]
    shares = F.one_hot(token_logits.argmax(-1), experts).float().mean(0)
    return experts * (shares * token_logits.softmax(-1).mean(0)).sum()


def export(model: SwitchTransformersEncoderModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer for `from_pretrained`.

    The loaded model computes in float32 and without dropout.
    """
    names = [k for k in model.state_dict() if k != "encoder.embed_tokens.weight"]  # tied to shared.weight
    tensors = {k: model.state_dict()[k].detach().to("cpu", torch.bfloat16).contiguous() for k in names}
    save_file(tensors, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").replace(out / "model.safetensors")
    config = copy.deepcopy(model.config)
    config.dtype, config.dropout_rate = "float32", 0.0
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
