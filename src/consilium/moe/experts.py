"""Our own computation of a model's experts: a leaf per expert, and a backward pass through the chosen ones alone.

transformers keeps the experts of most families in one fused tensor [E, ..]: its gradient and its optimiser moments are
as large as all experts together, however few of them learn. Here every expert has tensors of its own, views of the
model's, and one autograd function per block runs over the experts one by one on their own tokens:

    h = x W1^T + b1,   a = act(h),   y = a W2^T + b2,   out[token] += w * y

for every family of the table: gated or not, transposed, interleaved and clamped (gpt-oss), with dropout inside and
tokens beyond the capacity left out (Switch). Adapters of the model (moe/lora.py) add two narrow matmuls to each
projection, and where the base is frozen its gradients are not computed; a base in 4 bits is turned back into matrices
expert by expert. Only the `forward` of the live experts modules is replaced, and only while the context manager is
entered; parameters, names, routers and hooks stay what and where they are.

Shapes: T tokens, D model width, E experts, K experts per token, N tokens of one expert, F width inside an expert.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consilium.errors import ModelError
from consilium.moe.addressing import all_experts, expert_of, parameters, table, unpack
from consilium.moe.model import TaskModel
from consilium.moe.quantise import dequantise

__all__ = ["Active", "Experts"]

Tensors = tuple[Tensor, ...]
Active = Mapping[str, Collection[int]]
"""Block -> local places of the experts that a backward pass reaches; a block that is not named: none of it."""


class Experts:
    """The experts of a model, computed here instead of in transformers while the context manager is entered.

    The forward pass equals transformers' own up to the order of summation; so does the backward pass through all.

    Args:
        model: of any family of the table, sliced or not, with adapters or without, on its device for good; parameters
            that require no gradient are constants.
        keep: save the pre-activations h of all tokens for the backward pass. It is then faster by one matmul per
            expert, but its memory is bounded by the tokens of all experts; without, by the tokens of the active ones.

    Attributes:
        places: block -> the local places of its experts, 0 .. E-1.
        leaves: "<block>.experts.<place>.<tensor>" -> a leaf that shares storage with the model's own parameter, for
            every expert tensor that is to be trained. Gradients arrive here (`grad` is None where no token came or
            the expert was not active), and an optimiser that steps the leaves steps the model.
    """

    def __init__(self, model: TaskModel, keep: bool = False):
        self.keep = keep
        self.places = all_experts(model)
        self._active: Active | None = None
        self._before: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
        own, views = _expert_tensors(model)
        self.leaves = {name: tensor for name, tensor in (own | views).items() if tensor.requires_grad}
        self._of: dict[tuple[str, int], list[Tensor]] = {}
        for name, leaf in self.leaves.items():
            self._of.setdefault(expert_of(name), []).append(leaf)
        tensors = own | views | {name: packed for name, (packed, _) in model.quantised.items()}
        self._layers = [_layer(self, model, block, tensors) for block in self.places]

    @property
    def active(self) -> Active | None:
        """Whom the coming backward pass reaches; None: all. The output of the others counts as a constant.

        It is read while the backward pass runs, so it can be decided after the forward pass of the same batch.

        Raises:
            ModelError: on setting, for a block or a place that the model does not have.
        """
        return self._active

    @active.setter
    def active(self, active: Active | None) -> None:
        for block, places in (active or {}).items():
            have = self.places.get(block)
            if have is None:
                raise ModelError(f"{block!r} is not a sparse block of the model; it has {', '.join(self.places)}")
            odd = sorted(set(places) - set(have))
            if odd:
                raise ModelError(f"{block} has no expert in place {odd[0]}; its places are 0..{len(have) - 1}")
        self._active = None if active is None else {block: frozenset(places) for block, places in active.items()}

    def of(self, block: str, place: int) -> list[Tensor]:
        """The leaves of one expert."""
        return self._of.get((block, place), [])

    def trainable(self, model: TaskModel) -> dict[str, Tensor]:
        """All that is to be trained: parameters that belong to no expert, by their paths, and the leaves."""
        names = table(model)
        trunk = {
            path: p
            for path, p in parameters(model).items()
            if p.requires_grad and not expert_of(names[path] if isinstance(names[path], str) else names[path][0])
        }
        return trunk | self.leaves

    def reaches(self, block: str, place: int) -> bool:
        """Whether the coming backward pass reaches that expert."""
        return self._active is None or place in self._active.get(block, ())

    def __enter__(self) -> "Experts":
        for layer in self._layers:
            self._before.append((layer.module, layer.module.__dict__.get("forward")))
            layer.module.forward = partial(_forward, layer)
        return self

    def __exit__(self, *exc: object) -> None:
        for module, forward in self._before:
            del module.forward
            if forward is not None:
                module.forward = forward
        self._before = []


def _expert_tensors(model: TaskModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Flat local name -> tensor of every expert: the parameters of modules, and leaves cut out of fused tensors."""
    names = table(model)
    own, fused = {}, {}  # parameters of modules and adapters; fused tensors
    for path, parameter in parameters(model).items():
        name = names[path]
        if isinstance(name, str):
            if expert_of(name):
                own[name] = parameter
        elif expert_of(name[0]):
            fused[path] = parameter
    views = {}
    for path, parameter in fused.items():
        for name, view in unpack(names, {path: parameter.detach()}).items():
            views[name] = view.requires_grad_(parameter.requires_grad)
    return own, views


# --- one block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """One projection of one expert, from tensors of its block by index: x W^T + b + scale (x A^T) B^T.

    Args:
        weight: [Y, X], or [X, Y] if the family stores it transposed. bias: [Y].
        lora: A [R, X] and B [Y, R].
        state: how to turn a 4-bit weight back into a matrix; None: it is one.
    """

    weight: int
    bias: int | None
    transposed: bool
    lora: tuple[int, int] | None
    scale: float
    state: Any = None

    def matrix(self, tensors: Tensors) -> Tensor:
        """The weight [Y, X] in the dtype in which the expert computes."""
        weight = tensors[self.weight]
        if self.state is not None:
            weight = dequantise(weight, self.state)
        return weight.t() if self.transposed else weight

    def __call__(self, x_NX: Tensor, tensors: Tensors) -> Tensor:
        weight = self.matrix(tensors)
        x_NX = x_NX.to(weight.dtype)
        y_NY = x_NX @ weight.t() if self.bias is None else torch.addmm(tensors[self.bias], x_NX, weight.t())
        if self.lora is not None:
            a_RX, b_YR = (tensors[i] for i in self.lora)
            y_NY.addmm_(x_NX @ a_RX.t(), b_YR.t(), alpha=self.scale)
        return y_NY

    def back(
        self, g_NY: Tensor, x_NX: Tensor, w_N1: Tensor | None, tensors: Tensors, grads: dict[int, Tensor | None]
    ) -> Tensor:
        """Through y: the gradient of x [N, X] where that of y is g; with the gradient w g (w None: g) those tensors
        that have a place in `grads` get theirs."""
        weight = self.matrix(tensors)
        g_NY, x_NX = g_NY.to(weight.dtype), x_NX.to(weight.dtype)
        if w_N1 is not None:
            x_NX = (x_NX * w_N1).to(weight.dtype)
        if self.weight in grads:
            grads[self.weight] = x_NX.t() @ g_NY if self.transposed else g_NY.t() @ x_NX
        if self.bias in grads:
            grads[self.bias] = (g_NY if w_N1 is None else g_NY * w_N1).sum(0).to(tensors[self.bias].dtype)
        to_x = g_NY @ weight
        if self.lora is not None:
            a_RX, b_YR = (tensors[i] for i in self.lora)
            v_NR = g_NY @ b_YR
            to_x.addmm_(v_NR, a_RX, alpha=self.scale)
            if self.lora[0] in grads:
                grads[self.lora[0]] = (v_NR.t() @ x_NX).mul_(self.scale)
            if self.lora[1] in grads:
                grads[self.lora[1]] = (g_NY.t() @ (x_NX @ a_RX.t())).mul_(self.scale)
        return to_x


@dataclass(frozen=True)
class _Layer:
    """One block: its experts module and, per place, the two projections; they index into `tensors`."""

    owner: Experts
    block: str
    module: Any
    dispatch: bool
    dropout: float
    tensors: tuple[Tensor, ...]
    first: tuple[_Linear, ...]
    second: tuple[_Linear, ...]
    activation: Callable[[Tensor], Tensor]

    def act(self, h_NH: Tensor, place: int, seed: int | None) -> Tensor:
        """What lies between the projections, [N, F]; the mask of dropout follows from the seed, also the next time."""
        a_NF = self.activation(h_NH)
        if seed is None:
            return a_NF
        generator = torch.Generator(h_NH.device).manual_seed(seed + place)
        mask_NF = torch.empty_like(a_NF).bernoulli_(1 - self.dropout, generator=generator)
        return a_NF * mask_NF / (1 - self.dropout)


def _layer(owner: Experts, model: TaskModel, block: str, tensors: Mapping[str, Tensor]) -> _Layer:
    family = model.family
    module: Any = model.blocks()[block].get_submodule(family.experts)
    modules = family.layout == "modules"
    inner = module.get_submodule(family.module.format(0)) if modules else module
    flat: list[Tensor] = []

    def index(name: str) -> int | None:
        if name not in tensors:
            return None
        flat.append(tensors[name])
        return len(flat) - 1

    def linear(place: int, target: str) -> _Linear:
        name = f"{block}.experts.{place}.{target}"
        weight, bias = (f"{name}.weight", f"{name}.bias") if modules else (name, f"{name}_bias")
        a, b = index(f"{name}.lora_A"), index(f"{name}.lora_B")
        return _Linear(
            weight=index(weight),
            bias=index(bias),
            transposed=not modules and module.is_transposed,
            lora=None if a is None or b is None else (a, b),
            scale=model.adapters.scale if model.adapters is not None else 1.0,
            state=model.quantised[weight][1] if weight in model.quantised else None,
        )

    pairs = [tuple(linear(place, target) for target in family.lora_targets) for place in owner.places[block]]
    first, second = zip(*pairs, strict=True)
    return _Layer(
        owner=owner,
        block=block,
        module=module,
        dispatch=family.dispatch,
        dropout=inner.dropout.p if modules else 0.0,
        tensors=tuple(flat),
        first=first,
        second=second,
        activation=inner.act if modules else module._apply_gate,
    )


def _forward(layer: _Layer, hidden_TD: Tensor, routed: Tensor, weights_TK: Tensor) -> Tensor:
    """What replaces the forward of an experts module. `routed`: indices [T, K], or a 0/1 dispatch mask [T, 1, E]."""
    if layer.dispatch:
        served_T1, place_T1 = routed.max(-1)
        routed = place_T1.masked_fill(served_T1 == 0, len(layer.first))
    seed = int(torch.randint(2**62, ())) if layer.module.training and layer.dropout else None
    keep = layer.owner.keep and torch.is_grad_enabled()
    return _Compute.apply(hidden_TD, weights_TK, routed, layer, keep, seed, *layer.tensors)


def _segments(order_S: Tensor, counts: list[int], k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(place, slots [N], tokens [N]) of every expert that has a token."""
    start = 0
    for place, count in enumerate(counts):
        if count:
            slots = order_S[start : start + count]
            yield place, slots, slots // k
        start += count


class _Compute(torch.autograd.Function):
    """The experts of one block. A slot is a token's k-th choice, number token * K + k; sentinels (>= E) are skipped."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        routed_TK: Tensor,
        layer: _Layer,
        keep: bool,
        seed: int | None,
        *tensors: Tensor,
    ) -> Tensor:
        experts, k = len(layer.first), routed_TK.shape[-1]
        order_S = routed_TK.flatten().argsort(stable=True)
        counts = torch.bincount(routed_TK.flatten(), minlength=experts)[:experts].tolist()
        out_TD, weights_S, kept = torch.zeros_like(hidden_TD), weights_TK.flatten(), []
        for place, slots, tokens in _segments(order_S, counts, k):
            h_NH = layer.first[place](hidden_TD[tokens], tensors)
            y_ND = layer.second[place](layer.act(h_NH, place, seed), tensors)
            out_TD.index_add_(0, tokens, (y_ND * weights_S[slots, None]).to(out_TD.dtype))
            if keep:
                kept.append(h_NH)
        ctx.layer, ctx.counts, ctx.seed = layer, counts, seed
        ctx.save_for_backward(hidden_TD, weights_TK, order_S, *tensors, *kept)  # saved so that checkpointing sees it
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        hidden_TD, weights_TK, order_S, *rest = ctx.saved_tensors
        tensors, kept = tuple(rest[: len(layer.tensors)]), iter(rest[len(layer.tensors) :])
        keep, k = len(rest) > len(tensors), weights_TK.shape[-1]
        needs = ctx.needs_input_grad[-len(tensors) :]
        grads: dict[int, Tensor | None] = {i: None for i, needed in enumerate(needs) if needed}
        to_hidden = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        weights_S = weights_TK.flatten()
        to_weights = torch.zeros_like(weights_S)
        for place, slots, tokens in _segments(order_S, ctx.counts, k):
            h_NH = next(kept) if keep else None
            if not layer.owner.reaches(layer.block, place):
                continue
            first, second = layer.first[place], layer.second[place]
            x_ND, g_ND, w_N1 = hidden_TD[tokens], grad_TD[tokens], weights_S[slots, None]
            h_NH = (first(x_ND, tensors) if h_NH is None else h_NH.detach()).requires_grad_()
            with torch.enable_grad():
                a_NF = layer.act(h_NH, place, ctx.seed)
            to_a = second.back(g_ND, a_NF.detach(), w_N1, tensors, grads)  # of y, before its weight
            to_y = (to_a * a_NF.detach()).sum(-1)
            if second.bias is not None:
                to_y += g_ND @ tensors[second.bias]
            to_weights[slots] = to_y.to(to_weights.dtype)
            (to_h,) = torch.autograd.grad(a_NF, h_NH, (to_a * w_N1).to(a_NF.dtype))
            to_x = first.back(to_h, x_ND, None, tensors, grads)
            if to_hidden is not None:
                to_hidden.index_add_(0, tokens, to_x.to(to_hidden.dtype))
        own = (grads.get(i) for i in range(len(tensors)))
        return to_hidden, to_weights.view_as(weights_TK), None, None, None, None, *own
