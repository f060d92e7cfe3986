"""Memory model: what a client's device must hold to train a sub-model, before anything is built.

Built from the configuration and the meta skeleton only. All results are bytes beyond the interpreter with its
libraries imported. Symbols: B batch, S source tokens, T target tokens, D model width, F feed-forward width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from consilium.errors import ConfigError
from consilium.moe.addressing import all_experts, expert_of, parameters, router_row_of, table
from consilium.moe.build import ModelSource

__all__ = ["Footprint", "MemoryModel", "bytes_of", "human"]

Mode = Literal["full", "lora", "forward"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMG]i?B|B|)\s*", re.IGNORECASE)
_OVERHEAD = 8 * 10**6


def human(n: int) -> str:
    """Decimal units, one digit: 59_990_000 -> "60.0 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def bytes_of(size: str | int) -> int:
    """A size in bytes: 60_000_000, "60MB", "1.5 GB" (decimal) or "12GiB" (binary).

    Raises:
        ConfigError: for any other form, or a size that is not greater than 0.
    """
    found = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    number = round(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if number < 1:
        raise ConfigError(f"size {size!r} is no number of bytes > 0; write an integer, '60MB', '1.5GB' or '12GiB'")
    return number


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a client's training, by what they are spent on."""

    weights: int
    gradients: int
    optimizer: int
    references: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """The peak."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.references
            + self.activations
            + self.overhead
        )


@dataclass(frozen=True)
class MemoryModel:
    """Sizes of one model.

    Args:
        counts: experts per block of the full model.
        dense_params: parameters outside experts and router rows, tied ones once, without a task's head.
        expert_params: parameters of one expert of each block, without its router row.
        row_params: parameters of one router row of each block.
        itemsize: bytes per parameter.
        width, layers: D, and the number of layers (encoder and decoder together).
    """

    counts: Mapping[str, int]
    dense_params: int
    expert_params: Mapping[str, int]
    row_params: Mapping[str, int]
    itemsize: int
    width: int
    layers: int

    @classmethod
    def of(cls, source: ModelSource) -> "MemoryModel":
        """The memory model of a source; nothing is loaded, and built once per source."""
        return _built(source)

    def params(self, counts: Mapping[str, int]) -> int:
        """Parameters of a sub-model with so many experts per block, router rows included."""
        per_block = (n * (self.expert_params[b] + self.row_params[b]) for b, n in counts.items())
        return self.dense_params + sum(per_block)

    def bytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of such a sub-model on the wire, one way."""
        return self.params(counts) * self.itemsize

    def footprint(
        self,
        counts: Mapping[str, int],
        *,
        mode: Mode,
        batch_size: int,
        max_length: int,
        target_length: int,
        optimizer: Literal["adamw", "sgd"],
        gradient_checkpointing: bool = False,
        references: int = 0,
        rank: int = 8,
    ) -> Footprint:
        """Peak memory of a client with `counts` experts per block."""
        weights = self.bytes(counts)
        trained = {"full": weights, "lora": weights // 20, "forward": 0}[mode]
        tokens = batch_size * (max_length + target_length)
        per_layer = 4 * tokens * 20 * self.width
        alive = 2 if gradient_checkpointing or mode == "forward" else self.layers
        return Footprint(
            weights=weights,
            gradients=trained,
            optimizer=2 * trained if optimizer == "adamw" else 0,
            references=references * (trained if mode == "lora" else weights),
            activations=per_layer * alive,
            overhead=_OVERHEAD,
        )


@lru_cache(maxsize=8)
def _built(source: ModelSource) -> MemoryModel:
    model = source.skeleton("", ())
    counts = {block: len(ids) for block, ids in all_experts(model).items()}
    dense, experts, rows = 0, dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    names = table(model)
    for path, parameter in parameters(model).items():
        name = names[path]
        flat = (name,) if isinstance(name, str) else name
        size = parameter.numel() // len(flat)
        for key in flat:
            if (found := expert_of(key)) is not None:
                experts[found[0]] += size if found[1] == 0 else 0
            elif (found := router_row_of(key)) is not None:
                rows[found[0]] += size if found[1] == 0 else 0
            else:
                dense += size
    config = model.config
    layers = config.num_hidden_layers + (config.num_decoder_layers if model.encoder_decoder else 0)
    return MemoryModel(counts, dense, experts, rows, source.torch_dtype.itemsize, config.hidden_size, layers)
