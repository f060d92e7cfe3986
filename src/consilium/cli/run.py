"""The commands `consilium run` and `consilium resume`."""

from pathlib import Path
from typing import Annotated

import tyro

from consilium.cli.parsing import parse, read_command, split_options, whole_number
from consilium.cli.screen import VOICE, follow, out, speaking, split_voice
from consilium.escape import print_line


def run_command(args: list[str]) -> None:
    """consilium run RECIPE|FILE.json [--algorithm NAME] [--config FILE] [--out DIR] [--track TOOLS]
    [--quiet] [--json] [flags of the experiment]"""
    option_defaults = {"--algorithm": "", "--config": "", "--out": "runs", "--track": ""}
    command = read_command(args, "run", run_command.__doc__, option_defaults, VOICE)
    from consilium.loop import run

    experiment, folder = command.experiment, Path(command.options["--out"]) / command.experiment.name
    with speaking("--quiet" in command.switches, "--json" in command.switches) as lines:
        follow(lambda watch: run(experiment, folder, watch), folder, command.options["--track"], lines)


def resume_command(args: list[str]) -> None:
    """consilium resume RUN [--rounds N] [--track TOOLS] [--quiet] [--json]"""
    from consilium.loop import resume
    from consilium.report.table import print_table
    from consilium.rundir import RunDirectory

    def parameters(run: Annotated[Path, tyro.conf.Positional]) -> Path:
        """Continue an interrupted run from its last checkpoint, or a finished one for more rounds with --rounds.

        An interrupted run continues to the same bits, and in the same tracked run.

        Args:
            run: the run directory.
        """
        return run

    options, other_args = split_options(args, {"--track": "", "--rounds": ""})
    quiet, as_json, other_args = split_voice(other_args)
    folder = parse(parameters, other_args, "consilium resume")
    directory = RunDirectory(folder)
    config = directory.config()
    rounds = whole_number(options, "--rounds", 1) if options["--rounds"] else None
    is_finished = config["status"] == "finished" and rounds in (None, config["experiment"].get("rounds"))
    with speaking(quiet, as_json) as lines:
        if is_finished:
            print_line(out, f"{folder} is finished")
            print_table([folder], out)
            if lines:
                lines.line({"summary": directory.summary(), "report": str(folder / "report.html")})
        else:
            follow(lambda watch: resume(folder, watch, rounds), folder, options["--track"], lines)
