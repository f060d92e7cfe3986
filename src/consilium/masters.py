"""Optimizers that update float32 masters of bfloat16 weights.

bfloat16 has 8 bits of precision. A weight of 0.02 has a spacing of 1e-4, so an update of 1e-5 is lost if it is added to
the weight. `MasterOptimizer` runs any torch optimizer on float32 masters and rounds them to the weights that a model
computes with; mixtures of experts in bfloat16 are trained with it.

`Masters` is a special case: plain SGD on a CPU for small models under autocast. Under autocast alone, a forward pass
makes bfloat16 copies of all weights, a backward pass makes float32 copies of all gradients, and the optimizer then
reads both weights and gradients again. Small models therefore wait for memory longer than they compute. Here, a layer
holds its weights in bfloat16 and its gradients arrive in bfloat16. Gradient, master and the next bfloat16 weight are
processed in one pass, in pieces that fit into a core's own cache. The result is the same to the bit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["CHUNK", "MasterOptimizer", "Masters"]

CHUNK = 2**24
"""Elements of masters that `MasterOptimizer` updates at once; their gradients are held in float32."""

LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d
"""Layers whose weights autocast copies, and which use them for nothing else."""
PIECE = 2**17
"""Elements of a weight that are updated at once."""


class MasterOptimizer:
    """An optimizer that updates float32 masters and rounds them to the parameters, which have fewer bits.

    Args:
        parameters: path -> parameter; the gradients are read from there.
        make: returns a torch optimizer of a mapping path -> float32 tensor; the paths have suffixes.
        start: path -> initial masters; missing paths start from the parameters' own values. It is emptied.

    Attributes:
        masters: path -> float32 master, of the parameter's shape.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        make: Callable[[Mapping[str, Tensor]], torch.optim.Optimizer],
        start: dict[str, Tensor] | None = None,
    ):
        start = {} if start is None else start
        self.parameters = dict(parameters)
        self.masters = {
            path: start.pop(path, p).detach().to(p.device, torch.float32, copy=True).reshape(p.shape).contiguous()
            for path, p in parameters.items()
        }
        pieces = {
            f"{path}#{place}": piece
            for path, master in self.masters.items()
            for place, piece in enumerate(master.view(-1).split(CHUNK))
        }
        self.optimizer = make(pieces)
        self._chunks: list[list[tuple[str, int, Tensor]]] = []  # (path, place, piece), updated together
        room = 0
        for name, piece in pieces.items():
            path, _, place = name.rpartition("#")
            if piece.numel() > room:
                self._chunks.append([])
                room = CHUNK
            self._chunks[-1].append((path, int(place), piece))
            room -= piece.numel()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters of all parameters that have a gradient, and round them to the parameters."""
        for chunk in self._chunks:
            pieces = [(path, place, piece) for path, place, piece in chunk if self.parameters[path].grad is not None]
            for path, place, piece in pieces:
                piece.grad = self.parameters[path].grad.reshape(-1).split(CHUNK)[place].to(torch.float32)
            self.optimizer.step()
            for path, place, piece in pieces:
                piece.grad = None
                if (place + 1) * CHUNK >= self.parameters[path].numel():
                    self.parameters[path].copy_(self.masters[path])

    def forget(self, parameter: Tensor) -> None:
        """Drop the optimizer's state of a parameter."""
        for chunk in self._chunks:
            for path, _, piece in chunk:
                if self.parameters[path] is parameter:
                    self.optimizer.state.pop(piece, None)


class Masters:
    """Plain SGD on float32 masters, as a context in which the layers of a model hold bfloat16 weights.

    SGD runs without momentum and weight decay. On exit, the masters become the layers' weights again.

    Args:
        model: float32; it must be run under autocast to bfloat16.
        groups: the trainable parameters with their rates, in the form of a torch optimizer's `param_groups`.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Mapping[str, Any]]):
        layers = (module for module in model.modules() if isinstance(module, LAYERS))
        dense_ids = {id(p) for layer in layers for p in layer.parameters(recurse=False) if _dense(p)}
        self.others: list[tuple[nn.Parameter, float]] = []
        self.members: list[tuple[list[nn.Parameter], float]] = []
        for group in groups:
            rate, dense_params = group["lr"], [p for p in group["params"] if id(p) in dense_ids]
            self.others += [(p, rate) for p in group["params"] if id(p) not in dense_ids]
            self.members += [([p], rate) for p in dense_params if p.numel() >= PIECE]
            if small_params := [p for p in dense_params if p.numel() < PIECE]:
                self.members.append((small_params, rate))

    def __enter__(self) -> Self:
        buffer = torch.empty(PIECE)
        self.together = [_Together(*member, buffer) for member in self.members]
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.together:
            group.restore()

    def zero_grad(self) -> None:
        """Drop all gradients, as torch's optimizers do."""
        for group in self.together:
            for p in group.parameters:
                p.grad = None
        for p, _ in self.others:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient: w <- w - rate * gradient."""
        for group in self.together:
            group.step()
        for p, rate in self.others:
            if p.grad is not None:
                p.add_(p.grad, alpha=-rate)


class _Together:
    """Parameters that are updated as if they were one; room [PIECE] float32 is a scratch buffer."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, room: Tensor):
        self.parameters, self.rate = parameters, rate
        self.weights = [p.data for p in parameters]
        flat_weights = [_flat(weight) for weight in self.weights]
        self.master = flat_weights[0] if len(flat_weights) == 1 else torch.cat(flat_weights)
        self.low = self.master.to(torch.bfloat16)
        pieces = zip(self.master.split(PIECE), self.low.split(PIECE), strict=True)
        self.pieces = [(master, low, room[: len(low)]) for master, low in pieces]
        for p, low in zip(parameters, self._parts(self.low), strict=True):
            p.data = low

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Split `flat` into one tensor per parameter, each with the strides of its weight."""
        parts, start = [], flat.storage_offset()
        for weight in self.weights:
            parts.append(flat.as_strided(weight.shape, weight.stride(), start))
            start += weight.numel()
        return parts

    def step(self) -> None:
        gradients = [_flat(_gradient(p)) for p in self.parameters]
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        for (master, low, room), part in zip(self.pieces, gradient.split(PIECE), strict=True):
            low.copy_(master.add_(room.copy_(part), alpha=-self.rate))

    def restore(self) -> None:
        for p, weight, master in zip(self.parameters, self.weights, self._parts(self.master), strict=True):
            if master.data_ptr() != weight.data_ptr():
                weight.copy_(master)
            p.data = weight


def _dense(p: nn.Parameter) -> bool:
    """Return True if a parameter can be stored as part of a longer tensor: float32, no gaps."""
    dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
    return p.dtype == torch.float32 and dense and p.numel() > 0


def _flat(t: Tensor) -> Tensor:
    """Return a dense tensor as a flat view, in memory order."""
    return t.as_strided((t.numel(),), (1,))


def _gradient(p: nn.Parameter) -> Tensor:
    """Return the gradient of p with the strides of p; zeros if p has no gradient in this batch."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
