"""What both halves of every method are built from: how clients train, and where models and data come from.

`Setup` holds no weights. It gives a server its initial parameters and the capacities of devices, and a client its live
model and its data as tokens or tensors. Each kind of model has its own: `MixtureSetup` for one mixture of experts (or
dense language model) that all clients share, `CohortSetup` for small models. Methods for both kinds use what is here.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from consilium.core import ClientContext, ClientInfo, ExpertSet, Payload, Sampling, Scalar
from consilium.data.encode import Encoded
from consilium.data.task import ClientData, Split, Task
from consilium.data.tensor import TensorSplit
from consilium.errors import ConfigError, PayloadError
from consilium.fit import Fit
from consilium.kinds import Model
from consilium.moe.addressing import select
from consilium.moe.budget import Mode
from consilium.moe.gates import Gates
from consilium.moe.layers import Shape
from consilium.moe.merging import Merging, RobustMean
from consilium.params import Params, WeightedMean
from consilium.privacy import Privacy, PrivateMean

__all__ = ["EVALUATION", "Setup", "check_dtypes"]

EVALUATION = 4
"""Factor of `Fit.batch_size` when labels are predicted, since nothing is saved for a backward pass."""


@dataclass(frozen=True)
class Setup(ABC):
    """The set-up from which both halves of every method are built; it holds no weights.

    Args:
        model: where the model comes from.
        fit: how clients train.
        sampling: who takes part in a round.
        seed: seed of the run.
        heads: task -> every label any client has, for the server's table of heads; {} for text-to-text.
        clients: all clients of the federation, as the server knows them.
        shape: shape of one example, for small models; () for texts.
        merging: how the server merges updates.
        privacy: what the server may learn about a client and disclose.
        rounds: rounds of the whole run, for schedules; 0: not known.
        layers: weight of each sparse layer when a device's room is divided among them; (): the same for all.
    """

    model: Model
    fit: Fit
    sampling: Sampling
    seed: int
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: tuple[ClientInfo, ...] = ()
    shape: tuple[int, ...] = ()
    merging: Merging = field(default_factory=Merging)
    privacy: Privacy = field(default_factory=Privacy)
    rounds: int = 0
    layers: Shape = ()

    scores_tests: ClassVar[bool] = False
    """Whether a reply of training has the test score before aggregation, as the pFedMoE family's code reports it."""

    # --- what depends on the kind of model ----------------------------------------------------------------------------

    @abstractmethod
    def initial_params(self, client: ClientInfo | None = None) -> Params:
        """Return the parameters from which all methods start, float32.

        Args:
            client: the client that gets the model; None: the model that all clients have.

        Raises:
            ConfigError: for None if the clients have different models.
        """

    @abstractmethod
    def build(
        self, params: Params, context: ClientContext, held: ExpertSet | None = None, gates: Gates | None = None
    ) -> Any:
        """Build the client's live model on its device.

        Args:
            held: its experts; None: all.
            gates: gates of a payload, see `gates.gates_from_scalars`; None: gates are not scaled.

        Raises:
            BudgetError: if the model does not fit what the client allows.
            ModelError: for a name that is missing, another shape, or experts that the model does not have.
            PayloadError: for a dtype that the model does not have.
        """

    @abstractmethod
    def build_sent(self, payload: Payload, context: ClientContext) -> Any:
        """Build the client's live model from the payload that it was sent; the errors are those of `build`."""

    @abstractmethod
    def check(self, task: Task) -> None:
        """Raise ConfigError if this model and `fit` cannot do the task."""

    @abstractmethod
    def tokens(self, context: ClientContext, split: Split) -> Any:
        """Encode texts of the client as token ids, see `encode`."""

    @abstractmethod
    def _read_first(self, task: Task, split: Split) -> Any:
        """Encode one example, to see whether it can be read."""

    # --- what a kind of model may change ------------------------------------------------------------------------------

    @property
    def evaluation_rows(self) -> int:
        """Return the number of rows of an evaluation batch."""
        return self.fit.batch_size * EVALUATION

    def sub_moe(self, params: Params, task: str, held: ExpertSet | None, client: ClientInfo | None = None) -> Payload:
        """Return what a client of `task` needs to build its model: the group "params", and what names its part.

        Args:
            held: its experts; None: all.
            client: adapters are cut to this client's rank; None: the full rank.
        """
        return Payload({"params": select(params, task, held)}, {})

    def slice_scalars(self, held: ExpertSet) -> dict[str, Scalar]:
        """Return the scalars of a payload that name the experts of a sub-MoE; {} without experts."""
        return {}

    def both_halves(self, params: Params, own: Params) -> Params:
        """Return parameters completed by what is not sent; of all models but adapters everything is."""
        return params

    def leaving(self, params: Params, model: Any, context: ClientContext) -> Params:
        """Return the part of the trained parameters that leaves a client."""
        return params

    def lacks(
        self,
        client: ClientInfo,
        counts: Mapping[str, int],
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> str | None:
        """Return why the client's device cannot train `counts` experts per block, or None if it can."""
        return None

    def reported(
        self,
        counts: Mapping[str, int],
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> dict[str, int]:
        """Return the footprint in bytes as a scalar of a reply; {} without a memory model."""
        return {}

    def admit(
        self,
        context: ClientContext,
        held: ExpertSet | None,
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> dict[str, int]:
        """Raise BudgetError if a model would not fit what the client allows, before it is built.

        Returns:
            The value of `reported`.
        """
        return {}

    def mean(self, previous: Params, round: int = 0) -> WeightedMean | RobustMean | PrivateMean:
        """Return the mean with which a server merges a round's replies: the weighted mean, or as `merging` or `privacy`
        say.

        Args:
            previous: the server's parameters; the replies are changed versions of them.
            round: number of the round; adapters that a rule restarts are drawn by it.
        """
        if self.privacy.noise:
            return PrivateMean(self.privacy, self._merged_params(previous), self.cohort)
        mean = self._plain_mean(round)
        return mean if self.merging.plain else RobustMean(self.merging, previous, mean)

    def _merged_params(self, previous: Params) -> Params:
        return dict(previous)

    def _plain_mean(self, round: int) -> WeightedMean:
        return WeightedMean()

    # --- the same for all kinds ---------------------------------------------------------------------------------------

    @property
    def cohort(self) -> int:
        """Return the number of clients that are expected in a round."""
        return min(self.sampling.clients_per_round, len(self.clients))

    @property
    def classes(self) -> int:
        """Return C, the number of labels, for methods with one place per label in their messages.

        Raises:
            ConfigError: if clients have different tasks.
        """
        if len(self.heads) != 1:
            raise ConfigError(f"the method is for clients of one task, these have {', '.join(self.heads)}")
        return len(next(iter(self.heads.values())))

    def encode(self, context: ClientContext, split: Split | TensorSplit) -> Encoded | TensorSplit:
        """Encode a split of the client's data: texts as token ids; tensors stay as they are.

        Raises:
            BudgetError: if the rows do not fit what the client allows.
            ConfigError, DataError: see `check` and `data.causal`.
        """
        return split if isinstance(split, TensorSplit) else self.tokens(context, split)

    def check_data(self, data: ClientData) -> None:
        """Check that this model and `fit` can do a client's task, and can read its first example.

        Raises:
            ConfigError: see `check`.
            ModelError: for a tokenizer that is missing or does not match the model.
            DataError: for texts that cannot be tokenized, e.g. because of a broken chat template.
        """
        self.check(data.task)
        if isinstance(data.train, Split):
            self._read_first(data.task, Split(data.train.texts[:1], data.train.targets[:1]))


def check_dtypes(params: Params, known: Collection[torch.dtype]) -> None:
    """Raise PayloadError for a tensor of a dtype that the model does not have."""
    for key, tensor in params.items():
        if tensor.dtype not in known:
            raise PayloadError(f"{key!r} is {tensor.dtype}; of this model it must be {', '.join(map(str, known))}")
