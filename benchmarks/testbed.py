"""What choosing experts is worth: next-token loss in bits per byte on domains of code and text that really differ.

Three settings on the testbed of `consilium.data.code`, all from the shipped model `code-olmoe`:

    A   twelve clients, each with a public domain of its own, which the model knows
    B   twelve clients, each with a Dirichlet(0.3) mixture of the public domains
    C   eight private domains that are new to the model, three clients each, 4 to 12 kB of training text a client

A domain is new if the model without any limit has a higher loss on it than on any public domain: 2.10 to 2.90 bits per
byte of validation text, against at most 1.87. (The private domains cuda, cython, simd, yaml are not new in this sense.)

Every device can train 16 of the model's 64 experts. G is the model that a client is delivered in the end, S the best
one by its own validation data among what it was sent and what it made of that in each round: what early stopping makes
of every method, working alone included. The learning rate of each method is searched on validation data
of a seed that the table does not use, with the same tries for all. Differences are paired by seed; intervals are 95 %
t-intervals over seeds, and in C over domains as well.

    python benchmarks/testbed.py                       # everything; stops and continues as you like
    python benchmarks/testbed.py --settings C --seeds 1
    python benchmarks/testbed.py --search              # the learning rates, by validation data alone
    python benchmarks/testbed.py --table-only          # from the results there are

Writes benchmarks/results/testbed.md and testbed.json; runs go to --out. A cell that testbed.json holds for the same
experiment and the same model is not run again.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from cells import RESULTS, Result, finish, plan

from consilium.algorithms.affinitymoe import AffinityMoE
from consilium.algorithms.ditto import Ditto
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedopt import FedAdam
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.fedrep import FedRep
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.core import Algorithm
from consilium.data.code import CodeData
from consilium.experiment import Experiment
from consilium.machine import cores
from consilium.privacy import Privacy
from consilium.recipes.code import DEVICE, affinitymoe_code
from consilium.report.methods import half_width
from consilium.rundir import RunDirectory

NEW = ("metrics", "idna", "cmake", "json", "codecs", "doctest", "generated-c", "lexers")
SIZES = {"train": 8, "validation": 9, "test": 62}
SETTINGS = {
    "A": CodeData(("public",), 12, **SIZES),
    "B": CodeData(("public",), 12, "dirichlet", **SIZES),
    "C": CodeData(NEW, 24, **SIZES),
}
FEDMOE = FedMoE(stage1="forward", stage2=False, alpha=1.0)
METHODS: dict[str, Algorithm] = {
    "AffinityMoE": AffinityMoE(),
    "alone": AffinityMoE(likeness="self"),
    "FedMoE": FEDMOE,
    "randomMoE": RandomMoE(),
    "AffinityMoE, all alike": AffinityMoE(likeness="none"),
    "FedAvg, no limit": FedAvg(),
    "nested": AffinityMoE(choice="public", budget="even", likeness="none"),
    "nested, budget": AffinityMoE(choice="public", likeness="none"),
    "randomMoE, budget": AffinityMoE(choice="random", likeness="none"),
    "usage, even": AffinityMoE(choice="usage", budget="even", likeness="none"),
    "usage, budget": AffinityMoE(choice="usage", likeness="none"),
    "contribution, even": AffinityMoE(budget="even", likeness="none"),
    "AffinityMoE, even": AffinityMoE(budget="even"),
    "AffinityMoE, random": AffinityMoE(choice="random"),
    "random, even, likeness": AffinityMoE(choice="random", budget="even"),
    "alone, even": AffinityMoE(likeness="self", budget="even"),
    "AffinityMoE, coarse usage": AffinityMoE(),
    "AffinityMoE, noised usage": AffinityMoE(),
    "FedProx, budget": FedProx(experts="fit"),
    "FedAdam, budget": FedAdam(experts="fit"),
    "Ditto, budget": Ditto(experts="fit"),
    "FedRep, budget": FedRep(experts="fit", private="router"),
    "FedMoE, budget": FEDMOE,
    "FedMoE, alpha 0.9": replace(FEDMOE, alpha=0.9),
    "FedMoE, stage two": replace(FEDMOE, stage2=True),
    "FedMoE, both stages": FedMoE(),
    "HFedMoE": HFedMoE(),
    "HFedMoE, budget": HFedMoE(),
    "HFedMoE, beta 0": HFedMoE(beta=0.0),
    "HFedMoE, random choice": HFedMoE(select="random"),
    "HFedMoE, plain experts": HFedMoE(experts="plain"),
    "HFedMoE, plain routers": HFedMoE(router="plain"),
}
"""In the order in which they are run. "alone" is working alone with AffinityMoE's own sub-model, stopped early."""
UNLIMITED = ("FedAvg, no limit",)
LAYERS = (2.0, 1.0, 1.0, 1.0)
"""The layer budget of rivals that have no search of their own: the one that AffinityMoE finds in 14 of 15 runs."""
BUDGETED = (
    "FedProx, budget",
    "FedAdam, budget",
    "Ditto, budget",
    "FedRep, budget",
    "FedMoE, budget",
    "HFedMoE, budget",
)
PRIVACY = {
    "AffinityMoE, coarse usage": Privacy(usage="coarse"),
    "AffinityMoE, noised usage": Privacy(usage="noised", usage_noise=1.0),
}
NEAREST = {
    "nested": "nested, budget",
    "randomMoE, budget": "randomMoE",
    "usage, even": "FedMoE",
    "usage, budget": "FedMoE",
    "contribution, even": "AffinityMoE, all alike",
    "AffinityMoE, even": "AffinityMoE",
    "AffinityMoE, random": "AffinityMoE",
    "random, even, likeness": "AffinityMoE",
    "alone, even": "alone",
    "AffinityMoE, coarse usage": "AffinityMoE",
    "AffinityMoE, noised usage": "AffinityMoE",
    **{f"FedMoE, {part}": "FedMoE" for part in ("budget", "alpha 0.9", "stage two", "both stages")},
    **{
        f"HFedMoE, {part}": "HFedMoE"
        for part in ("budget", "beta 0", "random choice", "plain experts", "plain routers")
    },
}
"""Method -> the one whose searched rate it takes, where it has none of its own. The search found the same rate for all
methods that average all clients alike, and the same lower one for the two that do not."""
Cells = Mapping[str, Result]
GRID = (2.4e-3, 1.2e-3, 5e-4, 2e-4)
SEARCH_SEED = 100
ROUNDS = 6


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        settings: of A, B, C.
        methods: names as in the table; () all.
        seeds: runs per method and setting.
        search: search the learning rates of `methods` in `settings` and stop; they go to testbed_rates.json.
        out: where the runs go.
        jobs: runs at a time, one thread each.
        table_only: only make the table of the runs there are.
    """

    settings: tuple[str, ...] = tuple(SETTINGS)
    methods: tuple[str, ...] = ()
    seeds: int = 5
    search: bool = False
    out: Path = Path("runs/benchmark-testbed")
    jobs: int = cores()
    table_only: bool = False


def slug(method: str) -> str:
    """A method's name as a part of a run's."""
    return method.replace(", ", "-").replace(" ", "-")


def rates() -> dict[str, dict[str, float]]:
    """Setting -> method -> the learning rate that the search found; 6e-4 and nothing where it was not searched."""
    file = RESULTS / "testbed_rates.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def experiment(setting: str, method: str, seed: int, rate: float | None = None) -> Experiment:
    """One cell of the table, or of the search if a rate is given."""
    base, data = affinitymoe_code(), SETTINGS[setting]
    if rate is not None:
        data = replace(data, test=4)  # the search goes by validation data
    tuned = rates().get(setting, {}) or rates().get("C", {})
    found = tuned.get(method) or tuned.get(NEAREST.get(method, ""), base.fit.lr)
    name = f"{setting}-{slug(method)}-{seed}"
    return replace(
        base,
        name=name if rate is None else f"search-{setting}-{slug(method)}-{rate:g}",
        algorithm=METHODS[method],
        data=data,
        fit=replace(base.fit, lr=rate or found),
        sampling=replace(base.sampling, clients_per_round=data.clients),
        rounds=ROUNDS,
        evaluate_every=ROUNDS,
        memory=() if method in UNLIMITED else (DEVICE,),
        layers=LAYERS if method in BUDGETED else (),
        privacy=PRIVACY.get(method, Privacy()),
        seed=seed,
    )


def read(folder: Path) -> Result:
    """What the table needs of a finished run."""
    rounds = list(RunDirectory(folder).rounds())
    last = rounds[-1]
    peaks = [c["peak_bytes_model"] for r in rounds for c in r["clients"].values() if c["peak_bytes_model"]]
    saved = json.loads((folder / "config.json").read_text())
    return {
        "rate": saved["experiment"]["fit"]["lr"],
        "G": last["bits_per_byte"],
        "S": last["personal_bits_per_byte"],
        "accuracy": last["test"],
        "validation": statistics.mean(last["personal_validation"].values()),
        "megabytes": sum(r["bytes_down"] + r["bytes_up"] for r in rounds) / 1e6 / len(last["bits_per_byte"]),
        "peak_megabytes": max(peaks) / 1e6,
        "seconds": sum(r["seconds"]["round"] for r in rounds),
    }


def main(benchmark: Benchmark) -> None:
    """Run what is missing, then write the table."""
    benchmark = replace(benchmark, methods=benchmark.methods or tuple(METHODS))
    if benchmark.search:
        return search(benchmark)
    whole, wanted = plan(benchmark, SETTINGS, METHODS, METHODS, experiment)
    write(finish("testbed", whole, wanted, read, benchmark.jobs))


def search(benchmark: Benchmark) -> None:
    """Choose each method's learning rate by the mean over clients of the best validation loss, never by test data."""
    cells = {
        (setting, method, rate): experiment(setting, method, SEARCH_SEED, rate)
        for rate in GRID
        for setting in benchmark.settings
        for method in benchmark.methods
    }
    keep_best("testbed", cells, benchmark, rates())


def keep_best(
    name: str,
    cells: Mapping[tuple[str, str, float], Experiment],
    benchmark: Any,
    found: dict[str, dict[str, float]],
) -> None:
    """Run the cells of a search and write the best rates to results/<name>_rates.json, beside those found before.

    Args:
        cells: (setting, method, rate) -> experiment.
        benchmark: its `out` and `jobs`.
        found: setting -> method -> rate, of earlier searches.
    """
    table = {benchmark.out / cell.name: cell for cell in cells.values()}
    done = finish(f"{name}_search", table, list(table), read, benchmark.jobs)
    for setting, method in dict.fromkeys((setting, method) for setting, method, _ in cells):
        tried = {
            r: done[c.name]["validation"]
            for (s, m, r), c in cells.items()
            if (s, m) == (setting, method) and c.name in done
        }
        if tried:
            found.setdefault(setting, {})[method] = min(tried, key=tried.__getitem__)
            print(setting, method, {f"{rate:g}": round(loss, 4) for rate, loss in tried.items()}, flush=True)
    (RESULTS / f"{name}_rates.json").write_text(json.dumps(found, indent=1) + "\n")


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % t-interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ± {half_width(values):.3f}"


def difference(
    cells: Mapping[str, Result], setting: str, one: str, other: str, which: str, seeds: range
) -> list[float]:
    """one - other, seed by seed, in bits per byte: the mean over clients."""
    gaps = []
    for seed in seeds:
        a, b = (cells.get(f"{setting}-{slug(m)}-{seed}") for m in (one, other))
        if a and b:
            common = sorted(a[which].keys() & b[which].keys())
            gaps.append(statistics.mean(a[which][c] - b[which][c] for c in common))
    return gaps


def by_domain(cells: Cells, setting: str, one: str, other: str, which: str, seeds: range) -> list[float]:
    """one - other, domain by domain: the mean over its clients and all seeds."""
    gaps: dict[str, list[float]] = {}
    for seed in seeds:
        a, b = (cells.get(f"{setting}-{slug(m)}-{seed}") for m in (one, other))
        if a and b:
            for client in a[which].keys() & b[which].keys():
                gaps.setdefault(client.rpartition("-")[0], []).append(a[which][client] - b[which][client])
    return [statistics.mean(values) for _, values in sorted(gaps.items())]


def write(cells: Cells) -> None:
    """The Markdown table of all cells there are."""
    lines = [
        "# The testbed: what choosing experts is worth",
        "",
        "Made by `python benchmarks/testbed.py`; its first lines say what is compared. Bits per byte of test text,",
        "lower is better: the mean over clients, then mean and 95 % t-interval over seeds. MB: traffic per client.",
        "",
    ]
    for setting in SETTINGS:
        lines += section(cells, setting, METHODS, domains=setting == "C")
    text = "\n".join(lines)
    (RESULTS / "testbed.md").write_text(text)
    print(text)


def section(cells: Cells, setting: str, methods: Iterable[str], domains: bool) -> list[str]:
    """The part of a table about one setting; empty without runs.

    Args:
        methods: in the order of the rows. domains: whether differences are shown over domains as well.
    """
    seeds = range(100)
    runs = {m: [cells[n] for s in seeds if (n := f"{setting}-{slug(m)}-{s}") in cells] for m in methods}
    runs = {m: found for m, found in runs.items() if found}
    if not runs:
        return []
    lines = [
        f"## Setting {setting}",
        "",
        "| method | seeds | rate | G | S | worst tenth, S | accuracy, % | MB | peak MB | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, found in runs.items():
        means = [[statistics.mean(run[w].values()) for run in found] for w in ("G", "S")]
        worst = [statistics.mean(sorted(r["S"].values())[-max(len(r["S"]) // 10, 1) :]) for r in found]
        accuracy = statistics.mean(100 * statistics.mean(run["accuracy"].values()) for run in found)
        used = "/".join(f"{rate:g}" for rate in sorted({run["rate"] for run in found}))
        lines.append(
            f"| {method} | {len(found)} | {used} | {interval(means[0])[1:]} | {interval(means[1])[1:]} "
            f"| {statistics.mean(worst):.3f} | {accuracy:.1f} "
            f"| {statistics.mean(r['megabytes'] for r in found):.0f} "
            f"| {statistics.mean(r['peak_megabytes'] for r in found):.0f} "
            f"| {statistics.mean(r['seconds'] for r in found):.0f} |"
        )
    lines += ["", "Differences, paired by seed (negative: the first is better):", ""]
    lines += [f"| | G | S |{' S, over domains |' if domains else ''}", "|---|---|---|" + ("---|" if domains else "")]
    compared = [("AffinityMoE", m) for m in runs if m != "AffinityMoE"] + [("FedMoE", "randomMoE")]
    for one, other in compared:
        gaps = {w: difference(cells, setting, one, other, w, seeds) for w in ("G", "S")}
        if gaps["G"]:
            row = f"| {one} - {other} | {interval(gaps['G'])} | {interval(gaps['S'])} |"
            found_domains = interval(by_domain(cells, setting, one, other, "S", seeds)) if domains else ""
            lines.append(row + (f" {found_domains} |" if domains else ""))
    return [*lines, ""]


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
