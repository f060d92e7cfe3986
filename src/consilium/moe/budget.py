"""A memory model: the bytes a client's device needs to train a sub-model, before anything is built or loaded.

The estimate is the peak above an interpreter that has imported the libraries and run a first tiny step. It is computed
from the shapes of the meta skeleton. Weights, optimiser state and references are always present. The gradients of a
step are freed before the next forward pass, and they grow while activations are freed, so the larger of the two counts.

The estimate covers live tensors and assumes an allocator that returns freed memory. glibc with
MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 in the client's environment stays within a few percent of
it (`benchmarks/memory.py` measures this). With its default settings, glibc keeps freed blocks of up to 32 MB for reuse,
and the resident set is 1.2 to 1.7 times as large. The estimate does not count:

- The parameters the model was built from, if the caller still refers to them during training (one more reference).
  `training.local_round` releases them, but a caller in the same process, such as the local engine, still has them.
- The cache of text generation.
- The kernels that oneDNN compiles and keeps. For bfloat16 on a CPU there is one per shape, which took 100 to 200 MB.
  For float32, where `products` requests it, there are a few dozen, up to 32 MB.

There are two budgets. `counts` experts are resident. Without `trained`, all of them get gradients and optimiser state.
With `trained`, only that many experts do in any one batch, as selected by `training.fit(choose=...)`. The experts are
then computed by `moe.experts`, which saves none of their tokens, so the other experts cost only their weights.

Symbols: B examples, n tokens per sequence (S source, T target, S + T causal), D width, V vocabulary; see `parts`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Literal

from consilium.errors import ConfigError, shown
from consilium.masters import CHUNK
from consilium.moe.addressing import all_experts, expert_of, parameters, router_row_of, table
from consilium.moe.build import ModelSource
from consilium.moe.families import experts_per_token, linear_layers
from consilium.moe.measured import measured_parts
from consilium.moe.parts import PARTS, Mode, Parts

__all__ = ["PARTS", "Footprint", "MemoryModel", "Mode", "bytes_of", "human"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMG]i?B|B|)\s*", re.IGNORECASE)

CHUNKS = ("chunk_size", "mamba_chunk_size")
"""Fields of configurations with the number of tokens that a state space layer computes at once."""
LINEAR = 64
"""Number of tokens that transformers' linear attention computes at once if no field says otherwise."""
OVERHEAD = 5_000_000
"""Bytes that are needed at any size: work space of the matrix kernels, the modules and the autograd graph."""
SLACK = 64
"""One byte per SLACK bytes of live tensors is added for headers, rounding to pages and small freed blocks."""


def human(n: int) -> str:
    """Format a number of bytes in decimal units with one digit: 59_990_000 -> "60.0 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if round(abs(n) / size, 1) >= 1:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def bytes_of(size: str | int) -> int:
    """Return a size in bytes from an integer or a text in any case: 60_000_000, "60MB", "1.5 GB" or "12GiB".

    KB, MB and GB are decimal units; KiB, MiB and GiB are binary units.

    Raises:
        ConfigError: if the size has another form or is not greater than 0.
    """
    match = _SIZE.fullmatch(str(size)) if isinstance(size, (str, int)) else None
    number = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    number = round(number) if number < 2**63 else 0
    if number < 1:
        raise ConfigError(
            f"size {shown(size)} is no number of bytes above 0; write an integer, '60MB', '1.5GB' or '12GiB'"
        )
    return number


@dataclass(frozen=True)
class Footprint:
    """The bytes that a client needs, by purpose.

    Args:
        weights: the model, adapters included.
        gradients: gradients of all trained parameters, which are all present when the optimiser steps.
        optimizer: optimiser state.
        references: further copies of the weights that a method keeps while training.
        activations: tensors saved for the backward pass, plus what is allocated before any of them is freed:
            temporaries and the gradient of the logits' matrix. With checkpointing, little is saved and most gradients
            are included here.
        between: the amount by which the middle of a layer of the backward pass exceeds its ends.
        overhead: allocator and libraries.
        absent: router rows of the experts that are not held, which some methods and `fit.gates` send along.
        masters: float32 copies of weights below 32 bits, which the optimiser updates and payloads carry.
    """

    weights: int
    gradients: int
    optimizer: int
    references: int
    activations: int
    between: int
    overhead: int
    absent: int = 0
    masters: int = 0

    @property
    def total(self) -> int:
        """Return the peak of training or of building the model next to its source, whichever is larger.

        During the backward pass, gradients replace activations layer by layer. At the ends of a layer, their sum is at
        most the larger of the two. Within the first or the last of L layers, half of the layer's gradients coexist with
        half of what it saved. This adds at most the smaller of the two divided by 2 L.
        """
        state = self.masters + self.optimizer + self.references
        training = state + max(self.gradients, self.activations) + self.between
        # Masters start as copies of the received parameters and end as the parameters to send back.
        return self.weights + self.absent + max(training, self.weights, 2 * self.masters) + self.overhead


@dataclass(frozen=True)
class Stack:
    """A stack of consecutive layers.

    Args:
        layers: the number of layers.
        blocks: names of the sparse blocks.
        before: the number of layers before the first sparse one.
    """

    layers: int
    blocks: tuple[str, ...]
    before: int


@dataclass(frozen=True)
class MemoryModel:
    """The sizes of one model; create it with `of`.

    Args:
        counts: experts per block of the full model.
        dense_params: parameters outside experts and router rows, with tied ones once, without a task's head.
        expert_params: parameters of one expert of each block, without its router row.
        row_params: parameters of one router row of each block.
        adapter_params: parameters of one expert's adapters per rank: inputs plus outputs of its matrices.
        stacked: elements per expert of the block's largest fused tensor; 0 if experts are modules.
        largest: elements of the largest parameter outside fused experts.
        itemsize: bytes per parameter.
        width: D.
        vocabulary: V; 0: there are no logits over it.
        top_k: K.
        stacks: the only stack; or encoder and decoder.
        parts: see `Parts`.
        linear_sides: inputs plus outputs of the linear layers that adapters of a dense model change.
        chunk: state space layers pad a sequence to a multiple of this number of tokens.
    """

    counts: Mapping[str, int]
    dense_params: int
    expert_params: Mapping[str, int]
    row_params: Mapping[str, int]
    adapter_params: Mapping[str, int]
    stacked: Mapping[str, int]
    largest: int
    itemsize: int
    width: int
    vocabulary: int
    top_k: int
    stacks: tuple[Stack, ...]
    parts: Mapping[Mode, Parts] = field(repr=False)
    linear_sides: int = 0
    chunk: int = 1

    @classmethod
    def of(cls, source: ModelSource) -> "MemoryModel":
        """Return the memory model of a source from its meta skeleton. Nothing is loaded; results are cached."""
        return _built(source)

    def params(self, counts: Mapping[str, int]) -> int:
        """Return the number of parameters of a sub-model with `counts` experts per block, router rows included."""
        return self.dense_params + sum(n * (self.expert_params[b] + self.row_params[b]) for b, n in counts.items())

    def bytes(self, counts: Mapping[str, int]) -> int:
        """Return the size in bytes of the parameters of a sub-model with `counts` experts per block."""
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
        momentum: float = 0.0,
        gradient_checkpointing: bool = False,
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> Footprint:
        """Return the peak memory of a client with `counts` experts per block, for batches without padding.

        Args:
            mode: "full" training; "lora": only adapters on the experts and routers; "peft": only PEFT's adapters;
                "forward": no training.
            batch_size: B, the number of examples of a batch.
            max_length: S, the number of source tokens.
            target_length: T, the number of target tokens (text-to-text only).
            optimizer: "adamw" keeps two float32 numbers per trained parameter; "sgd" keeps one with momentum and none
                without. Weights below 32 bits also have float32 masters.
            momentum: momentum of "sgd".
            gradient_checkpointing: recompute the layers during the backward pass.
            references: extra copies of the trained parameters that a method keeps (with adapters: of the adapters).
            rank: rank of the adapters.
            trained: the number of experts, over all blocks, that one batch trains; `moe.experts` then computes them.
                None: all experts of `counts` are trained, computed by transformers.
        """
        weights = self.bytes(counts)
        sizes = self.expert_params
        gradients = weights if mode == "full" else 0
        if mode in ("lora", "peft"):
            sizes = {block: rank * size for block, size in self.adapter_params.items()}
            adapters = self.itemsize * (sum(n * sizes[b] for b, n in counts.items()) + rank * self.linear_sides)
            routers = self.itemsize * sum(n * self.row_params[b] for b, n in counts.items())
            weights += adapters
            gradients = adapters + (routers if mode == "lora" else 0)
        copies = references * (gradients or weights)
        masters = gradients * 4 // self.itemsize if self.itemsize < 4 else 0
        if trained is not None and gradients and sizes:
            idle_experts = max(sum(counts.values()) - trained, 0)
            gradients -= self.itemsize * idle_experts * min(sizes.values())
        batch = (batch_size, max_length, target_length)
        activations = self._activations(counts, mode, batch, gradient_checkpointing, gradients, trained is not None)
        moments = (2 if optimizer == "adamw" else int(momentum > 0)) * gradients * 4 // self.itemsize
        copies = copies * 4 // self.itemsize
        trains_all = trained is None or trained >= sum(counts.values())
        # The other cases count the first layer, where they peak.
        counts_between = trains_all and not gradient_checkpointing
        between = (
            min(gradients, activations) // (2 * sum(stack.layers for stack in self.stacks)) if counts_between else 0
        )
        absent_rows = 4 * sum((self.counts[b] - n) * self.row_params[b] for b, n in counts.items())
        if masters:  # The optimiser converts gradients to float32, one chunk at a time.
            gradients += 4 * min(CHUNK, gradients // self.itemsize)
        peak_bytes = weights + absent_rows + masters + moments + copies + max(gradients, activations) + between
        overhead = OVERHEAD + peak_bytes // SLACK
        return Footprint(weights, gradients, moments, copies, activations, between, overhead, absent_rows, masters)

    def _activations(
        self,
        counts: Mapping[str, int],
        mode: Mode,
        batch: tuple[int, int, int],
        checkpointing: bool,
        gradients: int,
        chosen: bool,
    ) -> int:
        """Return the peak bytes of saved tensors, temporaries and the gradients that coexist with them."""
        forward, backward = self._logits(mode, *batch)
        ends, last_layer, all_layers, largest_layer = self._layers(counts, mode, batch, chosen)
        if mode == "forward":
            return ends + max(largest_layer, forward)
        if checkpointing:  # All layers' inputs are saved; one layer is recomputed while others have gradients.
            all_layers = (
                sum(stack.layers * n for stack, n in self._lengths(batch)) * batch[0] * self.width * self.itemsize
            )
            last_layer = max(
                last_layer, largest_layer + gradients - gradients // sum(stack.layers for stack in self.stacks)
            )
        peak = ends + all_layers + max(last_layer, forward, backward)
        if chosen:  # The peak may be in the first layer, when the gradients of all other layers are present.
            first_layer = (
                largest_layer + last_layer + gradients - gradients // sum(stack.layers for stack in self.stacks)
            )
            peak = max(peak, first_layer)
        return peak

    def _lengths(self, batch: tuple[int, int, int]) -> list[tuple[Stack, int]]:
        """Return every stack with the length n of its sequences."""
        _, S, T = batch
        if len(self.stacks) == 2:
            return [(self.stacks[0], S), (self.stacks[1], T)]
        n = S + T if self.vocabulary else S
        return [(self.stacks[0], -(-n // self.chunk) * self.chunk)]

    def _layers(
        self, counts: Mapping[str, int], mode: Mode, batch: tuple[int, int, int], chosen: bool
    ) -> tuple[int, int, int, int]:
        """Return bytes of the ends, the last layer's temporaries, all layers, and the largest layer or part."""
        parts = self.parts[mode]
        block = parts.chosen if chosen else parts.sparse
        B, S, _ = batch
        ends = last_layer = layers = largest_layer = 0
        for stack, n in self._lengths(batch):
            is_decoder = stack is not self.stacks[0]
            attention, dense = parts.attention(B, n, S), parts.dense(B, n, S)
            cross = parts.cross(B, n, S) if is_decoder else 0
            sparse_sizes = [block(B, n, S, min(self.top_k, counts[b]), counts[b]) for b in stack.blocks]
            if mode == "peft":
                sparse_sizes = [
                    size + self._merged(b, counts[b]) for size, b in zip(sparse_sizes, stack.blocks, strict=True)
                ]
            ends += parts.ends(B, n, S)
            if chosen or mode == "lora":
                last_layer = max(last_layer, parts.expert(B, n, S))
            else:
                last_layer = parts.last(B, n, S, min(self.top_k, counts[stack.blocks[-1]]) if stack.blocks else 0)
            layers += (
                stack.layers * (attention + cross) + (stack.layers - len(sparse_sizes)) * dense + sum(sparse_sizes)
            )
            if (
                mode in ("lora", "peft") and not is_decoder and stack.blocks
            ):  # Nothing requires a gradient before the first adapter.
                layers -= stack.before * (attention + dense) + attention * (stack.before < stack.layers)
            feed_forward = (
                max(sparse_sizes, default=0) if len(sparse_sizes) == stack.layers else max(dense, *sparse_sizes, 0)
            )
            layer_size = max(attention, cross, feed_forward) if mode == "forward" else attention + cross + feed_forward
            largest_layer = max(largest_layer, layer_size)
        return tuple(self.itemsize * size for size in (ends, last_layer, layers, largest_layer))

    def _merged(self, block: str, experts: int) -> int:
        """Return the elements of the sums W + B A, which adapters on fused experts keep until the block's backward."""
        return experts * self.expert_params[block] if self.stacked[block] else 0

    def _logits(self, mode: Mode, B: int, S: int, T: int) -> tuple[int, int]:
        """Return the bytes of logits at the end of the forward pass, and in the backward pass."""
        logits = self.itemsize * B * T * self.vocabulary
        float32_logits = max(self.itemsize, 4) * B * T * self.vocabulary  # The loss is computed in float32.
        float32_copy = float32_logits if self.itemsize < 4 else 0
        # all and selected ones
        forward = max(2 * logits if len(self.stacks) == 2 else logits, logits + float32_copy + float32_logits)
        matrix = self.itemsize * self.vocabulary * self.width if mode == "full" else 0
        return forward, max(3 * float32_logits, logits + matrix)


@lru_cache(maxsize=8)
def _built(source: ModelSource) -> MemoryModel:
    model = source.skeleton("", ())
    counts = {block: len(ids) for block, ids in all_experts(model).items()}
    sizes = {kind: dict.fromkeys(counts, 0) for kind in ("experts", "rows", "adapters", "stacked")}
    dense = largest = 0
    names = table(model)
    for path, parameter in parameters(model).items():
        name = names[path]
        shape = tuple(parameter.shape[1:] if isinstance(name, tuple) else parameter.shape)
        first_name = name[0] if isinstance(name, tuple) else name
        if expert := expert_of(first_name):
            block = expert[0]
            if expert[1] == 0:
                sizes["experts"][block] += prod(shape)
                sizes["adapters"][block] += sum(shape)
            if isinstance(name, tuple):
                dense += prod(shape) * (len(name) - counts[block])
                sizes["stacked"][block] = max(sizes["stacked"][block], prod(shape))
                continue
        elif row := router_row_of(first_name):
            sizes["rows"][row[0]] += prod(shape)
            dense += prod(shape) * (len(name) - counts[row[0]])  # Rows that follow those of experts are in the trunk.
            continue
        else:
            dense += parameter.numel()
        largest = max(largest, parameter.numel())
    config = model.config
    return MemoryModel(
        counts=counts,
        dense_params=dense,
        expert_params=sizes["experts"],
        row_params=sizes["rows"],
        adapter_params=sizes["adapters"],
        stacked=sizes["stacked"],
        largest=largest,
        itemsize=source.torch_dtype.itemsize,
        width=config.hidden_size,
        vocabulary=config.vocab_size if source.form == "text-to-text" else 0,
        top_k=experts_per_token(config) if source.family.top_k else 1,
        stacks=_stacks(config, source.form, tuple(counts)),
        parts=_parts(source),
        linear_sides=sum(m.in_features + m.out_features for _, m in linear_layers(model.backbone))
        * source.family.dense,
        chunk=_chunk(config),
    )


def _chunk(config: Any) -> int:
    """Return the number of tokens that state space or linear attention layers compute at once, or 1 without these."""
    default = LINEAR if "linear" in repr(getattr(config, "layer_types", None)) else 1
    return next((int(n) for name in CHUNKS if (n := getattr(config, name, None))), default)


def _parts(source: ModelSource) -> Mapping[Mode, Parts]:
    """Return the memory of the layers: counted if `PARTS` has the model type, otherwise measured on a tiny model."""
    below_32_bits = int(source.torch_dtype.itemsize < 4)
    if source.config.model_type in PARTS:
        return PARTS[source.config.model_type](source.config, below_32_bits)
    return measured_parts(source.config, source.family, below_32_bits)


def _stacks(config: Any, form: str, blocks: tuple[str, ...]) -> tuple[Stack, ...]:
    """Return the stacks of a model, read from its blocks' paths: `<stack>.<number of the layer>.<rest>`."""
    layers = [config.num_hidden_layers]
    if form == "text-to-text" and config.is_encoder_decoder:
        layers.append(config.num_decoder_layers)
    stacks = []
    for i, n_layers in enumerate(layers):
        stack_blocks = tuple(b for b in blocks if b.startswith("decoder.") == bool(i))
        layers_before = int(re.search(r"\.(\d+)(?:\.|$)", stack_blocks[0])[1]) if stack_blocks else n_layers
        stacks.append(Stack(n_layers, stack_blocks, layers_before))
    return tuple(stacks)
