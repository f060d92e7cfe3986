"""The computation behind `Experts`: explicit forward and backward passes of one block's experts.

Shapes: T tokens, D model width, E experts, K experts per token; S slots of the block, N of a group of experts; X and Y
the input and output of a projection, H and F the width before and after the activation, R the rank of adapters.

A CPU computes the experts one after the other, each with a matmul on its own slots. On a GPU, launching these kernels
would dominate the run time. There, torch's `grouped_mm` computes the experts of a block at once if their weights lie in
one tensor. The slots are in the order of the experts, with one group per expert; the group of an expert that a backward
pass does not reach is empty.

On CUDA, a token's experts are summed in no fixed order, so with more than two of them the last bit may differ between
runs. On the CPU, results are reproducible.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from consilium.moe.quantise import dequantise
from consilium.products import inner, rows

__all__ = ["Layer", "Linear", "compute"]

Tensors = tuple[Tensor, ...]
Grads = dict[int, Tensor | None]
Members = list[tuple[int, int, int]]
Spans = list[tuple[int, int]]

SLOTS = 1024
"""Slots that are gathered, activated and weighted together. Fewer add small operations, more take more memory."""
GROUPED = ("cuda",)
"""Kinds of devices on which a block's experts are computed at once."""


def _down(x_NX: Tensor, b_XR: Tensor) -> Tensor:
    """Return x b, [N, R]."""
    return rows(x_NX, b_XR, x_NX.new_empty(len(x_NX), b_XR.shape[1]))


@dataclass(frozen=True)
class Linear:
    """One projection of one expert, y = x W^T + b + scale (x A^T) B^T, with tensors given as indices into its block's.

    Args:
        weight: [Y, X], or [X, Y] if the family stores it transposed.
        bias: [Y]; None: there is none.
        width: Y.
        dtype: dtype of the weight.
        transposed: the weight is stored as [X, Y].
        lora: A [R, X] and B [Y, R]; None: there is no adapter.
        scale: factor of the adapter.
        state: the scheme that dequantises a 4-bit weight; None: the weight is a matrix already.
    """

    weight: int
    bias: int | None
    width: int
    dtype: torch.dtype
    transposed: bool
    lora: tuple[int, int] | None
    scale: float
    state: Any = None

    def matrix(self, tensors: Tensors) -> Tensor:
        """Return the weight [Y, X] in the dtype in which the expert computes."""
        weight = tensors[self.weight]
        if self.state is not None:
            weight = dequantise(weight, self.state)
        return weight.t() if self.transposed else weight

    def forward(self, x_NX: Tensor, n: int, tensors: Tensors, out: Tensor) -> None:
        """Write y of the first n rows into `out` [N, Y]; a few rows after them may be overwritten, too."""
        rows(x_NX, self.matrix(tensors).t(), out, n, None if self.bias is None else tensors[self.bias])
        if self.lora is not None:
            a_RX, b_YR = (tensors[i] for i in self.lora)
            out_rows = out[:n]
            rows(_down(x_NX[:n], a_RX.t()), b_YR.t(), out_rows, add=out_rows, alpha=self.scale)

    def backward(
        self,
        g_NY: Tensor,
        x_NX: Tensor,
        w_N1: Tensor | None,
        n: int,
        tensors: Tensors,
        grads: Grads,
        out: Tensor | None,
    ) -> None:
        """Compute the gradients of the first n rows, where g is the gradient of y.

        The gradient of the input is written into `out`; a few rows after the first n may be overwritten, too. The
        weight and the factors of the adapter, if they have an entry in `grads`, get their gradients of w y there.

        Args:
            g_NY: the gradient of y.
            x_NX: the input, already multiplied by w if the weight has an entry in `grads`.
            w_N1: the weights w of the rows; None: gradients are those of y.
            n: the number of rows.
            tensors: the tensors of the block.
            grads: index of a tensor -> its gradient.
            out: the gradient of the input [N, X]; None: it is not needed.
        """
        if out is not None:
            rows(g_NY, self.matrix(tensors), out, n)
            out = out[:n]
        g_NY, x_NX, w_N1 = g_NY[:n], x_NX[:n], None if w_N1 is None else w_N1[:n]
        if self.weight in grads:
            grads[self.weight] = inner(x_NX, g_NY) if self.transposed else inner(g_NY, x_NX)
            w_N1 = None
        if self.lora is not None:
            a_RX, b_YR = (tensors[i] for i in self.lora)
            v_NR = _down(g_NY, b_YR)
            if out is not None:
                rows(v_NR, a_RX, out, add=out, alpha=self.scale)
            if self.lora[0] in grads:
                v_NR = v_NR if w_N1 is None else v_NR.mul_(w_N1)
                grads[self.lora[0]] = inner(v_NR, x_NX, self.scale)
            if self.lora[1] in grads:
                u_NR = _down(x_NX, a_RX.t())
                u_NR = u_NR if w_N1 is None else u_NR.mul_(w_N1)
                grads[self.lora[1]] = inner(u_NR, g_NY, self.scale).t()  # This has the memory layout of B.


@dataclass(frozen=True)
class Layer:
    """One block: its experts module and, per place, the two projections, which index into `tensors`.

    Args:
        module: the experts module.
        keep: save h of all slots for the backward pass.
        reached: returns whether the backward pass reaches the expert in a place.
        dispatch: the router gives a mask instead of indices.
        dropout: dropout rate after the activation.
        tensors: the tensors of all experts.
        first: the first projection of each expert.
        second: the second projection of each expert.
        activation: the function between the projections.
        whole: the weights of each of the two projections in one tensor [E, ..]; (): they do not lie in one.
        record: called in the forward pass with each group's members, tokens [N], outputs [N, D] and gates [N].
        skips: choices beyond the experts pass the token on unchanged, times its gate.
    """

    module: Any
    keep: bool
    reached: Callable[[int], bool]
    dispatch: bool
    dropout: float
    tensors: tuple[Tensor, ...]
    first: tuple[Linear, ...]
    second: tuple[Linear, ...]
    activation: Callable[[Tensor], Tensor]
    whole: tuple[Tensor, ...] = ()
    record: Callable[[Members, Tensor, Tensor, Tensor], None] | None = None
    skips: bool = False

    @cached_property
    def at_once(self) -> bool:
        """Return True if all experts are computed at once; `grouped_mm` needs rows of a multiple of 16 bytes."""
        sides = [n for weight in self.whole for n in weight.shape[1:]]
        ranks = [self.tensors[linear.lora[0]].shape[0] for linear in (self.first[0], self.second[0]) if linear.lora]
        return bool(self.whole) and self.whole[0].device.type in GROUPED and all(n % 8 == 0 for n in sides + ranks)

    def act(self, h_NH: Tensor, members: Members, seed: int | None) -> Tensor:
        """Apply activation and dropout between the projections, [N, F]; the same seed gives the same dropout mask."""
        a_NF = self.activation(h_NH)
        if seed is None:
            return a_NF
        mask_NF = torch.empty_like(a_NF, requires_grad=False)
        for place, start, end in members:
            generator = torch.Generator(h_NH.device).manual_seed(seed + place)
            mask_NF[start:end].bernoulli_(1 - self.dropout, generator=generator)
        return a_NF * mask_NF / (1 - self.dropout)


def _through(
    layer: Layer, which: int, x_NX: Tensor, members: Members, tensors: Tensors, out: Tensor | None = None
) -> Tensor:
    """Apply the first or second projection of each expert to its own slots, [N, Y], in the order of `members`."""
    linears = (layer.first, layer.second)[which]
    first_linear = linears[0]
    x_NX = x_NX.to(first_linear.dtype)
    if layer.at_once:
        y_NY = _all_through(linears, layer.whole[which], x_NX, members, tensors)
        return y_NY if out is None else out.copy_(y_NY)
    y_NY = x_NX.new_empty(len(x_NX), first_linear.width) if out is None else out
    for place, start, end in members:  # The order matters: the next expert overwrites rows written beyond a slot range.
        linears[place].forward(x_NX[start:], end - start, tensors, y_NY[start:])
    return y_NY


def _back(
    layer: Layer,
    which: int,
    g_NY: Tensor,
    x_NX: Tensor,
    w_N1: Tensor | None,
    members: Members,
    tensors: Tensors,
    grads: Grads,
    to_input: bool = True,
) -> Tensor | None:
    """Return the gradient of x, [N, X], if `to_input`, where g is the gradient of y.

    The experts' own gradients, which are written into `grads`, are those of w y (w None: of y).
    """
    linears = (layer.first, layer.second)[which]
    dtype = linears[0].dtype
    g_NY = g_NY.to(dtype)
    if w_N1 is not None and any(linears[place].weight in grads for place, _, _ in members):
        x_NX = x_NX * w_N1
    x_NX, w_N1 = x_NX.to(dtype), None if w_N1 is None else w_N1.to(dtype)
    if layer.at_once:
        return _all_back(linears, layer.whole[which], g_NY, x_NX, w_N1, members, tensors, grads, to_input)
    grad_x = torch.empty_like(x_NX) if to_input else None
    for place, start, end in members:  # The order matters, as in `_through`.
        linear, w = linears[place], None if w_N1 is None else w_N1[start:end]
        out = None if grad_x is None else grad_x[start:]
        linear.backward(g_NY[start:], x_NX[start:], w, end - start, tensors, grads, out)
        if linear.bias in grads:
            g = g_NY[start:end]
            grads[linear.bias] = (g if w is None else g * w).sum(0).to(dtype)
    return grad_x


def _ends(members: Members, device: torch.device, experts: int = 0) -> Tensor:
    """Return the end of each expert's slots, int32: for the members, or for `experts` experts including empty ones."""
    sizes = {place: end - start for place, start, end in members}
    counts = torch.tensor([sizes.get(place, 0) for place in range(experts)] if experts else list(sizes.values()))
    return counts.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def _stack(linears: Sequence[Linear], tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return A [E, R, X] and B [E, Y, R] of all experts."""
    pairs = [linear.lora for linear in linears if linear.lora is not None]
    return torch.stack([tensors[a] for a, _ in pairs]), torch.stack([tensors[b] for _, b in pairs])


def _biases(linears: Sequence[Linear], members: Members, tensors: Tensors, device: torch.device) -> Tensor:
    """Return the bias of the expert of every slot [N, Y]."""
    bias = torch.stack([tensors[linears[place].bias] for place, _, _ in members])
    return bias[_owners(members, device)]


def _owners(members: Members, device: torch.device) -> Tensor:
    """Return, for every slot, the position in `members` of its expert [N]."""
    sizes = torch.tensor([end - start for _, start, end in members], device=device)
    return torch.repeat_interleave(torch.arange(len(members), device=device), sizes, output_size=members[-1][2])


def _all_through(
    linears: tuple[Linear, ...], whole: Tensor, x_NX: Tensor, members: Members, tensors: Tensors
) -> Tensor:
    """Compute `Linear.forward` of all members at once."""
    first_linear, ends = linears[0], _ends(members, x_NX.device, len(linears))
    y_NY = grouped_mm(x_NX, whole if first_linear.transposed else whole.transpose(1, 2), offs=ends)
    if first_linear.bias is not None:
        y_NY += _biases(linears, members, tensors, x_NX.device)
    if first_linear.lora is not None:
        a_ERX, b_EYR = _stack(linears, tensors)
        u_NR = grouped_mm(x_NX, a_ERX.transpose(1, 2), offs=ends)
        y_NY.add_(grouped_mm(u_NR, b_EYR.transpose(1, 2), offs=ends), alpha=first_linear.scale)
    return y_NY


def _all_back(
    linears: tuple[Linear, ...],
    whole: Tensor,
    g_NY: Tensor,
    x_NX: Tensor,
    w_N1: Tensor | None,
    members: Members,
    tensors: Tensors,
    grads: Grads,
    to_input: bool,
) -> Tensor | None:
    """Compute `Linear.backward` of all members at once."""
    first_linear, device = linears[0], g_NY.device
    ends, member_ends = _ends(members, device, len(linears)), _ends(members, device)
    grad_x = (
        grouped_mm(g_NY, whole.transpose(1, 2) if first_linear.transposed else whole, offs=ends) if to_input else None
    )

    def give(index: Callable[[Linear], int | None], all_of_them: Tensor) -> None:
        for (place, _, _), gradient in zip(members, all_of_them.unbind(), strict=True):
            grads[index(linears[place])] = gradient

    has_weight_grad = first_linear.weight in grads  # In this case x has already been multiplied by w.
    if has_weight_grad:
        left, right = (x_NX, g_NY) if first_linear.transposed else (g_NY, x_NX)
        give(lambda one: one.weight, grouped_mm(left.t(), right, offs=member_ends))
    if first_linear.bias in grads:
        g = g_NY if w_N1 is None else g_NY * w_N1
        sums = g.new_zeros(len(members), g.shape[1], dtype=torch.float32)
        give(lambda one: one.bias, sums.index_add_(0, _owners(members, device), g.float()).to(g.dtype))
    if first_linear.lora is not None:
        a_ERX, b_EYR = _stack(linears, tensors)
        v_NR = grouped_mm(g_NY, b_EYR, offs=ends)
        if grad_x is not None:
            grad_x.add_(grouped_mm(v_NR, a_ERX, offs=ends), alpha=first_linear.scale)
        w_N1 = first_linear.scale * (1 if has_weight_grad or w_N1 is None else w_N1)
        if first_linear.lora[0] in grads:
            give(lambda one: one.lora[0], grouped_mm((v_NR * w_N1).t(), x_NX, offs=member_ends))
        if first_linear.lora[1] in grads:
            u_NR = grouped_mm(x_NX, a_ERX.transpose(1, 2), offs=ends)
            give(lambda one: one.lora[1], grouped_mm(g_NY.t(), u_NR * w_N1, offs=member_ends))
    return grad_x


def compute(layer: Layer, hidden_TD: Tensor, routed: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute the experts of a block, in place of the forward of its experts module.

    Args:
        layer: the block.
        hidden_TD: the hidden state of the tokens.
        routed: indices [T, K], or a 0/1 dispatch mask [T, 1, E].
        weights_TK: the gates.
    """
    if layer.dispatch:
        served_T1, place_T1 = routed.max(-1)
        routed = place_T1.masked_fill(served_T1 == 0, len(layer.first))
    seed = int(torch.randint(2**62, ())) if layer.module.training and layer.dropout else None
    keep = layer.keep and torch.is_grad_enabled()
    out_TD = _Compute.apply(hidden_TD, weights_TK, routed, layer, keep, seed, *layer.tensors)
    if layer.skips:
        past_T1 = (weights_TK * (routed >= len(layer.first))).sum(-1, keepdim=True)
        out_TD = out_TD + (hidden_TD * past_T1).to(out_TD.dtype)
    return out_TD


def _groups(counts: list[int], reached: Callable[[int], bool], at_once: bool) -> Iterator[tuple[Members, Spans]]:
    """Yield groups of experts of about `SLOTS` slots, or one group with all experts.

    Each group has its members, which are a place and a range of slots within the group, and its spans, which are ranges
    in the order of all slots.

    Args:
        counts: slots per expert; experts without slots are left out.
        reached: returns whether a place is reached; other experts are left out.
        at_once: yield all experts in one group.
    """
    members: Members = []
    spans: Spans = []
    position = size = 0
    for place, count in enumerate(counts):
        if count and reached(place):
            members.append((place, size, size + count))
            if spans and spans[-1][1] == position:
                spans[-1] = (spans[-1][0], position + count)
            else:
                spans.append((position, position + count))
            size += count
        position += count
        if members and ((size >= SLOTS and not at_once) or place == len(counts) - 1):
            yield members, spans
            members, spans, size = [], [], 0


def _take(spans: Spans, tensor: Tensor) -> Tensor:
    """Return the rows of the spans; the result is a view if they are contiguous."""
    parts = [tensor[start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Compute(torch.autograd.Function):
    """The experts of one block. Slot token * K + k is a token's k-th choice; sentinels (>= E) are skipped."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        routed_TK: Tensor,
        layer: Layer,
        keep: bool,
        seed: int | None,
        *tensors: Tensor,
    ) -> Tensor:
        experts, k = len(layer.first), routed_TK.shape[-1]
        order_S = routed_TK.flatten().argsort(stable=True)
        counts = torch.bincount(routed_TK.flatten(), minlength=experts)[:experts].tolist()
        out_TD, weights_S = torch.zeros_like(hidden_TD), weights_TK.flatten()
        first_linear = layer.first[0]
        saved_h = [hidden_TD.new_empty(sum(counts), first_linear.width, dtype=first_linear.dtype)] if keep else []
        for members, spans in _groups(counts, lambda place: True, layer.at_once):
            slots = _take(spans, order_S)
            tokens = slots // k
            out = _take(spans, saved_h[0]) if keep else None  # All spans are contiguous here, so this is a view.
            h_NH = _through(layer, 0, hidden_TD[tokens], members, tensors, out)
            y_ND = _through(layer, 1, layer.act(h_NH, members, seed), members, tensors)
            if layer.record is not None:
                layer.record(members, tokens, y_ND, weights_S[slots])
            out_TD.index_add_(0, tokens, (y_ND * weights_S[slots, None]).to(out_TD.dtype))
        ctx.layer, ctx.counts, ctx.seed = layer, counts, seed
        ctx.save_for_backward(hidden_TD, weights_TK, order_S, *tensors, *saved_h)  # Checkpointing needs to see these.
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        hidden_TD, weights_TK, order_S, *saved_tensors = ctx.saved_tensors
        tensors, saved_h = tuple(saved_tensors[: len(layer.tensors)]), saved_tensors[len(layer.tensors) :]
        needs_grad, k = ctx.needs_input_grad[-len(tensors) :], weights_TK.shape[-1]
        grads: Grads = {i: None for i, is_needed in enumerate(needs_grad) if is_needed}
        grad_hidden = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        weights_S = weights_TK.flatten()
        grad_weights = torch.zeros_like(weights_S)
        for members, spans in _groups(ctx.counts, layer.reached, layer.at_once):
            slots = _take(spans, order_S)
            tokens = slots // k
            x_ND, g_ND, w_N1 = hidden_TD[tokens], grad_TD[tokens], weights_S[slots, None]
            h_NH = _take(spans, saved_h[0]) if saved_h else _through(layer, 0, x_ND, members, tensors)
            h_NH = h_NH.detach().requires_grad_()
            with torch.enable_grad():
                a_NF = layer.act(h_NH, members, ctx.seed)
            grad_a = _back(layer, 1, g_ND, a_NF.detach(), w_N1, members, tensors, grads)  # This is for y unweighted.
            grad_w = (grad_a * a_NF.detach()).sum(-1)
            if layer.second[0].bias is not None and layer.at_once:
                grad_w += (g_ND * _biases(layer.second, members, tensors, g_ND.device)).sum(-1)
            elif layer.second[0].bias is not None:
                for place, start, end in members:
                    grad_w[start:end] += g_ND[start:end] @ tensors[layer.second[place].bias]
            grad_weights[slots] = grad_w.to(grad_weights.dtype)
            (grad_h,) = torch.autograd.grad(a_NF, h_NH, grad_a.mul_(w_N1).to(a_NF.dtype))
            grad_x = _back(layer, 0, grad_h, x_ND, None, members, tensors, grads, grad_hidden is not None)
            if grad_hidden is not None:
                grad_hidden.index_add_(0, tokens, grad_x.to(grad_hidden.dtype))
        tensor_grads = (grads.get(i) for i in range(len(tensors)))
        return grad_hidden, grad_weights.view_as(weights_TK), None, None, None, None, *tensor_grads
