"""THE local loop: `fit` trains a model on one client's data, `evaluate` scores it. Every method comes through here.

A method bends the loop in two places only: `correct`, called on the gradients of each step before clipping (FedProx's
penalty and SCAFFOLD's control variates are such corrections), and `objective`, the loss of a batch, where that is more
than the cross-entropy of one model (prototypes, distillation).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.core import (
    ClientContext,
    ClientInfo,
    ExpertSet,
    Payload,
    Sampling,
    Scalar,
    counts_of,
    derive_seed,
    experts_from_scalars,
)
from consilium.data.encode import Encoded, encode
from consilium.data.task import Split, score
from consilium.data.tensor import TensorSplit
from consilium.errors import ConfigError
from consilium.models.cohort import Cohort, SplitModel, initial
from consilium.moe.addressing import flatten, load_flat, parameters, select
from consilium.moe.budget import PARTS, Footprint, MemoryModel, human
from consilium.moe.build import ModelSource
from consilium.moe.model import TaskModel
from consilium.moe.routing import Tap
from consilium.params import Params

__all__ = [
    "Fit",
    "Fitted",
    "Objective",
    "Setup",
    "evaluate",
    "fit",
    "local_round",
    "local_test",
    "seeded",
    "tested",
    "trained",
]

Correct = Callable[[Mapping[str, nn.Parameter]], None]
Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(model, batch) -> the loss to descend, a scalar."""

EVALUATION = 4
"""Evaluation takes so many times `Fit.batch_size` examples at once: nothing is saved for a backward pass."""


@dataclass(frozen=True)
class Fit:
    """How a client trains in one round.

    Args:
        lr: learning rate of the backbone, > 0.
        head_lr: learning rate of classification heads, which start from zero, > 0.
        epochs: passes over the client's training data per round, >= 1.
        batch_size: examples per step, >= 1.
        max_length: source tokens kept per example, >= 1; what is longer is cut.
        target_length: target tokens kept (text-to-text), the end of the text included, >= 2.
        optimizer: "adamw" or "sgd"; fresh in every round.
        weight_decay: decoupled weight decay.
        clip: largest norm of the gradient, 0: no clipping.
        label_smoothing: of the cross-entropy, 0..1 (FedMoE, Eq 1).
        balance: weight of the per-layer load-balance loss (alpha in FedMoE's Eq 1).
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    lr: float = 1e-3
    head_lr: float = 1e-2
    epochs: int = 1
    batch_size: int = 16
    max_length: int = 96
    target_length: int = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    label_smoothing: float = 0.1
    balance: float = 0.01
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"fit.{name} is {getattr(self, name)}; it must be greater than 0")
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 1), ("target_length", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"fit.{name} is {getattr(self, name)}; it must be at least {least}")
        for name, top in (
            ("label_smoothing", 1.0),
            ("balance", float("inf")),
            ("weight_decay", float("inf")),
            ("clip", float("inf")),
        ):
            if not 0 <= getattr(self, name) <= top:
                raise ConfigError(f"fit.{name} is {getattr(self, name)}; it must be within 0..{top:g}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"fit.optimizer is {self.optimizer!r}; it must be adamw or sgd")


@dataclass(frozen=True)
class Setup:
    """What both halves of every method are built from; holds no weights.

    Args:
        model: where the model comes from: one mixture of experts, or a cohort of small models.
        fit: how clients train.
        sampling: who takes part in a round.
        seed: of the run.
        heads: task -> every label any client has, for the server's table of heads; {} for text-to-text.
        clients: all clients of the federation, as the server knows them.
        shape: of one example, for a cohort; () for texts.
    """

    model: ModelSource | Cohort
    fit: Fit
    sampling: Sampling
    seed: int
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: tuple[ClientInfo, ...] = ()
    shape: tuple[int, ...] = ()

    def initial_params(self, client: ClientInfo | None = None) -> Params:
        """Where all methods start. The pretrained backbone, and a zero head row for every label of every task; in a
        cohort: an extractor and head rows by their own initialisation, the same for all of one architecture.

        Args:
            client: whose model; None: the one that all clients have.

        Raises:
            ConfigError: for None in a cohort of several architectures.
        """
        if isinstance(self.model, Cohort):
            return self._one_model(client)
        params = self.model.load()
        width, dtype = self.model.config.hidden_size, self.model.torch_dtype
        for task, labels in self.heads.items():
            for label in labels:
                params[f"head.{task}.{label}.weight"] = torch.zeros(width, dtype=dtype)
                params[f"head.{task}.{label}.bias"] = torch.zeros((), dtype=dtype)
        return params

    def _one_model(self, client: ClientInfo | None) -> Params:
        if client is None and self.model.world != "cohort":
            raise ConfigError(
                f"the clients have the architectures {self.model.path}, and there is no model that all could share; "
                "give --model.architectures one name, or use a method that lets models differ"
            )
        name = self.model.architectures[0] if client is None else client.architecture
        return {**self.extractor_params(name), **self.head_params(self.model.width_of(name, self.shape))}

    def head_params(self, width: int) -> Params:
        """The head rows with which models of a cohort begin, whose representations have that width."""
        params: Params = {}
        for task, labels in self.heads.items():
            head = initial(lambda labels=labels: nn.Linear(width, len(labels)), self.seed, "head", task, width)
            for place, label in enumerate(labels):
                params |= {f"head.{task}.{label}.{leaf}": head[leaf][place].clone() for leaf in ("weight", "bias")}
        return params

    @property
    def common_width(self) -> int:
        """d, the width of the representation of every model of a cohort.

        Raises:
            ConfigError: if it differs between architectures.
        """
        widths = {name: self.model.width_of(name, self.shape) for name in self.model.architectures}
        if len(set(widths.values())) > 1:
            raise ConfigError(f"the method exchanges what depends on the width of representations, but it is {widths}")
        return next(iter(widths.values()))

    @property
    def classes(self) -> int:
        """C, the number of labels, for methods whose messages have a place for each.

        Raises:
            ConfigError: if clients have different tasks.
        """
        if len(self.heads) != 1:
            raise ConfigError(f"the method is for clients of one task, these have {', '.join(self.heads)}")
        return len(next(iter(self.heads.values())))

    def own_params(self, context: ClientContext) -> Params:
        """A client's own model: as it left it in its state, or as it begins."""
        return context.state.params or select(self.initial_params(context.info), context.data.task.name)

    def extractor_params(self, name: str) -> Params:
        """The weights with which a client's own extractor begins: of the run's seed and its architecture's name."""
        return initial(lambda: self.model.extractor(name, self.shape), self.seed, "extractor", name)

    def small_params(self) -> Params:
        """The weights with which the extractor that all share beside their own begins: never those of a client's own,
        also where the architecture is the same (two equal extractors would learn the same, and a gate nothing)."""
        return initial(lambda: self.model.extractor(self.model.small, self.shape), self.seed, "small extractor")

    def footprint(
        self,
        counts: Mapping[str, int],
        mode: Literal["full", "lora", "forward"] = "full",
        references: int = 0,
        rank: int = 8,
    ) -> Footprint:
        """Bytes a client needs for `counts` experts per block, by the memory model: for training or for the evaluation
        that follows it, whichever needs more.

        Args:
            mode: "forward" is evaluation alone.
            references: extra copies of the weights the method keeps while training (FedProx 1, SCAFFOLD 3).
            rank: of the adapters ("lora").
        """
        fit = self.fit
        shape = {"max_length": fit.max_length, "target_length": fit.target_length, "optimizer": fit.optimizer}
        evaluation = self._memory.footprint(counts, mode="forward", batch_size=EVALUATION * fit.batch_size, **shape)
        if mode == "forward":
            return evaluation
        training = self._memory.footprint(
            counts,
            mode=mode,
            batch_size=fit.batch_size,
            gradient_checkpointing=fit.gradient_checkpointing,
            references=references,
            rank=rank,
            **shape,
        )
        return max(training, evaluation, key=lambda footprint: footprint.total)

    def reported(
        self,
        counts: Mapping[str, int],
        mode: Literal["full", "lora", "forward"] = "full",
        references: int = 0,
        rank: int = 8,
    ) -> dict[str, int]:
        """The footprint in bytes as a scalar of a reply; {} for a family without a memory model."""
        if isinstance(self.model, Cohort) or self.model.family.model_type not in PARTS:
            return {}
        return {"footprint": self.footprint(counts, mode, references, rank).total}

    def lacks(
        self, client: ClientInfo, counts: Mapping[str, int], mode: str = "full", references: int = 0, rank: int = 8
    ) -> str | None:
        """Why the client's device cannot train `counts` experts per block; None if it can."""
        if client.memory_bytes is None:
            return None
        need = self.footprint(counts, mode, references, rank).total
        if need <= client.memory_bytes:
            return None
        return f"needs {human(need)}, has {human(client.memory_bytes)}, lacks {human(need - client.memory_bytes)}"

    @property
    def _memory(self) -> MemoryModel:
        return MemoryModel.of(self.model)

    def largest_uniform(self, memory_bytes: int | None, share: float = 1.0, references: int = 0) -> int:
        """The most experts per block, the same in every block, that fit into `share` of the memory; 0 if none does."""
        most = max(self.model.counts.values())
        if memory_bytes is None:
            return most
        for n in range(most, 0, -1):
            counts = {block: min(n, total) for block, total in self.model.counts.items()}
            if self.footprint(counts, references=references).total <= share * memory_bytes:
                return n
        return 0

    def public_usage(self, *seed: str) -> dict[str, Tensor]:
        """Block -> share of public tokens per expert [E], from the model's card; random where it says nothing."""
        known, rng = self.model.public_usage(), torch.Generator().manual_seed(derive_seed(self.seed, *seed))
        return {
            block: torch.tensor(known[block]) if block in known else torch.rand(total, generator=rng)
            for block, total in self.model.counts.items()
        }

    def encode(self, context: ClientContext, split: Split | TensorSplit) -> Encoded | TensorSplit:
        """A split of the client's data as token ids for this model; tensors are what they are."""
        if isinstance(split, TensorSplit):
            return split
        way = "classification"
        if self.model.form == "text-to-text":
            way = "seq2seq" if self.model.config.is_encoder_decoder else "causal"
        data = context.data
        return encode(split, data.task, self.model.tokenizer(), way, self.fit.max_length, self.fit.target_length)

    def build(self, params: Params, context: ClientContext, held: ExpertSet | None = None) -> TaskModel | SplitModel:
        """The client's live model on its device, holding only `held` experts."""
        task = context.data.task
        if isinstance(self.model, Cohort):
            return self.split_model(
                lambda: self.model.extractor(context.info.architecture, self.shape), params, context
            )
        return self.model.build(params, task.name, task.labels, held).to(context.device)

    def split_model(
        self,
        make: Callable[[], nn.Module],
        params: Params,
        context: ClientContext,
        kind: type[SplitModel] = SplitModel,
    ) -> SplitModel:
        """A live model on the client's device with weights `params`: `make`'s extractor and the client's head."""
        task = context.data.task
        with init_empty_weights(include_buffers=False):
            model = kind(make(), task.name, task.labels)
        return load_flat(model, params).to(context.device)


@dataclass(frozen=True)
class Fitted:
    """What `fit` did: mean training loss, optimiser steps, wall seconds."""

    loss: float
    steps: int
    seconds: float


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything random inside (dropout, router noise) follows from the seed; the outside is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def fit(
    model: TaskModel,
    data: Encoded,
    config: Fit,
    context: ClientContext,
    correct: Correct | None = None,
    epochs: int | None = None,
    objective: Objective | None = None,
    rates: Mapping[str, float] | None = None,
) -> Fitted:
    """Train in place on every parameter that requires a gradient.

    Loss: cross-entropy with label smoothing + balance * load-balance loss (FedMoE, Eq 1). No gradients are left behind.

    Args:
        correct: called after each backward pass with path -> parameter of all trainable parameters, to change
            their gradients; a parameter the batch did not reach has `grad` None.
        epochs: instead of `config.epochs`.
        objective: the loss of a batch instead of the above.
        rates: beginning of a parameter's path -> learning rate, the first that fits; None: `config`'s.
    """
    start = time.perf_counter()
    trainable = {path: p for path, p in parameters(model).items() if p.requires_grad}
    optimizer = _optimizer(trainable, config, rates or {"head.": config.head_lr, "": config.lr})
    epochs = config.epochs if epochs is None else epochs
    total = epochs * -(-len(data) // config.batch_size)
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "batches"))
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    losses: list[Tensor] = []
    with seeded(derive_seed(context.seed, "fit")), Tap(model) as tap:
        for rows in data.epochs(epochs, config.batch_size, generator):
            optimizer.zero_grad(set_to_none=True)  # before the forward pass: gradients never lie beside activations
            batch = data.batch(rows, context.device)
            if objective is not None:
                loss = objective(model, batch)
            else:
                with tap.batch(batch):
                    logits, labels = model(batch)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                del logits  # the graph keeps what it needs of them
                if config.balance:
                    loss = loss + config.balance * tap.balance_loss()
            loss.backward()
            if correct is not None:
                correct(trainable)
            if config.clip:
                nn.utils.clip_grad_norm_(trainable.values(), config.clip)
            optimizer.step()
            losses.append(loss.detach())
            del loss  # and with it the graph
            context.progress(len(losses), total)
    optimizer.zero_grad(set_to_none=True)  # what comes next needs none
    mean = torch.stack(losses).mean().item() if losses else float("nan")
    return Fitted(mean, len(losses), time.perf_counter() - start)


def evaluate(model: TaskModel, data: Encoded, context: ClientContext, setup: Setup, tap: Tap | None = None) -> float:
    """The task's metric on a split, in [0, 1].

    Args:
        tap: counts the usage of experts over the split (teacher-forced for text-to-text).
    """
    predictions: list[str] = []
    model.eval()
    size = EVALUATION * setup.fit.batch_size
    order = data.order()
    with torch.inference_mode():
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            batch = data.batch(rows, context.device)
            classify = data.way == "classification"
            if classify or tap is not None:
                with nullcontext() if tap is None else tap.batch(batch, count=True):
                    logits, _ = model(batch)
                if classify:
                    predictions += [model.labels[i] for i in logits.argmax(-1).tolist()]
                del logits  # generation has its own
            if not classify:
                prompt = data.batch(rows, context.device, prompt=True)
                ids = model.generate(prompt, setup.fit.target_length)
                predictions += setup.model.tokenizer().batch_decode(ids, skip_special_tokens=True)
    return score(context.data.task.metric, predictions, [data.texts[i] for i in order])


def local_round(
    setup: Setup,
    payload: Payload,
    context: ClientContext,
    correct: Callable[[TaskModel], Correct] | None = None,
    usage: bool = False,
    references: int = 0,
) -> tuple[TaskModel, Payload]:
    """One client's round on what it was sent: build, fit, validate, flatten.

    Args:
        payload: group "params" (trunk, held experts, their router rows, the task's head rows), scalars naming the
            held experts (none: all); optionally group "router", the rows of the experts that are not held.
        correct: given the live model, returns the correction for `fit`.
        references: copies of the weights that `correct` keeps, for the footprint reported.
        usage: also report the usage of experts over the validation data, groups "demand" and "served", int64 [E].

    Returns:
        The trained model, and the reply: group "params", and scalars num_examples, validation (the task's metric),
        train_loss, steps, experts, footprint (bytes by the memory model, if the family has one), seconds_evaluate.
    """
    held, outside = experts_from_scalars(payload.scalars), payload.group("router")
    model = setup.build(payload.group("params"), context, held)
    del payload  # a full copy of the weights, unless the caller still holds it
    fitted = fit(
        model,
        setup.encode(context, context.data.train),
        setup.fit,
        context,
        correct(model) if correct is not None else None,
    )
    start = time.perf_counter()
    validation = setup.encode(context, context.data.validation)
    with Tap(model, held, outside, setup.model.counts) as tap:
        accuracy = evaluate(model, validation, context, setup, tap if usage else None)
    told = _before_aggregation(setup, model, context)
    seconds_evaluate = time.perf_counter() - start
    groups: dict[str, Params] = {"params": flatten(model, held)}  # after evaluation, which needs room itself
    if usage:
        groups |= {"demand": tap.usage.demand, "served": tap.usage.served}
    counts = counts_of(held) if held else setup.model.counts
    scalars = {
        "num_examples": context.info.num_examples,
        "validation": accuracy,
        "train_loss": fitted.loss,
        "steps": fitted.steps,
        **({"experts": sum(counts.values())} if counts else {}),
        **setup.reported(counts, references=references),
        "seconds_evaluate": seconds_evaluate,
        **told,
    }
    return model, Payload(groups, scalars)


def trained(
    setup: Setup,
    model: SplitModel,
    context: ClientContext,
    objective: Objective | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Scalar]:
    """`fit` and validate the model of a method that builds it itself; returns the scalars of `local_round`'s reply."""
    data = context.data
    fitted = fit(model, setup.encode(context, data.train), setup.fit, context, objective=objective, rates=rates)
    start = time.perf_counter()
    accuracy = evaluate(model, setup.encode(context, data.validation), context, setup)
    told = _before_aggregation(setup, model, context)
    return {
        "num_examples": context.info.num_examples,
        "validation": accuracy,
        "train_loss": fitted.loss,
        "steps": fitted.steps,
        "seconds_evaluate": time.perf_counter() - start,
        **told,
    }


def _before_aggregation(setup: Setup, model: nn.Module, context: ClientContext) -> dict[str, Scalar]:
    """The metric of the pFedMoE family's own code, in a cohort: after local training and before aggregation, the mean
    over the test batches of the accuracy of each (so the short last one weighs as much as the others), in [0, 1]."""
    if not isinstance(setup.model, Cohort):
        return {}
    test, size = setup.encode(context, context.data.test), setup.fit.batch_size
    model.eval()
    with torch.inference_mode():
        batches = (test.batch(range(i, min(i + size, len(test))), context.device) for i in range(0, len(test), size))
        right = [(logits.argmax(-1) == labels).float().mean() for logits, labels in map(model, batches)]
    return {"report/test before aggregation": torch.stack(right).mean().item()}


def local_test(setup: Setup, payload: Payload, context: ClientContext) -> Payload:
    """Score a delivered model on the client's test split: scalars score, examples, seconds_evaluate."""
    start = time.perf_counter()
    model = setup.build(payload.group("params"), context, experts_from_scalars(payload.scalars))
    return tested(setup, model, context, start)


def tested(setup: Setup, model: nn.Module, context: ClientContext, start: float | None = None) -> Payload:
    """Score a live model on the client's test split; start: `perf_counter` when the work for it began."""
    start = time.perf_counter() if start is None else start
    value = evaluate(model, setup.encode(context, context.data.test), context, setup)
    return Payload(
        scalars={
            "score": value,
            "examples": len(context.data.test),
            "seconds_evaluate": time.perf_counter() - start,
        }
    )


def _optimizer(trainable: Mapping[str, nn.Parameter], config: Fit, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    members: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in rates}
    for path, p in trainable.items():
        members[next(prefix for prefix in rates if path.startswith(prefix))].append(p)
    groups = [{"params": members[prefix], "lr": lr} for prefix, lr in rates.items() if members[prefix]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
