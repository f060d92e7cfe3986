"""The commands `consilium expert` and `consilium hub`: a federation with a single exchange."""

from typing import TYPE_CHECKING

from consilium.cli.parsing import parse, read_command, split_options
from consilium.cli.screen import out
from consilium.cli.sites import of_one_client
from consilium.errors import ConfigError
from consilium.escape import print_line

if TYPE_CHECKING:
    from consilium.experiment import Experiment

_GROUPS = ("data", "model", "fit", "algorithm", "sampling", "wire", "merging", "privacy")
_SINGLE = ("--memory", "--device", "--seed", "--threads", "--rounds")


def run_one_shot(room: str, args: list[str]) -> None:
    """Run a command of a site or of a hub.

    The synopsis is: consilium expert | hub COMMAND [its flags] [RECIPE flags of an experiment].
    """
    try:
        import consilium.certificates  # noqa: F401  signatures
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    from consilium.oneshot.commands import ROOMS, Rows

    commands = ROOMS[room]
    if not args or args[0] not in commands:
        if args and args[0] not in ("-h", "--help"):
            raise ConfigError(f"unknown command {room} {args[0]!r}; allowed are {', '.join(commands)}")
        for name, kind in commands.items():
            line = f"consilium {room} {name:10} {kind.__doc__.splitlines()[0]}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(0)
    kind, prog, other_args = commands[args[0]], f"consilium {room} {args[0]}", args[1:]
    recipe, other_args = _recipe_first(other_args) if args[0] == "train" else ("", other_args)
    options, other_args = split_options(other_args, {"--rows": recipe})
    experiment_flags = [arg for arg in other_args if arg.startswith("--") and _is_of_experiment(arg)]
    own_args, flags = _divided(other_args)
    if experiment_flags and not options["--rows"]:
        raise ConfigError(f"{experiment_flags[0]} is a flag of an experiment: name a recipe by --rows first")
    command = parse(kind, own_args, prog)
    rows = Rows(_rows(options["--rows"], flags, prog) if options["--rows"] else None)
    for line in command.lines(rows):
        print_line(out, line)


def _is_of_experiment(flag: str) -> bool:
    """Return whether a flag of a one-shot command belongs to the experiment that defines how rows are read."""
    name = flag.partition("=")[0]
    return name in _SINGLE or (name.removeprefix("--").removeprefix("no-").partition(".")[0] in _GROUPS and "." in name)


def _divided(args: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the command's own and those of an experiment; each flag keeps the values after it."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    is_of_experiment = False
    for arg in args:
        if arg.startswith("--"):
            is_of_experiment = _is_of_experiment(arg)
        parts[is_of_experiment].append(arg)
    return parts[False], parts[True]


def _recipe_first(args: list[str]) -> tuple[str, list[str]]:
    """Return the recipe, if it is the first argument at a site, and the other arguments."""
    return (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)


def _rows(recipe: str, flags: list[str], prog: str) -> "Experiment":
    """Return the experiment that defines how the rows of a site or a hub are read.

    They are the rows of one client unless the flags say otherwise.
    """
    from dataclasses import replace

    from consilium.algorithms.fedavg import FedAvg

    # FedAvg accepts any model, and the method itself is never used.
    command = read_command(
        [recipe, *flags], prog.removeprefix("consilium "), None, {}, change=lambda e: replace(e, algorithm=FedAvg())
    )
    return command.experiment if recipe.endswith(".json") else of_one_client(command.experiment, command.flags)


def expert_command(args: list[str]) -> None:
    """consilium expert COMMAND"""
    run_one_shot("expert", args)


def hub_command(args: list[str]) -> None:
    """consilium hub COMMAND"""
    run_one_shot("hub", args)
