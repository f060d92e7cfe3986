"""Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints.

Komatsuzaki, Puigcerver, Lee-Thorp, Riquelme Ruiz, Mustafa, Ainslie, Tay, Dehghani, Houlsby. ICLR 2023.
https://arxiv.org/abs/2212.05055

A dense model becomes a mixture of experts of a family that has a place for all its weights. Attention, norms and
embeddings are kept, every expert of a sparse layer is a copy of the layer's feed-forward network, and routers start
with small random weights.

    llama, mistral -> Mixtral                 granite -> GraniteMoE       (llama with biases in attention -> GraniteMoE)
    qwen2 -> Qwen2-MoE                        qwen3 -> Qwen3-MoE          t5 -> Switch Transformers
    olmo2 -> FlexOlmo

In all families but Switch, the weights of the k chosen experts sum to 1. As long as the copies are equal, a token's
output is then that of the dense network, so the model starts with the dense model's logits. Qwen2-MoE has a shared
expert next to the routed ones. Its second matrix starts with zeros, so it adds nothing.

Switch weighs its one expert by the router's probability p, which is about 1/E at the start, and the paper does not
correct this. Here the experts' second matrices are multiplied by E, so that p E is about 1; `scale` False switches this
off. As p is never exactly 1/E, logits are close to those of the dense model but not equal. They are closer for smaller
router weights.

With `branches`, dense models that were trained separately from the same start on different domains are mixed
(Branch-Train-MiX, Sukhbaatar et al. 2024, https://arxiv.org/abs/2403.07816). Expert i is the network of model i modulo
their number, and all other weights are the mean over all models. Such experts differ from the start. The paper then
trains routers on all domains, which is left to later training.

Departures from the paper: every layer of a decoder is sparse (`every` is for families that leave some dense), and T5 is
routed by its family's top-1, with a capacity that drops no token of 4,096, and not by the encoder's expert choice.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from accelerate import init_empty_weights
from annotated_types import Ge
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from consilium.constraints import NonNegativeFloat, PositiveFloat, PositiveInt, check_settings, forbid
from consilium.core import derive_seed
from consilium.errors import ConfigError, ModelError, first_line
from consilium.machine import quietly
from consilium.moe.build import ModelSource
from consilium.moe.discovery import family_of, has_experts
from consilium.moe.families import Family, blocks
from consilium.moe.formats import gguf_place

__all__ = ["FAMILY_OF", "Upcycling", "convert", "dense_model", "upcycle"]

SHARED = 64
"""Width of Qwen2-MoE's shared expert, which the dense model does not have."""
CAPACITY = 4096


@dataclass(frozen=True)
class Upcycling:
    """The settings for turning a dense model into a mixture of experts.

    Args:
        experts: E, copies of each feed-forward network, >= 2.
        top_k: experts per token, 1..E; None: 2, in Switch 1.
        every: one in this many layers is sparse, >= 1; None: 1, in Switch 2, as in its own models. Mixtral, GraniteMoE
            and FlexOlmo have no dense layers.
        noise: standard deviation of the noise added to the copies, as a share of each matrix's own, >= 0; 0: none, and
            the copies only diverge through training.
        router_std: standard deviation of the routers' weights, > 0; None: 0.02, in Switch 0.001.
        scale: multiply the second matrices of Switch's experts by E.
        seed: seed of the noise and the routers.
        branches: further dense models of the same configuration, trained separately, that experts are taken from in
            turn.
    """

    experts: Annotated[int, Ge(2)] = 8
    top_k: PositiveInt | None = None
    every: PositiveInt | None = None
    noise: NonNegativeFloat = 0.0
    router_std: PositiveFloat | None = None
    scale: bool = True
    seed: int = 0
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        forbid(
            len(self.branches) >= self.experts,
            f"branches has {len(self.branches)} models, with the first one more: experts is {self.experts}; it "
            "must be at least as many",
        )
        forbid(
            self.top_k is not None and self.top_k > self.experts,
            f"top_k is {self.top_k}; it must be within 1..{self.experts}, the experts",
        )


def upcycle(path: str, folder: Path, how: Upcycling, gguf: str = "") -> list[str]:
    """Write the mixture of experts, its tokenizer and its chat template into a directory, and return a summary.

    Args:
        path: the dense model, a directory or a hub name.
        folder: the directory to write.
        how: the settings.
        gguf: a GGUF file in `path`.

    Raises:
        ModelError: if the model cannot be read, or if no family has a place for it; the message gives the reason.
        ConfigError: for settings that its family does not have.
    """
    source = ModelSource(path, "text-to-text", gguf=gguf)
    if source.quantised:
        raise ModelError("its weights are quantised; upcycle the model that they were made from")
    _configuration(source.config, _family(source.config), how)  # This refuses a model before its weights are read.
    tokenizer = source.tokenizer()
    model = dense_model(source)
    mixture, family = convert(model, how, [_branch(source, branch, model) for branch in how.branches])
    if model.generation_config is not None:
        mixture.generation_config = model.generation_config
    sparse_blocks = blocks(mixture, family)
    mixture.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    k = getattr(mixture.config, "num_experts_per_tok", 1)
    model_type, model_names = source.config.model_type, " + ".join((path, *how.branches))
    summary = [
        f"{model_names}: {model_type} as {family.name}, {how.experts} experts in {len(sparse_blocks)} layers, top-{k}"
    ]
    (folder / "README.md").write_text(_card(path, summary[0], how))
    if family.top_k is None:
        (folder / "card.json").write_text(
            json.dumps({"gates_public": _scales(sparse_blocks, how.experts)}, indent=1) + "\n"
        )
    if k == 1 and family.top_k is not None:
        summary.append("of one expert the normalised weight is 1: routers learn from the balance loss alone")
    if family.top_k is None:
        summary.append(
            "Switch weighs an expert by its probability: logits are near the dense model's, not equal to them"
        )
    return summary


def convert(dense: Any, how: Upcycling, branches: Sequence[Mapping[str, Tensor]] = ()) -> tuple[Any, Family]:
    """Return a live dense model as a mixture of experts in memory, and its family.

    Args:
        dense: the dense model.
        how: the settings.
        branches: weights of models that were trained separately from it, which also become experts.

    Raises:
        ModelError: if no family has a place for the model.
        ConfigError: for settings that its family does not have.
    """
    family = _family(dense.config)
    config = _configuration(dense.config, family, how)
    cls = getattr(transformers, family.classes["text-to-text"])
    with init_empty_weights(include_buffers=False), no_init_weights():
        mixture = cls._from_config(config, dtype=dense.dtype)
    mixture.load_state_dict(_weights([dense.state_dict(), *branches], mixture, family, how), assign=True)
    mixture.tie_weights()
    return mixture, family


# --- configurations ---------------------------------------------------------------------------------------------------

FAMILY_OF = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "granite": "granitemoe",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "t5": "switch_transformers",
}
"""Dense model type -> model type of the family that has a place for it."""

ELSEWHERE = {"architectures", "dtype", "transformers_version", "_name_or_path", "model_type", "pretraining_tp"}
ELSEWHERE |= {"id2label", "label2id", "problem_type", "task_specific_params", "n_positions", "use_cache"}
"""Fields of a configuration that do not affect logits."""


def _family(dense: Any) -> Family:
    model_type = dense.model_type
    if has_experts(dense):
        raise ModelError(f"model type {model_type!r} is a mixture of experts already: use it as it is")
    if model_type not in FAMILY_OF:
        raise ModelError(f"model type {model_type!r} fits no family here; dense models that do: {', '.join(FAMILY_OF)}")
    if model_type == "llama" and dense.attention_bias:
        return family_of("granitemoe")
    return family_of(FAMILY_OF[model_type])


def _configuration(dense: Any, family: Family, how: Upcycling) -> Any:
    """Return the configuration of the mixture: all settings of the dense one, and its experts."""
    is_switch = family.top_k is None
    every = how.every or (2 if is_switch else 1)
    dense_settings = dense.to_dict()
    family_settings = AutoConfig.for_model(family.model_type).to_dict()
    new_settings = _own(dense, family, every)
    if every > 1 and family.model_type in ("mixtral", "granitemoe", "flex_olmo"):
        raise ConfigError(f"every is {every}, but all layers of {family.name} are sparse; leave it at 1")
    if is_switch and how.top_k not in (None, 1):
        raise ConfigError(f"top_k is {how.top_k}, but {family.name} takes one expert per token; leave it at 1")
    _refuse(dense, dense_settings, family, family_settings.keys() | new_settings.keys())
    shared_settings = {
        key: value for key, value in dense_settings.items() if key in family_settings and key not in ELSEWHERE
    }
    routing = {family.number: how.experts} | ({} if is_switch else {"num_experts_per_tok": how.top_k or 2})
    return AutoConfig.for_model(family.model_type, **shared_settings | new_settings | routing)


def _refuse(dense: Any, given: Mapping[str, Any], family: Family, places: set[str]) -> None:
    """Raise ModelError for settings of the dense configuration that the family's configuration cannot express."""
    layer_kinds = {kind for kind in given.get("layer_types") or () if kind != "full_attention"}
    if layer_kinds and family.model_type != "qwen2_moe":
        raise ModelError(
            f"some layers have {layer_kinds.pop()}, and {family.name} has one kind of attention for all layers"
        )
    if getattr(dense, "is_gated_act", False):
        raise ModelError(f"its feed-forward networks are gated (as in T5 1.1), and those of {family.name} are not")
    default_settings = type(dense)().to_dict()
    exempt_keys = {
        "layer_types",
        "max_window_layers",
        "feed_forward_proj",
        "scale_decoder_outputs",
        "classifier_dropout",
    }
    for key, value in given.items():
        # Settings that the model's own class does not know have no effect; configurations on the hub contain many.
        if key in default_settings.keys() - places - ELSEWHERE - exempt_keys and value != default_settings[key]:
            raise ModelError(f"its configuration says {key} = {value!r}, for which {family.name} has no place")


def _own(dense: Any, family: Family, every: int) -> dict[str, Any]:
    """Return the settings of the family's configuration that differ from the dense one or are missing there."""
    if family.model_type == "mixtral":
        return {}
    if family.model_type == "flex_olmo":
        return {"norm_topk_prob": True}
    if family.model_type == "granitemoe":
        return _granite(dense)
    if family.model_type == "switch_transformers":
        return _switch(dense, every)
    settings = {
        "moe_intermediate_size": dense.intermediate_size,
        "decoder_sparse_step": every,
        "norm_topk_prob": True,
    }
    if family.model_type == "qwen2_moe":
        return settings | {"shared_expert_intermediate_size": SHARED}
    return settings | {"head_dim": dense.head_dim}


def _granite(dense: Any) -> dict[str, Any]:
    if dense.model_type == "granite":
        return {}
    size = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return {"attention_bias": dense.attention_bias, "attention_multiplier": size**-0.5, "head_dim": size}


def _switch(dense: Any, every: int) -> dict[str, Any]:
    for name, layers in (("num_layers", dense.num_layers), ("num_decoder_layers", dense.num_decoder_layers)):
        if layers % every:
            raise ConfigError(f"every is {every}; it must divide {name}, which is {layers}")
    if dense.scale_decoder_outputs != dense.tie_word_embeddings:
        raise ModelError("it scales its outputs other than its tied embeddings say, and Switch does as they say")
    return {
        "num_sparse_encoder_layers": dense.num_layers // every,
        "num_sparse_decoder_layers": dense.num_decoder_layers // every,
        "encoder_sparse_step": every,
        "decoder_sparse_step": every,
        "expert_capacity": CAPACITY,
        "router_jitter_noise": 0.0,
        "decoder_start_token_id": dense.decoder_start_token_id,
    }


# --- weights ----------------------------------------------------------------------------------------------------------


def dense_model(source: ModelSource) -> Any:
    """Load a dense model in its own dtype."""
    encoder_decoder = source.config.is_encoder_decoder
    cls = transformers.T5ForConditionalGeneration if encoder_decoder else transformers.AutoModelForCausalLM
    try:
        with quietly():
            file_args = (
                {"gguf_file": gguf_place(source.path, source.gguf)[1]} if source.gguf else {"use_safetensors": True}
            )
            model, loading_info = cls.from_pretrained(
                source.location, dtype="auto", trust_remote_code=False, output_loading_info=True, **file_args
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {source.path!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(loading_info["missing_keys"]):
        raise ModelError(f"model {source.path!r} lacks {len(missing)} weights, e.g. {missing[0]!r}")
    return model


def _branch(source: ModelSource, path: str, first: Any) -> dict[str, Tensor]:
    """Return the weights of another dense model, which must have the same shapes as the first.

    Raises:
        ModelError: if the model has other tensors.
    """
    branch = ModelSource(path)
    if branch.config.model_type != source.config.model_type:
        raise ModelError(
            f"branch {path!r} is a {branch.config.model_type}, and {source.path!r} a {first.config.model_type}"
        )
    branch_state, first_state = dense_model(branch).state_dict(), first.state_dict()
    first_shapes, branch_shapes = (
        {name: tensor.shape for name, tensor in weights.items()} for weights in (first_state, branch_state)
    )
    differences = sorted(name for name, _ in first_shapes.items() ^ branch_shapes.items())
    if differences:
        raise ModelError(
            f"branch {path!r} and {source.path!r} differ in {differences[0]!r}: give models of one configuration"
        )
    return {name: tensor.to(first_state[name].dtype) for name, tensor in branch_state.items()}


def _weights(states: list[Mapping[str, Tensor]], made: Any, family: Family, how: Upcycling) -> dict[str, Tensor]:
    """Return the state dict of the mixture of a dense model and its branches.

    Raises:
        ModelError: if a tensor of the dense model is missing or not used; the message names it.
    """
    dense_state, used_names = states[0], set()

    def taken(name: str) -> Tensor:
        if name not in dense_state:
            raise ModelError(f"the dense model has no {name!r}, which {family.name} needs")
        used_names.add(name)
        if len(states) == 1:
            return dense_state[name]
        return torch.stack([state[name].float() for state in states]).mean(0).to(dense_state[name].dtype)

    def each(name: str) -> list[Tensor]:
        taken(name)
        return [state[name] for state in states]

    weights: dict[str, Tensor] = {}
    for path in blocks(made, family):
        fill = _switch_block if family.top_k is None else _decoder_block
        weights |= fill(path, each, made.get_submodule(path), family, how)
    for name in made.state_dict():
        if name not in weights:  # A dense layer of Switch has its network under another name.
            weights[name] = taken(name.replace(".mlp.", ".DenseReluDense.") if family.top_k is None else name)
    if unused_names := sorted(dense_state.keys() - used_names):
        raise ModelError(
            f"{family.name} has no place for {len(unused_names)} tensors of the dense model, e.g. {unused_names[0]!r}"
        )
    return weights


def _decoder_block(
    path: str, each: Callable[[str], list[Tensor]], block: Any, family: Family, how: Upcycling
) -> dict[str, Tensor]:
    """Return the router and fused experts of one block."""
    mlp = f"{path.rpartition('.')[0]}.mlp"
    gates, ups, downs = (each(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
    gate = gates[0]
    copies = {
        "gate_up_proj": [torch.cat(pair) for pair in zip(gates, ups, strict=True)],
        "down_proj": downs,
    }
    weights = {
        f"{path}.{family.experts}.{name}": torch.stack(
            [_copy(tensors[i % len(tensors)], how, f"{path}.{i}.{name}") for i in range(how.experts)]
        )
        for name, tensors in copies.items()
    }
    weights[f"{path}.{family.router}.weight"] = _router(path, how, how.router_std or 0.02, gate)
    rng = torch.Generator().manual_seed(derive_seed(how.seed, "upcycle", path, "shared"))
    for name, tensor in block.state_dict().items():
        if name.startswith("shared_expert"):  # gate_proj and up_proj are random, so that down_proj has a gradient.
            noise = torch.randn(tensor.shape, generator=rng) * 0.02
            is_zero = name.endswith("down_proj.weight") or name.startswith("shared_expert_gate")
            weights[f"{path}.{name}"] = (torch.zeros(tensor.shape) if is_zero else noise).to(gate.dtype)
    return weights


def _switch_block(
    path: str, each: Callable[[str], list[Tensor]], block: Any, family: Family, how: Upcycling
) -> dict[str, Tensor]:
    """Return the router and expert modules of one block."""
    mlp = f"{path.rpartition('.')[0]}.DenseReluDense"
    wis, wos = each(f"{mlp}.wi.weight"), each(f"{mlp}.wo.weight")
    wi = wis[0]
    factor = how.experts if how.scale else 1
    weights = {f"{path}.{family.router}.classifier.weight": _router(path, how, how.router_std or 0.001, wi)}
    for i in range(how.experts):
        expert = f"{path}.{family.experts}.{family.module.format(i)}"
        weights[f"{expert}.wi.weight"] = _copy(wis[i % len(wis)], how, f"{path}.{i}.wi")
        weights[f"{expert}.wo.weight"] = _copy(wos[i % len(wos)], how, f"{path}.{i}.wo") * factor
    return weights


def _copy(tensor: Tensor, how: Upcycling, name: str) -> Tensor:
    if not how.noise:
        return tensor.clone()
    rng = torch.Generator().manual_seed(derive_seed(how.seed, "upcycle", name))
    noise = torch.randn(tensor.shape, generator=rng)
    return (tensor.float() + how.noise * tensor.float().std() * noise).to(tensor.dtype)


def _router(path: str, how: Upcycling, std: float, like: Tensor) -> Tensor:
    """Return random router weights [E, D] in the dtype of `like`, which has D columns."""
    rng = torch.Generator().manual_seed(derive_seed(how.seed, "upcycle", path, "router"))
    return (std * torch.randn(how.experts, like.shape[1], generator=rng)).to(like.dtype)


def _scales(sparse: Iterable[str], experts: int) -> dict[str, list[float]]:
    """Return the constants of `moe.gates` for new routers of Switch, which are almost uniform: c(n) = n / E."""
    return {block: [n / experts for n in range(1, experts + 1)] for block in sparse}


def _card(path: str, told: str, how: Upcycling) -> str:
    base = f"base_model: {path}\n" if "/" in path and not Path(path).exists() else ""
    return f"""---
library_name: transformers
{base}tags: ["consilium", "moe", "upcycled"]
---

# Upcycled: {told}

Made by `consilium upcycle` (Komatsuzaki et al. 2023): every expert is a copy of {_copied(how)}, noise
{how.noise:g} of each matrix's deviation, seed {how.seed}; routers are new. It has learned nothing since.
"""


def _copied(how: Upcycling) -> str:
    if not how.branches:
        return "the dense feed-forward network"
    return "the feed-forward network of one of the dense models in turn, the rest is their mean (Branch-Train-MiX)"
