"""Can somebody who has the released model tell whose images it was trained on, and does noise keep that from them?

A membership-inference attack with a threshold on the loss (Yeom, Giacomelli, Fredrikson, Jha 2018,
https://arxiv.org/abs/1709.01604): an image with a low loss is taken for one of the training set. The threshold is the
best one on half of the images of both kinds; what is reported is measured on the other half.

    advantage    share of members that are taken for members, less that of others; 0: no better than chance, 1: perfect
    AUC          how often a member's loss is below another's; 0.5: no better than chance

The run: FedAvg of a small network over 30 clients, trained for longer than is good for it, without noise and with
client-level differential privacy of different strengths. The data is scikit-learn's digits, of which three in ten have
a random label: what a model knows of those it can only have memorised. Members are the training images of all clients,
some 900, others their validation and test images, as many.

    python benchmarks/membership.py        # some minutes on one core; writes benchmarks/results/membership.md
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from cells import RESULTS, spread
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from consilium.algorithms.fedavg import FedAvg
from consilium.core import ClientContext, ClientInfo, ClientState, Sampling
from consilium.data.arrays import ImageData
from consilium.data.tensor import TensorSplit
from consilium.engine.checkpoint import load_checkpoint
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.loop import run
from consilium.models.cohort import Cohort
from consilium.moe.addressing import select
from consilium.privacy import Privacy
from consilium.recipes.digits import SMALL_FIT


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        noises: z of each row, standard deviation of the noise in units of the clipping norm; 0: no privacy at all.
        clip: C. delta: at which epsilon is told. seeds: of data and run. rounds: of each run.
        mislabelled: share of the images that have a random label.
    """

    noises: tuple[float, ...] = (0.0, 0.2, 1.0, 2.0)
    clip: float = 1.0
    delta: float = 3e-3
    seeds: int = 5
    rounds: int = 60
    mislabelled: float = 0.3


def best_threshold(members: Tensor, others: Tensor) -> float:
    """Return the loss up to which taking an example for a member has the largest advantage.

    Args:
        members, others: losses [N], [M], of examples of which it is known.
    """
    candidates = torch.cat([members, others]).unique()
    return float(candidates[torch.stack([taken(members, others, float(t)) for t in candidates]).argmax()])


def taken(members: Tensor, others: Tensor, threshold: float) -> Tensor:
    """Return the advantage of this threshold: the share of members at most there, less that of others."""
    return (members <= threshold).double().mean() - (others <= threshold).double().mean()


def attack(members: Tensor, others: Tensor, seed: int) -> tuple[float, float]:
    """Return (advantage, AUC) of the threshold attack: the threshold from one half, the advantage on the other."""
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for losses in (members, others):
        order = torch.randperm(len(losses), generator=generator)
        halves.append((losses[order[: len(losses) // 2]], losses[order[len(losses) // 2 :]]))
    (known_in, in_), (known_out, out) = halves
    below = in_[:, None] < out[None, :]
    auc = below.double().mean() + (in_[:, None] == out[None, :]).double().mean() / 2
    return float(taken(in_, out, best_threshold(known_in, known_out))), float(auc)


def losses_of(experiment: Experiment, folder: Path) -> tuple[Tensor, Tensor, float]:
    """Return the losses [N], [M] of members and others under a run's released model, and its accuracy on others."""
    federation = experiment.data.load(experiment.seed)
    first = next(iter(federation.clients.values()))
    setup = experiment.setup([(first.task.name, first.task.labels)], shape=federation.shape)
    params = select(load_checkpoint(folder / "checkpoints").server.group("params"), first.task.name)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    right = []
    for name, data in federation.clients.items():
        info = ClientInfo(name, len(data.train), data.task.name, architecture=experiment.model.architectures[0])
        context = ClientContext(info, data, torch.device("cpu"), 0, ClientState())
        model = setup.build(params, context).eval()
        for split in (data.train, data.validation, data.test):
            logits, labels = predicted(model, split)
            found[split is data.train].append(F.cross_entropy(logits, labels, reduction="none"))
            if split is not data.train:
                right.append(logits.argmax(1) == labels)
    return torch.cat(found[True]), torch.cat(found[False]), torch.cat(right).double().mean().item()


def predicted(model: torch.nn.Module, split: TensorSplit) -> tuple[Tensor, Tensor]:
    """Return the logits [N, C] of all examples of a split, and their labels [N]."""
    with torch.inference_mode():
        return model(split.batch(range(len(split)), torch.device("cpu")))


def write_digits(path: Path, mislabelled: float, seed: int) -> Path:
    """Write scikit-learn's digits as an .npz file, with this share of random labels."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    wrong = rng.random(len(digits.target)) < mislabelled
    y = np.where(wrong, rng.integers(0, 10, len(digits.target)), digits.target)
    x, order = (digits.images / 16 * 255).astype(np.uint8), rng.permutation(len(y))
    train, test = order[:1200], order[1200:]
    np.savez(path, x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])
    return path


def experiment_of(plan: Benchmark, path: Path, noise: float, seed: int) -> Experiment:
    """Return the run of one row and seed on the images in a file."""
    made = Experiment(
        name="membership",
        algorithm=FedAvg(),
        data=ImageData(path=path, partition="iid", clients=30),
        model=Cohort(("mlp-1",), small="mlp-1", width=50),
        fit=Fit(lr=0.1, head_lr=0.1, epochs=5, batch_size=8, **SMALL_FIT),
        sampling=Sampling(clients_per_round=15),
        rounds=plan.rounds,
        evaluate_every=plan.rounds,
        seed=seed,
    )
    if not noise:
        return made
    return replace(made, privacy=Privacy(noise=noise, clip=plan.clip, epsilon=1e9, delta=plan.delta))


def main(plan: Benchmark) -> None:
    rows = []
    for noise in plan.noises:
        told = {"accuracy": [], "advantage": [], "auc": []}
        epsilon = "∞"
        for seed in range(plan.seeds):
            with tempfile.TemporaryDirectory() as folder:
                path = write_digits(Path(folder) / "digits.npz", plan.mislabelled, seed)
                made = experiment_of(plan, path, noise, seed)
                summary = run(made, Path(folder) / "run")
                members, others, accuracy = losses_of(made, Path(folder) / "run")
            advantage, auc = attack(members, others, seed)
            for name, value in (("accuracy", 100 * accuracy), ("advantage", advantage), ("auc", auc)):
                told[name].append(value)
            if noise:
                epsilon = f"{summary['privacy']['epsilon']:.3g}"
        rows.append(
            f"| {'none' if not noise else f'{noise:g}'} | {epsilon} | {spread(told['accuracy'])} | "
            f"{spread(told['advantage'], 3)} | {spread(told['auc'], 3)} |"
        )
        print(rows[-1], flush=True)
    flags = f"--noises {' '.join(f'{z:g}' for z in plan.noises)} --clip {plan.clip:g} --delta {plan.delta:g}"
    page = [
        "# Who was in the training set: a threshold on the loss",
        "",
        f"    python benchmarks/membership.py {flags} \\",
        f"        --seeds {plan.seeds} --rounds {plan.rounds}",
        "",
        "FedAvg of a small network over 30 clients with some 30 digits each, of which "
        f"{100 * plan.mislabelled:.0f} % have a random label;",
        f"15 clients expected in a round, {plan.rounds} rounds of 5 epochs. Members are the training images of",
        "all clients, others their validation and test images. Mean ± standard deviation over the seeds; epsilon of",
        f"client-level differential privacy at delta {plan.delta:g}, with the clipping norm {plan.clip:g}.",
        "",
        "| noise | epsilon | accuracy on others, % | advantage | AUC |",
        "|---|---|---|---|---|",
        *rows,
    ]
    (RESULTS / "membership.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
