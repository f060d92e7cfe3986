"""The exceptions that Consilium raises on purpose.

    ConsiliumError
    ├── ConfigError        a setting, flag, recipe or combination that cannot be run
    ├── DataError          a file, column, label or partition that cannot be used
    ├── ModelError         a model or family that cannot be loaded, sliced or addressed
    ├── BudgetError        more than the memory of a device, or the limits of a site, allow
    ├── PayloadError       something that may not travel, or arrived broken
    ├── RoundError         a round that too few clients answered, or a site that cannot be reached
    ├── CheckpointError    a run directory or checkpoint that cannot be continued
    └── PackageError       a site's package that cannot be taken, or a hub that cannot be used

A message is one line that says what was given, what is allowed and what to do. The command line prints it and exits
with 2.
"""

import reprlib
from typing import Any

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "ConsiliumError",
    "DataError",
    "ModelError",
    "PackageError",
    "PayloadError",
    "RoundError",
    "first_line",
    "shown",
]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class ConsiliumError(Exception):
    """Base class of all errors raised on purpose; catch it to catch them all."""


class ConfigError(ConsiliumError):
    """A setting, flag, recipe or combination of them that cannot be run."""


class DataError(ConsiliumError):
    """A file, column, label or partition that cannot be used."""


class ModelError(ConsiliumError):
    """A model or family that cannot be loaded, sliced or addressed."""


class BudgetError(ConsiliumError):
    """Something that exceeds the memory of a device, or the limits of a site, while it works."""


class PayloadError(ConsiliumError):
    """Something that may not travel between server and client, or that arrived broken."""


class RoundError(ConsiliumError):
    """A round that too few clients answered, or a site that cannot be reached."""


class CheckpointError(ConsiliumError):
    """A run directory or checkpoint that cannot be continued."""


class PackageError(ConsiliumError):
    """A site's package that cannot be taken, or a hub of packages that cannot be used."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, or its type name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: Any) -> str:
    """Return the shortened repr of a value from outside; error messages must never contain a whole foreign value."""
    return _SHORT.repr(value)
