"""What every source of data and every kind of model offers; the base classes of both.

A source of data and a kind of model are frozen dataclasses. Their fields are settings of an experiment, and flags of
the command line.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from consilium.params import Params

if TYPE_CHECKING:
    from consilium.data.task import Federation

__all__ = ["DataSource", "Gives", "Model"]

Gives = Literal["tensors", "labelled texts", "language"]
"""What the rows are: images or tables; texts with a label or an answer; prompts and responses, or plain text."""


class DataSource(ABC):
    """Where the clients' data comes from.

    Attributes:
        gives: what its rows are.
        form: the form that the model must have, "classification" or "text-to-text"; "": either.
        plain: whether it is text without prompts.
    """

    gives: ClassVar[Gives]
    form: ClassVar[str] = ""
    plain: bool = False

    @abstractmethod
    def load(self, seed: int) -> "Federation":
        """Return the data of all clients. Equal seeds and files give equal results.

        Raises:
            DataError: if the data cannot be used.
        """


class Model(ABC):
    """Where the clients' models come from. A kind of model also has a set-up, see `setup.SETUPS`.

    Attributes:
        form: the form of its tasks, "classification" or "text-to-text".
        counts: experts of each block of the full model; {} without experts.
        fingerprint: what identifies its files; "" if it has none.
        torch_dtype: dtype of weights in payloads.
        dense: whether a method must be able to train a model without experts.
        reads: what its clients' data may consist of.
        shared: whether all clients have one model, or parts of it; otherwise each has a small one of its own.
        world: the kind of model that methods must be able to train, see `core.Algorithm.worlds`.
        path: its name in messages.
    """

    form: str
    counts: Mapping[str, int]
    fingerprint: str
    torch_dtype: torch.dtype
    dense: bool
    reads: frozenset[Gives]
    shared: bool
    world: str
    path: str

    @abstractmethod
    def ready(self) -> None:
        """Raise ModelError if the model is not there, before any data is read."""

    @abstractmethod
    def check_site(self, shape: tuple[int, ...]) -> None:
        """Raise an error if a site with examples of this shape, () for texts, cannot bring the model."""

    @abstractmethod
    def architecture(self, client: int) -> str:
        """Return the name of the architecture of the client at an index, from 0; "" if all share one model."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Return the tokenizer of its texts."""

    @abstractmethod
    def round(self, params: Params) -> Params:
        """Return the parameters in the dtype in which the model is deployed."""
