"""A check that a model behaves as its `Family` says: each block's slice is compared to the block with a masked router.

One tiny batch runs through the model, and the inputs of routers and experts are recorded. For every block, two copies
that share all tensors then get the same inputs: one is cut to some experts, and the router of the other may only choose
these experts. Gates and outputs must agree. Finally, the model's output must agree with the output that `moe.experts`
computes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from consilium.errors import ModelError
from consilium.moe.experts import Experts
from consilium.moe.families import Family, blocks
from consilium.moe.model import TaskModel
from consilium.moe.surgery import attribute, experts_in, put_tensor, set_attribute, share_block, slice_block

__all__ = ["check_slices"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two results as a share of the largest element, by dtype."""


@dataclass
class Call:
    """The inputs and the output of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Record the last call of each module inside the block."""
    calls: dict[str, Call] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            calls[name] = Call(args, kwargs, output)

        return hook

    hooks = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_slices(model: nn.Module, family: Family, ids: Tensor) -> None:
    """Raise if a block does not behave as the family says.

    Args:
        model: a live model of the family, in evaluation mode.
        family: the family.
        ids: token ids [B, S] without padding.

    Raises:
        ModelError: if a block differs; the message names the block and the difference.
    """
    sparse_blocks = blocks(model, family)
    modules = {
        f"{name}|{part}": block.get_submodule(path)
        for name, block in sparse_blocks.items()
        for part, path in (("router", family.router), ("experts", family.experts))
    } | {f"{name}|block": block for name, block in sparse_blocks.items()}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False) and not type(model).__name__.endswith("EncoderModel"):
        inputs["decoder_input_ids"] = ids
    with recorded(modules) as calls:
        output = model(**inputs)[0]
    for name, block in sparse_blocks.items():
        if f"{name}|router" not in calls:
            raise ModelError(f"no token of a text passes its block {name}")
        total = experts_in(block, family)
        sample_ids = tuple(range(1, total, 2)) if total // 2 >= family.least else tuple(range(total))
        for expert_ids in {sample_ids, tuple(range(total - family.least, total))}:
            _compare(name, block, family, expert_ids, calls)
    if output.dtype != torch.float32:  # Roundings add up over many layers.
        return
    with Experts(TaskModel(model, family, "", (), output.dtype)):
        kernel_output = model(**inputs)[0]
    if not _agree(kernel_output, output):
        raise ModelError("its experts compute something else than two matrices with an activation between them")


def _compare(name: str, block: nn.Module, family: Family, kept: Sequence[int], calls: Mapping[str, Call]) -> None:
    total = experts_in(block, family)
    if len(kept) == total:
        return
    sliced_block = slice_block(share_block(block), family, kept)
    masked_block = _lift(share_block(block), family, kept, total)
    if family.dispatch:
        call = calls[f"{name}|block"]
        with _Masked(masked_block.get_submodule(family.router), kept, total, family.extra):
            masked_output = masked_block(*call.args, **call.kwargs)
        slice_output = sliced_block(*call.args, **call.kwargs)
        masked_output, slice_output = (y[0] if isinstance(y, tuple) else y for y in (masked_output, slice_output))
        if not _agree(slice_output, masked_output):
            raise ModelError(f"a slice of its block {name} differs from the block with its router masked")
        return
    call, experts_call = calls[f"{name}|router"], calls[f"{name}|experts"]
    with _Masked(masked_block.get_submodule(family.router), kept, total, family.extra):
        masked_output = _route(masked_block, block, family, call)
    slice_output = _route(sliced_block, block, family, call)
    places = torch.tensor([*kept, *range(total, total + family.extra)], device=slice_output[family.routed].device)
    masked_gates = _spread(masked_output[family.gates], masked_output[family.routed], total + family.extra)
    slice_gates = _spread(slice_output[family.gates], slice_output[family.routed], len(places))
    if not _agree(slice_gates, masked_gates[:, places]):
        raise ModelError(f"the gates of a slice of its block {name} differ from those with its router masked")
    hidden = experts_call.args[0] if experts_call.args else next(iter(experts_call.kwargs.values()))
    outputs = [
        variant.get_submodule(family.experts)(
            hidden, *(routing[i].reshape(len(hidden), -1) for i in (family.routed, family.gates))
        )
        for variant, routing in ((sliced_block, slice_output), (masked_block, masked_output))
    ]
    if not _agree(*outputs):
        raise ModelError(f"the experts of a slice of its block {name} differ from those with its router masked")


def _lift(masked: nn.Module, family: Family, kept: Sequence[int], total: int) -> nn.Module:
    """Give the copy of a whole block the settings of a slice, and corrections that exclude the other experts."""
    for path in (f"{family.router}.num_group", f"{family.router}.topk_group") if family.groups else ():
        set_attribute(masked, path, 1)
    if family.top_k is not None:
        set_attribute(masked, family.top_k, min(attribute(masked, family.top_k), family.choices(len(kept))))
    if family.capacity is not None:
        limit = attribute(masked, family.capacity)
        set_attribute(masked, family.capacity, -(-limit * total // len(kept)))
    if family.correction is not None:
        owner, _, leaf = family.correction.rpartition(".")
        correction = attribute(masked, family.correction).detach().clone()
        outside_ids = [i for i in range(total) if i not in kept]
        correction[..., outside_ids] = float("-inf")
        put_tensor(masked.get_submodule(owner), leaf, correction)
    return masked


def _route(copy: nn.Module, block: nn.Module, family: Family, call: Call) -> tuple[Any, ...]:
    """Run the router of a copy with the recorded inputs, replacing the block's own tensors by those of the copy."""
    replacements = {id(attribute(block, path)): attribute(copy, path) for path in family.beside}
    args = [replacements.get(id(arg), arg) for arg in call.args]
    return copy.get_submodule(family.router)(*args, **{k: replacements.get(id(v), v) for k, v in call.kwargs.items()})


def _spread(gates: Tensor, index: Tensor, total: int) -> Tensor:
    """Return gates by expert, float32 [T, E]."""
    index = index.reshape(-1, index.shape[-1])
    zeros = torch.zeros(len(index), total, device=index.device)
    return zeros.scatter_add_(1, index, gates.reshape(index.shape).float())


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return True if two results are the same within the precision of their dtype.

    Below 32 bits, a token may choose another expert if two are about equal, so one in five tokens may differ.
    """
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    largest = float(b.float().abs().max()) if b.numel() else 0.0
    is_close = (a.float() - b.float()).abs().flatten(0, -2).amax(-1) <= TOLERANCE[b.dtype] * max(largest, 1e-6)
    return bool(is_close.all()) if b.dtype == torch.float32 else float(is_close.float().mean()) >= 0.8


class _Masked(TorchFunctionMode):
    """A context in which the logits [.., E] that a router computes are -inf except for the kept experts."""

    def __init__(self, router: nn.Module, kept: Sequence[int], total: int, extra: int):
        super().__init__()
        self.width, self.depth = total + extra, 0
        self.outside = torch.tensor([i for i in range(total) if i not in kept])
        self.router, self.forward = router, router.forward

    def __enter__(self) -> "_Masked":
        self.router.forward = self._inside
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.router.forward

    def _inside(self, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        is_product = func in (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)
        if self.depth and is_product and output.shape[-1] == self.width:
            return output.index_fill(-1, self.outside.to(output.device), float("-inf"))
        return output
