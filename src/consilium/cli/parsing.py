"""The arguments of a command: its own options, and the flags of an experiment, which come from the dataclasses."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from consilium.cli.catalogue import hint_for, print_flags, read_catalogue, refuse_mistyped, refuse_unknown
from consilium.constraints import nearest
from consilium.errors import ConfigError

if TYPE_CHECKING:
    from consilium.core import Algorithm
    from consilium.experiment import Experiment

OWN = {
    "--out": "folder of the run directories",
    "--algorithm": "method to run in place of the recipe's own",
    "--algorithms": "methods to compare, separated by commas; with options of its own: HFedMoE:beta=0",
    "--seeds": "runs per method, with seeds from --seed on",
    "--jobs": "runs at a time, each a process; 0: as many as cores and free memory allow",
    "--sites": "names of the sites, separated by commas",
    "--config": "YAML or JSON file with settings that are laid over the recipe's, e.g. fit: {lr: 0.001}",
    "--sweep": "a setting and its values, e.g. fit.lr=1e-4,1e-3: every method runs with each; several with ; between",
    "--hosts": "names or addresses under which sites reach the server, separated by commas",
    "--address": "host:port to listen on",
    "--certificates": "folder of `consilium certificates`: its part for the server, or for this site",
    "--insecure": "plain text without keys: once on this machine, twice elsewhere",
    "--wait": "seconds until all sites must be connected",
    "--name": "of this site",
    "--server": "host:port of the server",
    "--state": "folder for what is kept at this site",
    "--track": "tools to track the run in, separated by commas: tensorboard, mlflow, wandb; each is an extra",
    "--quiet": "print errors and the last line only",
    "--json": "stdout gets a line of JSON per round and a last one with the summary; all else goes to stderr",
    "--port": "for Flower's processes on this machine, on 127.0.0.1 alone",
    "--max-lr": "largest learning rate that the server may ask of this site",
    "--max-epochs": "most passes over this site's data in a round",
    "--max-steps": "most updates of a model in a round; training ends with an error before one more",
    "--max-batch-size": "most examples in a batch",
    "--max-tokens": "most tokens (of images and tables: rows) that models read and write in a round",
    "--max-seconds": "longest time that training, or scoring, may take in a round",
    "--max-rounds": "most rounds of a run",
    "--max-bytes": "largest message that this site takes or returns, unfolded",
    "--max-memory": "most memory that a model may need here, e.g. 12GiB; default: --memory, or all of the device",
    "--max-state": "most room on disk for the states of former runs; the oldest go first",
    "--log-level": "debug (with Flower's own messages), info, warning or error",
    "--log-file": "a file that gets the log, too; it rotates at 5 MB",
    "--max-days": "days after which the state of a former run is removed",
}
"""The help of the commands' own flags; all other flags are fields of the experiment."""


@dataclasses.dataclass(frozen=True)
class Command:
    """The arguments of a command that takes an experiment.

    Args:
        experiment: experiment with all flags applied.
        options: options of the command itself, by flag.
        switches: flags without a value of the command itself that were given.
        flags: flags of the experiment that were given, without their values.
    """

    experiment: "Experiment"
    options: dict[str, str]
    switches: frozenset[str]
    flags: frozenset[str]


def read_command(
    args: list[str],
    name: str,
    usage: str | None,
    options: Mapping[str, str],
    switches: Collection[str] = (),
    change: "Callable[[Experiment], Experiment]" = lambda experiment: experiment,
) -> Command:
    """Read RECIPE|FILE.json, a command's own options, and the flags of the experiment.

    Help, unknown recipes and mistyped flags are answered from the catalogue, before any slow import.

    Args:
        usage: synopsis of the command.
        options: options of the command itself -> default.
        switches: flags without a value of the command itself.
        change: applied to the experiment before its flags are read.
    """
    usage = usage or ""
    if not args:
        raise ConfigError(f"consilium {name} needs a recipe; see `consilium list`")
    recipe, other_args = args[0], args[1:]
    if recipe in ("-h", "--help", "--help-all"):
        print(f"{usage}\n\nRecipes: {', '.join(read_catalogue()['recipes'])}")
        print(f"Flags of an experiment: consilium {name} RECIPE --help")
        raise SystemExit(0)
    recipe = f"{recipe}/config.json" if (Path(recipe) / "config.json").is_file() else recipe
    option_values, other_args = split_options(other_args, options)
    active_switches = frozenset(arg for arg in other_args if arg in switches)
    other_args = [arg for arg in other_args if arg not in active_switches]
    method = option_values.get("--algorithm", "")
    option_defaults = {**options, **dict.fromkeys(switches, "")}
    if recipe in read_catalogue()["recipes"] and not {"-h", "--help", "--help-all"}.isdisjoint(other_args):
        print_flags(
            recipe,
            usage,
            {flag: _described(flag, option_defaults) for flag in option_defaults},
            "--help-all" in other_args,
            method,
        )
        raise SystemExit(0)
    refuse_unknown(recipe)
    if not option_values.get("--config"):  # the file may change the method, and with it the flags
        refuse_mistyped(recipe, other_args, option_defaults, name, method)
    default = named_experiment(recipe)
    if method:
        default = dataclasses.replace(default, algorithm=named_algorithm(recipe, default, method))
    if option_values.get("--config"):
        from consilium.settings import merged, read_settings

        default = merged(default, read_settings(Path(option_values["--config"])))
    default = change(default)
    if hasattr(default.data, "target"):  # images call it label, texts and tables target: accept both
        other_args = [re.sub(r"^--data\.label(?=$|=)", "--data.target", arg) for arg in other_args]
    experiment = parse(type(default), other_args, f"consilium {name} {args[0]}", default, option_defaults)
    flags = frozenset(flags_in(other_args))
    return Command(experiment, option_values, active_switches, flags)


def _described(flag: str, own: Mapping[str, str]) -> str:
    return OWN[flag] + (f" (default: {own[flag]})" if own[flag] else "")


def named_experiment(recipe: str) -> "Experiment":
    """Return the experiment of a recipe, or a saved one.

    Args:
        recipe: a recipe's name, or a JSON file with an experiment or a run's config.
    """
    if not recipe.endswith(".json"):
        from consilium.recipes import find

        return find(recipe).make()
    from consilium.experiment import from_json

    try:
        content = json.loads(Path(recipe).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{recipe} is not a saved experiment: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe} is not a saved experiment: it holds a {type(content).__name__}")
    return from_json(content.get("experiment", content))


def named_algorithm(recipe: str, experiment: "Experiment", name: str) -> "Algorithm":
    """Return a method by name, as the recipe sets it up as a rival or else at its defaults."""
    from consilium.recipes import Recipe, find

    recipe_object = Recipe(recipe, lambda: experiment) if recipe.endswith(".json") else find(recipe)
    return recipe_object.algorithm(name)


def split_options(args: list[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Split a command's own options from the other arguments, which belong to the experiment."""
    options, other_args, i = dict(defaults), [], 0
    while i < len(args):
        name, has_value, value = args[i].partition("=")
        if name not in defaults:
            other_args.append(args[i])
        elif has_value:
            options[name] = value
        elif i + 1 < len(args):
            i += 1
            options[name] = args[i]
        else:
            raise ConfigError(f"{name} needs a value, e.g. {name} {defaults[name]}")
        i += 1
    return options, other_args


def flags_in(args: list[str]) -> set[str]:
    """Return the flags among the arguments, without their values."""
    return {arg.partition("=")[0] for arg in args if arg.startswith("--")}


def whole_number(options: dict[str, str], name: str, least: int) -> int:
    text = options[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number >= {least}")
    return int(text)


def number(options: dict[str, str], name: str) -> float:
    try:
        return float(options[name])
    except ValueError:
        raise ConfigError(f"{name} is {options[name]!r}; it must be a number") from None


def parse(
    kind: Any, args: list[str], prog: str, default: Any = None, own: Mapping[str, str | None] | None = None
) -> Any:
    """Parse arguments with tyro, report its errors as one line, and name the nearest flag for a misspelt one.

    Args:
        default: experiment that the flags change.
        own: flags of the command itself, with their values.
    """
    extra = {"default": default} if default is not None else {}
    if own:
        words = {flag: flag if value is None else f"{flag} {value or 'X'}" for flag, value in own.items()}
        flag_lines = "\n".join(f"{words[flag]}: {OWN[flag]}" for flag in own)
        extra["description"] = f"The command has flags of its own, with these defaults:\n\n{flag_lines}"
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            value, unknown_args = tyro.cli(
                kind, args=args, prog=prog, return_unknown_args=True, config=(tyro.conf.AvoidSubcommands,), **extra
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(f"{complaint(stderr.getvalue())}; see `{prog} --help`") from None
    if unknown_args:
        known_flags = [*(flags_of(default) if default is not None else []), *(own or ())]
        raise ConfigError(
            f"unknown argument {unknown_args[0]!r}; {hint_for(unknown_args[0].split('=')[0], known_flags, prog)}"
        )
    return value


def complaint(box: str) -> str:
    """Return the first part of tyro's error box as one line: the flag, the value, and the allowed values."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯")))  # parts end at rules, drawn or typed
    text = " ".join(next((part for has_text, part in parts if has_text), ())).rstrip(".")
    if match := re.search(r"invalid choice '(.*?)' for argument '(.+?)'.*?\((.*)\)", text):
        allowed = re.findall(r"'(.*?)'", match[3])
        return f"{match[2]} is {match[1]!r}; allowed are {', '.join(allowed)}{nearest(match[1], allowed, '; ')}"
    text = text.removeprefix("Error parsing ")
    text = text.replace("invalid literal for int() with base 10:", "it must be a whole number, not")
    return text.replace("could not convert string to float:", "it must be a number, not")


def flags_of(value: Any, prefix: str = "--") -> list[str]:
    """Return every flag of an experiment, e.g. --algorithm.alpha."""
    flags = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        flags += flags_of(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return flags
