"""Functions that return an `Experiment`, with one module per paper table or use case.

A function decorated with `recipe` is found by `consilium list` and run by its name.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from consilium.constraints import nearest
from consilium.core import Algorithm
from consilium.errors import ConfigError

if TYPE_CHECKING:  # the module imports the user's own files, and these import this one
    from consilium.experiment import Experiment

__all__ = ["RECIPES", "Recipe", "find", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """A named experiment, and the settings of other methods for a comparison with it on equal terms.

    Args:
        compared: the methods of `consilium compare`, separated by commas; "": its own, FedAvg and RandomMoE.
    """

    name: str
    make: Callable[[], "Experiment"]
    rivals: dict[str, Algorithm] = field(default_factory=dict)
    compared: str = ""
    """The methods of `consilium compare` by default."""

    @property
    def summary(self) -> str:
        """Return the first line of the function's docstring."""
        return (self.make.__doc__ or "").strip().splitlines()[0]

    def algorithm(self, name: str) -> Algorithm:
        """Return a method by name: the recipe's own, a rival as set up, or any registered one at its defaults.

        Raises:
            ConfigError: if the name is none of these.
        """
        own_algorithm = self.make().algorithm
        algorithms = {
            **{key: None for key in Algorithm.registry},
            **self.rivals,
            type(own_algorithm).__name__: own_algorithm,
        }
        if name not in algorithms:
            raise ConfigError(
                f"unknown algorithm {name!r}; allowed are {', '.join(sorted(algorithms))}"
                f"{nearest(name, algorithms, '; ')}"
            )
        return algorithms[name] or Algorithm.registry[name]()


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str, rivals: dict[str, Algorithm] | None = None, compared: str = Recipe.compared
) -> Callable[[Callable[[], "Experiment"]], Callable[[], "Experiment"]]:
    """Register the decorated function under a name for the command line."""

    def register(make: Callable[[], "Experiment"]) -> Callable[[], "Experiment"]:
        RECIPES[name] = Recipe(name, make, rivals or {}, compared)
        return make

    return register


def find(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: if the name is unknown; the message gives the nearest known one.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in RECIPES:
        hint = nearest(name, RECIPES, "; ")
        raise ConfigError(f"unknown recipe {name!r}; allowed are {', '.join(sorted(RECIPES))}{hint}")
    return RECIPES[name]


import consilium.experiment  # noqa: E402, F401  # last: it imports the user's own files, which may define recipes
