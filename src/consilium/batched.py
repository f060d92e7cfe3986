"""Batched training of small models: clients of one architecture are stacked and take every step together.

For a small model, a GPU takes as long to start the kernels as a CPU takes to compute them. Training a hundred clients
one after the other leaves the GPU idle; stacked, a step of all hundred is the same few kernels on larger tensors. Every
client computes the same as it would alone, up to the order of summation. On a CPU, stacking is slower than running one
client per core.

Clients have their own batches, and unequal numbers of them. A short batch is padded with rows that are ignored
(`models.cohort.real_rows`), and a client that runs out of batches leaves the stack. Models can be stacked if all their
modules treat every row independently, or depend on the real rows alone: the classes in `ROWWISE`, or a class that sets
`rowwise = True` in its own body. Such a class must also use the weights of its layers only by calling these layers, see
`masters`. Other models, and methods with a loss of their own, are trained one after the other.

Shapes: K clients of one architecture, B rows of a batch, *S the shape of an example, C labels.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from consilium.core import ClientContext, derive_seed
from consilium.data.tensor import TensorSplit
from consilium.fit import Fit
from consilium.models.cohort import SplitModel, padded

__all__ = ["FitJob", "PredictJob", "fit_jobs", "predict_jobs", "stackable"]

ROWWISE = (
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.GroupNorm,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FitJob:
    """The arguments of one client's `training.fit`, to be run as part of a stack."""

    model: SplitModel
    data: TensorSplit
    config: Fit
    context: ClientContext
    epochs: int
    rates: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class PredictJob:
    """A request to predict the top-ranked label of every row of a split, in batches of `size`."""

    model: SplitModel
    data: TensorSplit
    config: Fit
    context: ClientContext
    size: int


def stackable(model: nn.Module) -> bool:
    """Return True if padding rows cannot change what the model computes for the other rows."""
    return all(type(module) in ROWWISE or vars(type(module)).get("rowwise", False) for module in model.modules())


def fit_jobs(jobs: Sequence[FitJob]) -> list[tuple[float, int, float] | None]:
    """Train the models in place; return each job's (mean loss, steps, seconds), or None if it could not be stacked."""
    return _answered(jobs, _fit)


def predict_jobs(jobs: Sequence[PredictJob]) -> list[Tensor | None]:
    """Return the top-ranked label indices of each job, int64 [n] on the CPU, or None if it could not be stacked."""
    return _answered(jobs, _predict)


def _answered(jobs: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    answers: list[Any] = [None] * len(jobs)
    for places in _alike(jobs):
        for place, answer in zip(places, work([jobs[i] for i in places]), strict=True):
            answers[place] = answer
    return answers


def _alike(jobs: Sequence[FitJob | PredictJob]) -> list[list[int]]:
    """Return groups of two or more job indices whose models differ only in their weights."""
    groups: dict[object, list[int]] = defaultdict(list)
    for place, job in enumerate(jobs):
        if stackable(job.model):
            shapes = tuple((key, t.shape, t.dtype) for key, t in job.model.state_dict().items())
            groups[repr(job.model), shapes, job.data.shape, job.data.x.dtype, job.config].append(place)
    return [places for places in groups.values() if len(places) > 1]


def _fit(jobs: Sequence[FitJob]) -> list[tuple[float, int, float]]:
    start, config, device = time.perf_counter(), jobs[0].config, jobs[0].context.device
    data = [job.data.augmented(derive_seed(job.context.seed, "augment")) for job in jobs]
    plans = [
        list(split.epochs(job.epochs, config.batch_size, _generator(job)))
        for job, split in zip(jobs, data, strict=True)
    ]
    steps = [len(plan) for plan in plans]
    order = sorted(range(len(jobs)), key=lambda k: -steps[k])  # most batches first: clients leave at the end
    model = jobs[0].model.train()
    weights = _stacked([dict(jobs[k].model.named_parameters()) for k in order])
    buffers = _stacked([dict(jobs[k].model.named_buffers()) for k in order])
    weights = {path: w.requires_grad_(model.get_parameter(path).requires_grad) for path, w in weights.items()}
    trainable = _trainable(weights)
    optimizer = config.descent(trainable, jobs[0].rates)
    losses = torch.full((max(steps), len(jobs)), float("nan"), device=device)

    def loss_of(weights, buffers, batch, real):
        with padded(real):
            logits, labels = functional_call(model, {**weights, **buffers}, (batch,))
        element_losses = config.cross_entropy(logits, labels, reduction="none")
        return element_losses.mean() if real is None else (element_losses * real).sum() / real.sum()

    client_count = len(jobs)
    autocast = config.lowered(device)
    for step, (batch, real) in enumerate(_batches([data[k] for k in order], [plans[k] for k in order], device)):
        remaining = len(batch["labels"])
        if remaining < client_count:
            _leave(jobs, order[remaining:client_count], remaining, model, weights, buffers)
            weights, buffers = _shrunk(weights, buffers, optimizer, remaining)
            trainable, client_count = _trainable(weights), remaining
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = torch.vmap(loss_of, in_dims=(0, 0, 0, None if real is None else 0))(weights, buffers, batch, real)
        loss.sum().backward()
        if config.clip:
            _clip(trainable, config.clip)
        optimizer.step()
        losses[step, :remaining] = loss.detach()
        del loss
        for k in order[:remaining]:
            jobs[k].context.work.step()
            jobs[k].context.progress(step + 1, steps[k])
    _leave(jobs, order[:client_count], 0, model, weights, buffers)
    means = dict(zip(order, losses.nanmean(0).tolist(), strict=True))
    seconds = (time.perf_counter() - start) / len(jobs)
    return [(means[k], n, seconds) for k, n in enumerate(steps)]


def _generator(job: FitJob) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(job.context.seed, "batches"))


def _trainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trainable weights, keyed by the paths that `Fit.descent` and `moe.addressing` use."""
    return {path.removeprefix("backbone."): w for path, w in weights.items() if w.requires_grad}


def _stacked(many: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([tensors[key].detach() for tensors in many]) for key in many[0]}


def _leave(
    jobs: Sequence[FitJob],
    leaving: Sequence[int],
    first: int,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:
    """Copy the final weights of leaving clients, stacked from index `first` on, back into their models."""
    with torch.no_grad():
        for key, stack in {**weights, **buffers}.items():
            for place, k in enumerate(leaving, first):
                client_model = jobs[k].model
                (client_model.get_parameter(key) if key in weights else client_model.get_buffer(key)).copy_(
                    stack[place]
                )


def _shrunk(
    weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, left: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the stacks cut to the first `left` clients, and cut the optimizer's state in place."""
    shrunk_weights = {path: w.detach()[:left].clone().requires_grad_(w.requires_grad) for path, w in weights.items()}
    weights_by_id = {id(old_weight): shrunk_weights[path] for path, old_weight in weights.items()}
    for group in optimizer.param_groups:
        for place, old_weight in enumerate(group["params"]):
            new_weight = group["params"][place] = weights_by_id[id(old_weight)]
            state = optimizer.state.pop(old_weight, None)
            if state is not None:
                optimizer.state[new_weight] = {
                    name: value[:left].clone() if torch.is_tensor(value) and value.shape == old_weight.shape else value
                    for name, value in state.items()
                }
    return shrunk_weights, {key: b[:left].clone() for key, b in buffers.items()}


def _batches(
    splits: Sequence[TensorSplit], plans: Sequence[Sequence[Tensor]], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Yield each step's batch of the clients that still have one, and the mask of its real rows.

    The clients that have a batch come first in the stack. A batch holds `x` [K, B, *S] and `labels` [K, B]; the mask is
    bool [K, B], or None if all rows are real.

    Args:
        plans: row indices of every batch of each split; no split has more batches than the one before it.
    """
    first_split, steps = splits[0], range(len(plans[0]))
    sizes = [[len(plan[step]) for plan in plans if len(plan) > step] for step in steps]
    masks = [
        None
        if min(row_counts) == max(row_counts)
        else torch.arange(max(row_counts)) < torch.tensor(row_counts)[:, None]
        for row_counts in sizes
    ]
    device_masks = [None if mask is None else mask.to(device, non_blocking=True) for mask in masks]
    if first_split.augment != "none" or any(
        split.x is not first_split.x or split.y is not first_split.y for split in splits
    ):
        for step, mask in zip(steps, device_masks, strict=True):
            requests = [(split, plan[step]) for split, plan in zip(splits, plans, strict=True) if len(plan) > step]
            parts = [split.batch(rows, device) for split, rows in requests]
            yield {key: pad_sequence([part[key] for part in parts], batch_first=True) for key in parts[0]}, mask
        return
    # All rows come from one data set, so their indices for all steps are sent to the device at once.
    rows_by_client = []
    for split, plan in zip(splits, plans, strict=True):
        rows = split.index[torch.cat(plan)]
        rows_by_client.append(rows.split([len(batch) for batch in plan]))
    rows_by_step = [
        pad_sequence([part[step] for part in rows_by_client if len(part) > step], batch_first=True) for step in steps
    ]
    flat_rows = (
        torch.cat([step.flatten() for step in rows_by_step])
        .to(first_split.x.device)
        .split([step.numel() for step in rows_by_step])
    )
    for step, step_rows, mask in zip(rows_by_step, flat_rows, device_masks, strict=True):
        yield first_split.at(step_rows.view_as(step), device), mask


def _clip(trainable: Mapping[str, Tensor], largest: float) -> None:
    """Clip the norm of each client's gradients, taken together, to `largest`, in place."""
    squares = [w.grad.flatten(1).square().sum(1) for w in trainable.values()]
    norm_K = torch.stack(squares).sum(0).sqrt()
    scale_K = (largest / (norm_K + 1e-6)).clamp(max=1.0)
    for w in trainable.values():
        w.grad *= scale_K.view(-1, *[1] * (w.dim() - 1))


def _predict(jobs: Sequence[PredictJob]) -> list[Tensor]:
    config, device, size = jobs[0].config, jobs[0].context.device, jobs[0].size
    order = sorted(range(len(jobs)), key=lambda k: -len(jobs[k].data))
    data = [jobs[k].data for k in order]
    plans = [torch.arange(len(client_part)).split(size) for client_part in data]
    model = jobs[0].model.eval()
    weights = _stacked([dict(jobs[k].model.named_parameters()) for k in order])
    buffers = _stacked([dict(jobs[k].model.named_buffers()) for k in order])

    def chosen(weights, buffers, batch):
        return functional_call(model, {**weights, **buffers}, (batch,))[0].argmax(-1)

    parts: list[list[Tensor]] = [[] for _ in jobs]
    with torch.inference_mode(), config.lowered(device):
        for batch, _ in _batches(data, plans, device):
            remaining = len(batch["labels"])
            weights, buffers = ({key: t[:remaining] for key, t in stack.items()} for stack in (weights, buffers))
            for client_part, classes in zip(parts, torch.vmap(chosen)(weights, buffers, batch), strict=False):
                client_part.append(classes)
        predictions = torch.cat(
            [torch.cat(part)[: len(client_part)] for part, client_part in zip(parts, data, strict=True)]
        ).cpu()
    predictions_by_job = dict(zip(order, predictions.split([len(client_part) for client_part in data]), strict=True))
    return [predictions_by_job[k] for k in range(len(jobs))]
