"""Conversations and documents to token ids, for causal language models; and how these become rows of a batch.

A row holds at most S + T tokens (`max_length`, `target_length` of `fit.Fit`), one way for a whole run:

    examples   one example a row: at most S tokens of the conversation, at most T of the answer, the loss on the answer
    documents  one document a row: its first S + T tokens, the loss on all of them
    blocks     all documents of a split one after the other, an end mark behind each, cut into rows of S + T tokens;
               attention reaches over the borders of documents, as is usual in pretraining
    packed     several examples, or documents, in a row; neither attention nor the loss reaches from one into the next

A conversation is written by the tokenizer's chat template if it has one, else as

    ### System:          ### User:            ### Assistant:
    <content>            <content>            <answer><end>

with an empty line between the parts. The loss is on what the template writes for the answer, and on the end mark.
What is too long: of a conversation the end is kept (the question, and the mark after which the answer begins), of an
answer and of a document the beginning. An answer that was cut has no end mark: it does not end there.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from consilium.data.encode import Encoded, pad, shuffled
from consilium.data.task import Split
from consilium.data.template import render
from consilium.errors import ConfigError, DataError

__all__ = ["Packed", "Rows", "check_rows", "encode_language", "rendered", "renderings"]

Rows = Literal["examples", "documents", "blocks", "packed"]
"""See above."""


def encode_language(
    split: Split, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, target_length: int
) -> Encoded:
    """Tokenise a split of a "language" task; "packed" gives one example a row, which `Packed` then packs.

    Raises:
        ConfigError: for rows that do not fit the data. DataError: for a conversation that cannot be written.
    """
    plain = not any(split.texts)
    check_rows(rows, plain)
    first, end = _begin(tokenizer), tokenizer.eos_token_id
    if plain:
        width = max_length + target_length
        whole = [[*first, *ids, end] for ids in _ids(tokenizer, split.targets)]
        targets = _blocks(whole, width) if rows == "blocks" else [ids[:width] for ids in whole]
        sources: list[list[int]] = [[] for _ in targets]
        cut = 0 if rows == "blocks" else sum(len(ids) > width for ids in whole)
    else:
        asked = [json.loads(text) for text in split.texts]
        pairs = renderings(list(zip(asked, split.targets, strict=True)), tokenizer)
        begun = [] if tokenizer.chat_template else first  # a template writes the mark itself
        prompts = [begun + ids for ids in _ids(tokenizer, [prompt for prompt, _ in pairs])]
        answers = [_ended(ids, end) for ids in _ids(tokenizer, [answer for _, answer in pairs])]
        sources = [_end_of(ids, max_length, first) for ids in prompts]
        targets = [ids[:target_length] for ids in answers]
        cut = sum(len(p) > max_length or len(a) > target_length for p, a in zip(prompts, answers, strict=True))
    return Encoded(sources, targets, list(split.targets), "causal", tokenizer.pad_token_id, cut)


def check_rows(rows: Rows, plain: bool) -> None:
    """Raise ConfigError if such rows cannot be made of plain text, or of instruction data."""
    allowed = ("documents", "blocks", "packed") if plain else ("examples", "packed")
    if rows not in allowed:
        kind = "plain text" if plain else "instruction data"
        raise ConfigError(f"fit.rows is {rows!r}, which {kind} has not; allowed are {', '.join(allowed)}")


def rendered(
    conversation: Sequence[Mapping[str, Any]], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return `renderings` of one conversation."""
    return renderings([(conversation, answer)], tokenizer)[0]


def renderings(
    pairs: Sequence[tuple[Sequence[Mapping[str, Any]], str]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Return what the model reads and what it shall write, for conversations with their answers.

    The second text has no end mark where the template writes none. Where a template writes a conversation otherwise
    once it is answered, the answer as it stands follows the mark after which it begins.

    Raises:
        DataError: if the template refuses a conversation or does not come to an end, or there is none and tools are
            used.
    """
    if not tokenizer.chat_template:
        return [_plainly(conversation, answer) for conversation, answer in pairs]
    jobs: list[tuple[Sequence[Mapping[str, Any]], bool]] = []
    for conversation, answer in pairs:
        whole = [*conversation, {"role": "assistant", "content": answer}]
        jobs += [(list(conversation), True), (whole, False)]
    texts = render(jobs, tokenizer)
    return [
        _split(prompt, whole, answer) for prompt, whole, (_, answer) in zip(texts[::2], texts[1::2], pairs, strict=True)
    ]


def _plainly(conversation: Sequence[Mapping[str, Any]], answer: str) -> tuple[str, str]:
    if any(turn["role"] not in _PLAIN or turn.get("tool_calls") for turn in conversation):
        raise DataError(
            "a conversation uses tools, and the tokenizer has no chat template to write them; "
            "take a model with one, or leave these conversations out"
        )
    parts = [f"### {_PLAIN[turn['role']]}:\n{turn['content']}\n\n" for turn in conversation]
    return "".join(parts) + f"### {_PLAIN['assistant']}:\n", answer


def _split(prompt: str, whole: str, answer: str) -> tuple[str, str]:
    """Return the prompt, and what the template writes behind it for the answer."""
    if not whole.startswith(prompt):
        return prompt, answer
    written = whole.removeprefix(prompt)
    if answer not in written:  # many templates trim what is said, which would take the indent from code
        written = written.replace(answer.strip(), answer, 1)
    return prompt, written


_PLAIN = {"system": "System", "user": "User", "assistant": "Assistant"}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The mark with which this tokenizer begins every text, if it has one."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


def _ended(ids: list[int], end: int) -> list[int]:
    """Up to the last end mark that the template wrote, which may write more behind it; else with one."""
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else [*ids, end]


def _end_of(ids: list[int], length: int, first: list[int]) -> list[int]:
    """The last `length` ids, the mark at the beginning kept."""
    if len(ids) <= length:
        return ids
    mark = first if ids[: len(first)] == first and length > len(first) else []
    return mark + ids[len(ids) - length + len(mark) :]


def _blocks(documents: Sequence[list[int]], width: int) -> list[list[int]]:
    """All ids in rows of `width`; the last may be shorter, but not a single token, which has nothing to predict."""
    stream = [token for ids in documents for token in ids]
    rows = [stream[start : start + width] for start in range(0, len(stream), width)]
    return rows[:-1] if len(rows) > 1 and len(rows[-1]) == 1 else rows


@dataclass(frozen=True)
class Packed:
    """Rows of several examples each; an `Encoded` for `training.fit`, not for evaluation.

    Args:
        data: the examples. groups: the examples of each row.
    """

    data: Encoded
    groups: list[list[int]]

    @classmethod
    def of(cls, data: Encoded, width: int) -> "Packed":
        """Best fit, longest first: rows of at most `width` tokens, every example in one of them."""
        sizes = [len(s) + len(t) for s, t in zip(data.sources, data.targets, strict=True)]
        groups: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, group), ascending
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            place = bisect_left(room, (sizes[i], -1))
            left, group = room.pop(place) if place < len(room) else (width, len(groups))
            if group == len(groups):
                groups.append([])
            groups[group].append(i)
            insort(room, (left - sizes[i], group))
        return cls(data, groups)

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """A batch of these rows, with position ids that start again at every example."""
        ids, labels, positions = [], [], []
        for group in (self.groups[row] for row in rows):
            parts = [(self.data.sources[i], self.data.targets[i]) for i in group]
            ids.append([token for s, t in parts for token in s + t])
            # The first token of an example follows the last of another: nothing may predict it.
            labels.append([label for s, t in parts for label in [-100, *([-100] * len(s) + t)[1:]]])
            positions.append([place for s, t in parts for place in range(len(s) + len(t))])
        batch = {
            "input_ids": pad(ids, self.data.pad),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, -100),
            "position_ids": pad(positions, 0),
        }
        return {key: value.to(device) for key, value in batch.items()}

    def epochs(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Rows of each batch, as `Encoded.epochs`."""
        return shuffled(len(self), epochs, batch_size, generator)
