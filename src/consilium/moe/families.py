"""How each family of mixture-of-experts models stores its routers and experts: one table, one row a family.

Everything else in `moe/` reads this table and nothing else about a family. To add one, add a row and run
`tests/moe`: the suite is parametrised over the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from consilium.errors import ModelError

__all__ = ["FAMILIES", "Family", "blocks", "family_of"]

Form = Literal["classification", "text-to-text"]


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        name: the family's name in messages.
        model_type: `config.model_type` in transformers.
        block: class name of the sparse block that owns one router and its experts.
        router: attribute of the router below the block.
        rows: parameters below the router whose first dimension is the expert ([E, D] weights, [E] biases).
        experts: attribute of the experts below the block.
        layout: "modules", one submodule `module.format(i)` per expert; or "fused", tensors [E, ...].
        tensors: for "fused": names of the fused parameters below `experts`.
        counts: attributes (below the block) that hold the number of experts.
        top_k: attribute (below the block) with the experts per token; None: top-1.
        logits, routed: where in the router's output tuple the raw logits [.., E] and the routing decision are;
            the decision is a 0/1 dispatch mask [.., E] (dispatch=True) or expert indices [.., K].
        capacity: attribute with the tokens per expert and sequence that are served at most, None: no limit.
        classes: transformers class per form of task.
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
    top_k: str | None = None
    logits: int = 0
    routed: int = 2
    dispatch: bool = False
    capacity: str | None = None
    lora_targets: tuple[str, ...] = field(default=())


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
        ),
        Family(
            name="OLMoE",
            model_type="olmoe",
            block="OlmoeSparseMoeBlock",
            router="gate",
            rows=("weight",),
            experts="experts",
            layout="fused",
            tensors=("gate_up_proj", "down_proj"),
            counts=("gate.num_experts", "experts.num_experts"),
            top_k="gate.top_k",
            logits=0,
            routed=2,
            classes={"classification": "OlmoeModel", "text-to-text": "OlmoeForCausalLM"},
            lora_targets=("gate_up_proj", "down_proj"),
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The row for a `config.model_type`.

    Raises:
        ModelError: for a type that is not in the table, naming those that are.
    """
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
