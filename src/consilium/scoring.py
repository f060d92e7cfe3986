"""Scoring of models: by the metric of their task, by the loss of every token, by the usage of their experts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.batched import PredictJob, predict_jobs, stackable
from consilium.core import (
    ClientContext,
)
from consilium.data.encode import Encoded, token_bytes
from consilium.data.task import balanced, recalls, score
from consilium.data.tensor import TensorSplit
from consilium.errors import DataError
from consilium.fit import Fit
from consilium.models.cohort import SplitModel, padded
from consilium.moe.experts import Experts
from consilium.moe.model import TaskModel
from consilium.moe.routing import Tap
from consilium.params import Params
from consilium.setup import Setup
from consilium.work import tokens_in

__all__ = [
    "assess", "evaluate", "even", "even_logits", "evened", "first_ranked", "mean_loss", "profile", "read_batches",
    "score_places",
]  # fmt: skip

EVEN = 16
"""The batch size of a small model is padded to a multiple of this number of rows."""


def evaluate(model: TaskModel, data: Encoded, context: ClientContext, setup: Setup, tap: Tap | None = None) -> float:
    """Return the task's metric on a split, in [0, 1]; see `assess`."""
    return assess(model, data, context, setup, tap)["score"]


def assess(
    model: TaskModel,
    data: Encoded,
    context: ClientContext,
    setup: Setup,
    tap: Tap | None = None,
    by_label: bool = False,
) -> dict[str, float]:
    """Return the task's metric on a split, "score" in [0, 1], and further scores with it.

    If the metric is the accuracy of tokens, these are "perplexity" and "bits_per_byte" (the loss of all predicted
    tokens in bits, divided by the bytes of text they stand for).

    Args:
        tap: counts the usage of experts over the split (teacher-forced for text-to-text).
        by_label: for a classification, also return "balanced" (the mean recall of the labels) and "recall <label>".
    """
    if context.data.task.metric == "token_accuracy":
        sizes = token_bytes(setup.model.tokenizer()).to(context.device)
        return _teacher_forced(model, data, context, setup.evaluation_rows, sizes, tap)
    size = setup.evaluation_rows
    if isinstance(data, TensorSplit) and tap is None:
        (label_indices,) = first_ranked(model, [data], setup.fit, context, size)
        if by_label:
            return _by_label([model.labels[i] for i in label_indices], data.texts)
        return {"score": score_places(model, data, label_indices, context)}
    predictions = []
    model.eval()
    order = data.order()
    with torch.inference_mode(), setup.fit.lowered(context.device):
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            batch = data.batch(rows, context.device)
            context.work.read(tokens_in(batch))
            classify = data.way == "classification"
            if classify or tap is not None:
                with nullcontext() if tap is None else tap.batch(batch, count=True):
                    logits, _ = model(batch)
                if classify:
                    predictions += [model.labels[i] for i in logits.argmax(-1).tolist()]
                del logits  # generation computes its own
            if not classify:
                prompt = data.batch(rows, context.device, prompt=True)
                context.work.read(prompt["input_ids"].numel())
                ids = model.generate(prompt, setup.fit.target_length, context.work.read)
                predictions += setup.model.tokenizer().batch_decode(ids, skip_special_tokens=True)
    targets = [data.texts[i] for i in order]
    if by_label and data.way == "classification":
        return _by_label(predictions, targets)
    return {"score": score(context.data.task.metric, predictions, targets)}


def _by_label(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    recall_by_label = recalls(predictions, targets)
    scores = {f"recall {label}": value for label, value in recall_by_label.items()}
    return {"score": score("accuracy", predictions, targets), "balanced": balanced(recall_by_label), **scores}


def first_ranked(
    model: SplitModel, splits: Sequence[TensorSplit], config: Fit, context: ClientContext, size: int
) -> list[list[int]]:
    """Predict the label index of every row in each split, in batches of `size`."""
    counts = [len(split) for split in splits]
    if all(split.x is splits[0].x for split in splits):  # Splits of one data set are predicted in one pass.
        splits = [replace(splits[0], index=torch.cat([split.index for split in splits]))]
    predictions = torch.cat([_ranked(model, split, config, context, size) for split in splits])
    return [indices.tolist() for indices in predictions.split(counts)]


def _ranked(model: SplitModel, data: TensorSplit, config: Fit, context: ClientContext, size: int) -> Tensor:
    if context.meet:
        predictions = context.meet(predict_jobs, PredictJob(model, data, config, context, size))
        if predictions is not None:
            return predictions
    model.eval()
    logits = partial(even_logits, model) if evened(model, context) else model
    with torch.inference_mode(), config.lowered(context.device):
        batches = read_batches(data, size, context)
        return torch.cat([logits(batch)[0].argmax(-1) for batch in batches]).cpu()


def score_places(model: SplitModel, data: TensorSplit, places: Sequence[int], context: ClientContext) -> float:
    """Return the task's metric of the labels at these indices, in [0, 1]."""
    return score(context.data.task.metric, [model.labels[i] for i in places], data.texts)


def read_batches(
    data: Encoded | TensorSplit, size: int, context: ClientContext, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield rows of a split in batches of `size`, each counted against `context.work`.

    Args:
        rows: which rows, in this order; None: all, in their own order.
    """
    rows = torch.arange(len(data)) if rows is None else rows
    for start in range(0, len(rows), size):
        batch = data.batch(rows[start : start + size], context.device)
        context.work.read(tokens_in(batch))
        yield batch


def evened(model: nn.Module, context: ClientContext) -> bool:
    """Return True if padding rows, see `even`, is allowed and useful."""
    return context.device.type == "cpu" and isinstance(model, SplitModel) and stackable(model)


def even(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad a batch to a multiple of `EVEN` rows by repeating its last row.

    A CPU's libraries compile kernels for every number of rows, and clients differ in the size of their last batch.
    """
    padding = -len(next(iter(batch.values()))) % EVEN
    return {key: torch.cat([t, t[-1:].expand(padding, *t.shape[1:])]) if padding else t for key, t in batch.items()}


def even_logits(model: SplitModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a model's logits and labels of a batch, computed on the padded batch."""
    labels, full_batch = batch["labels"], even(batch)
    if (rows := len(full_batch["labels"])) == len(labels):
        return model(batch)
    with padded(torch.arange(rows) < len(labels)):
        logits, _ = model(full_batch)
    return logits[: len(labels)], labels


def _teacher_forced(
    model: TaskModel, data: Encoded, context: ClientContext, size: int, bytes_V: Tensor, tap: Tap | None
) -> dict[str, float]:
    """Score every predicted token given the true ones before it: the share that ranks first, and their loss.

    Args:
        size: rows per batch.
        bytes_V: bytes that each token stands for, int64 [V].
    """
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.sources[i]) + len(data.targets[i]))
    hits = tokens = byte_count = 0
    loss = 0.0
    with torch.inference_mode():
        for batch in read_batches(data, size, context, order):
            with nullcontext() if tap is None else tap.batch(batch, count=True):
                logits, labels = model(batch)
            hits += int((logits.argmax(-1) == labels).sum())
            tokens += labels.numel()
            byte_count += int(bytes_V[labels].sum())
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            del logits
    if not tokens:
        raise DataError("nothing to score: no token of these rows is predicted; raise fit.target_length")
    scores = {"score": hits / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}
    return scores | ({"bits_per_byte": loss / math.log(2) / byte_count} if byte_count else {})


def profile(setup: Setup, model: TaskModel, data: Encoded, context: ClientContext, rows: int) -> tuple[Params, Params]:
    """Measure how the experts of a model are used on the first rows of a split.

    Returns:
        Per block: the slots that ask for each expert, int64 [E]; and the mean over tokens of (gate x norm of the
        expert's output), float32 [E].
    """
    model.eval()
    experts = Experts(model, measure=True)
    tokens = 0
    with torch.inference_mode(), Tap(model) as tap, experts:
        for batch in read_batches(data, setup.evaluation_rows, context, range(min(rows, len(data)))):
            experts.masks = model.masks(batch)
            tokens += sum(int(mask.sum()) for mask in experts.masks.values())
            with tap.batch(batch, count=True):
                model(batch)
    contributions = {block: (total / max(tokens, 1)).float() for block, total in experts.contributions.items()}
    return tap.usage.demand, contributions


def mean_loss(setup: Setup, model: TaskModel, data: Encoded, context: ClientContext, rows: int) -> float:
    """Return the mean cross-entropy of the first rows of a split, in nats per label or predicted token."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in read_batches(data, setup.evaluation_rows, context, range(min(rows, len(data)))):
            logits, labels = model(batch)
            total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            count += labels.numel()
    return total / max(count, 1)
