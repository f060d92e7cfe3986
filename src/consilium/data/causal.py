"""Tokenisation of conversations and documents for causal language models, and packing of the tokens into rows.

A row holds at most S + T tokens (`max_length`, `target_length` of `fit.Fit`). A run uses one of these layouts:

    examples   one example a row: at most S tokens of the conversation, at most T of the answer, the loss on the answer
    documents  one document a row: its first S + T tokens, the loss on all of them
    blocks     all documents of a split one after the other, an end mark behind each, cut into rows of S + T tokens;
               attention reaches over the borders of documents, as is usual in pretraining
    packed     several examples, or documents, in a row; neither attention nor the loss reaches from one into the next

The tokenizer's chat template renders a conversation. Without a template, it is rendered as

    ### System:          ### User:            ### Assistant:
    <content>            <content>            <answer><end>

with an empty line between the parts. The loss is on the text that the template writes for the answer, and on the end
mark. A conversation that is too long keeps its end (the question, and the mark after which the answer begins). An
answer or a document that is too long keeps its beginning. A truncated answer has no end mark, because it does not end
there.
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
"""The layout of the rows of a run, see the module docstring."""


def encode_language(
    split: Split, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, target_length: int
) -> Encoded:
    """Tokenise a split of a "language" task.

    For "packed", the result has one example per row; `Packed` then packs these rows.

    Raises:
        ConfigError: if `rows` does not fit the data.
        DataError: if a conversation cannot be rendered.
    """
    is_plain = not any(split.texts)
    check_rows(rows, is_plain)
    start_ids, end_id = _begin(tokenizer), tokenizer.eos_token_id
    if is_plain:
        width = max_length + target_length
        documents = [[*start_ids, *ids, end_id] for ids in _ids(tokenizer, split.targets)]
        targets = _blocks(documents, width) if rows == "blocks" else [ids[:width] for ids in documents]
        sources: list[list[int]] = [[] for _ in targets]
        cut_count = 0 if rows == "blocks" else sum(len(ids) > width for ids in documents)
    else:
        conversations = [json.loads(text) for text in split.texts]
        pairs = renderings(list(zip(conversations, split.targets, strict=True)), tokenizer)
        prefix = [] if tokenizer.chat_template else start_ids  # A template writes the mark itself.
        prompts = [prefix + ids for ids in _ids(tokenizer, [prompt for prompt, _ in pairs])]
        answers = [_ended(ids, end_id) for ids in _ids(tokenizer, [answer for _, answer in pairs])]
        sources = [_end_of(ids, max_length, start_ids) for ids in prompts]
        targets = [ids[:target_length] for ids in answers]
        cut_count = sum(len(p) > max_length or len(a) > target_length for p, a in zip(prompts, answers, strict=True))
    return Encoded(sources, targets, list(split.targets), "causal", tokenizer.pad_token_id, cut_count)


def check_rows(rows: Rows, plain: bool) -> None:
    """Raise ConfigError if plain text (`plain`), or else instruction data, cannot be laid out in such rows."""
    allowed_rows = ("documents", "blocks", "packed") if plain else ("examples", "packed")
    if rows not in allowed_rows:
        kind = "plain text" if plain else "instruction data"
        raise ConfigError(f"fit.rows is {rows!r}, which {kind} has not; allowed are {', '.join(allowed_rows)}")


def rendered(
    conversation: Sequence[Mapping[str, Any]], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return `renderings` of one conversation."""
    return renderings([(conversation, answer)], tokenizer)[0]


def renderings(
    pairs: Sequence[tuple[Sequence[Mapping[str, Any]], str]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Render conversations with their answers, each as a prompt and the text that the model shall generate.

    The second text has no end mark if the template writes none. If the template renders the conversation differently
    once it has an answer, the second text is the unchanged answer.

    Raises:
        DataError: if the template refuses a conversation or does not terminate, or if a conversation uses tools and
            there is no template.
    """
    if not tokenizer.chat_template:
        return [_plainly(conversation, answer) for conversation, answer in pairs]
    jobs: list[tuple[Sequence[Mapping[str, Any]], bool]] = []
    for conversation, answer in pairs:
        exchange = [*conversation, {"role": "assistant", "content": answer}]
        jobs += [(list(conversation), True), (exchange, False)]
    texts = render(jobs, tokenizer)
    return [
        _split(prompt, exchange, answer)
        for prompt, exchange, (_, answer) in zip(texts[::2], texts[1::2], pairs, strict=True)
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
    """Return the prompt, and the text that the template writes after it for the answer."""
    if not whole.startswith(prompt):
        return prompt, answer
    completion = whole.removeprefix(prompt)
    if answer not in completion:  # Many templates strip messages, which would remove the indentation of code.
        completion = completion.replace(answer.strip(), answer, 1)
    return prompt, completion


_PLAIN = {"system": "System", "user": "User", "assistant": "Assistant"}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the mark with which this tokenizer begins every text, as a list of one id; [] if it has none."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


def _ended(ids: list[int], end: int) -> list[int]:
    """Return the ids up to the last end mark, or with an end mark appended if there is none.

    A template may write more after its end mark; this is dropped.
    """
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else [*ids, end]


def _end_of(ids: list[int], length: int, first: list[int]) -> list[int]:
    """Return the last `length` ids; the mark at the beginning is kept."""
    if len(ids) <= length:
        return ids
    mark = first if ids[: len(first)] == first and length > len(first) else []
    return mark + ids[len(ids) - length + len(mark) :]


def _blocks(documents: Sequence[list[int]], width: int) -> list[list[int]]:
    """Concatenate all ids and cut them into rows of `width`.

    The last row may be shorter. A last row of a single token has nothing to predict and is dropped, unless it is the
    only row.
    """
    stream = [token for ids in documents for token in ids]
    rows = [stream[start : start + width] for start in range(0, len(stream), width)]
    return rows[:-1] if len(rows) > 1 and len(rows[-1]) == 1 else rows


@dataclass(frozen=True)
class Packed:
    """Rows of several examples each. It replaces `Encoded` in `training.fit`, but not in evaluation.

    Args:
        data: the examples.
        groups: indices of the examples in each row.
    """

    data: Encoded
    groups: list[list[int]]

    @classmethod
    def of(cls, data: Encoded, width: int) -> "Packed":
        """Pack the examples into rows of at most `width` tokens by best fit, longest example first."""
        sizes = [len(s) + len(t) for s, t in zip(data.sources, data.targets, strict=True)]
        groups: list[list[int]] = []
        free_space: list[tuple[int, int]] = []  # (tokens left, group), ascending
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            position = bisect_left(free_space, (sizes[i], -1))
            free_tokens, group = free_space.pop(position) if position < len(free_space) else (width, len(groups))
            if group == len(groups):
                groups.append([])
            groups[group].append(i)
            insort(free_space, (free_tokens - sizes[i], group))
        return cls(data, groups)

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Return a batch of these rows, with position ids that restart at every example."""
        ids, labels, positions = [], [], []
        for group in (self.groups[row] for row in rows):
            parts = [(self.data.sources[i], self.data.targets[i]) for i in group]
            ids.append([token for s, t in parts for token in s + t])
            # The first token of an example follows the last token of another, so it must not be predicted.
            labels.append([label for s, t in parts for label in [-100, *([-100] * len(s) + t)[1:]]])
            positions.append([position for s, t in parts for position in range(len(s) + len(t))])
        batch = {
            "input_ids": pad(ids, self.data.pad),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, -100),
            "position_ids": pad(positions, 0),
        }
        return {key: value.to(device) for key, value in batch.items()}

    def epochs(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Yield the rows of each batch, as `Encoded.epochs`."""
        return shuffled(len(self), epochs, batch_size, generator)
