"""A measurement of whether a language model needs its experts, on the domains of `data.domains`.

    python -m consilium.recipes.necessity [MODEL]

A model for which a random choice of experts is as good as any other cannot show the value of choosing them. The module
prints

    whole, none         the loss with all experts, and with the output of all of them zero
    own, random         the loss with a quarter of the experts in every layer: those that contribute most to a domain's
                        text, and a random quarter; without training and after equal fine-tuning
    between, within     total variation of the usage of experts between two domains, and between two halves of the text
                        of one
    completions         greedy completions of four prompts, with a penalty on tokens that occurred before

Losses are in nats per token. They are means over the public domains, on text that no model was trained on.
"""

import argparse
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium.algorithms.randommoe import random_choice
from consilium.completions import complete
from consilium.core import ClientContext, ClientInfo, ClientState, Sampling, derive_seed
from consilium.data.code import CodeData
from consilium.data.task import ClientData, Split
from consilium.fit import Fit
from consilium.moe.build import ModelSource
from consilium.moe.layers import most
from consilium.moe.model import TaskModel
from consilium.moe.routing import shares
from consilium.scoring import mean_loss, profile
from consilium.setup import MixtureSetup
from consilium.training import fit

__all__ = ["PROMPTS", "Necessity", "measure"]

ROWS = 24
PROMPTS = (
    "def mean(values):\n    ",
    "#pragma once\n\n#include <ATen/core/Tensor.h>\n\nnamespace at {\n\n",
    'def test_merge_columns(self):\n    df = DataFrame({"a": [1, 2], "b": ',
    "Parameters\n----------\nx : array_like\n    ",
)


@dataclass(frozen=True)
class Necessity:
    """Losses in nats per token and total variations in [0, 1], as means over the domains; see the module."""

    whole: float
    none: float
    own: float
    random: float
    own_tuned: float
    random_tuned: float
    between: float
    within: float


def measure(model: ModelSource, domains: int = 12, steps: int = 40) -> Necessity:
    """Measure a language model of any family on the first public domains.

    Args:
        steps: steps of the fine-tuning, each with 8 rows of 128 tokens, with AdamW at 6e-4.
    """
    setup = _setup(model)
    params = setup.initial_params()
    federation = CodeData(("public",), 12, train=90, validation=16, test=16).load(0)
    names = sorted(federation.clients)[:domains]
    losses: dict[str, list[float]] = {
        key: [] for key in ("whole", "none", "own", "random", "own_tuned", "random_tuned")
    }
    usage, halves = {}, []
    for name in names:
        context = _context(name, federation.clients[name])
        train, validation = (setup.encode(context, split) for split in (context.data.train, context.data.validation))
        live = setup.build(params, context)
        losses["whole"].append(mean_loss(setup, live, validation, context, ROWS))
        demand, contribution = profile(setup, live, train, context, len(train))
        usage[name] = shares(demand)
        parts = [setup.encode(context, half) for half in _halves(context.data.train)]
        halves.append(_variation(*(shares(profile(setup, live, part, context, len(part))[0]) for part in parts)))
        losses["none"].append(mean_loss(setup, _without_experts(live), validation, context, ROWS))
        del live
        quarter = {block: max(total // 4, 1) for block, total in setup.model.counts.items()}
        for key, expert_ids in (("own", most(contribution, quarter)), ("random", random_choice(setup, name, quarter))):
            sub_model = setup.build_sent(setup.sub_moe(params, context.data.task.name, expert_ids), context)
            losses[key].append(mean_loss(setup, sub_model, validation, context, ROWS))
            per_epoch = -(-len(train) // setup.fit.batch_size)
            fit(sub_model, train, setup.fit, context, epochs=max(1, round(steps / per_epoch)))
            losses[f"{key}_tuned"].append(mean_loss(setup, sub_model, validation, context, ROWS))
    pairs = [_variation(usage[a], usage[b]) for i, a in enumerate(names) for b in names[:i]]
    means = {key: statistics.mean(values) for key, values in losses.items()}
    return Necessity(**means, between=statistics.mean(pairs), within=statistics.mean(halves))


def _setup(model: ModelSource) -> MixtureSetup:
    tuning = Fit(
        lr=6e-4, batch_size=8, max_length=64, target_length=64, rows="blocks", label_smoothing=0.0, balance=0.0
    )
    return MixtureSetup(replace(model, form="text-to-text"), tuning, Sampling(), seed=0)


def _context(name: str, data: ClientData) -> ClientContext:
    info = ClientInfo(name, len(data.train), data.task.name)
    return ClientContext(info, data, torch.device("cpu"), derive_seed("necessity", name), ClientState())


def _halves(split: Split) -> list[Split]:
    """Return two halves of a split: every second piece of its text, and the others."""
    return [Split(split.texts[start::2], split.targets[start::2], split.rows[start::2]) for start in (0, 1)]


def _variation(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the total variation of two usages, as the mean over the layers."""
    return statistics.mean(float((one[block] - other[block]).abs().sum()) / 2 for block in one)


def _without_experts(model: TaskModel) -> TaskModel:
    """Set the output of every routed expert to zero, in place, and return the model."""
    for block in model.blocks().values():
        block.get_submodule(model.family.experts).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    return model


def main() -> None:
    """Print the measurements of a model, the shipped one by default."""
    parser = argparse.ArgumentParser(description="Measure whether a language model needs its experts.")
    parser.add_argument("model", nargs="?", default="code-olmoe", help="a shipped model, a directory or a hub name")
    model = ModelSource(parser.parse_args().model, form="text-to-text")
    necessity = measure(model)
    print(
        f"all experts {necessity.whole:.3f}, none {necessity.none:.3f}: "
        f"{necessity.none - necessity.whole:+.3f} nats per token"
    )
    print(
        f"a quarter without training: own {necessity.own:.3f}, random {necessity.random:.3f} "
        f"({necessity.random - necessity.own:+.3f})"
    )
    print(
        f"a quarter after 40 steps: own {necessity.own_tuned:.3f}, random {necessity.random_tuned:.3f} "
        f"({necessity.random_tuned - necessity.own_tuned:+.3f})"
    )
    print(
        f"total variation of usage: between domains {necessity.between:.3f}, "
        f"between halves of one {necessity.within:.3f}"
    )
    source = replace(model, form="text-to-text")
    live = source.build(source.load(), "", ())
    for prompt in PROMPTS:
        print(f"--- {prompt}\033[1m{complete(live, source.tokenizer(), prompt)}\033[0m")


if __name__ == "__main__":
    main()
