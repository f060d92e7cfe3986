"""The set-up for small models: one architecture per client, each an extractor and a head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from consilium.core import ClientContext, ClientInfo, ExpertSet, Payload
from consilium.data.encode import encode
from consilium.data.task import Split, Task
from consilium.data.tensor import TensorSplit, of_texts
from consilium.errors import ConfigError
from consilium.models.cohort import Cohort, SplitModel, initial
from consilium.moe.addressing import load_flat, select
from consilium.moe.gates import Gates
from consilium.params import Params, nbytes
from consilium.products import quicken
from consilium.setup.base import Setup, check_dtypes

__all__ = ["CohortSetup"]


@dataclass(frozen=True)
class CohortSetup(Setup):
    """The set-up of a cohort of small models; see `Setup` for the fields."""

    scores_tests: ClassVar[bool] = True
    model: Cohort

    def initial_params(self, client: ClientInfo | None = None) -> Params:
        """Return an extractor and head rows with their own initialisation, equal for all clients of one architecture.

        Args:
            client: the client that gets the model; None: the model that all clients have.

        Raises:
            ConfigError: for None in a cohort of several architectures.
        """
        if client is None and self.model.world != "cohort":
            raise ConfigError(
                f"the clients have the architectures {self.model.path}, and there is no model that all could share; "
                "give --model.architectures one name, or use a method that lets models differ"
            )
        name = self.model.architectures[0] if client is None else client.architecture
        return {**self.extractor_params(name), **self.head_params(self.model.width_of(name, self.shape))}

    def head_params(self, width: int) -> Params:
        """Return the initial head rows of a cohort's models with representations of this width."""
        params: Params = {}
        for task, labels in self.heads.items():
            head = initial(lambda labels=labels: nn.Linear(width, len(labels)), self.seed, "head", task, width)
            for i, label in enumerate(labels):
                params |= {f"head.{task}.{label}.{leaf}": head[leaf][i].clone() for leaf in ("weight", "bias")}
        return params

    @property
    def common_width(self) -> int:
        """Return d, the width of the representation of every model of a cohort.

        Raises:
            ConfigError: if it differs between architectures.
        """
        widths = {name: self.model.width_of(name, self.shape) for name in self.model.architectures}
        if len(set(widths.values())) > 1:
            raise ConfigError(f"the method exchanges what depends on the width of representations, but it is {widths}")
        return next(iter(widths.values()))

    def own_params(self, context: ClientContext) -> Params:
        """Return a client's own model: from its state if it has one there, else with initial weights."""
        if context.state.params:
            return context.state.params
        self.admit_small(lambda: self.model.extractor(context.info.architecture, self.shape), context)
        return select(self.initial_params(context.info), context.data.task.name)

    def extractor_params(self, name: str) -> Params:
        """Return the initial weights of a client's own extractor, by the run's seed and its architecture's name."""
        return initial(lambda: self.model.extractor(name, self.shape), self.seed, "extractor", name)

    def small_params(self) -> Params:
        """Return the initial weights of the shared extractor that clients use next to their own.

        They always differ from those of a client's own extractor, even if the architecture is the same: two equal
        extractors would learn the same, and a gate between them would learn nothing.
        """
        return initial(lambda: self.model.extractor(self.model.small, self.shape), self.seed, "small extractor")

    def check(self, task: Task) -> None:
        """Raise ConfigError if the models cannot do the task."""
        if task.model_form != self.model.form:
            raise ConfigError(f"task {task.name} is {task.form}, the model is set up for {self.model.form}")
        if not self.shape:  # texts
            self.model.tokenizer()

    def tokens(self, context: ClientContext, split: Split) -> TensorSplit:
        """Encode texts as rows of fit.max_length token ids.

        Raises:
            BudgetError: if the rows do not fit what the client allows; every row takes the same room.
        """
        context.work.hold(8 * len(split) * self.fit.max_length, "the data as rows of fit.max_length tokens")
        return self._read_first(context.data.task, split)

    def _read_first(self, task: Task, split: Split) -> TensorSplit:
        self.check(task)
        fit = self.fit
        tokens = encode(split, task, self.model.tokenizer(), "classification", fit.max_length, fit.target_length)
        return of_texts(tokens, task.labels, fit.max_length)

    def build(
        self, params: Params, context: ClientContext, held: ExpertSet | None = None, gates: Gates | None = None
    ) -> SplitModel:
        """Build the client's live model on its device; `held` and `gates` are for mixtures of experts."""
        return self.split_model(lambda: self.model.extractor(context.info.architecture, self.shape), params, context)

    def build_sent(self, payload: Payload, context: ClientContext) -> SplitModel:
        """Build the client's live model from the payload that it was sent; the errors are those of `build`."""
        return self.build(payload.group("params"), context)

    def admit_small(
        self, make: Callable[[], nn.Module], context: ClientContext, kind: type[SplitModel] = SplitModel
    ) -> None:
        """Raise BudgetError if training a small model would not fit what the client allows, before it is made.

        The count covers the model's tensors as they are sent and as they are built, their gradients, and the
        optimizer's moments.

        Args:
            make: see `split_model`.
            kind: see `split_model`.

        Raises:
            BudgetError: with the bytes needed and allowed.
        """
        if math.isinf(context.work.memory):
            return
        with torch.device("meta"):
            model = kind(make(), context.data.task.name, context.data.task.labels)
        moments = 2 if self.fit.optimizer == "adamw" else int(self.fit.momentum > 0)
        context.work.hold((3 + moments) * nbytes(model.state_dict().values()), "the small model")

    def split_model(
        self,
        make: Callable[[], nn.Module],
        params: Params,
        context: ClientContext,
        kind: type[SplitModel] = SplitModel,
        used: SplitModel | None = None,
    ) -> SplitModel:
        """Return a live model on the client's device with weights `params`: `make`'s extractor and the client's head.

        Convolution filters are stored channels last, and torch then uses that layout for the whole computation. On a
        CPU, where `blocked` does not compute them, a step then takes 0.82 of the time.

        Args:
            used: a finished model that was made in the same way, for a client with the same labels; it is refilled.
        """
        model, task = used, context.data.task
        if model is None:
            from accelerate import init_empty_weights
            from transformers.initialization import no_init_weights

            self.admit_small(make, context, kind)
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = kind(make(), task.name, task.labels)
        check_dtypes(params, {tensor.dtype for tensor in model.state_dict().values()})
        load_flat(model, params)
        if model is used:
            return model
        model.to(context.device)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                # `contiguous` leaves filters of one channel as they are, and with them the layout of all that follows.
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        return quicken(model)
