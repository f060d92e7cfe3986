"""What does a client's uploaded usage of experts give away, and what does telling less cost?

1. Leak. Clients with mixed labels (Dirichlet 0.3) tell how their validation texts use the experts of the shipped model.
   The server knows texts of its own with labels; it makes shadow clients of them, of which it knows the mix, and learns
   from what they would tell in that mode: which label is dominant (logistic regression), and how much there is of each
   (ridge regression, clipped and normalised; total variation to the true mix). Texts of shadows and clients are apart.
2. Price. FedMoE on the docstring tasks (`fedmoe_docstrings`, made shorter), the same data, memory and seeds, with each
   mode, and randomMoE in the memory that FedMoE starts with, which asks for no usage: what is left without any.

    python benchmarks/usage_leak.py        # about 10 minutes on one core; writes benchmarks/results/usage_leak.md

epsilon is that of client-level differential privacy against the server at delta 1e-5, for one telling and for ten.
"""

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from cells import RESULTS, spread
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.core import ClientContext, ClientInfo, ClientState
from consilium.data.docstrings import DocstringData
from consilium.data.task import ClientData, pooled
from consilium.fit import Fit
from consilium.loop import run
from consilium.moe.routing import Tap
from consilium.privacy import Privacy, epsilon_spent, usage_told
from consilium.recipes.docstrings import fedmoe_docstrings
from consilium.setup import MixtureSetup

MODES = {
    "exact": Privacy(),
    "coarse": Privacy(usage="coarse"),
    **{f"noised {z:g}": Privacy(usage="noised", usage_noise=z) for z in (0.01, 0.03, 0.1, 0.3, 1.0)},
}
RUNS = ("exact", "coarse", "noised 0.03", "noised 1")


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        texts: with labels, per task, half of them the server's.
        examples: validation examples that a client's usage is measured on.
        clients: whose mix is guessed; 0 leaves the guessing out. shadows: that the server learns from.
        seeds: of the runs of FedMoE; 0 leaves the runs out.
        rounds: of each. train: training examples per client in them.
    """

    texts: int = 2400
    examples: int = 80
    clients: int = 300
    shadows: int = 3000
    seeds: int = 2
    rounds: int = 6
    train: int = 120


def usage_of_texts(task: str, texts: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """(tokens per text, layer and expert, int64 [N, L, E]; blocks; labels) of the pretrained model."""
    found = DocstringData(tasks=(task,), clients=4, train=texts // 4, validation=10, test=10, partition="iid", topics=8)
    data: ClientData = pooled(found.load(0), task)
    model = fedmoe_docstrings().model
    setup = MixtureSetup(model, Fit(max_length=64), fedmoe_docstrings().sampling, 0, {task: data.task.labels})
    context = ClientContext(ClientInfo("site", len(data.train), task), data, torch.device("cpu"), 0, ClientState())
    live, encoded = setup.build(setup.initial_params(), context).eval(), setup.encode(context, data.train)
    counts, blocks = [], list(setup.model.counts)
    for row in range(len(encoded)):
        with Tap(live) as tap, torch.inference_mode():
            batch = encoded.batch((row,), torch.device("cpu"))
            with tap.batch(batch, count=True):
                live(batch)
            counts.append(torch.stack([tap.usage.demand[block] for block in blocks]))
    return torch.stack(counts), blocks, list(data.train.targets)


def clients_of(counts: torch.Tensor, labels: list[str], n: int, examples: int, rng: np.random.Generator):
    """n clients: (their usage [n, L, E], their true mix [n, C])."""
    names = sorted(set(labels))
    rows = [np.flatnonzero([label == name for label in labels]) for name in names]
    usage, mixes = [], []
    for _ in range(n):
        numbers = rng.multinomial(examples, rng.dirichlet([0.3] * len(names)))
        chosen = np.concatenate([rng.choice(r, k) for r, k in zip(rows, numbers, strict=True)])
        usage.append(counts[torch.from_numpy(chosen)].sum(0))
        mixes.append(numbers / examples)
    return torch.stack(usage), np.array(mixes)


def told_features(usage: torch.Tensor, blocks: list[str], mode: Privacy) -> np.ndarray:
    """What the server sees of each client, as shares [n, L * E]."""
    rows = []
    for client in usage:
        told = usage_told(dict(zip(blocks, client, strict=True)), mode)
        rows.append(torch.cat([t.double() / max(float(t.sum()), 1.0) for t in told.values()]).numpy())
    return np.array(rows)


def leak(task: str, plan: Benchmark) -> list[str]:
    """Rows of the table of a task."""
    counts, blocks, labels = usage_of_texts(task, plan.texts)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    halves = [(counts[torch.from_numpy(half)], [labels[i] for i in half]) for half in np.array_split(order, 2)]
    (shadow, shadow_mix), (client, mix) = (
        clients_of(*half, n, plan.examples, rng) for half, n in zip(halves, (plan.shadows, plan.clients), strict=True)
    )
    chance = np.bincount(mix.argmax(1)).max() / len(mix)
    lines = [f"| {task}, {mix.shape[1]} labels | nothing (the commonest) | {100 * chance:.0f} % | "
             f"{np.abs(shadow_mix.mean(0) - mix).sum(1).mean() / 2:.3f} | 0 | 0 |"]  # fmt: skip
    for name, mode in MODES.items():
        seen, known = told_features(client, blocks, mode), told_features(shadow, blocks, mode)
        scale = StandardScaler().fit(known)
        seen, known = scale.transform(seen), scale.transform(known)
        dominant = LogisticRegression(max_iter=2000, C=0.1).fit(known, shadow_mix.argmax(1)).predict(seen)
        guess = Ridge(alpha=10).fit(known, shadow_mix).predict(seen).clip(0)
        guess /= guess.sum(1, keepdims=True).clip(1e-9)
        epsilons = "∞ | ∞"
        if mode.usage == "noised":
            spent = [epsilon_spent(replace(mode, delta=1e-5), 2, 2, n, True) for n in (1, 10)]
            epsilons = " | ".join(f"{e:.3g}" for e in spent)
        lines.append(f"| | {name} | {100 * (dominant == mix.argmax(1)).mean():.0f} % | "
                     f"{np.abs(guess - mix).sum(1).mean() / 2:.3f} | {epsilons} |")  # fmt: skip
        print(lines[-1], flush=True)
    return lines


def price(plan: Benchmark) -> list[str]:
    """Rows of the table of runs."""
    base = fedmoe_docstrings()
    base = replace(base, rounds=plan.rounds, evaluate_every=plan.rounds,
                   data=replace(base.data, train=plan.train, validation=60, test=100))  # fmt: skip
    arms = {name: (FedMoE(stage1="forward"), replace(MODES[name], epsilon=1e12)) for name in RUNS}
    arms["randomMoE"] = (RandomMoE(share=0.9), Privacy())
    means: dict[str, list[float]] = {}
    for seed in range(plan.seeds):
        for name, (method, privacy) in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                made = replace(base, algorithm=method, privacy=privacy, seed=seed)
                means.setdefault(name, []).append(100 * run(made, Path(folder) / "run")["mean"])
            print(f"seed {seed} {name}: {means[name][-1]:.1f}", flush=True)
    first = means["exact"]
    lines = []
    for name, values in means.items():
        differences = [value - exact for value, exact in zip(values, first, strict=True)]
        against = "" if name == "exact" else spread(differences)
        lines.append(f"| {name} | {spread(values)} | {against} |")
    return lines


def written(name: str, text: str) -> None:
    """Put a section into usage_leak.md; the other one stays as it is."""
    path = RESULTS / "usage_leak.md"
    old = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", old, re.M | re.S)) | {name: f"\n{text}\n"}
    sections = "".join(f"## {key}\n{found[key]}" for key in ("Leak", "Price") if key in found)
    path.write_text(f"# What uploaded usage gives away, and what telling less costs\n\n{sections}")


def main(plan: Benchmark) -> None:
    torch.set_num_threads(1)
    if plan.clients:
        table = [line for task in ("topic", "kind") for line in leak(task, plan)]
        written("Leak", f"""\
    python benchmarks/usage_leak.py --texts {plan.texts} --examples {plan.examples} \\
        --clients {plan.clients} --shadows {plan.shadows} --seeds 0

How often the server names a client's dominant label, and how far its guess of the whole mix is off (total variation),
from one telling of the usage by {plan.clients} clients of {plan.examples} validation examples each. "noised z": see
`consilium.privacy`; epsilon against the server at delta 1e-5, for one telling and for ten (inf: thousands).

| task | mode | dominant label | mix is off by | epsilon, 1 | epsilon, 10 |
|---|---|---|---|---|---|
{chr(10).join(table)}
""")  # fmt: skip
    if plan.seeds:
        runs = price(plan)
        written("Price", f"""\
    python benchmarks/usage_leak.py --clients 0 --seeds {plan.seeds} --rounds {plan.rounds} \\
        --train {plan.train}

FedMoE (stage one without training) on the docstring tasks, {plan.rounds} rounds, 12 clients with four sizes of memory
and at most {plan.train} training examples, {plan.seeds} seeds: mean accuracy over the tasks in %, mean ± standard
deviation, and the difference to exact on the same seed.

| mode | accuracy | against exact |
|---|---|---|
{chr(10).join(runs)}
""")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
