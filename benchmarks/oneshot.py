"""A federation of one exchange against many rounds: bits per byte by domain, and bytes sent, on the testbed of code.

Six sites, each with one private domain that the shipped model has never seen. Every method starts from `code-olmoe` and
takes as many local steps: a site trains `PASSES` passes over its text; FedAvg and FedMoE take as many rounds of one
pass; joint training takes as many passes over all texts together. Sites and joint training keep the best pass by
validation loss. Learning rates are searched on validation data of a seed that the table does not use, with three tries
for each.

    python benchmarks/oneshot.py --search        # the learning rates
    python benchmarks/oneshot.py                 # everything that is missing; stops and continues as you like
    python benchmarks/oneshot.py --table-only

Writes benchmarks/results/oneshot.md and oneshot.json; packages and runs go to --out, and are not made again.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from cells import RESULTS

from consilium.algorithms.fedavg import FedAvg
from consilium.certificates import site_key
from consilium.core import derive_seed
from consilium.data.code import CodeData
from consilium.data.task import ClientData
from consilium.engine.checkpoint import write_atomic
from consilium.experiment import Experiment
from consilium.loop import run
from consilium.moe.build import ModelSource
from consilium.oneshot.base import Base
from consilium.oneshot.build import Building, assemble
from consilium.oneshot.evaluate import Domains, alone, ensemble, fit_router
from consilium.oneshot.package import Package, read, to_bytes
from consilium.oneshot.train import Training, train
from consilium.recipes.code import DEVICE, FEDMOE, affinitymoe_code
from consilium.report.methods import half_width
from consilium.rundir import RunDirectory
from consilium.training import fit

DOMAINS = ("cuda", "doctest", "lexers", "metrics", "simd", "yaml")
PASSES, SEARCH_SEED, SEARCHED = 6, 100, 2
"""Passes over a site's text; the seed of the search, and how many of its sites train in it."""
DATA = CodeData(DOMAINS, len(DOMAINS), train=12, validation=5, test=8)
PUBLIC = CodeData(("cpp-aten", "py-scipy", "stubs", "prose"), 4, train=4, validation=4, test=4)
"""Public rows: what the hub's operator has, 4 kB of some public domains."""
PARTS = {
    "adapter": Training("gated", rank=16, targets="both", gate_steps=12, moments=True, save_every=6),
    "expert": Training("expert", copies=2, moments=True, save_every=6),
}
GRID = {
    "adapter": (1e-3, 3e-3, 1e-2),
    "expert": (3e-4, 1e-3, 3e-3),
    "joint": (3e-4, 6e-4, 1.2e-3),
    "FedAvg": (3e-4, 6e-4, 1.2e-3),
    "FedMoE": (3e-4, 6e-4, 1.2e-3),
}
FEDERATED = {"FedAvg": FedAvg(), "FedMoE": FEDMOE}
ROUTERS = {
    "adapter": (
        Building("uniform"),
        Building("arrow"),
        Building("phatgoose"),
        Building("ridge"),
        Building("lorahub", tries=12),
    ),
    "expert": (Building("flexolmo"), Building("ridge")),
}
Cell = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        seeds: runs per method. search: search the learning rates and stop. table_only: make the table of what there is.
        out: where packages and runs go.
    """

    seeds: int = 3
    search: bool = False
    table_only: bool = False
    out: Path = Path("runs/benchmark-oneshot")


class Cells:
    """Results by name, written after each, so that an interrupted benchmark keeps what is finished."""

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, Cell] = json.loads(file.read_text()) if file.is_file() else {}

    def get(self, name: str, make: Callable[[], Cell]) -> Cell:
        """Return a result, made now if it is missing."""
        if name not in self.found:
            began = time.process_time()
            self.found[name] = {**make(), "cpu_seconds": time.process_time() - began}
            write_atomic(self.file, json.dumps(self.found, indent=1).encode())
            print(name, {k: v for k, v in self.found[name].items() if isinstance(v, float)}, flush=True)
        return self.found[name]


def experiment(seed: int, lr: float, name: str = "oneshot") -> Experiment:
    """All sites of a seed, as they train."""
    base = affinitymoe_code()
    return replace(
        base, name=name, data=DATA, fit=replace(base.fit, lr=lr, personal="none"), memory=(), seed=seed, rounds=PASSES,
        sampling=replace(base.sampling, clients_per_round=len(DOMAINS)), evaluate_every=PASSES,
    )  # fmt: skip


def package(benchmark: Benchmark, kind: str, seed: int, site: str, lr: float, data: ClientData) -> Package:
    """A site's package, from its file if it has been made."""
    folder = benchmark.out / f"{kind}-{seed}-{lr:g}"
    path = folder / f"{site}.safetensors"
    if not path.exists():
        made = train(experiment(seed, lr), site, PARTS[kind], folder / f"state-{site}", data)
        write_atomic(path, to_bytes(made.signed(site_key(folder / "key"))))
    return read(path)


# --- the search -------------------------------------------------------------------------------------------------------


def search(benchmark: Benchmark, cells: Cells) -> None:
    """Try every learning rate on the validation data of some sites."""
    for method, grid in GRID.items():
        for lr in grid:
            cells.get(f"search {method} {lr:g}", partial(tried, benchmark, method, lr))


def tried(benchmark: Benchmark, method: str, lr: float) -> Cell:
    """The mean validation loss of one try, nats per token."""
    few = replace(DATA, domains=DOMAINS[:SEARCHED], clients=SEARCHED)
    made = replace(
        experiment(SEARCH_SEED, lr), data=few, sampling=replace(affinitymoe_code().sampling, clients_per_round=SEARCHED)
    )
    clients = few.load(SEARCH_SEED).clients
    if method in PARTS:
        scores = [
            package(benchmark, method, SEARCH_SEED, site, lr, data).card["validation"]["own"]
            for site, data in clients.items()
        ]
        return {"validation": statistics.mean(scores)}
    domains = Domains(made, clients, "validation")
    if method == "joint":
        return {"validation": joint(made, domains)[1]}
    return {"validation": federated(benchmark, made, method, f"search-{method}-{lr:g}")["validation"]}


def rate(cells: Cells, method: str) -> float:
    """The learning rate that the search found."""
    found = {lr: cells.found.get(f"search {method} {lr:g}", {}).get("validation", math.inf) for lr in GRID[method]}
    return min(found, key=found.__getitem__)


# --- the methods ------------------------------------------------------------------------------------------------------


def joint(made: Experiment, validation: Domains) -> tuple[torch.nn.Module, float]:
    """Train all parameters on all texts; returns the best pass by the mean validation score, and that score."""
    base = Base(made.model)
    model = base.model().requires_grad_(True)
    training = replace(validation, split="train")
    rows = list(training.rows.values())
    whole = replace(rows[0], sources=[s for r in rows for s in r.sources], targets=[t for r in rows for t in r.targets])
    context, best, state = training.context(next(iter(training.data))), math.inf, {}
    for number in range(made.rounds):
        here = replace(context, seed=derive_seed(made.seed, "joint", number))
        fit(model, whole, made.fit, here, epochs=1)
        score = statistics.mean(validation.scores(model).values())
        if score < best:
            best, state = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model, best


def federated(benchmark: Benchmark, made: Experiment, method: str, name: str) -> Cell:
    """FedAvg or FedMoE: scores of the delivered models, and bytes of one site in both directions."""
    folder = benchmark.out / name
    if not (folder / "summary.json").exists():
        memory = (DEVICE,) if method == "FedMoE" else ()
        run(replace(made, name=name, algorithm=FEDERATED[method], memory=memory), folder)
    rounds = list(RunDirectory(folder).rounds())
    last = rounds[-1]["clients"].values()
    return {
        "scores": rounds[-1]["bits_per_byte"],
        "validation": statistics.mean(told["bits_per_byte"] for told in last),
        "bytes": sum(r["bytes_down"] + r["bytes_up"] for r in rounds) / len(rounds[-1]["bits_per_byte"]),
    }


def seed_cells(benchmark: Benchmark, cells: Cells, seed: int) -> None:
    """Run what is missing of a seed."""
    made = experiment(seed, 1e-3)
    clients = DATA.load(seed).clients
    test = Domains(made, clients)
    base = Base(ModelSource("code-olmoe", form="text-to-text"))
    cells.get(f"{seed} public", lambda: {"scores": test.scores(base.model())})
    for kind in PARTS:
        lr = rate(cells, kind)
        packages = {site: package(benchmark, kind, seed, site, lr, data) for site, data in clients.items()}
        one_exchange(cells, seed, kind, base, packages, test)
    lr = rate(cells, "joint")

    def jointly() -> Cell:
        model, _ = joint(replace(made, fit=replace(made.fit, lr=lr)), replace(test, split="validation"))
        return {"scores": test.scores(model)}

    cells.get(f"{seed} joint", jointly)
    for method in FEDERATED:
        here = experiment(seed, rate(cells, method))
        cells.get(f"{seed} {method}", partial(federated, benchmark, here, method, f"{method}-{seed}"))


def one_exchange(
    cells: Cells, seed: int, kind: str, base: Base, packages: Mapping[str, Package], test: Domains
) -> None:
    """Score the packages alone and under every router; take sites out of the best one."""
    size = statistics.mean(p.nbytes - sum(m.numel() * 4 for m in p.part("moment").values()) for p in packages.values())
    with_moments = statistics.mean(p.nbytes for p in packages.values())
    own = {site: replace(test, data={site: test.data[site]}) for site in packages}

    def each_own() -> Cell:
        return {"scores": {s: own[s].scores(alone(base, p))[s] for s, p in packages.items()}, "bytes": size}

    cells.get(f"{seed} {kind} own", each_own)
    public = Domains(replace(test.experiment, data=PUBLIC), PUBLIC.load(seed).clients)
    means = {}
    for building in ROUTERS[kind]:

        def routed(building: Building = building) -> Cell:
            fitted = fit_router(base, packages, building, public if building.router in ("ridge", "lorahub") else None)
            model = assemble(base, packages, building, fitted)
            return {"scores": test.scores(model), "bytes": with_moments if building.router == "ridge" else size}

        found = cells.get(f"{seed} {kind} {building.router}", routed)
        means[building] = statistics.mean(found["scores"].values())

    def together() -> Cell:
        return {"scores": ensemble([alone(base, p) for p in packages.values()], test), "bytes": size}

    cells.get(f"{seed} {kind} ensemble", together)
    best = min(means, key=means.__getitem__)
    for site in packages:

        def without(site: str = site) -> Cell:
            members = {name: p for name, p in packages.items() if name != site}
            fitted = fit_router(base, members, best, public if best.router in ("ridge", "lorahub") else None)
            return {"scores": test.scores(assemble(base, members, best, fitted)), "router": best.router}

        cells.get(f"{seed} {kind} without {site}", without)


# --- the table --------------------------------------------------------------------------------------------------------

NAMES = {
    "public": "public model", "joint": "joint training", "FedAvg": "FedAvg", "FedMoE": "FedMoE",
    "adapter own": "own adapter alone", "expert own": "own expert alone",
    "adapter ensemble": "ensemble of outputs, adapters", "expert ensemble": "ensemble of outputs, experts",
    "adapter uniform": "uniform mixing", "adapter lorahub": "LoraHub on public rows", "adapter arrow": "Arrow",
    "adapter phatgoose": "PHATGOOSE", "adapter ridge": "ridge, adapters", "expert flexolmo": "FlexOlmo rows",
    "expert ridge": "FlexOlmo rows with ridge scores",
}  # fmt: skip


def by_domain(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores without the number of the client."""
    return {name.rpartition("-")[0]: score for name, score in scores.items()}


def table(cells: Cells, seeds: int) -> str:
    """The page."""
    done = [s for s in range(seeds) if all(f"{s} {m}" in cells.found for m in ("public", "joint"))]
    lines = [__doc__.split("\n\n")[0], "", f"Made by `python benchmarks/oneshot.py`; {len(done)} seeds.", ""]
    lines += [
        f"| method | {' | '.join(DOMAINS)} | mean | gap closed, % | MB a site |",
        "|---|" + "---|" * (len(DOMAINS) + 3),
    ]
    for key, name in NAMES.items():
        runs = {s: cells.found[f"{s} {key}"] for s in done if f"{s} {key}" in cells.found}
        if not runs:
            continue
        scores = [by_domain(run["scores"]) for run in runs.values()]
        per = [f"{statistics.mean(s[d] for s in scores):.3f}" for d in DOMAINS]
        closed = [100 * share(cells, seed, run) for seed, run in runs.items()]
        sent = [run["bytes"] / 1e6 for run in runs.values() if "bytes" in run]
        mean = statistics.mean(statistics.mean(s.values()) for s in scores)
        few = f" ({len(runs)} seeds)" if len(runs) < len(done) else ""
        told = f"{statistics.mean(closed):.0f}" + (f" ± {half_width(closed):.0f}" if len(closed) > 1 else "")
        size = f"{statistics.mean(sent):.2f}" if sent else "-"
        lines.append(f"| {name}{few} | {' | '.join(per)} | {mean:.3f} | {told} | {size} |")
    lines += ["", *withdrawals(cells, done), "", *rates_found(cells)]
    return "\n".join(lines) + "\n"


def share(cells: Cells, seed: int, run: Cell) -> float:
    """How much of the gap between the public model and joint training a method closes, of the means over domains."""
    public, together, here = (
        statistics.mean(c["scores"].values())
        for c in (cells.found[f"{seed} public"], cells.found[f"{seed} joint"], run)
    )
    return (public - here) / (public - together)


def withdrawals(cells: Cells, done: list[int]) -> list[str]:
    """How much the loss rises on a site's own domain and on the others when it leaves."""
    lines = [
        "## One site leaves",
        "",
        "| kind | router | own domain | other domains, mean | other domains, most |",
        "|---|---|---|---|---|",
    ]
    for kind in PARTS:
        own, others, router = [], [], ""
        for seed in done:
            for site in (f"{d}-0" for d in DOMAINS):
                cell = cells.found.get(f"{seed} {kind} without {site}")
                if cell is None:
                    continue
                router = cell["router"]
                whole = cells.found[f"{seed} {kind} {router}"]["scores"]
                gaps = {name: cell["scores"][name] - whole[name] for name in whole}
                own.append(gaps.pop(site))
                others += gaps.values()
        if own:
            lines.append(
                f"| {kind} | {router} | {statistics.mean(own):+.3f} | {statistics.mean(others):+.3f} | "
                f"{max(others):+.3f} |"
            )
    return lines


def rates_found(cells: Cells) -> list[str]:
    """The search, for whoever asks how rates were chosen."""
    lines = [
        "## Learning rates",
        "",
        "Validation loss of every try; experts and adapters in nats per token, the others in bits per byte.",
        "",
    ]
    for method, grid in GRID.items():
        found = {lr: cells.found.get(f"search {method} {lr:g}", {}).get("validation") for lr in grid}
        told = ", ".join(f"{lr:g}: {v:.3f}" for lr, v in found.items() if v is not None)
        lines.append(f"- {method}: {told or 'not searched'}; taken {rate(cells, method):g}")
    return lines


def main(benchmark: Benchmark) -> None:
    """Run what is missing, then write the table."""
    torch.set_num_threads(1)
    cells = Cells(RESULTS / "oneshot.json")
    if not benchmark.table_only:
        search(benchmark, cells)
    if benchmark.search:
        return
    for seed in range(0 if benchmark.table_only else benchmark.seeds):
        seed_cells(benchmark, cells, seed)
        (RESULTS / "oneshot.md").write_text(table(cells, benchmark.seeds))
    (RESULTS / "oneshot.md").write_text(table(cells, benchmark.seeds))


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
