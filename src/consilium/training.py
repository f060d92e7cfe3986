"""THE local loop: `fit` trains a model on one client's data, `evaluate` scores it. Every method comes through here.

A method bends the loop in two places: `choose`, called between the forward and the backward pass of each step, says
which experts learn from this batch (HFedMoE's selection); `correct`, called on the gradients before clipping, changes
them. FedProx's penalty and SCAFFOLD's control variates are such corrections.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.core import (
    ClientContext,
    ClientInfo,
    ExpertSet,
    Payload,
    Sampling,
    counts_of,
    derive_seed,
    experts_from_scalars,
)
from consilium.data.encode import Encoded, encode
from consilium.data.task import Split, score
from consilium.errors import ConfigError
from consilium.moe.addressing import flatten, load_flat, parameters, travels
from consilium.moe.budget import PARTS, Footprint, MemoryModel, human
from consilium.moe.build import ModelSource
from consilium.moe.experts import Active, Experts
from consilium.moe.lora import Lora, ProductMean, add_lora, initial_adapters
from consilium.moe.model import TaskModel
from consilium.moe.routing import Tap
from consilium.params import Params, WeightedMean

__all__ = ["Choose", "Fit", "Fitted", "Setup", "evaluate", "fit", "local_round", "local_test", "seeded"]

Correct = Callable[[Mapping[str, Tensor]], None]
Choose = Callable[[Tap], Active | None]

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
        lora: train adapters on the experts instead of all parameters. Then only adapters, router rows and head rows
            travel, and every client has the rest from the model's own place.
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
    lora: Lora = field(default_factory=Lora)

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
        model: where the model comes from.
        fit: how clients train.
        sampling: who takes part in a round.
        seed: of the run.
        heads: task -> every label any client has, for the server's table of heads; {} for text-to-text.
        clients: all clients of the federation, as the server knows them.
    """

    model: ModelSource
    fit: Fit
    sampling: Sampling
    seed: int
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: tuple[ClientInfo, ...] = ()

    def initial_params(self) -> Params:
        """The pretrained backbone, and a zero head row for every label of every task: where all methods start.

        With `fit.lora`, of the backbone only the router rows, and new adapters, the same for all clients.
        """
        params = self.model.load()
        if self.fit.lora.rank:
            adapters = initial_adapters(self.model.skeleton("", ()), self.fit.lora, derive_seed(self.seed, "lora"))
            params = {key: tensor for key, tensor in params.items() if travels(key)} | adapters
        width, dtype = self.model.config.hidden_size, self.model.torch_dtype
        for task, labels in self.heads.items():
            for label in labels:
                params[f"head.{task}.{label}.weight"] = torch.zeros(width, dtype=dtype)
                params[f"head.{task}.{label}.bias"] = torch.zeros((), dtype=dtype)
        return params

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
            mode: "forward" is evaluation alone; "full" is "lora" with `fit.lora`, at its rank.
            references: extra copies of the weights the method keeps while training (FedProx 1, SCAFFOLD 3).
            rank: of the adapters ("lora").
        """
        fit = self.fit
        if mode == "full" and fit.lora.rank:
            mode, rank = "lora", fit.lora.rank
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
        if self.model.family.model_type not in PARTS:
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

    def encode(self, context: ClientContext, split: Split) -> Encoded:
        """A split of the client's data as token ids for this model."""
        way = "classification"
        if self.model.form == "text-to-text":
            way = "seq2seq" if self.model.config.is_encoder_decoder else "causal"
        data = context.data
        return encode(split, data.task, self.model.tokenizer(), way, self.fit.max_length, self.fit.target_length)

    def build(self, params: Params, context: ClientContext, held: ExpertSet | None = None) -> TaskModel:
        """The client's live model on its device, holding only `held` experts.

        With `fit.lora` the base is read from the model's own place, and `params` are what travels.
        """
        task, lora = context.data.task, self.fit.lora
        if not lora.rank:
            return self.model.build(params, task.name, task.labels, held).to(context.device)
        model = self.model.build(self.model.load() | params, task.name, task.labels, held).to(context.device)
        return load_flat(add_lora(model, lora), params, held)

    def mean(self) -> WeightedMean:
        """A new mean for a server's parameters: of adapters as `fit.lora.mean` says."""
        return ProductMean() if self.fit.lora.rank and self.fit.lora.mean == "products" else WeightedMean()


@dataclass(frozen=True)
class Fitted:
    """What `fit` did.

    Args:
        loss: mean over the steps. steps: of the optimiser. seconds: of the wall clock.
        trained: with `choose`: block -> by local place, the batches in which the expert was among the chosen and
            computed a real token, int64 [E]. An expert with 0 has not moved by one bit.
    """

    loss: float
    steps: int
    seconds: float
    trained: Mapping[str, Tensor] = field(default_factory=dict)


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
    choose: Choose | None = None,
) -> Fitted:
    """Train in place on every parameter that requires a gradient.

    Loss: cross-entropy with label smoothing + balance * load-balance loss (FedMoE, Eq 1). No gradients are left behind.

    Args:
        correct: called after each backward pass with path -> parameter of all trainable parameters, to change
            their gradients; a parameter the batch did not reach has `grad` None. With `choose`, experts are in it
            one by one, as `Experts.leaves` calls them.
        epochs: instead of `config.epochs`.
        choose: called after each forward pass with the tap of this batch; returns block -> local places of the
            experts that may learn from it (None: all). The others are computed, and count as constants: no gradient
            reaches them nor, through them, their router or the layers below. No more experts have moments in the
            optimiser than the last choice has; who was trained least recently loses them.
    """
    start = time.perf_counter()
    experts = None if choose is None else Experts(model)
    if experts is None:
        trainable = {path: p for path, p in parameters(model).items() if p.requires_grad}
    else:
        trainable = experts.trainable(model)
    optimizer = _optimizer(trainable, config)
    epochs = config.epochs if epochs is None else epochs
    total = epochs * -(-len(data) // config.batch_size)
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "batches"))
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    losses: list[Tensor] = []
    trained: dict[tuple[str, int], int] = {}  # (block, place) -> in how many batches; the most recent are the last
    with seeded(derive_seed(context.seed, "fit")), Tap(model) as tap, experts or nullcontext():
        for rows in data.epochs(epochs, config.batch_size, generator):
            optimizer.zero_grad(set_to_none=True)  # before the forward pass: gradients never lie beside activations
            batch = data.batch(rows, context.device)
            with tap.batch(batch):
                logits, labels = model(batch)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            del logits  # the graph keeps what it needs of them
            if config.balance:
                loss = loss + config.balance * tap.balance_loss()
            if choose is not None:
                _admit(choose(tap), experts, tap, trained, optimizer)
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
    shares = {} if experts is None else {block: torch.zeros(len(ids)).long() for block, ids in experts.places.items()}
    for (block, place), batches in trained.items():
        shares[block][place] = batches
    return Fitted(mean, len(losses), time.perf_counter() - start, shares)


def _admit(
    chosen: Active | None,
    experts: Experts,
    tap: Tap,
    trained: dict[tuple[str, int], int],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Let the chosen experts learn from this batch, those that have a real token in it; forget the moments of others.

    An expert that has only padding would get a gradient of zeros, and by its momentum move.
    """
    experts.active = experts.places if chosen is None else chosen
    limit = sum(len(places) for places in experts.active.values())
    served = {block: tap.served(block).tolist() for block in experts.active}
    experts.active = {block: [p for p in places if served[block][p]] for block, places in experts.active.items()}
    for block, places in experts.active.items():
        for place in sorted(places):
            trained[block, place] = trained.pop((block, place), 0) + 1
    for expert in list(trained)[: max(len(trained) - limit, 0)]:
        for leaf in experts.of(*expert):
            optimizer.state.pop(leaf, None)


def evaluate(model: TaskModel, data: Encoded, context: ClientContext, setup: Setup, tap: Tap | None = None) -> float:
    """The task's metric on a split, in [0, 1].

    Args:
        tap: counts the usage of experts over the split (teacher-forced for text-to-text).
    """
    predictions: list[str] = []
    tokenizer = setup.model.tokenizer()
    model.eval()
    size = EVALUATION * setup.fit.batch_size
    order = sorted(range(len(data)), key=lambda i: len(data.sources[i]))
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
                predictions += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return score(context.data.task.metric, predictions, [data.texts[i] for i in order])


def local_round(
    setup: Setup,
    payload: Payload,
    context: ClientContext,
    correct: Callable[[TaskModel], Correct] | None = None,
    usage: bool = False,
    references: int = 0,
    choose: Choose | None = None,
) -> tuple[TaskModel, Payload]:
    """One client's round on what it was sent: build, fit, validate, flatten.

    Args:
        payload: group "params" (trunk, held experts, their router rows, the task's head rows), scalars naming the
            held experts (none: all); optionally group "router", the rows of the experts that are not held.
        correct: given the live model, returns the correction for `fit`.
        references: copies of the weights that `correct` keeps, for the footprint reported.
        usage: also report the usage of experts over the validation data, groups "demand" and "served", int64 [E].
        choose: see `fit`; the reply then has the group "trained": block -> batches in which each held expert was
            trained, int64 [E_held].

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
        choose=choose,
    )
    start = time.perf_counter()
    validation = setup.encode(context, context.data.validation)
    with Tap(model, held, outside, setup.model.counts) as tap:
        accuracy = evaluate(model, validation, context, setup, tap if usage else None)
    seconds_evaluate = time.perf_counter() - start
    groups: dict[str, Params] = {"params": flatten(model, held)}  # after evaluation, which needs room itself
    if usage:
        groups |= {"demand": tap.usage.demand, "served": tap.usage.served}
    if choose is not None:
        groups["trained"] = dict(fitted.trained)
    counts = counts_of(held) if held else setup.model.counts
    scalars = {
        "num_examples": context.info.num_examples,
        "validation": accuracy,
        "train_loss": fitted.loss,
        "steps": fitted.steps,
        "experts": sum(counts.values()),
        **setup.reported(counts, references=references),
        "seconds_evaluate": seconds_evaluate,
    }
    return model, Payload(groups, scalars)


def local_test(setup: Setup, payload: Payload, context: ClientContext) -> Payload:
    """Score a delivered model on the client's test split: scalars score, examples, seconds_evaluate."""
    start = time.perf_counter()
    model = setup.build(payload.group("params"), context, experts_from_scalars(payload.scalars))
    value = evaluate(model, setup.encode(context, context.data.test), context, setup)
    return Payload(
        scalars={
            "score": value,
            "examples": len(context.data.test),
            "seconds_evaluate": time.perf_counter() - start,
        }
    )


def _optimizer(trainable: Mapping[str, Tensor], config: Fit) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for path, p in trainable.items() if path.startswith("head.")], "lr": config.head_lr},
        {"params": [p for path, p in trainable.items() if not path.startswith("head.")], "lr": config.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
