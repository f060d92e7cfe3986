"""Parts that are shared by methods with mixtures of adapters on a frozen model (FedAMoLE, CoMiGS, FedLEASE, ...).

The flat names of such a model are `<layer>.pairs.<name>.a`, `.b` and `<layer>.route` (see `moe.mixtures`), and those of
the head rows of a task.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium.core import ClientContext, ClientInfo, Payload, Scalar
from consilium.data.encode import Encoded
from consilium.errors import ConfigError
from consilium.moe.budget import human
from consilium.moe.mixtures import AdapterMixture, Mixing, attach, layers, mark, mixtures, names_of
from consilium.moe.model import TaskModel
from consilium.params import Params
from consilium.scoring import assess, read_batches
from consilium.setup import MixtureSetup
from consilium.training import Fitted, fit, keep_better, reply_scalars, tested_beside_best

__all__ = ["MixedModels", "heads_of", "own_adapters", "part"]

COPIES = 5
"""Float32 values in memory per trained parameter: the received value, the current one, its gradient, Adam's moments."""


def own_adapters(setup: MixtureSetup, method: str) -> None:
    """Raise if `fit.lora` is set for a method that has its own adapters.

    Raises:
        ConfigError: if fit.lora.rank is not 0.
    """
    if setup.fit.lora.rank:
        raise ConfigError(f"fit.lora.rank is {setup.fit.lora.rank}; {method} has adapters of its own: set it to 0")


def heads_of(params: Mapping[str, Tensor], task: str = "") -> Params:
    """Return the head rows of a task, or of all tasks if `task` is empty."""
    return {key: tensor for key, tensor in params.items() if key.startswith(f"head.{task}." if task else "head.")}


@dataclass(frozen=True)
class MixedModels:
    """A builder, trainer and scorer of a client's model with mixtures of adapters.

    Args:
        setup: set-up of the run.
        mixing: how adapters are mixed.
        always: names of the adapters that every token uses.
        balance: weight of the sum of the mixtures' load-balance losses, each scaled by its number of slots.
    """

    setup: MixtureSetup
    mixing: Mixing
    always: tuple[str, ...] = ()
    balance: float = 0.0

    def pairs_in(self, params: Mapping[str, Tensor]) -> int:
        """Return the largest number of adapters of a layer among flat parameters."""
        return max(len(names_of(params, path)) for path in self.paths)

    @property
    def paths(self) -> Mapping[str, tuple[int, int]]:
        """Return the adapted layers: path -> (X, Y)."""
        return layers(self.setup.model, self.mixing.targets)

    # --- memory -------------------------------------------------------------------------------------------------------

    def need(self, pairs: int, trained: int | None = None) -> int:
        """Return the bytes that a client needs for `pairs` adapters per layer.

        This is the memory model's footprint of a frozen model with saved activations, plus the parameters of adapters
        and routers, the saved intermediate products of these, and the optimiser state.

        Args:
            pairs: adapters per layer.
            trained: how many of them are trained; None: all.
        """
        fit, rank = self.setup.fit, self.mixing.rank
        trained = pairs if trained is None else trained
        lengths = fit.lengths
        tokens = fit.batch_size * (lengths["max_length"] + lengths["target_length"])
        numbers = sum((x + y) * rank * (2 * pairs + (COPIES - 2) * trained) for x, y in self.paths.values())
        numbers += sum(COPIES * x * rank for x, _ in self.paths.values())
        activations = sum(2 * x + (self.mixing.top_k + 2) * y + 3 * pairs * rank for x, y in self.paths.values())
        return self.setup.footprint(self.setup.model.counts, "lora", rank=rank).total + 4 * (
            numbers + tokens * activations
        )

    def lacks(self, client: ClientInfo, pairs: int, trained: int | None = None) -> str | None:
        """Return why a device cannot train `pairs` adapters per layer, or None if it can."""
        if client.memory_bytes is None or (need := self.need(pairs, trained)) <= client.memory_bytes:
            return None
        return f"needs {human(need)}, has {human(client.memory_bytes)}, lacks {human(need - client.memory_bytes)}"

    # --- work ---------------------------------------------------------------------------------------------------------

    def build(
        self,
        params: Params,
        context: ClientContext,
        slots: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        frozen: Callable[[str], bool] = lambda key: False,
    ) -> TaskModel:
        """Build the client's live model.

        The head and all parameters of the mixtures are trainable, except for mixture parameters that are `frozen`.

        Args:
            params: adapters, routers and head rows under flat names.
            context: the client's context.
            slots: see `moe.mixtures.attach`.
            frozen: returns True for the flat name of a parameter that must not be trained.

        Raises:
            BudgetError: if the model needs more memory than the client allows.
        """
        pairs = self.pairs_in(params)
        context.work.hold(self.need(pairs), f"a model with {pairs} adapters per layer")
        setup, task = self.setup, context.data.task
        base = setup.model.load() | setup.model.round(heads_of(params, task.name))
        model = setup.model.build(base, task.name, task.labels)
        attach(model, params, self.mixing, self.paths, self.always, slots).to(context.device)
        for path, mixture in mixtures(model):
            for key, parameter in mixture.named_parameters():
                parameter.requires_grad_(not key.startswith("base.") and not frozen(f"{path}.{key}"))
        return model

    def objective(self, model: TaskModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy plus `balance` times the sum of the mixtures' load-balance losses."""
        mark(model, batch)
        logits, labels = model(batch)
        loss = self.setup.fit.cross_entropy(logits, labels)
        balance_losses = [m.balance for _, m in mixtures(model) if m.balance is not None] if self.balance else []
        return loss + self.balance * torch.stack(balance_losses).sum() if balance_losses else loss

    def rows(self, context: ClientContext) -> Encoded:
        """Return the client's training rows."""
        return self.setup.encode(context, context.data.train)

    def train(
        self,
        model: TaskModel,
        context: ClientContext,
        decay: float = 1.0,
        epochs: int | None = None,
        rows: range | None = None,
        heads: bool = True,
        assessed: bool = True,
    ) -> tuple[Fitted, dict[str, Scalar]]:
        """Fit and validate a model.

        Args:
            model: the model, which is changed in place.
            context: the client's context.
            decay: the learning rates are those of `fit` times decay^(round - 1).
            epochs: passes over the training rows; None: `fit.epochs`.
            rows: training rows to use; None: all.
            heads: whether the head is trained.
            assessed: whether the model is validated; if not, no scalars are returned.

        Returns:
            The result of `fit`, and the scalars of a reply as `training.local_round` returns them.
        """
        setup, config = self.setup, self.setup.fit
        train = self.rows(context)
        if rows is not None:
            train = part(train, rows)
        if model.head is not None:
            model.head.requires_grad_(heads)
        validation = setup.encode(context, context.data.validation)
        if config.personal == "best" and assessed:
            scores = assess(model, validation, context, setup)
            self._keep(context, scores, model, self.flatten(model))
        factor = decay ** max(context.round - 1, 0)
        rates = {"head.": factor * config.head_lr, "": factor * config.lr}
        fit_result = fit(model, train, config, context, epochs=epochs, objective=self.objective, rates=rates)
        if not assessed:
            return fit_result, {}
        start = time.perf_counter()
        scores = assess(model, validation, context, setup)
        if config.personal == "best":
            self._keep(context, scores, model, self.flatten(model, fit_result.masters))
        pairs = max(len(mixture.pairs) for _, mixture in mixtures(model))
        return fit_result, {
            **reply_scalars(context, fit_result, scores, train.cut, time.perf_counter() - start),
            "experts": sum(setup.model.counts.values()),
            "footprint": self.need(pairs),
        }

    def flatten(self, model: TaskModel, masters: Mapping[str, Tensor] | None = None) -> Params:
        """Return float32 copies of adapters, routers and head rows on the CPU, under flat names.

        Args:
            model: the model.
            masters: path -> float32 tensor to copy in place of the model's own.
        """
        masters = masters or {}

        def copied(path: str, tensor: Tensor) -> Tensor:
            return masters.get(path, tensor).detach().to("cpu", torch.float32, copy=True)

        flat_params = {}
        for path, mixture in mixtures(model):
            mixture_params = {
                f"{path}.{key}": p for key, p in mixture.named_parameters() if not key.startswith("base.")
            }
            flat_params |= {key: copied(key, p) for key, p in mixture_params.items()}
        if model.head is not None:
            for leaf in ("weight", "bias"):
                rows = copied(f"head.{leaf}", getattr(model.head, leaf)).unbind()
                flat_params |= {
                    f"head.{model.task}.{label}.{leaf}": row.clone()
                    for label, row in zip(model.labels, rows, strict=True)
                }
        return flat_params

    def score(
        self,
        params: Params,
        context: ClientContext,
        slots: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        prepare: Callable[[TaskModel], None] = lambda model: None,
    ) -> Payload:
        """Score a delivered model on the test split and, with `fit.personal`, the client's best model next to it.

        Args:
            params: the delivered parameters under flat names.
            context: the client's context.
            slots: see `build`.
            prepare: changes a live model in place before it is scored.
        """

        def delivered() -> TaskModel:
            model = self.build(params, context, slots)
            prepare(model)
            return model

        def best() -> TaskModel:
            models, best_slots = self._best(context)
            model = models.build(context.best.params, context, best_slots)
            prepare(model)
            return model

        return tested_beside_best(self.setup, context, delivered, best)

    def _keep(self, context: ClientContext, scores: dict[str, float], model: TaskModel, params: Params) -> None:
        """Keep a model as the client's best if it scores best, together with the settings of its mixtures."""
        keep_better(context, scores, params, None)
        if context.best.params is params:
            adapter_mixtures = [mixture for _, mixture in mixtures(model)]
            if len({mixture.slots for mixture in adapter_mixtures}) == 1:
                context.best.scalars["slots"] = list(adapter_mixtures[0].slots)
            settings = {"top_k": self.mixing.top_k, "router": self.mixing.router, "always": list(self.always)}
            context.best.scalars |= settings

    def _best(self, context: ClientContext) -> tuple["MixedModels", list[str] | None]:
        """Return the builder and the slots of the client's best model."""
        settings = context.best.scalars
        mixing = replace(self.mixing, top_k=settings["top_k"], router=settings["router"])
        return replace(self, mixing=mixing, always=tuple(settings["always"])), settings.get("slots")

    def measured(self, model: TaskModel, context: ClientContext, rows: int) -> dict[str, AdapterMixture]:
        """Run the first training rows through a model with `measure` on, and return its mixtures by path."""
        train = self.setup.encode(context, context.data.train)
        mixtures_by_path = dict(mixtures(model))
        for mixture in mixtures_by_path.values():
            mixture.measure = True
        run_rows(self.setup, model, train, context, rows)
        for mixture in mixtures_by_path.values():
            mixture.measure = False
        return mixtures_by_path


def part(data: Encoded, rows: range) -> Encoded:
    """Return a split with the given rows only."""
    columns = {name: [getattr(data, name)[i] for i in rows] for name in ("sources", "targets", "texts")}
    return replace(data, **columns)


def run_rows(setup: MixtureSetup, model: TaskModel, data: object, context: ClientContext, rows: int) -> None:
    """Run the first rows of a split through a model in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        for batch in read_batches(data, setup.evaluation_rows, context, range(min(rows, len(data)))):
            mark(model, batch)
            model(batch)
