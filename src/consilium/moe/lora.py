"""LoRA on the experts: Consilium's own for training in rounds, and PEFT's, injected in place, for profiling.

Consilium's LoRA has a pair A [R, X], B [Y, R] per expert and projection, under flat names
(`<block>.experts.17.down_proj.lora_A`), so that adapters are sent and averaged expert by expert. `moe/experts.py`
computes y = x W^T + scale (x A^T) B^T with the base frozen. PEFT instead builds the merged weights of all experts in
every step. Parameters and files are the same: see `moe/adapter_files.py`.

The rules by which a server merges its clients' adapters are in `moe/rules.py`.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.constraints import check_settings
from consilium.errors import ConfigError
from consilium.moe.addressing import all_experts, expert_of, is_adapter
from consilium.moe.experts import Experts, is_transposed
from consilium.moe.families import linear_layers
from consilium.moe.model import TaskModel
from consilium.moe.quantise import dequantise, quantise
from consilium.moe.rules import ANY_RANK, FOLDED, Rule
from consilium.params import Params
from consilium.work import setting

__all__ = [
    "Adapters",
    "Lora",
    "add_expert_lora",
    "add_lora",
    "folded",
    "initial_adapters",
    "is_folded",
    "merged",
    "peft_targets",
]


@dataclass(frozen=True)
class Lora:
    """Training of the experts by adapters.

    Args:
        rank: R, at most the narrower side of a projection; 0: no adapters, all parameters are trained.
        alpha: the scale is alpha / rank; 0: alpha = rank, a scale of 1.
        targets: adapted expert tensors, by the names of the family ("gate_up_proj", "down_proj"; Switch "wi", "wo");
            (): all of them.
        router: train the routers, in full; heads always are, the rest of the model never is.
        base: "full", the frozen weights unchanged, or "nf4": experts in 4 bits (bitsandbytes).
        rule: the training and merging of adapters, see `moe.rules`: "mean" (FedIT), "ffa" (A keeps its initial value),
            "alternate" (B in odd rounds, A in even ones), "share_a" (B stays with the client), "stack" (the products
            are added to the base, and adapters are initialised again), "residual" (the mean of factors, and the
            difference to the mean product is added to the base), "svd" (the best factors of the mean product), "pad"
            and "pad_norm" (zero padding to the largest rank, with weights n_k or the norms of the updates),
            "rank_partition" (each row over the clients that have it).
        ranks: "equal", or "memory": each client gets the largest rank, from 1 to `rank`, with which the whole model
            fits its memory. For "stack", "svd", "pad", "pad_norm" and "rank_partition".
    """

    rank: Annotated[int, Interval(ge=0, le=1e12)] = setting(0, "memory")
    alpha: Annotated[float, Interval(ge=0, le=1e6)] = setting(0.0, "factor")
    targets: tuple[str, ...] = setting((), "free")
    router: bool = setting(True, "free")
    base: Literal["full", "nf4"] = setting("full", "free")
    rule: Rule = setting("mean", "free")
    ranks: Literal["equal", "memory"] = setting("equal", "free")

    def __post_init__(self) -> None:
        check_settings(self, "lora.")
        if self.ranks == "memory" and self.rule not in ANY_RANK:
            raise ConfigError(
                f"lora.ranks is 'memory', which needs a rule for unequal ranks; lora.rule is {self.rule!r}, allowed "
                f"are {', '.join(sorted(ANY_RANK))}"
            )

    @property
    def scale(self) -> float:
        """Return the factor of B A, alpha / rank, which also applies to clients of a smaller rank."""
        return (self.alpha or self.rank) / self.rank

    def at(self, rank: int) -> "Lora":
        """Return a copy of these settings with another rank and the same scale."""
        return replace(self, rank=rank, alpha=self.scale * rank)

    def trains(self, round: int) -> tuple[str, ...]:
        """Return the names of the factors that are trained in a round, counted from 1."""
        if self.rule == "alternate":
            return ("lora_A",) if round and round % 2 == 0 else ("lora_B",)
        return ("lora_B",) if self.rule == "ffa" else ("lora_A", "lora_B")

    @property
    def private(self) -> str:
        """Return the factor that the server never sends.

        It is "lora_A", which all clients derive from the seed, "lora_B", or "": the server sends both.
        """
        return {"ffa": "lora_A", "share_a": "lora_B"}.get(self.rule, "")


class Adapters(nn.Module):
    """The adapters of a model, by flat names with local places.

    B has the memory layout [R, Y], because matmuls with such a narrow matrix run two to eight times as fast along the
    long side.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scale: float):
        super().__init__()
        self.names = tuple(tensors)
        self.tensors = nn.ParameterList(
            nn.Parameter(tensor.t().contiguous().t() if name.endswith(".lora_B") else tensor)
            for name, tensor in tensors.items()
        )
        self.scale = scale

    def named(self) -> dict[str, nn.Parameter]:
        """Return flat name with local place -> A or B."""
        return dict(zip(self.names, self.tensors, strict=True))


def _sides(model: TaskModel, targets: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Yield (flat name, X, Y) of each adapted tensor, in the order of blocks, places and targets.

    For a dense model, the name is the path of a linear layer.
    """
    family = model.family
    unknown_targets = sorted(set(targets) - set(family.lora_targets))
    if unknown_targets:
        raise ConfigError(
            f"lora.targets has {unknown_targets[0]!r}; {family.name} has {', '.join(family.lora_targets)}"
        )
    for path, linear in linear_layers(model.backbone) if family.dense else ():
        if not targets or path.rpartition(".")[2] in targets:
            yield path, linear.in_features, linear.out_features
    for block, places in all_experts(model).items():
        module = model.blocks()[block].get_submodule(family.experts)
        for place in places:
            for target in (t for t in family.lora_targets if not targets or t in targets):
                if family.layout == "modules":
                    y, x = module.get_submodule(f"{family.module.format(place)}.{target}").weight.shape
                else:
                    x, y = module.get_parameter(target).shape[1:][:: 1 if is_transposed(module, family) else -1]
                yield f"{block}.experts.{place}.{target}", x, y


def initial_adapters(model: TaskModel, lora: Lora, seed: int) -> Params:
    """Return initial adapters in the model's dtype: A uniform in +-1/sqrt(X), as in PEFT, and B zero.

    The adapters therefore do not change the outputs at first. The model may be on the meta device. Experts of one block
    have different A; all clients that start from this result share it.

    Raises:
        ConfigError: for a target the family does not have, or a rank above the narrower side of a projection.
    """
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for name, x, y in _sides(model, lora.targets):
        if lora.rank > min(x, y):
            raise ConfigError(f"lora.rank is {lora.rank}; {name} is {y} x {x}, so it must be at most {min(x, y)}")
        a_RX = (2 * torch.rand(lora.rank, x, generator=rng) - 1) / x**0.5
        tensors[f"{name}.lora_A"] = a_RX.to(model.dtype)
        tensors[f"{name}.lora_B"] = torch.zeros(y, lora.rank, dtype=model.dtype)
    return tensors


def add_lora(model: TaskModel, lora: Lora, seed: int = 0) -> TaskModel:
    """Freeze a live model except its head (and routers), and give every expert adapters.

    From now on, `moe.experts` computes the model's experts, in evaluation and generation too. Call this function on the
    device where the model stays. `addressing.flatten` and `load_flat` then only handle adapters, router rows and head
    rows.

    Raises:
        ConfigError: see `initial_adapters`; also for "nf4" with a dense model.
        ModelError: if bitsandbytes cannot store the base in 4 bits.
    """
    tensors = initial_adapters(model, lora, seed)
    device = next(model.backbone.parameters()).device
    routers = [f"{block}.{model.family.router}." for block in model.blocks()]
    for path, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(lora.router and any(path.startswith(router) for router in routers))
    if lora.base == "nf4":
        if model.family.dense:
            raise ConfigError(
                "fit.lora.base is 'nf4', which stores experts in 4 bits; a dense model has none: use 'full'"
            )
        _quantise(model)
    model.adapters = Adapters({name: tensor.to(device) for name, tensor in tensors.items()}, lora.scale)
    if model.family.dense:
        adapter_tensors = model.adapters.named()
        for path, linear in linear_layers(model.backbone):
            if f"{path}.lora_A" in adapter_tensors:
                linear.register_forward_hook(
                    _Added(adapter_tensors[f"{path}.lora_A"], adapter_tensors[f"{path}.lora_B"], lora.scale)
                )
    else:
        Experts(model, keep=True).__enter__()
    return model


class _Added:
    """A forward hook that adds scale (x A^T) B^T to the output of a linear layer."""

    def __init__(self, a_RX: nn.Parameter, b_YR: nn.Parameter, scale: float):
        self.a_RX, self.b_YR, self.scale = a_RX, b_YR, scale

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.scale * F.linear(F.linear(args[0], self.a_RX), self.b_YR)


def merged(model: TaskModel, base: Mapping[str, Tensor], params: Mapping[str, Tensor], lora: Lora) -> Params:
    """Return the parameters of a model without adapters that equals a base with `params`.

    The result is W + alpha/rank B A, computed in float32 and returned in the dtype of W. Changes that rules made to the
    base are added first (`folded`). A base in 4 bits is then rounded in the same way as `add_lora` rounds it.

    Args:
        model: a model of the family, on the meta device or not.
        base: flat parameters, of all or of the held experts.
        params: adapters, router rows and head rows.
        lora: the settings of the adapters.
    """
    as_modules = model.family.layout == "modules" or model.family.dense
    merged_params = folded(model, base, params)
    merged_params |= {key: tensor for key, tensor in params.items() if not is_adapter(key) and not is_folded(key)}
    if lora.base == "nf4":
        suffixes = tuple(f".{target}{'.weight' if as_modules else ''}" for target in model.family.lora_targets)
        for key in [key for key in merged_params if expert_of(key) and key.endswith(suffixes)]:
            merged_params[key] = dequantise(*quantise(merged_params[key]))
    changes = {
        name: lora.scale * params[f"{name}.lora_B"].float() @ params[f"{name}.lora_A"].float()
        for name in (key.removesuffix(".lora_A") for key in params if key.endswith(".lora_A") and is_adapter(key))
    }
    return _moved(model, merged_params, changes)


def is_folded(key: str) -> bool:
    """Return True if a flat name belongs to the sum [Y, X] that a rule has added to an expert's weights."""
    return key.endswith(f".{FOLDED}")


def folded(model: TaskModel, base: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Params:
    """Return a base plus the changes that rules have added to it, in its dtype.

    Args:
        model: a model of the family, on the meta device or not.
        base: flat parameters, at least of the held experts.
        params: parameters that contain the changes.
    """
    changes = {key.removesuffix(f".{FOLDED}"): tensor for key, tensor in params.items() if is_folded(key)}
    return _moved(model, base, changes)


def _moved(model: TaskModel, whole: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Params:
    """Return parameters with changes [Y, X] added to them, summed in float32."""
    as_modules, new_params = model.family.layout == "modules" or model.family.dense, dict(whole)
    first_experts = None if as_modules else next(iter(model.blocks().values())).get_submodule(model.family.experts)
    transposed = not as_modules and is_transposed(first_experts, model.family)
    for name, change_YX in changes.items():
        target = f"{name}.weight" if as_modules else name
        old_weight = new_params[target]
        new_params[target] = (old_weight.float() + (change_YX.t() if transposed else change_YX)).to(old_weight.dtype)
    return new_params


def _quantise(model: TaskModel) -> None:
    """Store every expert's matrices in 4 bits, and replace the original parameters by shapes on the meta device."""
    family = model.family
    for block, places in all_experts(model).items():
        module = model.blocks()[block].get_submodule(family.experts)
        for target in family.lora_targets:
            if family.layout == "modules":
                for place in places:
                    owner = module.get_submodule(f"{family.module.format(place)}.{target}")
                    model.quantised[f"{block}.experts.{place}.{target}.weight"] = quantise(owner.weight)
                    owner.weight = nn.Parameter(owner.weight.to("meta"), requires_grad=False)
            else:
                fused = module.get_parameter(target)
                for place, matrix in enumerate(fused.detach()):
                    model.quantised[f"{block}.experts.{place}.{target}"] = quantise(matrix)
                setattr(module, target, nn.Parameter(fused.to("meta"), requires_grad=False))


# --- PEFT ------------------------------------------------------------------------------------------------------------


def peft_targets(model: TaskModel, targets: tuple[str, ...]) -> dict[str, object]:
    """Return the `LoraConfig` arguments that select these expert tensors in every block."""
    family = model.family
    if family.dense:
        return {"target_modules": list(targets)}
    paths = [f"{block}.{family.experts}" for block in model.blocks()]
    if family.layout == "modules":
        path_pattern = "|".join(re.escape(path) for path in paths)
        return {"target_modules": rf"({path_pattern})\..*\.({'|'.join(targets)})"}
    parameters = [f"{path}.{target}" for path in paths for target in targets]
    return {"target_modules": [], "target_parameters": parameters}


def add_expert_lora(model: TaskModel, rank: int) -> list[nn.Parameter]:
    """Freeze the model and attach PEFT's LoRA of this rank to every expert; the head stays trainable.

    The scale is 1 (alpha = rank). B is zero at first, so the adapters do not change the outputs.

    Returns:
        The adapters' parameters.
    """
    from peft import LoraConfig, inject_adapter_in_model  # The import takes seconds, and only stage one needs it.

    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, **peft_targets(model, model.family.lora_targets))
    model_type = model.config.model_type
    model.config.model_type = "custom"  # This keeps PEFT from rewriting expert paths for families it knows.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model.backbone)
    finally:
        model.config.model_type = model_type
    return [p for name, p in model.backbone.named_parameters() if "lora_" in name]
