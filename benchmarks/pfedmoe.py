"""pFedMoE, its ablations and its rivals on Fashion-MNIST: model-heterogeneous clients, unequal data.

Settings: 10 clients that all take part in every round, or 100 of which 10 do; each client has 2 of the 10 classes
(pathological, shares from U(0.4, 0.6)) or a Dirichlet(0.3) share of every class. Client k has CNN-(k mod 5 + 1) of the
paper's five; with --homogeneous all have CNN-1, and FedAvg and FedProx run too. The data is sub-sampled so that the
whole table takes about three hours on 2 cores. All methods begin with the same weights and see the same batches.

    python benchmarks/pfedmoe.py --data fashion_mnist.npz                  # stops and continues as you like
    python benchmarks/pfedmoe.py --data fashion_mnist.npz --settings N10-pathological --methods pFedMoE --seeds 1
    python benchmarks/pfedmoe.py --data fashion_mnist.npz --table-only      # from the results there are

--data takes any .npz with x_train, y_train, x_test, y_test whose images have 16 pixels a side or more.
Writes benchmarks/results/pfedmoe.md and pfedmoe.json; runs go to --out. A cell that pfedmoe.json holds for the same
experiment and the same file is not run again.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from cells import RESULTS, Result, finish, plan, spread

from consilium.algorithms.fd import FD
from consilium.algorithms.fedapen import FedAPEN
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedgh import FedGH
from consilium.algorithms.fedkd import FedKD
from consilium.algorithms.fedmrl import FedMRL
from consilium.algorithms.fedproto import FedProto
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.fedssa import FedSSA
from consilium.algorithms.fedtgp import FedTGP
from consilium.algorithms.fml import FML
from consilium.algorithms.lgfedavg import LGFedAvg
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.algorithms.standalone import Standalone
from consilium.core import Algorithm, Sampling
from consilium.data.arrays import ImageData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.machine import cores
from consilium.models.cohort import Cohort
from consilium.recipes.digits import SMALL_FIT
from consilium.rundir import RunDirectory

SETTINGS = {f"N{n}-{how}": (n, how) for n in (10, 100) for how in ("pathological", "dirichlet")}
SIZES = {10: (6000, 20), 100: (12000, 60)}
"""Clients -> examples dealt for training and validation (and as many at most for test), rounds."""
METHODS: dict[str, Algorithm] = {
    "pFedMoE": pFedMoE(),
    "pFedMoE static": pFedMoE(mixing="static"),
    "pFedMoE shared": pFedMoE(mixing="shared"),
    "pFedMoE local": pFedMoE(mixing="local"),
    "pFedMoE batch norm": pFedMoE(norm="batch"),
    "Standalone": Standalone(),
    "LG-FedAvg": LGFedAvg(),
    "FedProto": FedProto(),
    "FedTGP": FedTGP(),
    "FedGH": FedGH(),
    "FD": FD(),
    "FML": FML(),
    "FedKD": FedKD(),
    "FedAPEN": FedAPEN(),
    "FedMRL": FedMRL(),
    "FedSSA": FedSSA(),
}
HOMOGENEOUS: dict[str, Algorithm] = {"FedAvg": FedAvg(), "FedProx": FedProx()}


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        data: Fashion-MNIST as .npz.
        settings: of N10-pathological, N10-dirichlet, N100-pathological, N100-dirichlet.
        methods: names as in the table; () all.
        seeds: runs per method and setting.
        homogeneous: CNN-1 for all clients.
        lr: learning rate of every part of every method.
        rounds: instead of the settings' own, 0: those.
        out: where the runs go.
        jobs: runs at a time, one thread each.
        table_only: only make the table of the runs there are.
    """

    data: Path
    settings: tuple[str, ...] = tuple(SETTINGS)
    methods: tuple[str, ...] = ()
    seeds: int = 3
    homogeneous: bool = False
    lr: float = 0.1
    rounds: int = 0
    out: Path = Path("runs/benchmark-pfedmoe")
    jobs: int = cores()
    table_only: bool = False


def experiment(benchmark: Benchmark, setting: str, method: str, seed: int) -> Experiment:
    """One cell of the table."""
    clients, how = SETTINGS[setting]
    examples, rounds = SIZES[clients]
    kind = "homogeneous-" if benchmark.homogeneous else ""
    return Experiment(
        name=f"{kind}{setting}-{method.replace(' ', '-')}-{seed}",
        algorithm=(METHODS | HOMOGENEOUS)[method],
        data=ImageData(benchmark.data, partition=how, clients=clients, alpha=0.3, examples=examples),
        model=Cohort(("cnn-1",)) if benchmark.homogeneous else Cohort(),
        fit=Fit(lr=benchmark.lr, head_lr=benchmark.lr, batch_size=32, **SMALL_FIT),
        sampling=Sampling(10),
        rounds=benchmark.rounds or rounds,
        evaluate_every=10,
        seed=seed,
    )


def main(benchmark: Benchmark) -> None:
    """Run what is missing, then write the table."""
    methods = (*METHODS, *(HOMOGENEOUS if benchmark.homogeneous else ()))
    whole, wanted = plan(benchmark, SETTINGS, methods, methods, partial(experiment, benchmark))
    write(finish("pfedmoe", whole, wanted, read, benchmark.jobs), benchmark)


def read(folder: Path) -> Result:
    """What the table needs of one run."""
    summary = json.loads((folder / "summary.json").read_text())
    scored = [record["scores"]["mean"] for record in RunDirectory(folder).rounds() if record["scores"]]
    return {
        "mean": 100 * summary["mean"],
        "best": 100 * max(scored),
        "paper": 100 * summary["best_round_before_aggregation"],
        "clients": {client: 100 * told["test"] for client, told in summary["clients"].items()},
        "megabytes": (summary["bytes_down"] + summary["bytes_up"]) / 1e6,
        "seconds": summary["seconds"]["total"],
        "rounds": summary["rounds"],
    }


def table(setting: str, methods: dict[str, list[dict]]) -> list[str]:
    """One setting as Markdown lines; the gain over Standalone is client by client, on the seeds that both have."""
    lines = [
        f"## {setting}",
        "",
        "| method | accuracy | clients above Standalone | paper's metric | traffic MB | seconds | rounds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = methods.get("Standalone", [])
    for method, runs in methods.items():
        both = list(zip(runs, alone, strict=False))
        pairs = [(run["clients"][c], base["clients"][c]) for run, base in both for c in base["clients"]]
        above = f"{sum(a > b for a, b in pairs)} of {len(pairs)}" if pairs and method != "Standalone" else "-"
        lines.append(
            f"| {method} | {spread([r['mean'] for r in runs])} | {above} | {spread([r['paper'] for r in runs])} "
            f"| {spread([r['megabytes'] for r in runs], 0)} | {spread([r['seconds'] for r in runs], 0)} "
            f"| {runs[0]['rounds']} | {len(runs)} |"
        )
    return [*lines, ""]


def write(cells: dict[str, dict], benchmark: Benchmark) -> None:
    """The table of the finished cells as Markdown."""
    names = {
        (setting, method): [experiment(benchmark, setting, method, seed).name for seed in range(benchmark.seeds)]
        for setting in SETTINGS
        for method in METHODS | (HOMOGENEOUS if benchmark.homogeneous else {})
    }
    finished = {place: [cells[n] for n in members if n in cells] for place, members in names.items()}
    lines = [
        "# pFedMoE on Fashion-MNIST",
        "",
        f"Made by `python benchmarks/pfedmoe.py`{' --homogeneous' if benchmark.homogeneous else ''}, learning rate "
        f"{benchmark.lr:g} for all. Accuracy in percent, mean over all",
        "clients of the model each would deploy after the last round, ± standard deviation over seeds. The paper's",
        "metric: before aggregation, over the clients of a round, of all rounds the best, so chosen by the test data.",
        "Seconds are of one run on one core of whatever machine it ran on, with whatever else ran there.",
        "",
        f"Finished: {len(cells)} of {sum(map(len, names.values()))} runs.",
        "",
    ]
    for setting in SETTINGS:
        methods = {method: runs for (place, method), runs in finished.items() if place == setting and runs}
        if methods:
            lines += table(setting, methods)
    (RESULTS / "pfedmoe.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
