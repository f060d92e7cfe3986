"""The Python counterpart of the command line: compare methods and read runs. `import consilium` exports both."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from consilium.errors import ConfigError
from consilium.experiment import Experiment, from_json
from consilium.recipes import Recipe, find
from consilium.report import methods, read_runs, rows, write_report
from consilium.rundir import RunDirectory
from consilium.settings import changed, read_variant, suffix_of, sweeps
from consilium.watch import Comparison, at_a_time

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "by_default", "compare", "load_run", "plan", "split_names"]


def plan(
    recipe: Recipe,
    experiment: Experiment,
    names: Sequence[str],
    seeds: int,
    root: Path,
    swept: Sequence[str] = (),
) -> dict[Path, Experiment]:
    """Return a mapping run directory -> experiment, with one entry per method, sweep value and seed.

    Args:
        names: methods or rivals, optionally followed by options: "HFedMoE:beta=0".
        swept: settings and their values, "fit.lr=1e-4,1e-3"; several sweeps give every combination.

    Raises:
        ConfigError: for an unknown name, or a setting or value that an experiment does not have.
    """
    experiments = {}
    for text in names:
        name, options = read_variant(text)
        algorithm = recipe.algorithm(name)
        if type(algorithm) is type(experiment.algorithm) and algorithm == recipe.make().algorithm:
            algorithm = experiment.algorithm
        method = dataclasses.replace(experiment, algorithm=algorithm)
        for values in sweeps(swept):
            settings = {**{f"algorithm.{option}": value for option, value in options.items()}, **values}
            variant = changed(method, settings) if settings else method
            for seed in range(experiment.seed, experiment.seed + seeds):
                label = name + suffix_of(settings) + ("" if seeds == 1 else f"-seed{seed}")
                experiments[root / label] = dataclasses.replace(variant, name=label, seed=seed)
    return experiments


def split_names(given: Sequence[str] | str) -> list[str]:
    """Split names given as a sequence or as comma-separated text, and strip the blanks around them.

    Raises:
        ConfigError: for a name that is given twice.
    """
    parts = given.split(",") if isinstance(given, str) else given
    names = [name.strip() for name in parts if name.strip()]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"{duplicate!r} is named twice; name each method once, and give --seeds for several runs of it"
        )
    return names


def by_default(recipe: Recipe, experiment: Experiment) -> str:
    """Return the methods that are compared by default: names, separated by commas."""
    return recipe.compared or f"{type(experiment.algorithm).__name__},FedAvg,RandomMoE"


def compare(
    experiment: Experiment | str,
    algorithms: Sequence[str] | str = (),
    seeds: int = 1,
    jobs: int = 0,
    out: Path | str = "runs",
    progress: bool = False,
    sweep: Sequence[str] = (),
) -> "pd.DataFrame":
    """Run several methods on the same data, weights and seeds, each run in its own process, and compare them.

    Finished runs in `out` are kept and interrupted runs are resumed. The report is written to
    `<out>/<name>/report.html`, with report.csv and report.tex next to it; the returned frame holds its path in
    `attrs["report"]`.

    Args:
        experiment: an experiment, or the name of a recipe; a recipe also provides the settings of its rivals.
        algorithms: names, or one text with commas between them; the others are tested against the first. (): those of
            the recipe.
        seeds: runs per method, with seeds from experiment.seed on, >= 1.
        jobs: runs at a time; 0: as many as cores and free memory allow.
        progress: show bars.
        sweep: settings and their values, e.g. ["fit.lr=1e-4,1e-3"]; every method runs with each.

    Returns:
        One row per method, indexed by its name, with scores in [0, 1] per task and their mean, "_sd" over seeds, bytes,
        memory, seconds, and the paired test against the first; see `consilium.report.methods`.

    Raises:
        ConsiliumError: before any run starts if something cannot run, and later if a run fails.
    """
    if isinstance(experiment, str):
        recipe = find(experiment)
        experiment = recipe.make()
    else:
        template = experiment
        recipe = Recipe(template.name, lambda: template)
    names = split_names(algorithms) or split_names(by_default(recipe, experiment))
    root = Path(out) / experiment.name
    experiments = plan(recipe, experiment, names, seeds, root, sweep)
    console = Console(quiet=not progress)
    Comparison(console, experiments, jobs or at_a_time(list(experiments.values()))).run()
    return _frame(list(experiments), write_report(list(experiments), root / "report.html"))


def _frame(folders: Sequence[Path], report: Path) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(rows(methods(read_runs(folders)))).set_index("method")
    frame.attrs["report"] = str(report)
    return frame


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    Args:
        config: the experiment as JSON; `experiment` turns it back into an Experiment.
        summary: the result, as docs/run-directory.md describes it; None before the run has finished.
        experts: client -> block -> ids of the experts that it held last; {} for methods that do not choose.
        report: path of the report; the file exists once `consilium report` or the command line has written it.
    """

    folder: Path
    status: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    experts: Mapping[str, Mapping[str, tuple[int, ...]]]
    report: Path

    @property
    def experiment(self) -> Experiment:
        """Return the run's experiment.

        Raises:
            ConfigError: if the run's algorithm is not registered (import its module first).
        """
        return from_json(self.config)

    @property
    def scores(self) -> dict[str, float]:
        """Return the test score in [0, 1] per task and their "mean", of the last scored round; {} before the first."""
        return next((dict(r["scores"]) for r in reversed(list(RunDirectory(self.folder).rounds())) if r["scores"]), {})

    def rounds(self) -> "pd.DataFrame":
        """Return one row per round, indexed by round: scores (NaN if not tested), bytes, seconds, replies by fate."""
        import pandas as pd

        lines = [
            {
                "round": record["round"],
                "stage": record["stage"],
                **(record["scores"] or {}),
                "bytes_down": record["bytes_down"],
                "bytes_up": record["bytes_up"],
                **{f"seconds_{part}": seconds for part, seconds in record["seconds"].items()},
                "experts_mean": record["experts_mean"],
                **{outcome: record["ledger"][outcome] for outcome in ("ok", "error", "rejected", "missing")},
            }
            for record in RunDirectory(self.folder).rounds()
        ]
        return pd.DataFrame(lines, columns=None if lines else ["round"]).set_index("round")

    def clients(self) -> "pd.DataFrame":
        """Return one row per round and client that took part or was tested, indexed by both."""
        import pandas as pd

        lines = []
        for record in RunDirectory(self.folder).rounds():
            test = record["test"] or {}
            for client in sorted({*record["clients"], *test}):
                report = record["clients"].get(client, {})
                row = {key: value for key, value in report.items() if not isinstance(value, Mapping)}
                lines.append({"round": record["round"], "client": client, "test": test.get(client), **row})
        return pd.DataFrame(lines, columns=None if lines else ["round", "client"]).set_index(["round", "client"])


def load_run(folder: Path | str) -> Run:
    """Read a run directory, finished or not.

    Raises:
        CheckpointError: if the folder is not a run.
    """
    folder = Path(folder)
    directory = RunDirectory(folder)
    config = directory.config()
    summary, maps = directory.summary(), directory.structure()["rounds"]
    experts_by_client = maps[max(maps, key=int)] if maps else {}
    experts = {
        client: {block: tuple(ids) for block, ids in blocks.items()} for client, blocks in experts_by_client.items()
    }
    return Run(folder, config["status"], config["experiment"], summary, experts, folder / "report.html")
