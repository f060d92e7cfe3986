"""What a training step costs: stock experts, ours, adapters and a restricted backward pass, as ratios in one process.

    python benchmarks/moe_step.py            10 to 20 minutes on 2 cores; writes results/moe_step.md
    python benchmarks/moe_step.py --device cuda

A step is forward, backward, clipping and AdamW, all of it. Every variant of a shape has a model of its own; they take
turns, one step each, so that what else the machine does falls on all alike. Measured is the CPU time of the process on
one thread (on CUDA the time of the device between events); a ratio is of minima, and the spread is the median of a
variant over its minimum. On CUDA the models are larger (width 1024) and in bfloat16, results/moe_step_gpu.md.

    dense     Mistral, whose one feed-forward is as wide as the experts that a token uses: equal active FLOPs
    eager     Mixtral, transformers' own loop over experts      grouped   the same with grouped_mm, its default
    ours      moe/experts.py: `keep` saves what the backward pass needs, `again` computes it again
    25 %      `training.fit`'s restriction: each step other experts learn, a quarter of them in every block
    floor     everything but routers and head frozen, no adapters: what no LoRA can be faster than (the better of
              grouped and ours). It needs no backward pass through the first layer's experts, which any LoRA does
    LoRA, PEFT   rank 8 on all experts
    dense, LoRA  PEFT's on the feed-forward of the dense model

Every step has other tokens, which go to other experts. Ours has the linear layers of a run (`products`); all else is as
torch, transformers and PEFT have it.
"""

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import MistralConfig, MistralModel, MixtralConfig, MixtralModel

from consilium.moe.addressing import parameters
from consilium.moe.discovery import family_of
from consilium.moe.experts import Experts
from consilium.moe.lora import Lora, add_expert_lora, add_lora
from consilium.moe.model import TaskModel
from consilium.products import quicken

VOCABULARY, BATCH, TOP_K, RANK = 1000, 8, 2, 8


@dataclass(frozen=True)
class Shape:
    """How many experts, their width inside, layers, tokens per sequence, and the model's width and dtype."""

    experts: int
    hidden: int
    layers: int = 2
    length: int = 128
    width: int = 256
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.experts} experts of width {self.hidden}, {self.layers} layers, {BATCH} x {self.length} tokens"


SHAPES = (Shape(16, 256), Shape(32, 512), Shape(16, 896, 4, 256), Shape(32, 512, 4, 256))
"""Two small ones; one of Mixtral's proportions (experts 3.5 times as wide as the model), and one with many experts."""
LARGE = {"layers": 4, "length": 512, "width": 1024, "dtype": torch.bfloat16}
ON_GPU = (Shape(16, 1024, **LARGE), Shape(8, 3584, **LARGE), Shape(32, 2048, **LARGE), Shape(64, 1024, **LARGE))
NAMES = (
    "dense", "dense, LoRA", "eager", "grouped", "ours (keep)", "ours (again)", "ours, 25 %", "ours, 25 % (keep)",
    "floor, grouped", "floor, ours", "LoRA", "PEFT",
)  # fmt: skip
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Bar:
    """A ratio we want: `of` to `to` at most (or, `least`, at least) so much."""

    of: str
    to: str
    limit: float
    least: bool = False


BARS = (
    Bar("ours (keep)", "dense", 1.3),
    Bar("LoRA", "dense, LoRA", 1.2),
    Bar("PEFT", "LoRA", 1.5, least=True),
    Bar("ours, 25 %", "ours (keep)", 0.6),
    Bar("ours, 25 %", "grouped", 0.6),
)


def model_of(shape: Shape, dense: bool, device: str) -> TaskModel:
    """Mixtral with a head, random weights; dense: Mistral of equal active FLOPs."""
    common = dict(
        vocab_size=VOCABULARY, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 32, num_key_value_heads=shape.width // 32,
        max_position_embeddings=shape.length,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        if dense:
            config = MistralConfig(intermediate_size=TOP_K * shape.hidden, sliding_window=None, **common)
        else:
            config = MixtralConfig(
                intermediate_size=shape.hidden, num_local_experts=shape.experts, num_experts_per_tok=TOP_K, **common
            )
        backbone = MistralModel(config) if dense else MixtralModel(config)
    model = TaskModel(backbone.to(shape.dtype), family_of("mixtral"), "t", tuple("abcdefgh"), shape.dtype)
    return model.to(device).train()


def variant(name: str, shape: Shape, device: str) -> Callable[[], None]:
    """One step of that variant, to be called again and again."""
    model = model_of(shape, name.startswith("dense"), device)
    own, stack, rng = None, contextlib.ExitStack(), random.Random(0)
    if name in ("eager", "PEFT, eager"):
        model.backbone.set_experts_implementation("eager")
    if name.startswith("PEFT"):
        add_expert_lora(model, RANK)
    if name == "dense, LoRA":
        model.backbone.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=FEED_FORWARD), model.backbone)
    if name.startswith("floor"):
        for path, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(".gate." in path)
    if name == "LoRA":
        add_lora(model, Lora(rank=RANK))
    if name.startswith("ours") or name in ("floor, ours", "LoRA"):
        quicken(model)
    if name.startswith("ours") or name == "floor, ours":
        own = stack.enter_context(Experts(model, keep="keep" in name or "floor" in name))
    trainable = {path: p for path, p in parameters(model).items() if p.requires_grad}
    if own is not None:
        trainable = own.trainable(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(VOCABULARY, (BATCH, shape.length), generator=generator).to(device),
        "attention_mask": torch.ones(BATCH, shape.length, dtype=torch.int64, device=device),
        "labels": torch.randint(8, (BATCH,), generator=generator).to(device),
    }

    def step() -> None:
        ids = torch.randint(VOCABULARY, batch["input_ids"].shape, generator=generator)
        batch["input_ids"].copy_(ids)  # other tokens go to other experts, as in training
        optimizer.zero_grad(set_to_none=True)
        logits, labels = model(batch)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        if "25 %" in name:
            own.active = {block: rng.sample(places, len(places) // 4) for block, places in own.places.items()}
        loss.backward()
        nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        if "25 %" in name:  # as `fit` does: no moments for who was not chosen
            for block, places in own.places.items():
                for place in set(places) - set(own.active[block]):
                    for leaf in own.of(block, place):
                        optimizer.state.pop(leaf, None)

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Of one call, on the CPU (of this process) or on the device."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(shape: Shape, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step of every variant, in turns, after one step that is not counted."""
    variants: dict[str, Callable[[], None]] = {}
    for name in NAMES:
        try:
            variants[name] = variant(name, shape, device)
            variants[name]()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{name} cannot run here: {str(error).splitlines()[0]}", flush=True)
            variants.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(steps + 1):
        for name, step in variants.items():
            if name == "eager" and turn > 2:
                continue  # many times as slow as the others
            taken = seconds(step, device)
            if turn:
                times[name].append(taken)
    return times


def rows(shape: Shape, times: dict[str, list[float]]) -> list[str]:
    """The table of one shape, and which bars hold."""
    least = {name: min(t) for name, t in times.items()}
    least["floor"] = min(t for name, t in least.items() if name.startswith("floor"))
    lines = [f"\n## {shape}\n", "| variant | ms | spread | x dense | x grouped | x floor |"]
    lines.append("|---|---|---|---|---|---|")
    for name, t in times.items():
        ratios = " | ".join(f"{least[name] / least[to]:.2f}" for to in ("dense", "grouped", "floor") if to in least)
        lines.append(f"| {name} | {1000 * least[name]:.1f} | {statistics.median(t) / least[name]:.2f} | {ratios} |")
    lines.append("")
    for bar in (bar for bar in BARS if {bar.of, bar.to} <= least.keys()):
        ratio = least[bar.of] / least[bar.to]
        holds = ratio >= bar.limit if bar.least else ratio <= bar.limit
        lines.append(
            f"- {bar.of} / {bar.to}: {ratio:.2f}, wanted at {'least' if bar.least else 'most'} {bar.limit}: "
            f"{'holds' if holds else 'does not hold'}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of every variant, >= 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = args.device != "cpu"
    shapes, where = (ON_GPU, torch.cuda.get_device_name()) if on_gpu else (SHAPES, "cpu")
    lines = [
        "# A training step of a mixture of experts\n",
        f"`benchmarks/moe_step.py`: Mixtral of width {shapes[0].width}, top-{TOP_K}, {str(shapes[0].dtype)[6:]}, "
        f"LoRA of rank {RANK}; {where}, torch {torch.__version__}, least of {args.steps} steps; spread: "
        "median over least. What each variant is stands at the top of the script.",
    ]
    for shape in shapes:
        lines += rows(shape, measure(shape, args.steps, args.device))
        print("\n".join(lines), flush=True)
        (RESULTS / ("moe_step_gpu.md" if on_gpu else "moe_step.md")).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
