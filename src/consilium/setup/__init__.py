"""The common set-up of both halves of every method, by the kind of model; see `setup.base`."""

import dataclasses
from typing import Any

from consilium.errors import ConfigError
from consilium.kinds import Model
from consilium.models.cohort import Cohort
from consilium.moe.build import ModelSource
from consilium.setup.base import EVALUATION, Setup
from consilium.setup.cohort import CohortSetup
from consilium.setup.mixture import MixtureSetup

__all__ = ["EVALUATION", "SETUPS", "CohortSetup", "MixtureSetup", "Setup", "register_model", "setup_for"]

SETUPS: dict[type[Model], type[Setup]] = {ModelSource: MixtureSetup, Cohort: CohortSetup}
"""Kind of model -> its set-up; see `register_model`."""


def register_model(kind: type[Model], setup: type[Setup]) -> None:
    """Make a kind of model of your own known.

    Args:
        kind: a frozen dataclass, a subclass of `kinds.Model` with all of its attributes and methods.
        setup: its set-up, which makes weights and live models of it.

    Raises:
        ConfigError: if it lacks a part, or has the name of another kind.
    """
    parts = [*Model.__annotations__, *Model.__abstractmethods__]
    fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    inherited = [name for name in parts if getattr(kind, name, None) is getattr(Model, name, None)]
    missing = sorted({*inherited} - {*fields})
    if missing or not fields:
        lack = ", ".join(missing) or "@dataclass(frozen=True)"
        raise ConfigError(f"model kind {kind.__name__} lacks {lack}; see consilium.kinds.Model")
    if any(known.__name__ == kind.__name__ and known.__module__ != kind.__module__ for known in SETUPS):
        raise ConfigError(f"there is a model kind {kind.__name__} already; give yours another name")
    SETUPS[kind] = setup


def setup_for(model: Model, *fields: Any, **named: Any) -> Setup:
    """Return the set-up of a model; the fields are those of `Setup` after `model`.

    Raises:
        ConfigError: for a kind of model that nobody registered.
    """
    if type(model) not in SETUPS:
        known = ", ".join(kind.__name__ for kind in SETUPS)
        raise ConfigError(f"model kind {type(model).__name__} is unknown; known are {known}; see register_model")
    return SETUPS[type(model)](model, *fields, **named)
