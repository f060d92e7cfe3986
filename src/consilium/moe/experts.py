"""Consilium's own computation of a model's experts: one leaf per expert, and a backward pass through selected experts.

transformers keeps the experts of most families in one fused tensor [E, ..]. Its gradient and its optimiser moments are
as large as all experts together, even if few of them are trained. Here every expert has tensors of its own, which are
views of the model's. One autograd function per block runs over the experts on their own tokens:

    h = x W1^T + b1,   a = act(h),   y = a W2^T + b2,   out[token] += w * y

This covers every family of the table: gated or not, transposed, interleaved and clamped (gpt-oss), and with inner
dropout and tokens beyond the capacity left out (Switch). Adapters of the model (moe/lora.py) add two narrow matmuls to
each projection. The gradients of a frozen base are not computed. A base in 4 bits is dequantised expert by expert. Only
the `forward` of the live experts modules is replaced, and only while the context manager is entered. Parameters, names,
routers and hooks are left unchanged.

Shapes: T tokens, D model width, E experts, K experts per token, N tokens of one expert, F width inside an expert.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, expert_of, parameters, table, unpack
from consilium.moe.families import Family
from consilium.moe.kernel import Layer, Linear, compute
from consilium.moe.model import TaskModel

__all__ = ["Active", "Experts", "is_transposed"]

Active = Mapping[str, Collection[int]]
"""Block -> local places of the experts that a backward pass reaches. A missing block has no such experts."""


class Experts:
    """A context manager that computes the experts of a model here instead of in transformers.

    The forward pass equals that of transformers up to the order of summation. So does the backward pass through all
    experts.

    Args:
        model: a model of any family of the table, sliced or not, with or without adapters, which stays on its device;
            parameters that require no gradient are constants.
        keep: save the pre-activations h of all tokens for the backward pass. This is faster by one matmul per expert,
            but the memory is then bounded by the tokens of all experts instead of the tokens of the active ones.
        measure: sum up each expert's contribution in forward passes: over all real tokens that it computes, the gate
            times the norm of its output. `masks` must then mark the real tokens.

    Attributes:
        contributions: block -> the sum over real tokens of gate x norm of the output, float64 [E]; with `measure`.
        masks: with `measure`, the result of `TaskModel.masks` for the batch that is computed next.
        places: block -> the local places of its experts, 0 .. E-1.
        leaves: "<block>.experts.<place>.<tensor>" -> a leaf for every trained expert tensor, which shares storage with
            the model's own parameter. Gradients arrive here; `grad` is None if the expert received no token or was not
            active. An optimiser that steps the leaves also steps the model.
    """

    def __init__(self, model: TaskModel, keep: bool = False, measure: bool = False):
        self.keep = keep
        self.places = all_experts(model)
        self.masks: Mapping[str, Tensor] = {}
        self.contributions = {
            block: torch.zeros(len(places), dtype=torch.float64) for block, places in self.places.items() if measure
        }
        self._active: Active | None = None
        self._before: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
        expert_params, views = _expert_tensors(model)
        self.leaves = {name: tensor for name, tensor in (expert_params | views).items() if tensor.requires_grad}
        self._of: dict[tuple[str, int], list[Tensor]] = {}
        for name, leaf in self.leaves.items():
            self._of.setdefault(expert_of(name), []).append(leaf)
        tensors = expert_params | views | {name: packed for name, (packed, _) in model.quantised.items()}
        self._compute = _compute_inputs if model.family.inputs else compute
        self._layers = [_layer(self, model, block, tensors) for block in self.places]

    @property
    def active(self) -> Active | None:
        """Return the experts that the next backward pass reaches; None: all. The others' output is a constant.

        The value is read while the backward pass runs, so it can be set after the forward pass of the same batch.

        Raises:
            ModelError: on setting, for a block or a place that the model does not have.
        """
        return self._active

    @active.setter
    def active(self, active: Active | None) -> None:
        for block, places in (active or {}).items():
            block_places = self.places.get(block)
            if block_places is None:
                raise ModelError(f"{block!r} is not a sparse block of the model; it has {', '.join(self.places)}")
            unknown_places = sorted(set(places) - set(block_places))
            if unknown_places:
                raise ModelError(
                    f"{block} has no expert in place {unknown_places[0]}; its places are 0..{len(block_places) - 1}"
                )
        self._active = None if active is None else {block: frozenset(places) for block, places in active.items()}

    def of(self, block: str, place: int) -> list[Tensor]:
        """Return the leaves of one expert."""
        return self._of.get((block, place), [])

    def trainable(self, model: TaskModel) -> dict[str, Tensor]:
        """Return all trained tensors: parameters outside the experts by their paths, and the leaves."""
        names = table(model)
        trunk = {
            path: p
            for path, p in parameters(model).items()
            if p.requires_grad and not expert_of(names[path] if isinstance(names[path], str) else names[path][0])
        }
        return trunk | self.leaves

    def reaches(self, block: str, place: int) -> bool:
        """Return True if the next backward pass reaches that expert."""
        return self._active is None or place in self._active.get(block, ())

    def record(self, block: str, members: list, tokens_N: Tensor, y_ND: Tensor, gates_N: Tensor) -> None:
        """Add the contributions of the experts of a group to the sums; see `kernel.Layer`."""
        real_T = self.masks["decoder" if block.startswith("decoder.") else "encoder"].reshape(-1)
        size_N = y_ND.float().norm(dim=-1) * gates_N.float() * real_T[tokens_N % len(real_T)]
        for place, start, end in members:
            self.contributions[block][place] += size_N[start:end].sum().double().cpu()

    def __enter__(self) -> "Experts":
        for layer in self._layers:
            self._before.append((layer.module, layer.module.__dict__.get("forward")))
            layer.module.forward = partial(self._compute, layer)
        return self

    def __exit__(self, *exc: object) -> None:
        for module, forward in self._before:
            del module.forward
            if forward is not None:
                module.forward = forward
        self._before = []


def _expert_tensors(model: TaskModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return flat local name -> tensor of every expert: modules' parameters, and leaves cut from fused tensors."""
    names = table(model)
    # The first has parameters of modules and adapters, the second has fused tensors.
    expert_params, fused_params = {}, {}
    for path, parameter in parameters(model).items():
        name = names[path]
        if isinstance(name, str):
            if expert_of(name):
                expert_params[name] = parameter
        elif expert_of(name[0]):
            fused_params[path] = parameter
    views = {}
    for path, parameter in fused_params.items():
        for name, view in unpack(names, {path: parameter.detach()}).items():
            if expert_of(name):
                views[name] = view.requires_grad_(parameter.requires_grad)
    return expert_params, views


def _layer(owner: Experts, model: TaskModel, block: str, tensors: Mapping[str, Tensor]) -> Layer:
    family = model.family
    module: Any = model.blocks()[block].get_submodule(family.experts)
    as_modules = family.layout == "modules"
    inner = module.get_submodule(family.module.format(0)) if as_modules else module
    layer_tensors: list[Tensor] = []

    def index(name: str) -> int | None:
        if name not in tensors:
            return None
        layer_tensors.append(tensors[name])
        return len(layer_tensors) - 1

    def linear(place: int, target: str) -> Linear:
        name = f"{block}.experts.{place}.{target}"
        weight, bias = (f"{name}.weight", f"{name}.bias") if as_modules else (name, f"{name}_bias")
        a, b = index(f"{name}.lora_A"), index(f"{name}.lora_B")
        state = model.quantised[weight][1] if weight in model.quantised else None
        transposed = not as_modules and is_transposed(module, family)
        matrix = tensors[weight] if state is None else state
        return Linear(
            weight=index(weight),
            bias=index(bias),
            width=matrix.shape[1 if transposed else 0],
            dtype=matrix.dtype,
            transposed=transposed,
            lora=None if a is None or b is None else (a, b),
            scale=model.adapters.scale if model.adapters is not None else 1.0,
            state=state,
        )

    pairs = [tuple(linear(place, target) for target in family.lora_targets) for place in owner.places[block]]
    first, second = zip(*pairs, strict=True)
    is_fused = not as_modules and first[0].state is None and second[0].state is None
    return Layer(
        module=module,
        keep=owner.keep,
        reached=partial(owner.reaches, block),
        dispatch=family.dispatch,
        skips=family.extra > 0 and hasattr(module, "identity_expert"),
        dropout=inner.dropout.p if as_modules else 0.0,
        tensors=tuple(layer_tensors),
        first=first,
        second=second,
        activation=_activation(inner if as_modules else module),
        whole=tuple(getattr(module, target).detach() for target in family.lora_targets) if is_fused else (),
        record=partial(owner.record, block) if block in owner.contributions else None,
    )


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that an experts module applies between its two projections."""
    if hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
        return module._apply_gate
    if hasattr(module, "gate_up_proj"):
        return partial(_gated, module.act_fn)
    return module.act if hasattr(module, "act") else module.act_fn


def _gated(act: Callable[[Tensor], Tensor], h_NH: Tensor) -> Tensor:
    gate, up = h_NH.chunk(2, dim=-1)
    return act(gate) * up


def is_transposed(module: Any, family: Family) -> bool:
    """Return True if fused weights are [E, in, out], as stated by the module or else inferred from their shapes."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    first_shape, second_shape = (getattr(module, target).shape for target in family.lora_targets)
    return first_shape[1] == second_shape[2] and first_shape[2] != second_shape[1]


def _compute_inputs(layer: Layer, given: Tensor) -> Tensor:
    """Compute the experts of a block on inputs [E T, D], in place of the forward of its experts module.

    The inputs have all tokens once per expert, multiplied by the expert's gate.

    Tokens that did not choose an expert are rows of zeros. They are skipped, and their output is zero.
    """
    n_experts = len(layer.first)
    rows_SD = given.reshape(-1, given.shape[-1])
    place_S = torch.arange(n_experts, device=given.device).repeat_interleave(len(rows_SD) // n_experts)
    chosen_S = rows_SD.detach().ne(0).any(-1)
    routed_S1 = place_S.masked_fill(~chosen_S, n_experts)[:, None]
    layer = replace(layer, dispatch=False)
    return compute(layer, rows_SD, routed_S1, rows_SD.new_ones(len(rows_SD), 1))
