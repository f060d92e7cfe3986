"""How each family of mixture-of-experts models stores its routers and experts: one table, one row a family.

Everything else in `moe/` reads this table and nothing else about a family. To add one, add a row and run
`tests/moe`: the suite is parametrised over the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from consilium.errors import ModelError

__all__ = ["FAMILIES", "REFUSED", "Family", "blocks", "family_of"]

Form = Literal["classification", "text-to-text"]


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        name: the family's name in messages.
        model_type: `config.model_type` in transformers.
        block: class name of the sparse block that owns one router and its experts.
        router: attribute of the router below the block.
        rows: tensors below the router with one row per expert ([E, D] weights, [E] biases, or [1, E] in Ernie);
            parameters, or buffers, which are sliced, named and carried along like parameters but never trained.
        experts: attribute of the experts below the block.
        layout: "modules", one submodule `module.format(i)` per expert; or "fused", tensors [E, ...].
        tensors: for "fused": names of the fused parameters below `experts`.
        counts: attributes (below the block) that hold the number of experts.
        number: field of the configuration that holds it, one number for all blocks.
        top_k: attribute (below the block) with the experts per token; None: top-1.
        least: experts that a block must keep, because its router ranks so many whatever `top_k` says.
        choice: None: the router chooses by its logits; else by this function of them plus the last of `rows`, a
            correction bias, which therefore keeps its own dtype (float32) everywhere.
        groups: 0, or: the router first chooses `topk_group` of `num_group` groups of experts (attributes of the
            router, `topk_group` and `n_group` of the configuration), each by the sum of so many of its best.
        logits, routed: where in the router's output tuple the raw logits [.., E] and the routing decision are;
            the decision is a 0/1 dispatch mask [.., E] (dispatch=True) or expert indices [.., K].
        capacity: attribute with the tokens per expert and sequence that are served at most, None: no limit.
        classes: transformers class per form of task.
        divisor: attribute of the configuration by which text-to-text logits are divided; None: by nothing.
        normalised: whether the gates of the chosen experts do not depend on the others: True, False, or the name of the
            field of the configuration that says so. Where they do, `moe.gates` keeps a slice's gates on their scale.
        packs: whether position ids that start again keep the examples packed into one row apart, in attention too.
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
    choice: Literal["sigmoid", "softmax"] | None = None
    groups: int = 0
    logits: int = 0
    routed: int = 2
    dispatch: bool = False
    capacity: str | None = None
    lora_targets: tuple[str, ...] = ()
    divisor: str | None = None
    normalised: bool | str = True
    packs: bool = False


def _fused(name: str, model_type: str, prefix: str, block: str, router: str = "gate", **changes: Any) -> Family:
    """A decoder whose experts are two fused tensors, and whose router gives logits, weights and indices.

    Args:
        prefix: of the names of its classes. changes: fields in which it differs from the others.
    """
    common = dict(
        rows=("weight",),
        experts="experts",
        layout="fused",
        tensors=("gate_up_proj", "down_proj"),
        counts=(f"{router}.num_experts", "experts.num_experts"),
        top_k=f"{router}.top_k",
        logits=0,
        routed=2,
        classes={"classification": f"{prefix}Model", "text-to-text": f"{prefix}ForCausalLM"},
        lora_targets=("gate_up_proj", "down_proj"),
        packs=True,
    )
    return Family(name, model_type, f"{prefix}{block}", router, **common | changes)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            name="Switch Transformers",
            model_type="switch_transformers",
            block="SwitchTransformersSparseMLP",
            router="router",
            rows=("classifier.weight", "classifier.bias"),
            experts="experts",
            layout="modules",
            module="expert_{}",
            counts=("router.num_experts", "experts.num_experts"),
            logits=2,
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
        _fused("OLMoE", "olmoe", "Olmoe", "SparseMoeBlock", normalised="norm_topk_prob"),
        _fused("Mixtral", "mixtral", "Mixtral", "SparseMoeBlock", number="num_local_experts"),
        # The shared expert and its gate are trunk, and so are the layers that `mlp_only_layers` keeps dense.
        _fused("Qwen2-MoE", "qwen2_moe", "Qwen2Moe", "SparseMoeBlock", normalised="norm_topk_prob"),
        _fused(
            "Qwen3-MoE",
            "qwen3_moe",
            "Qwen3Moe",
            "SparseMoeBlock",
            number="num_local_experts",
            normalised="norm_topk_prob",
        ),
        _fused(
            "GraniteMoE",
            "granitemoe",
            "GraniteMoe",
            "MoE",
            router="router",
            number="num_local_experts",
            divisor="logits_scaling",
        ),
        # Always takes the best two one after the other; with one expert the second is a softmax over nothing, NaN.
        # In training it samples them, so what is served then is not what its logits rank first.
        _fused("PhiMoE", "phimoe", "Phimoe", "SparseMoeBlock", router="router", number="num_local_experts", least=2),
        # Of both DeepSeeks the first layers may be dense, and shared experts are trunk. A sliced block has one group:
        # it equals the full model with its router masked to the kept experts where groups do not restrict
        # (`topk_group` = `n_group`), and otherwise the full model masked so and with the groups of that block lifted.
        _fused(
            "DeepSeek-V2",
            "deepseek_v2",
            "DeepseekV2",
            "Moe",
            number="n_routed_experts",
            groups=1,
            normalised=False,  # transformers 5.23 does not read `norm_topk_prob`
        ),
        _fused(
            "DeepSeek-V3",
            "deepseek_v3",
            "DeepseekV3",
            "MoE",
            rows=("weight", "e_score_correction_bias"),
            number="n_routed_experts",
            choice="sigmoid",
            groups=2,
            least=2,
        ),
        _fused(
            "gpt-oss",
            "gpt_oss",
            "GptOss",
            "MLP",
            router="router",
            rows=("weight", "bias"),
            number="num_local_experts",
            tensors=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
            packs=False,  # in transformers 5.23 its masks do not look at position ids: examples see each other
        ),
        _fused(
            "Ernie 4.5 MoE",
            "ernie4_5_moe",
            "Ernie4_5_Moe",
            "SparseMoeBlock",
            rows=("weight", "moe_statics.e_score_correction_bias"),
            number="moe_num_experts",
            choice="softmax",
        ),
        # Groups as in DeepSeek-V3; the published models have one.
        _fused(
            "GLM4-MoE",
            "glm4_moe",
            "Glm4Moe",
            "MoE",
            rows=("weight", "e_score_correction_bias"),
            number="n_routed_experts",
            choice="sigmoid",
            groups=2,
            least=2,
        ),
    )
}

REFUSED = {
    "nllb_moe": "in transformers 5.23 its layers run experts 0 and 1 alone, whatever the router chose",
}
"""Model type -> why there is no row for it."""


def family_of(model_type: str) -> Family:
    """The row for a `config.model_type`.

    Raises:
        ModelError: for a type that is not in the table, with the reason or naming those that are.
    """
    if model_type in REFUSED:
        raise ModelError(f"model type {model_type!r} cannot be federated: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model type {model_type!r} is not a known mixture-of-experts family; known are {known}")
    return FAMILIES[model_type]


def blocks(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Module path -> sparse block, in the order of the layers.

    Raises:
        ModelError: if the model has no sparse block.
    """
    found = {name: m for name, m in model.named_modules() if type(m).__name__ == family.block}
    if not found:
        raise ModelError(f"this {family.name} model has no sparse layer, so there are no experts to federate")
    return found
