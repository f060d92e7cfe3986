"""The cost of work for a client: settings declare it, and a budget counts it where the work is done.

A server names the method and its settings in every message, so each setting declares what it costs the client that
follows it (`setting`). A site limits the cost twice. It compares the declared values with its limits before it begins,
and it counts steps, tokens, seconds and bytes in the loops that spend them (`Work`, at `ClientContext.work`).

    lr, epochs, steps, batch_size, rounds   compared with the site's limit of that name; steps are counted, too
    tokens     a length: tokens are counted as a model reads or writes them, and bound its memory
    memory     a width or rank: bytes are predicted before a model is built
    seconds    the smaller of the server's and the site's counts
    bytes      likewise, of a payload
    factor     multiplies a loss or a gradient; the range in its annotation bounds it
    server     costs the server alone
    free       costs nothing by itself: a choice between ways of working whose costs are all counted
"""

import math
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from torch import Tensor

from consilium.errors import BudgetError

__all__ = ["COMPARED", "COSTS", "MISSING", "Work", "setting", "tokens_in"]

COMPARED = ("lr", "epochs", "steps", "batch_size", "rounds")
"""Costs that a site compares with its limit of the same name."""
COSTS = frozenset({*COMPARED, "tokens", "memory", "seconds", "bytes", "factor", "server", "free"})
"""The allowed values of a setting's cost, see above."""


# --- settings -------------------------------------------------------------------------------------------------------


def setting(default: Any, cost: str) -> Any:
    """Declare a field of a dataclass that a server sends, and what it costs the client.

        mu: Annotated[float, Interval(ge=0, le=1e4)] = setting(0.01, "factor")

    The range of a number stands in its annotation, see `constraints`.

    Args:
        default: default of the field; `MISSING`: it has none.
        cost: one of `COSTS`.

    Raises:
        ValueError: for an unknown cost.
    """
    if cost not in COSTS:
        raise ValueError(f"cost is {cost!r}; it must be one of {', '.join(sorted(COSTS))}")
    return field(default=default, metadata={"cost": cost})


# --- the budget -----------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """A budget for the work that a client does for one message of a server; it has no limits in a simulation.

    The loops of `training` count by themselves. A method with its own loop calls `step` before each update of its
    weights and `read` before each forward pass.

    Args:
        steps: updates by an optimizer.
        tokens: tokens that a model reads or writes; for images and tables, rows.
        seconds: wall-clock time from now.
        memory: predicted bytes of a model at work.
        deadline: seconds from now after which the server stops waiting.
    """

    steps: float = math.inf
    tokens: float = math.inf
    seconds: float = math.inf
    memory: float = math.inf
    deadline: float = math.inf
    done: int = field(default=0, init=False)
    """Steps done so far."""
    planned: int = field(default=0, init=False)
    """Steps that will have been done when the loops that have begun are finished."""
    seen: int = field(default=0, init=False)
    """Tokens counted so far."""
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def plan(self, steps: int) -> None:
        """Raise BudgetError at once if a loop of `steps` steps could not be finished.

        Raises:
            BudgetError: if they are more than are left.
        """
        if self.done + steps > self.steps:
            raise BudgetError(f"the work takes {self.done + steps} steps, {_allowed(self.steps, 'steps')}")
        self.planned = max(self.planned, self.done + steps)

    def step(self) -> None:
        """Count one step; call it before the step.

        Raises:
            BudgetError: if it is one too many, or the time is over.
        """
        self.plan(1)
        self.done += 1
        self.check_time()

    def read(self, tokens: int) -> None:
        """Count tokens that a model is about to read or write.

        Raises:
            BudgetError: if they are too many, or the time is over.
        """
        self.seen += tokens
        if self.seen > self.tokens:
            raise BudgetError(f"the work takes {self.seen} tokens or more, {_allowed(self.tokens, 'tokens')}")
        self.check_time()

    def check_time(self) -> None:
        """Raise BudgetError if the time is over."""
        elapsed_seconds = time.monotonic() - self.start
        if elapsed_seconds > self.deadline:
            steps = f"{self.done} of {self.planned} steps"
            raise BudgetError(f"the round's deadline of {self.deadline:g} s has passed after {steps}")
        if elapsed_seconds > self.seconds:
            raise BudgetError(f"the work takes more than {self.seconds:g} s, {_allowed(self.seconds, 'seconds')}")

    def hold(self, need: int, what: str) -> None:
        """Raise BudgetError if an object would not fit into the allowed memory, before it is made.

        Args:
            need: bytes of the object.
            what: what they are for, e.g. "the model".

        Raises:
            BudgetError: if they are more than is allowed.
        """
        if need > self.memory:
            raise BudgetError(f"{what} takes {need:,} bytes, {_allowed(self.memory, 'memory')}")


def _allowed(most: float, name: str) -> str:
    return f"this site allows {int(most):,} (--max-{name})"


def tokens_in(batch: Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch, including padding and an encoder-decoder's targets; of other data, the rows."""
    ids, labels = batch.get("input_ids"), batch["labels"]
    if ids is None:
        return batch["x"].numel() if not batch["x"].is_floating_point() and batch["x"].dim() == 2 else len(labels)
    return ids.numel() + (labels.numel() if labels.dim() == 2 and labels.shape != ids.shape else 0)
