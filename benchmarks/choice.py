"""Does it matter which experts are kept? FedMoE's premise, measured on the shipped model without any federation.

1. Choice (the paper's Figure 2): per task, the data of all clients in one place; the sub-MoE with the n most used, n
   random or the n least used experts of every layer is fine-tuned and tested, beside the whole model. What FedMoE can
   gain over randomMoE at equal expert budget is bounded by the distance between the first two.
2. Distance: how differently clients use the experts, as total variation between their usage p (per layer, averaged):
   between clients of different tasks, between clients of one task, and, the floor that sampling alone gives, between
   two halves of one client's own examples; with and without label skew.

    python benchmarks/choice.py            # about 15 minutes on one core; writes benchmarks/results/choice.md

The settings (data, learning rates, batch, length) are those of benchmarks/fedmoe.py.
"""

import statistics
from dataclasses import dataclass, replace

import torch
import tyro
from cells import RESULTS, spread
from fedmoe import SETTINGS, TASKS, experiment

from consilium.core import ClientContext, ClientInfo, ClientState, derive_seed
from consilium.data.task import ClientData, Federation, Split, pooled
from consilium.moe.routing import Tap
from consilium.scoring import evaluate
from consilium.setup import MixtureSetup
from consilium.training import fit

CHOICES = ("most used", "random", "least used")
Usage = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        seeds: of data and training.
        epochs: of fine-tuning on the pooled data.
        kept: experts kept per layer.
    """

    seeds: int = 2
    epochs: int = 4
    kept: tuple[int, ...] = (1, 4)


def setup_for(data: ClientData, seed: int) -> tuple[MixtureSetup, ClientContext]:
    """One site that holds this data, with the benchmark's model and training."""
    cell = experiment("std-T", "FedMoE", seed, rounds=1)
    task = data.task
    setup = MixtureSetup(cell.model, cell.fit, cell.sampling, seed, {task.name: task.labels})
    info = ClientInfo("site", len(data.train), task.name)
    return setup, ClientContext(info, data, torch.device("cpu"), seed, ClientState())


def usage(setup: MixtureSetup, context: ClientContext, split: Split) -> Usage:
    """p_i of the pretrained model over a split, float64 [E] per block."""
    model = setup.build(setup.initial_params(), context)
    with Tap(model) as tap:
        evaluate(model, setup.encode(context, split), context, setup, tap)
    return tap.usage.probability()


def chosen(p: Usage, how: str, n: int, seed: int) -> dict[str, tuple[int, ...]]:
    """n experts of every block."""
    rng = torch.Generator().manual_seed(derive_seed(seed, how, n))
    held = {}
    for block, p_E in p.items():
        order = torch.randperm(len(p_E), generator=rng) if how == "random" else p_E.argsort(stable=True)
        held[block] = tuple(sorted((order[-n:] if how == "most used" else order[:n]).tolist()))
    return held


def tested(data: ClientData, seed: int, benchmark: Benchmark) -> dict[tuple[str, int], list[float]]:
    """(choice, experts per layer) -> test accuracy in percent after each epoch."""
    setup, context = setup_for(data, seed)
    p = usage(setup, context, data.validation)
    total = max(setup.model.counts.values())
    cells = [(how, n) for n in benchmark.kept for how in CHOICES] + [("all", total)]
    train, test = setup.encode(context, data.train), setup.encode(context, data.test)
    scores = {}
    for how, n in cells:
        sent = setup.sub_moe(setup.initial_params(), context.info.task, chosen(p, how, n, seed))
        model = setup.build_sent(sent, context)
        scores[how, n] = []
        for epoch in range(benchmark.epochs):
            fit(model, train, setup.fit, replace(context, seed=derive_seed(seed, epoch)))
            scores[how, n].append(100 * evaluate(model, test, context, setup))
    return scores


def distance(p: Usage, q: Usage) -> float:
    """Total variation, 0 (alike) to 1, the mean over the layers."""
    return statistics.mean(0.5 * float((p[block] - q[block]).abs().sum()) for block in p)


def half(split: Split, which: int) -> Split:
    return Split(split.texts[which::2], split.targets[which::2], split.rows[which::2])


def distances(federation: Federation, seed: int) -> dict[str, float]:
    """Mean distance between the usage of two tasks, of two clients of a task, and of two halves of a client's data."""
    whole, halves = {}, []
    for client, data in federation.clients.items():
        setup, context = setup_for(data, seed)
        whole[client] = (data.task.name, usage(setup, context, half(data.train, 0)))
        halves.append(distance(whole[client][1], usage(setup, context, half(data.train, 1))))
    pairs = [(a, b) for a in whole for b in whole if a < b]
    same = [distance(whole[a][1], whole[b][1]) for a, b in pairs if whole[a][0] == whole[b][0]]
    other = [distance(whole[a][1], whole[b][1]) for a, b in pairs if whole[a][0] != whole[b][0]]
    return {
        "other task": statistics.mean(other),
        "same task": statistics.mean(same),
        "same client": statistics.mean(halves),
    }


def main(benchmark: Benchmark) -> None:
    """Measure both and write the tables."""
    torch.set_num_threads(1)
    scores: dict[str, dict[tuple[str, int], list[list[float]]]] = {task: {} for task in TASKS}
    apart: dict[str, list[dict[str, float]]] = {"std-T": [], "std-TD": []}
    for seed in range(benchmark.seeds):
        for setting, rows in apart.items():
            rows.append(distances(experiment(setting, "FedMoE", seed, 1).data.load(seed), seed))
            print(f"seed {seed} {setting}: {rows[-1]}", flush=True)
        federation = experiment("std-T", "FedMoE", seed, 1).data.load(seed)
        for task in TASKS:
            for cell, curve in tested(pooled(federation, task), seed, benchmark).items():
                scores[task].setdefault(cell, []).append(curve)
                print(f"seed {seed} {task} {cell}: {[round(score, 1) for score in curve]}", flush=True)
    write(scores, apart, benchmark)


def write(scores: dict, apart: dict, benchmark: Benchmark) -> None:
    """Both tables as Markdown."""
    lines = [
        "# Does it matter which experts are kept?",
        "",
        "Made by `python benchmarks/choice.py`; its docstring says what is measured. Test accuracy in percent after",
        f"{benchmark.epochs} epochs on the pooled data of a task (after the first epoch in brackets), mean ± standard "
        f"deviation over {benchmark.seeds} seeds.",
        "",
        f"| experts kept per layer | {' | '.join(TASKS)} | mean |",
        "|---|" + "---|" * (len(TASKS) + 1),
    ]
    for how, n in scores[TASKS[0]]:
        last = {task: [curve[-1] for curve in scores[task][how, n]] for task in TASKS}
        first = {task: [curve[0] for curve in scores[task][how, n]] for task in TASKS}
        cells = [f"{spread(last[task])} ({statistics.mean(first[task]):.1f})" for task in TASKS]
        means = [statistics.mean(values) for values in zip(*last.values(), strict=True)]
        start = statistics.mean(statistics.mean(first[task]) for task in TASKS)
        lines.append(f"| {n}, {how} | {' | '.join(cells)} | {spread(means)} ({start:.1f}) |")
    lines += [
        "",
        "Total variation between the usage of experts (0 alike, 1 disjoint), mean over layers, pairs and seeds:",
        "",
        "| | clients of other tasks | clients of one task | halves of one client |",
        "|---|---|---|---|",
    ]
    for setting, rows in apart.items():
        skew = "label skew" if SETTINGS[setting][0] == "dirichlet" else "task heterogeneity alone"
        lines.append(f"| {skew} | " + " | ".join(spread([r[k] for r in rows], 3) for k in rows[0]) + " |")
    (RESULTS / "choice.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
