"""The public documents as batches for pretraining."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from consilium.data.source import Doc, words
from consilium.recipes.pretrain_model import PAD

__all__ = ["HEADS", "Batch", "Corpus", "answer", "classes_of"]

HEADS = ("topic", "kind", "verb")
"""The classification heads; a fourth, "words", predicts the words of the documented name."""


@dataclass(frozen=True)
class Batch:
    """A padded batch of documents.

    Args:
        ids: token ids [B, T] (padded).
        targets: targets [B] of each head (-1: none).
        words: words of the names [B, W], as rows that sum to 1 or 0.
    """

    ids: Tensor
    targets: dict[str, Tensor]
    words: Tensor


class Corpus:
    """Encoded documents with their targets, in batches of texts of about equal length."""

    def __init__(self, docs: list[Doc], tokenizer: PreTrainedTokenizerFast, length: int, classes: dict[str, list[str]]):
        token_ids = tokenizer([doc.text for doc in docs], truncation=True, max_length=length)["input_ids"]
        self.ids = [torch.tensor(row) for row in token_ids]
        self.classes = classes
        label_ids = {head: {label: i for i, label in enumerate(labels)} for head, labels in classes.items()}
        self.targets = {
            head: torch.tensor([label_ids[head].get(answer(head, doc), -1) for doc in docs]) for head in HEADS
        }
        self.words = [[label_ids["words"][w] for w in words(doc.name) if w in label_ids["words"]] for doc in docs]

    def batches(self, tokens: int, rng: random.Random) -> Iterator[Batch]:
        """Yield the batches of one pass in random order.

        A batch has at most `tokens` tokens, and texts of similar length share it.
        """
        order = list(range(len(self.ids)))
        rng.shuffle(order)
        groups = []
        for start in range(0, len(order), 4096):
            chunk = sorted(order[start : start + 4096], key=lambda i: len(self.ids[i]))
            group: list[int] = []
            for i in chunk:
                if group and len(self.ids[i]) * (len(group) + 1) > tokens:
                    groups.append(group)
                    group = []
                group.append(i)
            groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            yield self.take(group)

    def take(self, rows: list[int]) -> Batch:
        """Return the batch of the given rows."""
        ids = nn.utils.rnn.pad_sequence([self.ids[i] for i in rows], batch_first=True, padding_value=PAD)
        word_targets = torch.zeros(len(rows), len(self.classes["words"]))
        for r, i in enumerate(rows):
            for word in self.words[i]:
                word_targets[r, word] = 1.0 / len(self.words[i])
        return Batch(ids, {head: self.targets[head][rows] for head in HEADS}, word_targets)


def answer(head: str, doc: Doc) -> str | None:
    """Return the label that a head should predict for a document, or None.

    The labels are wider than those of the tasks: every kind, and every frequent verb.
    """
    if head == "topic":
        return doc.package
    if head == "kind":
        return doc.kind
    short_name = doc.name.rsplit(".", 1)[-1]
    parts = words(short_name)
    is_callable = doc.kind in ("function", "method", "classmethod", "staticmethod")
    return parts[0] if is_callable and len(parts) > 1 and not short_name.startswith("__") else None


def classes_of(docs: list[Doc]) -> dict[str, list[str]]:
    """Return the labels per head that occur often enough, and the frequent words of names."""
    minimum = max(2, len(docs) // 1000)
    classes = {}
    for head in HEADS:
        counts = Counter(answer(head, doc) for doc in docs)
        classes[head] = sorted(k for k, n in counts.items() if k and n >= (minimum if head == "verb" else 2))
    counts = Counter(w for doc in docs for w in set(words(doc.name)))
    classes["words"] = sorted(w for w, n in counts.most_common(1000) if n >= 2)
    return classes
