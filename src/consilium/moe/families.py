"""Descriptions of how a mixture-of-experts model stores its routers and experts.

The rest of `moe/` only knows a model through its `Family`. `moe.discovery` derives it from a model's configuration; a
row of `ROWS` states only what cannot be derived.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from consilium.errors import ModelError

__all__ = [
    "NAMES",
    "REFUSED",
    "ROWS",
    "TOP_K",
    "Family",
    "Form",
    "Score",
    "blocks",
    "experts_per_token",
    "linear_layers",
]

Form = Literal["classification", "text-to-text"]


Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class Family:
    """A description of how the models of one configuration store and choose experts.

    `moe.discovery` finds the fields; a row of `ROWS` may state some of them. Paths are attributes below the block,
    separated by dots, unless stated otherwise.

    Args:
        name: the family's name in messages.
        model_type: `config.model_type` in transformers.
        block: class name of the module that owns one router and its experts; "": a dense model.
        router: path of the router.
        rows: tensors below the router with one row per expert ([E, D] weights, [E] biases, or [1, E] in Ernie). They
            are parameters or buffers; buffers are sliced, named and sent like parameters but never trained.
        experts: path of the experts.
        layout: "modules", one submodule `module.format(i)` per expert; or "fused", tensors [E, ...].
        classes: transformers class for each form of task.
        module: for "modules": name of an expert's submodule, with a place for its number.
        tensors: for "fused": names of the fused parameters below `experts`.
        counts: attributes that hold the number of experts, perhaps plus `extra`.
        number: field of the configuration with the number of experts, one number for all blocks.
        top_k: attribute with the experts per token; None: top-1.
        least: the fewest experts that a block must keep, because its router ranks this many whatever `top_k` is.
        score: the function of the logits that gates are computed from.
        correction: path of the correction bias that is added to the scores before the choice; None: there is none. It
            keeps its own dtype (float32) everywhere.
        beside: rows that are attributes of the block instead of its router.
        extra: rows of a router after those of the experts, for parts that are never cut (shared experts, a skip).
        skips: the extra rows can be chosen, too; a token that chooses one is passed on or left out.
        groups: the router first chooses `topk_group` of `num_group` groups of experts (its attributes; `topk_group` and
            `n_group` of the configuration).
        logits: position of the raw logits [.., E] in the router's output tuple.
        gates: position of the gates [.., K] in the router's output tuple.
        routed: position of the routing decision in the router's output tuple.
        dispatch: the decision is a 0/1 dispatch mask [.., E] instead of indices [.., K].
        probabilities: the router returns the softmax of its logits in their place.
        inputs: the block multiplies the inputs of its experts by the gates, and gives each expert all tokens.
        capacity: attribute with the largest number of tokens served per expert and sequence; None: no limit.
        lora_targets: names of the two projections of an expert, or of a dense model's linear layers.
        finish: fields of the configuration that are applied to the text-to-text logits, in this order: see
            `model.finish_logits`.
        whole: only the model itself can compute its final logits.
        normalised: the gates of the chosen experts do not depend on the others. If they do, `moe.gates` keeps a slice's
            gates on their scale.
        packs: position ids that restart keep the examples packed into one row apart, in attention too.
        outside: names of submodules with blocks that no text passes through (those of images); they are left unchanged.
        router_class: class name of the router; blocks with another one are left unchanged.
        stated: the fields that a row of `ROWS` states; the others were found.
    """

    name: str
    model_type: str
    block: str
    router: str
    rows: tuple[str, ...]
    experts: str
    layout: Literal["modules", "fused"]
    classes: Mapping[Form, str]
    module: str = ""
    tensors: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    number: str = "num_experts"
    top_k: str | None = None
    least: int = 1
    score: Score = "softmax"
    correction: str | None = None
    beside: tuple[str, ...] = ()
    extra: int = 0
    skips: bool = False
    groups: bool = False
    logits: int = 0
    gates: int = 1
    routed: int = 2
    dispatch: bool = False
    probabilities: bool = False
    inputs: bool = False
    capacity: str | None = None
    lora_targets: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    whole: bool = False
    normalised: bool = True
    packs: bool = False
    outside: tuple[str, ...] = ()
    router_class: str = ""
    stated: tuple[str, ...] = ()

    def choices(self, experts: int) -> int:
        """Return the number of rows that a router with `experts` experts chooses from."""
        return experts + self.extra * self.skips

    @property
    def dense(self) -> bool:
        """Return True if the model has no experts at all."""
        return not self.block

    @property
    def row_paths(self) -> tuple[str, ...]:
        """Return the paths of all tensors with a row per expert, below the block."""
        return (*(f"{self.router}.{row}" for row in self.rows), *self.beside)


NAMES = {
    "olmoe": "OLMoE",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "granitemoe": "GraniteMoE",
    "phimoe": "PhiMoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "gpt_oss": "gpt-oss",
    "ernie4_5_moe": "Ernie 4.5 MoE",
    "glm4_moe": "GLM4-MoE",
}
"""Model type -> its official spelling; other families are called by their model type."""

ROWS: dict[str, dict[str, Any]] = {
    # Its experts are modules, its router returns a dispatch mask, and an expert serves a limited number of tokens.
    "switch_transformers": dict(
        name="Switch Transformers",
        block="SwitchTransformersSparseMLP",
        router="router",
        rows=("classifier.weight", "classifier.bias"),
        experts="experts",
        layout="modules",
        module="expert_{}",
        counts=("router.num_experts", "experts.num_experts"),
        logits=2,
        gates=1,
        routed=0,
        dispatch=True,
        capacity="router.expert_capacity",
        classes={
            "classification": "SwitchTransformersEncoderModel",
            "text-to-text": "SwitchTransformersForConditionalGeneration",
        },
        lora_targets=("wi", "wo"),
        normalised=False,
    ),
    # Its gates are normalised over the experts within a few percent of the best, so they only depend on near ones.
    "phimoe": dict(normalised=True),
    # Its experts compute all tokens. The inputs are multiplied by the gates, which are 0 for experts not chosen.
    "llama4_text": dict(
        name="Llama 4",
        block="Llama4TextMoe",
        router="router",
        rows=("weight",),
        experts="experts",
        layout="fused",
        tensors=("gate_up_proj", "down_proj"),
        counts=("router.num_experts", "experts.num_experts", "num_experts"),
        number="num_local_experts",
        top_k="router.top_k",
        score="sigmoid",
        logits=1,
        gates=0,
        routed=0,
        dispatch=True,
        inputs=True,
        classes={"classification": "Llama4TextModel", "text-to-text": "Llama4ForCausalLM"},
        lora_targets=("gate_up_proj", "down_proj"),
    ),
    # Their routers read these numbers from a configuration that all layers share.
    "gemma4_text": dict(top_k="router.config.top_k_experts"),
    "zaya": dict(
        counts=("gate.num_experts", "gate.num_router_classes", "experts.num_experts", "gate.config.num_experts")
    ),
}
"""Model type -> the fields of `Family` that cannot be found by inspecting a model."""

REFUSED = {
    "dbrx": "its block chooses experts outside of its router, and they lie in matrices without a place for each",
    "diffusion_gemma": "it writes blocks of text by diffusion, and here models predict the next token",
    "doge": "its experts are rows of two embeddings, found by a product of keys, and no router ranks them",
    "jetmoe": "its attention is a mixture of experts, too, and its experts compute one sorted list of all tokens",
    "nllb-moe": "in transformers 5.23 its layers run experts 0 and 1 alone, whatever the router chose",
}
"""Model type -> the reason for refusing it, whatever was found."""


def blocks(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Return module path -> sparse block, in the order of the layers; {} for a dense model.

    Raises:
        ModelError: if a mixture of experts has no sparse block.
    """
    if family.dense:
        return {}
    sparse_blocks = {name: module for name, module in model.named_modules() if _is_block(name, module, family)}
    if not sparse_blocks:
        raise ModelError(f"this {family.name} model has no sparse layer, so there are no experts to federate")
    return sparse_blocks


def _is_block(name: str, module: nn.Module, family: Family) -> bool:
    if type(module).__name__ != family.block or set(name.split(".")) & set(family.outside):
        return False
    try:
        router, _ = module.get_submodule(family.router), module.get_submodule(family.experts)
    except AttributeError:  # This is a dense layer of the same class.
        return False
    return family.router_class in ("", type(router).__name__)


TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""Fields of configurations that hold the number of experts per token."""


def experts_per_token(config: Any) -> int:
    """Return the number of experts per token that a configuration names; 1 if it names none."""
    text_part = config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()
    count = next((value for name in TOP_K if isinstance(value := getattr(text_part, name, None), int)), 1)
    return int(count)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield path and module of the linear layers inside the layers of a model, without the output layer."""
    for path, module in model.named_modules():
        is_in_layer = any(part.isdecimal() for part in path.split("."))
        if isinstance(module, nn.Linear) and is_in_layer and module is not model.get_output_embeddings():
            yield path, module
