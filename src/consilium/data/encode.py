"""Tokenisation of texts, and batches of token ids, for the three ways in which a model does a task.

Shapes: B examples, S source tokens, T target tokens; padded to the longest in the batch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from consilium.data.task import Split, Task
from consilium.errors import DataError

__all__ = ["Encoded", "encode", "pad", "shuffled", "token_bytes"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split.

    Args:
        sources: token ids per example, at most `max_length`.
        targets: label index per example, or target token ids; for plain text, the target is the text itself.
        texts: the target texts (label names), for scoring.
        way: "classification", "seq2seq" or "causal" (source and target in one sequence).
        pad: id of the padding token.
        cut: number of examples with a truncated source or target.
    """

    sources: list[list[int]]
    targets: list[int] | list[list[int]]
    texts: list[str]
    way: str
    pad: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def augmented(self, seed: int) -> "Encoded":
        """Return the texts unchanged; images are augmented in training, see `tensor.TensorSplit`."""
        return self

    def order(self) -> list[int]:
        """Return all rows, short sources first, so that rows of similar length are padded together."""
        return sorted(range(len(self)), key=lambda i: len(self.sources[i]))

    def batch(self, rows: Sequence[int], device: torch.device, prompt: bool = False) -> dict[str, Tensor]:
        """Return a batch of these rows.

        Args:
            prompt: for generation: the inputs are the sources only (left-padded for causal models).
        """
        sources = [self.sources[i] for i in rows]
        targets = [self.targets[i] for i in rows]
        if self.way == "classification":
            labels = torch.tensor(targets)
        elif self.way == "seq2seq":
            labels = pad(targets, -100)
        else:
            labels = pad([[-100] * len(s) + t for s, t in zip(sources, targets, strict=True)], -100)
            if not prompt:
                sources = [s + t for s, t in zip(sources, targets, strict=True)]
        pad_left = prompt and self.way == "causal"
        mask = pad([[1] * len(s) for s in sources], 0, pad_left)
        batch = {"input_ids": pad(sources, self.pad, pad_left), "attention_mask": mask, "labels": labels}
        return {key: value.to(device) for key, value in batch.items()}

    def epochs(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Yield the rows of each batch in `epochs` shuffled passes; the last batch of a pass may be short."""
        return shuffled(len(self), epochs, batch_size, generator)


def shuffled(rows: int, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the row numbers of each batch in `epochs` shuffled passes over `rows` rows."""
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def encode(
    split: Split,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    way: str,
    max_length: int,
    target_length: int,
) -> Encoded:
    """Tokenise a split.

    Args:
        way: "classification", "seq2seq" or "causal".
        max_length: maximum number of tokens of a source.
        target_length: maximum number of tokens of a target, including the end mark.

    Raises:
        DataError: if a label is not in the task's label set.
    """
    sources, cut_rows = _truncated(tokenizer, split.texts, max_length)
    sources = [ids or [tokenizer.pad_token_id] for ids in sources]
    if way == "classification":
        label_ids = {label: i for i, label in enumerate(task.labels)}
        unknown_label = next((t for t in split.targets if t not in label_ids), None)
        if unknown_label is not None:
            raise DataError(
                f"label {unknown_label!r} is not in the label set of task {task.name}: {', '.join(task.labels)}"
            )
        targets: list = [label_ids[t] for t in split.targets]
    else:
        end_ids = [tokenizer.eos_token_id]
        ids, cut_targets = _truncated(tokenizer, split.targets, target_length - 1, add_special_tokens=False)
        targets, cut_rows = [t + end_ids for t in ids], cut_rows | cut_targets
    return Encoded(sources, targets, list(split.targets), way, tokenizer.pad_token_id, len(cut_rows))


def _truncated(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, **options: bool
) -> tuple[list[list[int]], set[int]]:
    """Return the token ids of each text, at most `length`, and the indices of the texts that are longer."""
    encoded = tokenizer(list(texts), truncation=True, max_length=length, **options)
    if encoded.encodings is not None:
        return encoded["input_ids"], {i for i, text in enumerate(encoded.encodings) if text.overflowing}
    # A tokenizer written in Python does not report overflow, so tokenise again without truncation.
    full_ids = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    return encoded["input_ids"], {i for i, ids in enumerate(full_ids) if len(ids) > length}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the number of UTF-8 bytes that each token of the vocabulary stands for, int64 [V]; 0 for special tokens.

    Byte-level tokenizers write one character per byte. Others write a blank as "▁", a byte as "<0x0A>", and the
    continuation of a word as "##".
    """
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special_ids = set(tokenizer.all_special_ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))

    def size(name: str) -> int:
        if is_byte_level:
            return len(name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return 1
        return len(name.removeprefix("##").replace("▁", " ").encode())

    return torch.tensor([0 if i in special_ids or name is None else size(name) for i, name in enumerate(names)])


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Return the rows as int64 [rows, longest], padded with `value` on the right, or on the left if `left`."""
    width = max(len(row) for row in rows)
    padded_rows = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        padded_rows[i, span] = torch.tensor(row, dtype=torch.int64)
    return padded_rows
