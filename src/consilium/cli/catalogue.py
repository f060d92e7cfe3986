"""Recipes, algorithms and flags as plain data, so that `list`, `--help` and mistyped flags need no torch.

The file catalogue.json is generated from the code by `python -m consilium.cli.catalogue`. A test compares the two.

  recipes      name -> {"summary", "compared", "experiment": the recipe's experiment as JSON}
  algorithms   name -> {"summary", "experiment": the method at its defaults as JSON}
  fields       class -> field -> {"kind": as in a usage line, "help"}
"""

import dataclasses
import difflib
import json
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from consilium.constraints import nearest
from consilium.errors import ConfigError
from consilium.escape import one_line
from consilium.plugins import has_plugins

__all__ = [
    "Flag", "flags_of_recipe", "hint_for", "make_catalogue", "print_flags", "read_catalogue", "refuse_mistyped",
    "refuse_unknown",
]  # fmt: skip

FILE = Path(__file__).with_name("catalogue.json")
FREQUENT = (
    "name", "algorithm", "data", "model.path", "fit.lr", "fit.epochs", "fit.batch-size", "fit.max-length",
    "fit.lora.rank", "sampling.clients-per-round", "rounds", "memory", "evaluate-every", "seed", "workers", "device",
)  # fmt: skip
"""The flags, and groups of flags, that --help shows; --help-all shows all flags."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of an experiment.

    Args:
        name: name of the flag, e.g. "--fit.lr".
        kind: type of the value, e.g. "FLOAT".
        default: default value as text.
        help: one sentence or more.
    """

    name: str
    kind: str
    default: str
    help: str

    @property
    def frequent(self) -> bool:
        """Return whether --help shows the flag."""
        name = self.name.removeprefix("--")
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in FREQUENT)


@cache
def read_catalogue() -> dict[str, Any]:
    """Read catalogue.json."""
    return json.loads(FILE.read_text())


def flags_of_recipe(recipe: str, algorithm: str = "") -> list[Flag] | None:
    """Return the flags of a recipe's experiment; None if the catalogue does not have the recipe or the algorithm.

    Args:
        algorithm: method that replaces the recipe's own; "": the recipe's own.
    """
    catalogue = read_catalogue()
    if recipe not in catalogue["recipes"] or (algorithm and algorithm not in catalogue["algorithms"]):
        return None
    experiment = catalogue["recipes"][recipe]["experiment"]
    if algorithm and algorithm != experiment["algorithm"]["type"]:
        experiment = {**experiment, "algorithm": catalogue["algorithms"][algorithm]["experiment"]}
    return list(_flags(experiment, catalogue["fields"], "--"))


def _flags(saved: Mapping[str, Any], fields: Mapping[str, Any], prefix: str) -> Iterator[Flag]:
    for name, value in saved.items():
        if name == "type":
            continue
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from _flags(value, fields, f"{flag}.")
        else:
            description = fields[saved["type"]][name]
            default = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield Flag(flag, description["kind"], default, description["help"])


def refuse_mistyped(recipe: str, args: list[str], own: Mapping[str, Any], command: str, algorithm: str = "") -> None:
    """Raise ConfigError for a flag that the experiment does not have, and name the nearest one.

    The experiment is not imported for this.

    Args:
        args: arguments after the recipe.
        own: flags of the command itself.
    """
    flags = flags_of_recipe(recipe, algorithm)
    if flags is None:
        return
    flag_names = {flag.name for flag in flags} | own.keys() | {"--help", "-h", "--help-all", "--data.label"}
    for arg in args:
        name = arg.split("=")[0].replace("_", "-")
        positive_name = "--" + name.removeprefix("--no-") if name.startswith("--no-") else name.replace(".no-", ".")
        if name.startswith("--") and not {name, positive_name} & flag_names:
            raise ConfigError(
                f"unknown argument {arg!r}; {hint_for(name, flag_names, f'consilium {command} {recipe}')}"
            )


def refuse_unknown(recipe: str) -> None:
    """Raise ConfigError for a recipe that does not exist, and name the nearest one; no recipe is imported for this."""
    loaded_recipes = getattr(sys.modules.get("consilium.recipes"), "RECIPES", {})
    names = {*read_catalogue()["recipes"], *loaded_recipes}
    if recipe not in names and not recipe.endswith(".json") and not has_plugins():
        hint = nearest(recipe, names, "; ")
        raise ConfigError(f"unknown recipe {recipe!r}; allowed are {', '.join(sorted(names))}{hint}")


def hint_for(name: str, known: typing.Iterable[str], prog: str) -> str:
    """Return advice on an unknown flag."""
    known = set(known)
    if difflib.get_close_matches(name, {"--algorithms", "--seeds", "--jobs", "--sweep"} - known, n=1, cutoff=0.9):
        return "that is for `consilium compare`"
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"see `{prog} --help-all`"


def print_flags(recipe: str, usage: str, own: Mapping[str, str], everything: bool, algorithm: str = "") -> None:
    """Print a command's own flags, then those of the experiment, either the frequent ones or all.

    Args:
        own: flags of the command itself -> their help.
    """
    flags = flags_of_recipe(recipe, algorithm) or []
    shown_flags = [flag for flag in flags if everything or flag.frequent]
    width = min(max(shutil.get_terminal_size().columns, 60), 120)

    def show(left: str, text: str) -> None:
        indent = " " * 34
        lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent) or [indent]
        first = f"  {left}"
        print(first + lines.pop(0)[len(first) :] if len(first) < len(indent) else first)
        print(*lines, sep="\n", end="\n" if lines else "")

    print(textwrap.fill(f"usage: {' '.join(usage.split())}", width, subsequent_indent="    "))
    print()
    print(textwrap.fill(f"{recipe}: {read_catalogue()['recipes'][recipe]['summary']}", width))
    print("\noptions of the command")
    for name, text in own.items():
        show(name, text)
    print("\nthe experiment" + ("" if everything else ", its frequent flags"))
    for flag in shown_flags:
        default = flag.default if len(flag.default) < 60 else f"{flag.default[:57]}..."
        show(f"{flag.name} {flag.kind}", f"{one_line(flag.help, 400)} (default: {default or 'empty'})")
    if len(shown_flags) < len(flags):
        print(f"\n{len(flags) - len(shown_flags)} more flags: --help-all")


# --- making the catalogue ---------------------------------------------------------------------------------------------


def make_catalogue(theirs: bool = False) -> dict[str, Any]:
    """Return the catalogue of the current code.

    Args:
        theirs: include the user's own methods and recipes.
    """
    from consilium.core import Algorithm
    from consilium.experiment import to_json
    from consilium.recipes import RECIPES, find

    find("fedmoe-docstrings")
    fields: dict[str, Any] = {}
    recipes = {}
    for name, recipe in sorted(RECIPES.items()):
        experiment = recipe.make()
        _describe(experiment, fields)
        recipes[name] = {"summary": recipe.summary, "compared": recipe.compared, "experiment": to_json(experiment)}
    algorithms = {}
    for name, kind in sorted(Algorithm.registry.items()):
        if theirs or kind.__module__.startswith("consilium."):
            _describe(kind(), fields)
            summary = (kind.__doc__ or "without a docstring").splitlines()[0]
            algorithms[name] = {"summary": summary, "experiment": to_json(kind())}
    catalogue = {"recipes": recipes, "algorithms": algorithms, "fields": dict(sorted(fields.items()))}
    return json.loads(json.dumps(catalogue).replace(f"{Path.cwd()}/", ""))  # recipes have paths relative to the cwd


def _describe(value: Any, fields: dict[str, Any]) -> None:
    """Add the fields of a dataclass, and of all dataclasses in its fields."""
    kind = type(value)
    hints, texts = typing.get_type_hints(kind), _helps(kind)
    descriptions = fields.setdefault(kind.__name__, {})
    for field in dataclasses.fields(value):
        field_value = getattr(value, field.name)
        if dataclasses.is_dataclass(field_value):
            _describe(field_value, fields)
        else:
            descriptions[field.name] = {"kind": _kind(hints[field.name]), "help": texts.get(field.name, "")}


def _helps(kind: type) -> dict[str, str]:
    """Return field -> help, from the Args sections of the docstrings of a class and its bases."""
    from docstring_parser import DocstringStyle, parse

    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = base.__dict__.get("__doc__")
        if doc and dataclasses.is_dataclass(base):
            for parameter in parse(doc, style=DocstringStyle.GOOGLE).params:
                helps[parameter.arg_name] = " ".join((parameter.description or "").split())
    return helps


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (typing.Union, UnionType):
        return "|".join(_kind(arg) for arg in args if arg is not NoneType) + ("|None" if NoneType in args else "")
    if origin is tuple:
        return f"[{_kind(args[0])} ...]"
    return "BOOL" if hint is bool else getattr(hint, "__name__", str(hint)).upper()


if __name__ == "__main__":
    FILE.write_text(json.dumps(make_catalogue(), indent=1) + "\n")
