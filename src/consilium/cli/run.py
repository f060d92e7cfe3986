"""The commands `consilium run` and `consilium resume`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from consilium.cli.parsing import parse, read_command, split_options, whole_number
from consilium.cli.screen import VOICE, follow, out, speaking, split_voice
from consilium.escape import print_line

if TYPE_CHECKING:
    pass


def run_command(args: list[str]) -> None:
    """consilium run RECIPE|FILE.json [--algorithm NAME] [--config FILE] [--out DIR] [--track TOOLS]
    [--quiet] [--json] [flags of the experiment]"""
    own = {"--algorithm": "", "--config": "", "--out": "runs", "--track": ""}
    asked = read_command(args, "run", run_command.__doc__, own, VOICE)
    from consilium.loop import run

    experiment, folder = asked.experiment, Path(asked.options["--out"]) / asked.experiment.name
    with speaking("--quiet" in asked.switches, "--json" in asked.switches) as lines:
        follow(lambda watch: run(experiment, folder, watch), folder, asked.options["--track"], lines)


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

    options, rest = split_options(args, {"--track": "", "--rounds": ""})
    quiet, as_json, rest = split_voice(rest)
    folder = parse(parameters, rest, "consilium resume")
    config = RunDirectory(folder).config()
    rounds = whole_number(options, "--rounds", 1) if options["--rounds"] else None
    finished = config["status"] == "finished" and rounds in (None, config["experiment"].get("rounds"))
    with speaking(quiet, as_json) as lines:
        if finished:
            print_line(out, f"{folder} is finished")
            print_table([folder], out)
            if lines:
                summary = json.loads((folder / "summary.json").read_text())
                lines.line({"summary": summary, "report": str(folder / "report.html")})
        else:
            follow(lambda watch: resume(folder, watch, rounds), folder, options["--track"], lines)
