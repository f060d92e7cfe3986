"""The local training loop of every method: `fit` trains a model on one client's data.

A method changes the loop in three places. `objective` is the loss of a batch, if it is more than the cross-entropy of
one model (prototypes, distillation). `choose` is called between the forward and the backward pass of each step and
returns the experts that learn from this batch (HFedMoE's selection). `correct` is called on the gradients before
clipping and changes them; FedProx's penalty and SCAFFOLD's control variates are such corrections.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from consilium.batched import FitJob, fit_jobs
from consilium.core import (
    ClientContext,
    ExpertSet,
    Payload,
    Scalar,
    counts_of,
    derive_seed,
    experts_from_scalars,
    experts_to_scalars,
)
from consilium.data.causal import Packed
from consilium.data.encode import Encoded
from consilium.fit import Fit
from consilium.masters import MasterOptimizer, Masters
from consilium.models.cohort import SplitModel
from consilium.moe.addressing import flatten, local, parameters, select, table, unpack
from consilium.moe.experts import Active, Experts
from consilium.moe.model import TaskModel
from consilium.moe.routing import Tap
from consilium.params import Params
from consilium.scoring import (
    assess,
    even_logits,
    evened,
    first_ranked,
    score_places,
)
from consilium.setup import Setup
from consilium.work import tokens_in

__all__ = [
    "Choose",
    "Fitted",
    "Objective",
    "Supervised",
    "fit",
    "is_better",
    "keep_better",
    "local_round",
    "local_test",
    "reply_scalars",
    "seeded",
    "tested",
    "tested_beside_best",
    "trained",
]

Correct = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""(path -> parameter with its gradient, path -> its weight in float32): changes the gradients."""
Choose = Callable[[Tap], Active | None]
Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(model, batch) -> the loss to minimise, a scalar."""
Supervised = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, C], labels [B]) -> their loss, a scalar; `Fit.cross_entropy` in a run."""


@dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Args:
        loss: mean over the steps.
        steps: steps of the optimizer.
        seconds: wall-clock time.
        trained: with `choose`: block -> by local index, the number of batches in which the expert was chosen and
            computed a real token, int64 [E]. An expert with 0 has not changed by one bit.
        masters: for a model below 32 bits: path -> float32 value of each trained parameter.
    """

    loss: float
    steps: int
    seconds: float
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    masters: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all generators inside the block (dropout, router noise) and restore them afterwards."""
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # seeding this generator alone is a hundred times as fast
            torch.default_generator.manual_seed(seed)
        yield


def fit(
    model: TaskModel,
    data: Encoded,
    config: Fit,
    context: ClientContext,
    correct: Correct | None = None,
    epochs: int | None = None,
    choose: Choose | None = None,
    objective: Objective | None = None,
    rates: Mapping[str, float] | None = None,
    start: dict[str, Tensor] | None = None,
    anchored: float = 0.0,
) -> Fitted:
    """Train all parameters that require a gradient, in place; steps and tokens count against `context.work`.

    Loss: cross-entropy with label smoothing + balance * load-balance loss (FedMoE, Eq 1). All gradients are dropped
    afterwards.

    Args:
        correct: called after each backward pass to change the gradients, with path -> parameter of all trainable
            parameters, and with path -> weight, which is the float32 master for a model below 32 bits; a parameter that
            the batch did not reach has `grad` None. With `choose`, experts are listed one by one, named as in
            `Experts.leaves`.
        epochs: replaces `config.epochs`.
        choose: called after each forward pass with the tap of this batch; returns block -> local indices of the experts
            that may learn from it (None: all). The others are computed, but count as constants: no gradient reaches
            them nor, through them, their router or the layers below. The optimizer keeps moments for at most as many
            experts as the last choice has; the least recently trained experts lose theirs.
        objective: the loss of a batch; replaces the one above.
        rates: prefix of a parameter's path -> learning rate, the first match counts; None: `config`'s.
        anchored: mu: after each step of the optimizer every weight w that it changed becomes (w + lr mu w_0) / (1 + lr
            mu), with w_0 its value before training.
        start: for a model below 32 bits: path -> float32 value from which a parameter starts; it is emptied.

    Raises:
        BudgetError: before the first step if the steps are more than the client allows, and during training if tokens
            or time run out.
    """
    epochs = config.epochs if epochs is None else epochs
    rates = rates or {"head.": config.head_lr, "": config.lr}
    is_plain_fit = correct is None and choose is None and objective is None and not anchored
    if context.meet and is_plain_fit and isinstance(model, SplitModel):
        result = context.meet(fit_jobs, FitJob(model, data, config, context, epochs, rates))
        if result is not None:
            return Fitted(*result)
    start_time = time.perf_counter()
    experts = None if choose is None else Experts(model)
    if experts is None:
        trainable = {path: p for path, p in parameters(model).items() if p.requires_grad}
    else:
        trainable = experts.trainable(model)

    def descend(tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return _anchored(config.descent(tensors, rates), anchored)

    low_precision = any(p.dtype.itemsize < 4 for p in trainable.values())
    if low_precision:
        start = {} if start is None else start
        start |= unpack(table(model), start)  # also add single experts
        descent = MasterOptimizer(trainable, descend, start)
        start.clear()
    else:
        descent = descend(trainable)
    forget = descent.forget if low_precision else partial(_forget, descent)
    weights = descent.masters if low_precision else trainable
    data = data.augmented(derive_seed(context.seed, "augment"))
    if config.rows == "packed":
        data = Packed.of(data, config.max_length + config.target_length)
    total = epochs * -(-len(data) // config.batch_size)
    context.work.plan(total)
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "batches"))
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    autocast = config.lowered(context.device)
    fill = evened(model, context)
    if fill and is_plain_fit and config.plain and config.precision == "bfloat16":
        optimizer_context = Masters(model, descent.param_groups)
    else:
        optimizer_context = nullcontext(descent)
    losses: list[Tensor] = []
    counts: dict[tuple[str, int], int] = {}  # (block, index) -> number of batches; the most recently trained are last
    random_state = seeded(derive_seed(context.seed, "fit"))
    with random_state, Tap(model) as tap, experts or nullcontext(), optimizer_context as optimizer:
        for rows in data.epochs(epochs, config.batch_size, generator):
            optimizer.zero_grad()  # so memory never holds gradients and activations at once
            batch = data.batch(rows, context.device)
            context.work.read(tokens_in(batch))
            context.work.step()
            if objective is not None:
                with autocast:
                    loss = objective(model, batch)
            else:
                with tap.batch(batch), autocast:
                    logits, labels = even_logits(model, batch) if fill else model(batch)
                loss = config.cross_entropy(logits, labels)
                del logits  # the graph keeps what it needs of the logits
                if config.balance:
                    loss = loss + config.balance * tap.balance_loss()
                if choose is not None:
                    _admit(choose(tap), experts, tap, counts, forget)
            loss.backward()
            if correct is not None:
                correct(trainable, weights)
            if config.clip:
                nn.utils.clip_grad_norm_(trainable.values(), config.clip)
            optimizer.step()
            losses.append(loss.detach())
            del loss  # this also frees the graph
            context.progress(len(losses), total)
        optimizer.zero_grad()  # the code that follows needs no gradients
    mean = torch.stack(losses).mean().item() if losses else float("nan")
    expert_batches = (
        {} if experts is None else {block: torch.zeros(len(ids)).long() for block, ids in experts.places.items()}
    )
    for (block, place), batches in counts.items():
        expert_batches[block][place] = batches
    masters = _by_path(model, descent.masters) if low_precision else {}
    return Fitted(mean, len(losses), time.perf_counter() - start_time, expert_batches, masters)


def _by_path(model: TaskModel, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masters by the paths of the model's parameters, with single experts stacked; `masters` is emptied."""
    masters_by_path = {}
    for path, name in table(model).items():
        if path in masters:
            masters_by_path[path] = masters.pop(path)
        elif not isinstance(name, str) and name[0] in masters:
            masters_by_path[path] = torch.stack([masters.pop(key) for key in name])
        elif isinstance(name, str) and name in masters:
            masters_by_path[path] = masters.pop(name)
    return masters_by_path


def _anchored(optimizer: torch.optim.Optimizer, mu: float) -> torch.optim.Optimizer:
    """Return the optimizer; with mu > 0 each of its steps is followed by a proximal step, see `fit`."""
    if mu:
        anchors = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

        @torch.no_grad()
        def draw(stepped: torch.optim.Optimizer, *_: object) -> None:
            for group in stepped.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.lerp_(anchors[p], group["lr"] * mu / (1 + group["lr"] * mu))

        optimizer.register_step_post_hook(draw)
    return optimizer


def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Drop the optimizer's state of a parameter."""
    optimizer.state.pop(parameter, None)


def _admit(
    chosen: Active | None,
    experts: Experts,
    tap: Tap,
    trained: dict[tuple[str, int], int],
    forget: Callable[[Tensor], None],
) -> None:
    """Let the chosen experts that have a real token learn from this batch, and drop the moments of others.

    An expert that has only padding would get a gradient of zeros, and would still move because of its momentum.
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
            forget(leaf)


def local_round(
    setup: Setup,
    payload: Payload,
    context: ClientContext,
    correct: Callable[[TaskModel], Correct] | None = None,
    usage: bool = False,
    references: int = 0,
    choose: Choose | None = None,
    learning: int | None = None,
    anchored: float = 0.0,
    prepare: Callable[[TaskModel], None] | None = None,
) -> tuple[TaskModel, Payload]:
    """Run one client's round on the payload that it was sent: build, fit, validate, flatten.

    Args:
        payload: group "params" (trunk, held experts, their router rows, the task's head rows), scalars naming the held
            experts (none: all) and the scale of their gates; optionally group "router", the rows of the experts that
            are not held.
        correct: given the live model, returns the correction for `fit`.
        references: copies of the weights that `correct` keeps, for the footprint reported.
        usage: also report the usage of experts over the validation data, groups "demand" and "served", int64 [E].
        anchored: see `fit`.
        choose: see `fit`; the reply then has the group "trained": block -> batches in which each held expert was
            trained, int64 [E_held].
        prepare: changes the live model before it is trained (numbers of active experts, further parameters).
        learning: with `choose`, the most experts of all blocks together that it chooses for a batch, for the footprint.

    Returns:
        The trained model, and the reply: group "params", and scalars num_examples, validation (the task's metric),
        train_loss, steps, experts, footprint (bytes by the memory model), seconds_evaluate, cut (training examples
        longer than max_length or target_length), perplexity and bits_per_byte (if the metric is of tokens).
    """
    experts, router_params, base = experts_from_scalars(payload.scalars), payload.group("router"), payload.group("base")
    footprint = setup.admit(context, experts, references=references, trained=learning)
    params = setup.both_halves(payload.group("params"), context.private.params)
    model = setup.build_sent(payload, context)
    del payload  # the payload is a full copy of the weights, unless the caller still holds it
    start = local(model, params, experts) if model.dtype.itemsize < 4 else None
    if prepare is not None:
        prepare(model)
    train, validation = setup.encode(context, context.data.train), None
    if setup.fit.personal == "best":
        validation = setup.encode(context, context.data.validation)
        keep_better(context, assess(model, validation, context, setup), {**router_params, **base, **params}, experts)
    del params
    run = fit(
        model,
        train,
        setup.fit,
        context,
        correct(model) if correct is not None else None,
        choose=choose,
        start=start,
        anchored=anchored,
    )
    evaluation_start = time.perf_counter()
    with Tap(model, experts, router_params, setup.model.counts) as tap:
        if setup.scores_tests:
            scores, report = _after_training(model, context, setup)
        else:
            validation = validation or setup.encode(context, context.data.validation)
            scores, report = assess(model, validation, context, setup, tap if usage else None), {}
    seconds_evaluate = time.perf_counter() - evaluation_start
    groups: dict[str, Params] = {"params": flatten(model, experts, run.masters)}  # after evaluation needed its memory
    if setup.fit.personal == "best":
        keep_better(context, scores, {**router_params, **base, **groups["params"]}, experts)
    groups["params"] = setup.leaving(groups["params"], model, context)
    if usage:
        groups |= {"demand": tap.usage.demand, "served": tap.usage.served}
    if choose is not None:
        groups["trained"] = dict(run.trained)
    counts = counts_of(experts) if experts else setup.model.counts
    scalars = {
        **reply_scalars(context, run, scores, train.cut, seconds_evaluate),
        **({"experts": sum(counts.values())} if counts else {}),
        **footprint,
        **report,
    }
    return model, Payload(groups, scalars)


def reply_scalars(
    context: ClientContext, fitted: Fitted, scores: Mapping[str, float], cut: int, seconds: float
) -> dict[str, Scalar]:
    """Return the scalars that the reply of every method has after training.

    Args:
        fitted: the result of `fit`.
        scores: scores of the trained model on the validation data, as `assess` returns them.
        cut: training examples that were truncated.
        seconds: duration of the scoring.
    """
    return {
        "num_examples": context.info.num_examples,
        "validation": scores["score"],
        **{name: value for name, value in scores.items() if name != "score"},
        "train_loss": fitted.loss,
        "steps": fitted.steps,
        "cut": cut,
        "seconds_evaluate": seconds,
    }


def trained(
    setup: Setup,
    model: SplitModel,
    context: ClientContext,
    objective: Objective | None = None,
    rates: Mapping[str, float] | None = None,
    correct: Correct | None = None,
) -> dict[str, Scalar]:
    """Train and validate the model of a method that builds it itself; return the scalars of `local_round`'s reply."""
    train = setup.encode(context, context.data.train)
    result = fit(model, train, setup.fit, context, correct, objective=objective, rates=rates)
    start = time.perf_counter()
    scores, report = _after_training(model, context, setup)
    return {**reply_scalars(context, result, scores, train.cut, time.perf_counter() - start), **report}


def _after_training(
    model: SplitModel, context: ClientContext, setup: Setup
) -> tuple[dict[str, float], dict[str, Scalar]]:
    """Score a small model on validation and test data in one pass.

    Returns:
        The scores of `assess` on the validation data; and, for the reply, the metric of the pFedMoE family's own code:
        after local training and before aggregation, the mean over the test batches of the accuracy of each (so the
        short last one weighs as much as the others), in [0, 1].
    """
    validation, test = (setup.encode(context, split) for split in (context.data.validation, context.data.test))
    size = setup.evaluation_rows
    label_indices, test_indices = first_ranked(model, [validation, test], setup.fit, context, size)
    hits = (torch.tensor(test_indices) == test.y[test.index].cpu()).float()
    means = [part.mean() for part in hits.split(setup.fit.batch_size)]
    report = {"report/test before aggregation": torch.stack(means).mean().item()}
    return {"score": score_places(model, validation, label_indices, context)}, report


def local_test(
    setup: Setup, payload: Payload, context: ClientContext, prepare: Callable[[TaskModel], None] | None = None
) -> Payload:
    """Score a delivered model on the client's test split.

    The reply's scalars are score, (perplexity, bits_per_byte,) examples and seconds_evaluate.

    Args:
        prepare: changes the live model before it is scored.
    """
    prepare = prepare or (lambda model: None)

    def built(payload: Payload) -> TaskModel | SplitModel:
        model = setup.build_sent(payload, context)
        prepare(model)
        return model

    def best() -> TaskModel | SplitModel:
        task, state = context.data.task.name, context.best
        experts = experts_from_scalars(state.scalars)
        mixture = setup.sub_moe(state.params, task, experts)
        return built(Payload({**mixture.groups, "params": select(state.params, task, experts)}, mixture.scalars))

    return tested_beside_best(setup, context, lambda: built(payload), best)


def tested_beside_best(
    setup: Setup, context: ClientContext, delivered: Callable[[], nn.Module], best: Callable[[], nn.Module]
) -> Payload:
    """Score a delivered model, and with `fit.personal` also the client's best one by its validation data.

    Args:
        delivered: makes the delivered live model; only one live model exists at a time.
        best: makes the client's best live model.
    """
    start, model = time.perf_counter(), delivered()
    reply = tested(setup, model, context, start)
    if setup.fit.personal == "none":
        return reply
    validation = assess(model, setup.encode(context, context.data.validation), context, setup)
    scores, measure = reply.scalars, "bits_per_byte" if "bits_per_byte" in validation else "score"
    personal_validation = validation[measure]
    if context.best.params and not is_better(validation, context):
        del model
        scores = tested(setup, best(), context).scalars
        personal_validation = float(context.best.scalars[measure])
    personal = {"personal": scores["score"], "personal_validation": personal_validation}
    if "bits_per_byte" in scores:
        personal["personal_bits_per_byte"] = scores["bits_per_byte"]
    return Payload(scalars={**reply.scalars, **personal, "seconds_evaluate": time.perf_counter() - start})


def is_better(scores: Mapping[str, float], context: ClientContext) -> bool:
    """Return True if validation scores beat those of the client's best model.

    They are compared by bits per byte if there are any, else by the metric of the task.
    """
    best = context.best.scalars
    if "bits_per_byte" in scores:
        return scores["bits_per_byte"] < float(best.get("bits_per_byte", math.inf))
    return scores["score"] > float(best.get("score", -math.inf))


def keep_better(context: ClientContext, scores: Mapping[str, float], params: Params, held: ExpertSet | None) -> None:
    """Keep a trained model, with the router rows that it was sent, if it beats the client's best so far."""
    if is_better(scores, context):
        context.best.params = params
        context.best.scalars = {**scores, **(experts_to_scalars(held) if held else {})}


def tested(setup: Setup, model: nn.Module, context: ClientContext, start: float | None = None) -> Payload:
    """Score a live model on the client's test split.

    Args:
        start: `perf_counter` when the work for it began; None: now.
    """
    start = time.perf_counter() if start is None else start
    scores = assess(model, setup.encode(context, context.data.test), context, setup, by_label=True)
    return Payload(
        scalars={
            **scores,
            "examples": len(context.data.test),
            "seconds_evaluate": time.perf_counter() - start,
        }
    )
