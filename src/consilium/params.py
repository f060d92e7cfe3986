"""Arithmetic on `Params`, flat names to tensors: checks of their form, and the mean that every server uses.

A client that does not hold an expert has no key for it: no zeros, no masks. `WeightedMean` therefore averages each key
over the clients that hold it. Sums are taken in float64 in the order of the `add` calls. The engines add clients in the
order of their ids, so a result does not depend on which client answered first.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.errors import PayloadError

__all__ = ["Like", "Params", "WeightedMean", "checksum", "finite", "nbytes"]

Params = dict[str, Tensor]
"""Flat name -> tensor on the CPU, for instance `<block>.experts.17.down_proj` or `<block>.router.17.weight`."""


@dataclass(frozen=True)
class Like:
    """The required form of a tensor; nothing is broadcast and nothing is cast.

    Args:
        shape: shape of the tensor; None in it stands for any length.
        dtype: dtype of the tensor.
        least: smallest value allowed; values must be finite in any case.
        most: largest value allowed.
        needed: whether the tensor must be present.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    least: float = -math.inf
    most: float = math.inf
    needed: bool = True

    @classmethod
    def of(cls, tensor: Tensor, needed: bool = True) -> "Like":
        """Return the form of a given tensor: its shape and dtype."""
        return cls(tuple(tensor.shape), tensor.dtype, needed=needed)

    def objection(self, tensor: Tensor) -> str | None:
        """Return why a tensor does not have this form, or None if it does."""
        same_rank = len(tensor.shape) == len(self.shape)
        if not same_rank or any(n not in (m, None) for m, n in zip(tensor.shape, self.shape, strict=True)):
            return f"has shape {tuple(tensor.shape)}, it must be {self.shape}"
        if tensor.dtype != self.dtype:
            return f"is {tensor.dtype}, it must be {self.dtype}"
        if not finite(tensor):
            return "is not finite"
        is_bounded = self.least > -math.inf or self.most < math.inf
        if is_bounded and tensor.numel() and not (tensor.min() >= self.least and tensor.max() <= self.most):
            return f"has numbers outside {self.least:g}..{self.most:g}"
        return None


class WeightedMean:
    """Streaming weighted mean of each key over the clients that hold it.

    With `weight=n_k` it is FedAvg and FedMoE's modular aggregation (an absent key is not counted). A weight that
    depends on the key gives rules such as usage thresholds (weight 0) and per-row router weights.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, params: Mapping[str, Tensor], weight: float | Callable[[str], float]) -> None:
        """Add one client's tensors.

        Args:
            params: flat name -> floating tensor; shapes must agree between clients (nothing is broadcast).
            weight: >= 0 for all keys, or a function of the key. Weight 0 leaves the key uncounted.

        Raises:
            PayloadError: for a negative or non-finite weight, or two shapes under one key.
        """
        for key, tensor in params.items():
            w = weight(key) if callable(weight) else weight
            if not 0 <= w < float("inf"):
                raise PayloadError(f"weight {w!r} of {key!r} is not a finite number >= 0")
            if w == 0:
                continue
            if key not in self._sums:
                self._sums[key] = tensor.to(torch.float64) * w
                self._weights[key] = w
                continue
            if self._sums[key].shape != tensor.shape:
                raise PayloadError(
                    f"{key!r} arrived with shape {tuple(tensor.shape)}, others sent {tuple(self._sums[key].shape)}"
                )
            self._sums[key].add_(tensor, alpha=w)  # in float64, without a float64 copy of the tensor
            self._weights[key] += w

    def mean(self, previous: Mapping[str, Tensor]) -> Params:
        """Return the new parameters: the mean where a client contributed, else the previous tensor itself (not a copy).

        Each sum is freed as its mean is computed, so that not all sums and means are in memory at once. The method can
        therefore be called only once.

        Raises:
            PayloadError: for a contributed key that `previous` lacks or holds in another shape.
        """
        for key, total in self._sums.items():
            if key not in previous:
                raise PayloadError(f"{key!r} is not a parameter of the server's model")
            if previous[key].shape != total.shape:
                raise PayloadError(
                    f"{key!r} arrived with shape {tuple(total.shape)}, the server holds {tuple(previous[key].shape)}"
                )
        sums = self._sums
        return {
            key: sums.pop(key).div_(self._weights[key]).to(tensor.dtype) if key in sums else tensor
            for key, tensor in previous.items()
        }

    def told(self) -> dict[str, float]:
        """Return values for the record; the plain mean has none beyond the replies."""
        return {}


def finite(tensor: Tensor) -> bool:
    """Return True if all values are finite.

    The smallest and the largest value suffice for this test, because a NaN makes both of them NaN.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bound.isfinite() for bound in torch.aminmax(tensor))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of the tensors' elements in bytes, without any header."""
    return sum(t.numel() * t.element_size() for t in tensors)


def checksum(params: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(params):
        tensor = params[key].detach().contiguous().cpu()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
