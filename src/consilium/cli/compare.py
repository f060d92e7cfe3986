"""The command `consilium compare`."""

from pathlib import Path

from consilium.cli.catalogue import read_catalogue
from consilium.cli.parsing import flags_in, read_command, whole_number
from consilium.cli.screen import VOICE, finish, out, speaking, tracking_flags
from consilium.errors import ConfigError, ConsiliumError


def compare_command(args: list[str]) -> None:
    """consilium compare RECIPE|FILE.json [--algorithms A,B] [--seeds N] [--sweep SETTING=A,B] [--jobs N]
    [--config FILE] [--out DIR] [--track TOOLS] [--quiet] [--json] [flags of the experiment]"""
    default_names = read_catalogue()["recipes"].get(args[0] if args else "", {}).get("compared", "")
    option_defaults = {
        "--out": "runs",
        "--algorithms": default_names,
        "--seeds": "1",
        "--jobs": "0",
        "--sweep": "",
        "--config": "",
        "--track": "",
    }
    command = read_command(args, "compare", compare_command.__doc__, option_defaults, VOICE)
    from consilium.api import by_default, plan, split_names
    from consilium.recipes import Recipe, find
    from consilium.watch import Comparison, at_a_time

    experiment, options = command.experiment, command.options
    is_saved = args[0] not in read_catalogue()["recipes"]
    recipe = Recipe(experiment.name, lambda: experiment) if is_saved else find(args[0])
    seeds, jobs = whole_number(options, "--seeds", 1), whole_number(options, "--jobs", 0)
    if "--algorithms" in flags_in(args) and not options["--algorithms"]:
        raise ConfigError("--algorithms is empty; name methods, e.g. --algorithms FedMoE,FedAvg")
    names = split_names(options["--algorithms"] or by_default(recipe, experiment))
    root = Path(options["--out"]) / experiment.name
    sweeps = [part for part in options["--sweep"].split(";") if part.strip()]
    experiments = plan(recipe, experiment, names, seeds, root, sweeps)
    track = tracking_flags(options["--track"])
    with speaking("--quiet" in command.switches, "--json" in command.switches) as lines:
        jobs = jobs or at_a_time(list(experiments.values()))
        callback = (lambda name, record: lines.line({"run": name, **record})) if lines else None
        try:
            Comparison(out, experiments, jobs, track, callback).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("; the same command continues the comparison") from None
        except ConfigError:  # before any run began
            raise
        except ConsiliumError:
            if finished_folders := [folder for folder in experiments if (folder / "summary.json").exists()]:
                finish(finished_folders, root / "report.html", lines)
            raise
        finish(list(experiments), root / "report.html", lines)
