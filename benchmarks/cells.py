"""What the benchmarks of methods share: cells (one run each) that are kept under a digest, and the words of a table."""

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from consilium.errors import ConsiliumError
from consilium.experiment import Experiment
from consilium.moe.build import ModelSource
from consilium.report.methods import half_width
from consilium.rundir import RunDirectory
from consilium.watch import Comparison

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


@cache
def contents(path: Path) -> str:
    """SHA-256 of a file; the same for many cells, so read once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def essence(value: Any) -> Any:
    """A dataclass as JSON without the fields at their defaults, so that one which is added later changes no digest;
    a file is its contents, wherever it lies. Whoever changes a default runs the tables anew."""
    if isinstance(value, Path):
        return contents(value)
    if not dataclasses.is_dataclass(value):
        return [essence(item) for item in value] if isinstance(value, tuple) else value
    fields = {"type": type(value).__name__}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if own != default:
            fields[field.name] = essence(own)
    return fields


def digest(cell: Experiment) -> str:
    """What a result belongs to: the experiment, the data files it names and the weights it started from."""
    weights = contents(Path(cell.model.location) / "model.safetensors") if isinstance(cell.model, ModelSource) else ""
    return hashlib.sha256((json.dumps(essence(cell)) + weights).encode()).hexdigest()[:16]


def plan(
    benchmark: Any,
    settings: Collection[str],
    methods: Collection[str],
    by_default: Collection[str],
    make: Callable[[str, str, int], Experiment],
) -> tuple[dict[Path, Experiment], list[Path]]:
    """The cells of a whole table by run directory, and the directories of those to run: what `finish` takes.

    Seed by seed, so that an early stop leaves whole tables with fewer seeds.

    Args:
        benchmark: its `settings`, `methods` (empty: `by_default`), `seeds`, `out` and `table_only`.
        make: (setting, method, seed) -> cell.
    """
    whole, wanted = {}, []
    for seed in range(benchmark.seeds):
        for setting in settings:
            for method in methods:
                cell = make(setting, method, seed)
                whole[folder := benchmark.out / cell.name] = cell
                if setting in benchmark.settings and method in (benchmark.methods or by_default):
                    wanted.append(folder)
    return whole, [] if benchmark.table_only else wanted


def finish(
    name: str,
    table: Mapping[Path, Experiment],
    wanted: Collection[Path],
    read: Callable[[Path], Result],
    jobs: int,
) -> dict[str, Result]:
    """Run the wanted cells of the table that results/<name>.json lacks, keep them there, and return by their names all
    cells of the table that are up to date. An interrupted benchmark keeps what is finished; of a finished run all stays
    but the states of its clients.

    Args:
        table: run directory -> cell. wanted: directories of those to run, none to make the table alone.
    """
    file = RESULTS / f"{name}.json"
    cells = json.loads(file.read_text()) if file.is_file() else {}
    key = {folder: digest(cell) for folder, cell in table.items()}
    missing = {f: table[f] for f in wanted if cells.get(table[f].name, {}).get("digest") != key[f]}

    def tidy(name: str, record: Mapping[str, Any]) -> None:
        """After each round of anybody: client states of runs that are over go, most of what a table writes."""
        for folder in missing:
            if (folder / "summary.json").exists():
                shutil.rmtree(folder / "clients", ignore_errors=True)

    try:
        Comparison(Console(), missing, jobs, rounded=tidy).run()
    except ConsiliumError as error:  # the table says of how many seeds it is
        print(error, flush=True)
    finally:
        for folder, cell in missing.items():
            if (folder / "summary.json").exists():
                cells[cell.name] = {"digest": key[folder], **read(folder)}
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(cells, indent=1))
    fresh = {cell.name for f, cell in table.items() if cells.get(cell.name, {}).get("digest") == key[f]}
    return {name: cells[name] for name in fresh}


def read_run(folder: Path) -> Result:
    """What every table needs of a finished run: scores in percent, bytes, memory, experts, seconds.

    tested: (round, bytes spent until then, mean score in [0, 1]) for every round with a test.
    """
    summary = json.loads((folder / "summary.json").read_text())
    curve, spent = [], 0
    for record in RunDirectory(folder).rounds():
        spent += record["bytes_down"] + record["bytes_up"]
        if record["scores"]:
            curve.append((record["round"], spent, record["scores"]["mean"]))
    peaks = [c["peak_bytes_model"] for c in summary["clients"].values() if c["peak_bytes_model"]]
    return {
        "mean": 100 * summary["mean"],
        "tested": curve,
        "gigabytes": spent / 1e9,
        "peak_megabytes": max(peaks) / 1e6,
        "mean_megabytes": statistics.mean(peaks) / 1e6,
        "experts": summary["experts"],
        "coverage": summary["coverage"],
        "seconds": summary["seconds"]["total"],
    }


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def rounds_to(runs: list[Result], target: float) -> str:
    """Mean round in which the target (a score in [0, 1]) was first reached; how many seeds if not all did."""
    first = [next((r for r, _, score in run["tested"] if score >= target), None) for run in runs]
    reached = [r for r in first if r is not None]
    if not reached:
        return "never"
    return f"{statistics.mean(reached):.0f}" + ("" if len(reached) == len(runs) else f" ({len(reached)}/{len(runs)})")


def pairs(
    one: str,
    names: Mapping[tuple[str, str], list[str]],
    cells: Mapping[str, Result],
    settings: Collection[str],
    methods: Collection[str],
) -> list[str]:
    """A method's mean minus each other's on the same setting and seed, in points, as Markdown lines.

    Args:
        names: (setting, method) -> names of its cells, seed by seed. cells: those there are.
    """
    lines = [
        f"## {one} against each, seed by seed",
        "",
        f"{one}'s mean minus the other's on the same setting and seed, in points: mean ± standard deviation over",
        "seeds. All: seeds are the unit; the mean over the settings is taken of each seed, then the mean and the 95 %",
        f"interval of a paired t-test over seeds. Ahead: seeds in which {one} is.",
        "",
        f"| {one} minus | {' | '.join(settings)} | all | ahead |",
        "|---|" + "---|" * (len(settings) + 2),
    ]
    for method in [method for method in methods if method != one]:
        gaps = {
            setting: {
                seed: cells[own]["mean"] - cells[other]["mean"]
                for seed, (own, other) in enumerate(zip(names[setting, one], names[setting, method], strict=True))
                if own in cells and other in cells
            }
            for setting in settings
        }
        whole = sorted(set.intersection(*(set(values) for values in gaps.values()))) if gaps else []
        by_seed = [statistics.mean(gaps[setting][seed] for setting in settings) for seed in whole]
        if by_seed:
            lines.append(
                f"| {method} | {' | '.join(spread(list(values.values())) for values in gaps.values())} "
                f"| {interval(by_seed)} | {sum(gap > 0 for gap in by_seed)}/{len(by_seed)} |"
            )
    return [*lines, ""]


def interval(gaps: Collection[float]) -> str:
    """Return the mean of paired differences and its 95 % t-interval over seeds; one seed has no interval."""
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.2f} (one seed)"
    half = half_width(list(gaps))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
