"""The memory that a site's training needs, computed before anything is loaded."""

from math import prod
from typing import TYPE_CHECKING

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from consilium.moe.budget import OVERHEAD
from consilium.oneshot.base import Base
from consilium.setup import MixtureSetup
from consilium.work import Work

if TYPE_CHECKING:
    from consilium.oneshot.train import Training

__all__ = ["admit", "needed"]

TRAINED = 16
"""Bytes per trained parameter: itself or its master, gradient and two moments, in float32."""


def admit(base: Base, setup: MixtureSetup, training: "Training", work: Work) -> int:
    """Return the bytes that a training needs; raise BudgetError if they exceed what the site allows.

    Raises:
        BudgetError: with the bytes needed and allowed.
    """
    bytes_needed = needed(base, setup, training)
    work.hold(bytes_needed, f"training a part of kind {training.kind}")
    return bytes_needed


def needed(base: Base, setup: MixtureSetup, training: "Training") -> int:
    """Return the peak bytes of training a site's part: the frozen model, activations, and what is trained.

    For a mixture of experts, the memory model of adapters gives the model and activations (`MixtureSetup.footprint`),
    and the trained parameters are added. For a dense model, the activations are 16 D + 4 F numbers per token and layer,
    plus three times the logits.
    """
    config, fit = base.source.config, setup.fit
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    parameter_count = layers * (3 * width * inner + width) * training.copies
    if training.kind != "expert":
        parameter_count = layers * 2 * 8 * max(width, inner) * training.rank  # at most eight modules per layer
    if base.family is not None:
        return setup.footprint(base.source.counts, "lora", rank=training.rank).total + TRAINED * parameter_count
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    item = base.source.torch_dtype.itemsize
    weights = item * sum(prod(p.shape) for p in model.parameters())
    tokens = fit.batch_size * (fit.max_length + fit.target_length)
    activations = tokens * (item * layers * (16 * width + 4 * inner) + 12 * config.vocab_size)
    copies = 2 if training.kind == "expert" else 1  # the dense model, and the mixture made from it
    return copies * weights + activations + TRAINED * parameter_count + OVERHEAD
