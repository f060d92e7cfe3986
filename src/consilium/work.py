"""The cost of work for a client: settings declare it, and a budget counts it where the work is done.

A server names the method and its settings in every message, so each setting declares what it costs the client that
follows it (`setting`). A site limits the cost twice. It compares the declared values with its limits before it begins,
and it counts steps, tokens, seconds and bytes in the loops that spend them (`Work`, at `ClientContext.work`).

    lr, epochs, steps, batch_size, rounds   compared with the site's limit of that name; steps are counted, too
    tokens     a length: tokens are counted as a model reads or writes them, and bound its memory
    memory     a width or rank: bytes are predicted before a model is built
    seconds    the smaller of the server's and the site's counts
    bytes      likewise, of a payload
    factor     multiplies a loss or a gradient; the range of the setting bounds it
    server     costs the server alone
    free       costs nothing by itself: a choice between ways of working whose costs are all counted
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from consilium.errors import BudgetError, ConfigError

__all__ = ["COMPARED", "COSTS", "MISSING", "Work", "check_settings", "setting", "tokens_in"]

COMPARED = ("lr", "epochs", "steps", "batch_size", "rounds")
"""Costs that a site compares with its limit of the same name."""
COSTS = frozenset({*COMPARED, "tokens", "memory", "seconds", "bytes", "factor", "server", "free"})
"""The allowed values of a setting's cost, see above."""
_RANGE = re.compile(r"([\[(])([^,]+), ([^\])]+)([\])])")


# --- settings -------------------------------------------------------------------------------------------------------


def setting(default: Any, cost: str, within: str = "") -> Any:
    """Declare a field of a dataclass that a server sends, and what it costs the client.

        mu: float = setting(0.01, "factor", "[0, 1e4]")

    Args:
        default: default of the field; `MISSING`: it has none.
        cost: one of `COSTS`.
        within: the range of a number (of every number in a tuple), "[" and "]" include the end; "": any.

    Raises:
        ValueError: for an unknown cost, or a malformed range.
    """
    if cost not in COSTS:
        raise ValueError(f"cost is {cost!r}; it must be one of {', '.join(sorted(COSTS))}")
    if within:
        _ends(within)
    return field(default=default, metadata={"cost": cost, "within": within})


def check_settings(owner: Any, prefix: str = "") -> None:
    """Check the values of a dataclass against the ranges and the literals that its fields declare.

    Args:
        prefix: prefix of the fields' names in messages, e.g. "fit.".

    Raises:
        ConfigError: for a number outside its range, or a value that is none of its field's literals.
    """
    for dataclass_field in fields(owner):
        value, name = getattr(owner, dataclass_field.name), f"{prefix}{dataclass_field.name}"
        if (literals := _literals(type(owner)).get(dataclass_field.name)) and value not in literals:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, literals))}")
        within = dataclass_field.metadata.get("within")
        for item in value if isinstance(value, tuple) else (value,):
            if within and isinstance(item, int | float) and not _inside(item, within):
                raise ConfigError(f"{name} is {value}; it must be {_allowed_values(item, within)}")


@lru_cache
def _literals(kind: type) -> dict[str, tuple[Any, ...]]:
    """Return field -> allowed values, of the fields that are plain literals."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


@lru_cache
def _ends(within: str) -> tuple[bool, float, float, bool]:
    """Parse a range into (lower end is included, lower end, upper end, upper end is included)."""
    match = _RANGE.fullmatch(within)
    if not match or not -math.inf < float(match[2]) < float(match[3]) < math.inf:
        raise ValueError(f"within is {within!r}; it must be a finite range, e.g. '(0, 1]'")
    return match[1] == "[", float(match[2]), float(match[3]), match[4] == "]"


def _inside(value: float, within: str) -> bool:
    low_closed, low, high, high_closed = _ends(within)
    return (value >= low if low_closed else value > low) and (value <= high if high_closed else value < high)


def _allowed_values(value: float, within: str) -> str:
    """Describe the range for a message: only the lower end if the value violates it and the upper end is far away."""
    low_closed, low, high, _ = _ends(within)
    if value <= low and high >= 1e4:
        return f"at least {low:g}" if low_closed else f"greater than {low:g}"
    return f"within {within}"


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
