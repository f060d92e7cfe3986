"""Rules for adapters, and methods that train mixtures of adapters: next-token loss in bits per byte at equal bytes.

Eight clients with one private domain each (`consilium.data.code`), all from the shipped model
`code-olmoe`, whose experts are trained by adapters:

    unequal ranks   2, 4, .. 16, each client's largest by its memory: stack, svd, pad, pad_norm, rank_partition,
                    Standalone (with the rules' ranks)
    one rank        8, near the mean of the others, without a limit on memory: mean, ffa, alternate, share_a,
                    residual; and mean at rank 2, the largest that all devices could hold
    mixtures        adapters of rank 8 on query and value projections, without a limit: FedAMoLE, CoMiGS, FedLEASE
    FLAME           rank 8, one active expert of two for half of the clients

Every method runs the same rounds at one learning rate. Scores are read at equal bytes: a method's last round until
which it has sent no more than `BUDGET` megabytes per client, up and down; "rounds" says how many that were. S is the
best model of a client by its own validation data. Intervals are 95 % t-intervals over seeds of differences paired by
seed. Rank collapse: effective rank of the merged updates in the first and the last round, and their energy beyond the
smallest rank.

    python benchmarks/adapters.py                       # everything; stops and continues as you like
    python benchmarks/adapters.py --methods svd,pad --seeds 1
    python benchmarks/adapters.py --table-only          # from the results there are

Writes benchmarks/results/adapters.md and adapters.json; runs go to --out.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tyro
from cells import RESULTS, Result, finish, interval, plan

from consilium.algorithms.comigs import CoMiGS
from consilium.algorithms.fedamole import FedAMoLE
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedlease import FedLEASE
from consilium.algorithms.flame import FLAME
from consilium.algorithms.standalone import Standalone
from consilium.core import Algorithm
from consilium.data.code import CodeData
from consilium.experiment import Experiment
from consilium.machine import cores
from consilium.moe.lora import Lora
from consilium.recipes.code import affinitymoe_code
from consilium.rundir import RunDirectory

PRIVATE = ("cuda", "cython", "yaml", "simd", "metrics", "doctest", "lexers", "generated-c")
RANKS = (2, 4, 6, 8, 10, 12, 14, 16)
RANK = 8
RANK_MEASURES = ("effective_rank", "energy_beyond")
RATE = 3e-3
ROUNDS = 5
BUDGET = 14.0
"""Megabytes per client."""
ONE_RANK = ("mean", "ffa", "alternate", "share_a", "residual")
ANY_RANK = ("stack", "svd", "pad", "pad_norm", "rank_partition")
MIXTURES: dict[str, Algorithm] = {
    "FedAMoLE": FedAMoLE(E=12, r=RANK, max_experts=6),
    "CoMiGS": CoMiGS(r=RANK),
    "FedLEASE": FedLEASE(r=RANK, warmup=2),
}
METHODS = ("mean", *ANY_RANK, "Standalone", "FLAME", *MIXTURES, "mean, rank 2", *ONE_RANK[1:])
"""In the order in which they are run."""


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        methods: names as in the table; () all.
        seeds: runs per method.
        out: where the runs go.
        jobs: runs at a time, one thread each.
        table_only: only make the table of the runs there are.
    """

    methods: tuple[str, ...] = ()
    seeds: int = 3
    out: Path = Path("runs/benchmark-adapters")
    jobs: int = cores()
    table_only: bool = False
    settings: tuple[str, ...] = ("C",)


def base() -> Experiment:
    """What all cells share."""
    made = affinitymoe_code()
    return replace(
        made,
        data=CodeData(PRIVATE, 8, train=8, validation=6, test=16),
        fit=replace(made.fit, lr=RATE, lora=Lora(rank=max(RANKS), rule="svd", ranks="memory")),
        algorithm=FedAvg(),
        sampling=replace(made.sampling, clients_per_round=8),
        rounds=ROUNDS,
        evaluate_every=1,
        memory=(),
    )


@cache
def memory() -> tuple[str, ...]:
    """Device memory with which the clients have the ranks of `RANKS`."""
    made = base()
    setup = made.setup([("next", ())])
    return tuple(f"{setup.with_rank(rank).footprint(setup.model.counts).total}B" for rank in RANKS)


def experiment(setting: str, method: str, seed: int) -> Experiment:
    """One cell of the table."""
    made = replace(base(), name=f"{method.replace(', ', '-').replace(' ', '-')}-{seed}", seed=seed)
    if method in MIXTURES:
        return replace(made, algorithm=MIXTURES[method], fit=replace(made.fit, lora=Lora()))
    if method == "FLAME":
        return replace(made, algorithm=FLAME(k=(1, 2)), fit=replace(made.fit, lora=Lora(rank=RANK)))
    if method in ANY_RANK or method == "Standalone":
        rule = "svd" if method == "Standalone" else method
        algorithm = Standalone() if method == "Standalone" else FedAvg()
        lora = Lora(rank=max(RANKS), rule=rule, ranks="memory")
        return replace(made, algorithm=algorithm, fit=replace(made.fit, lora=lora), memory=memory())
    rule, _, rank = method.partition(", rank ")
    return replace(made, fit=replace(made.fit, lora=Lora(rank=int(rank or RANK), rule=rule)))


def read(folder: Path) -> Result:
    """What the table needs of a finished run: per round the megabytes per client so far, the scores and the ranks."""
    rounds, spent = [], 0.0
    for record in RunDirectory(folder).rounds():
        clients = len(record["test"])
        spent += (record["bytes_down"] + record["bytes_up"]) / 1e6 / clients
        personal = record["personal_bits_per_byte"]
        rounds.append(
            {
                "megabytes": spent,
                "G": statistics.mean(record["bits_per_byte"].values()),
                "S": statistics.mean(personal.values()),
                "worst": max(personal.values()),
                "seconds": record["seconds"]["round"],
                **{name: record["server"][name] for name in RANK_MEASURES if name in record["server"]},
            }
        )
    return {"rounds": rounds}


def within(run: Result) -> list[dict[str, float]]:
    """The rounds of a run until which a client has sent no more than the budget; the first one in any case."""
    return [r for r in run["rounds"] if r["megabytes"] <= BUDGET] or run["rounds"][:1]


def main(benchmark: Benchmark) -> None:
    """Run what is missing, then write the table."""
    whole, wanted = plan(benchmark, ("C",), METHODS, METHODS, experiment)
    write(finish("adapters", whole, wanted, read, benchmark.jobs))


def write(cells: Mapping[str, Result]) -> None:
    """The Markdown table of all cells there are."""
    found = {}
    for method in METHODS:
        names = {seed: experiment("C", method, seed).name for seed in range(10)}
        found[method] = {seed: cells[name] for seed, name in names.items() if name in cells}
    lines = [
        "# Rules for adapters at equal bytes",
        "",
        "Made by `python benchmarks/adapters.py`; its first lines say what is compared. Bits per byte of test text,",
        f"lower is better: the mean over eight clients, then over seeds. Read at {BUDGET:g} MB per client; one",
        "learning rate for all, which was not searched. A difference is minus what `mean` at rank 8 has: mean and 95 %",
        "t-interval over seeds.",
        "",
        "| method | seeds | rounds | MB | G | S | worst client, S | G - mean | S - mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        if runs:
            last = {seed: within(run)[-1] for seed, run in runs.items()}
            counts = statistics.mean(len(within(run)) for run in runs.values())
            means = {key: statistics.mean(r[key] for r in last.values()) for key in ("megabytes", "G", "S", "worst")}
            gaps = [_gaps(last, found["mean"], key) for key in "GS"]
            lines.append(
                f"| {method} | {len(runs)} | {counts:g} of {ROUNDS} | {means['megabytes']:.1f} | {means['G']:.3f} "
                f"| {means['S']:.3f} | {means['worst']:.3f} | {gaps[0]} | {gaps[1]} |"
            )
    lines += [
        "",
        "## Rank collapse",
        "",
        "Of what the server merged, over all adapted matrices: the effective rank, and the share of energy beyond the",
        "smallest rank that took part (2 with unequal ranks; with one rank nothing is beyond). First and last round.",
        "",
        "| method | effective rank, first | last | energy beyond, first | last |",
        "|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        told = [[r for r in run["rounds"] if "effective_rank" in r] for run in runs.values()]
        told = [rounds for rounds in told if rounds]
        if told:
            values = [
                statistics.mean(rounds[place][name] for rounds in told)
                for name in ("effective_rank", "energy_beyond")
                for place in (0, -1)
            ]
            lines.append(f"| {method} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.3f} | {values[3]:.3f} |")
    text = "\n".join([*lines, ""])
    (RESULTS / "adapters.md").write_text(text)
    print(text)


def _gaps(last: Mapping[int, Mapping[str, float]], reference: Mapping[int, Result], key: str) -> str:
    """The difference to the reference, seed by seed."""
    gaps = [r[key] - within(reference[seed])[-1][key] for seed, r in last.items() if seed in reference]
    return interval(gaps) if gaps else "-"


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
