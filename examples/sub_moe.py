"""A sub-MoE of an open model: keep some experts of each layer, compare, and save what was cut.

    python examples/sub_moe.py MODEL       MODEL: a directory or hub name, e.g. allenai/OLMoE-1B-7B-0924

Without MODEL a tiny OLMoE with random weights is made, so that the script runs anywhere.
"""

import sys
import tempfile

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import consilium
from consilium.core import counts_of
from consilium.moe.addressing import all_experts, flatten


def tiny_model() -> str:
    """A directory with an OLMoE of two layers and eight experts."""
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    folder = tempfile.mkdtemp(prefix="olmoe-")
    OlmoeForCausalLM(OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=8, pad_token_id=0)).save_pretrained(folder)
    return folder


def main(name: str) -> None:
    source = consilium.ModelSource(name, "text-to-text", "float32")
    model = source.build(source.load(), "", ()).eval()
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model.backbone(input_ids=tokens).logits
    whole = sum(p.numel() for p in model.parameters())
    keep = {block: tuple(range(0, count, 2)) for block, count in counts_of(all_experts(model)).items()}
    consilium.slice_experts(model, keep)  # in place: every second expert and its router row
    with torch.no_grad():
        after = model.backbone(input_ids=tokens).logits
    left = sum(p.numel() for p in model.parameters())
    print(f"{len(keep)} sparse layers; kept: {keep}")
    print(
        f"{whole:,} parameters before, {left:,} after; logits differ by {(after - before).abs().mean():.3f} on average"
    )
    print(f"{len(flatten(model))} tensors travel under names such as {next(iter(flatten(model)))}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tiny_model())
