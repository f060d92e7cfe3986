"""Seconds per round of a pFedMoE cohort: our engine against a plain PyTorch loop, and how both grow with clients.

    python benchmarks/cohort.py --data fashion_mnist.npz [--rounds 5] [--device cuda]

Same models, batches and steps for all: CNN-1 to CNN-5, 2 classes per client, batch 64, SGD 0.01, one local epoch, and
the same scoring on validation and test data after it. The plain loop is what one writes by hand: models that are made
beforehand and stay in memory, one client after the other, two torch threads, torch's default layout. Ours is the engine
that a run uses, with everything it does besides (making and judging, client states on disk, a core per client).
Interleaved round by round in one process. After the first round the shared extractors are compared, and the accuracies
after the last.

With --device cuda the plain loop and all data are on the GPU too, and ours takes 100 clients in step: CNN-1 for all,
and the five; one local epoch and ten. Client states are written to disk by ours alone, --folder says where.

The second part is ours alone, on the CPU: 1,000 clients of CNN-1, of whom 100 take part in a round, against 100 of whom
10 do: seconds and peak memory of all processes together (proportional set size, looked at every 50 ms).
"""

import copy
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import torch
import tyro
from cells import RESULTS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from consilium.algorithms.pfedmoe import SHARED, PFedMoEClient, SwitchableNorm, pFedMoE
from consilium.core import ClientContext, ClientInfo, ClientState, Payload, Sampling, derive_seed
from consilium.data.arrays import ImageData
from consilium.data.task import Federation
from consilium.data.tensor import on_device
from consilium.engine.checkpoint import ClientStore
from consilium.engine.local import LocalEngine
from consilium.engine.workers import forked
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.machine import cores
from consilium.models.cohort import Cohort, SplitModel
from consilium.moe.addressing import flatten
from consilium.params import WeightedMean
from consilium.recipes.digits import SMALL_FIT
from consilium.setup import Setup


@dataclass(frozen=True)
class Benchmark:
    """What to measure.

    Args:
        data: images as .npz, e.g. Fashion-MNIST.
        rounds: of each side, the first not counted; three times as many with 10 of 100, which are short.
        examples: rows dealt, 0: all; those of 100 clients hold as many each as those of 20.
        workers: processes of ours, threads of the plain loop.
        large: clients of the second part, 0: leave it out.
        scores: run one round more, and score what it leaves.
        peer: a clone of github.com/thuiaaa/MHPFL, whose pFedMoE is timed too.
        device: "cpu" or "cuda". folder: for client states; None: the system's for temporary files.
    """

    data: Path
    rounds: int = 5
    examples: int = 0
    workers: int = cores()
    large: int = 1000
    scores: bool = True
    peer: Path | None = None
    device: str = "cpu"
    folder: Path | None = None


FIVE = Cohort()


def experiment(
    benchmark: Benchmark, clients: int, at_once: int, precision: str = "float32", model: Cohort = FIVE, epochs: int = 1
) -> Experiment:
    """Every client holds `examples / 20` rows."""
    rows = benchmark.examples * clients // 20 if benchmark.examples else 0
    return Experiment(
        name="cohort",
        algorithm=pFedMoE(),
        data=ImageData(benchmark.data, clients=clients, classes=2, examples=rows),
        model=model,
        fit=Fit(lr=0.01, head_lr=0.01, batch_size=64, epochs=epochs, precision=precision, **SMALL_FIT),
        sampling=Sampling(at_once),
        device=benchmark.device,
    )


def prepared(made: Experiment) -> tuple[Setup, Federation]:
    federation = made.data.load(made.seed)
    infos = tuple(
        ClientInfo(client, len(data.train), data.task.name, architecture=made.model.architecture(i))
        for i, (client, data) in enumerate(federation.clients.items())
    )
    labels = [(data.task.name, data.task.labels) for data in federation.clients.values()]
    setup = made.setup(labels, infos, federation.shape)
    return setup, on_device(federation, torch.device(made.device))


class Plain:
    """pFedMoE as one would write it: a list of models, a loop over clients, a loop over batches."""

    def __init__(self, made: Experiment, threads: int):
        self.setup, self.federation = prepared(made)
        self.threads, self.device = threads, torch.device(made.device)
        self.shared = made.algorithm.server(self.setup).params
        client = PFedMoEClient(self.setup, made.algorithm)
        self.models = {info.id: self.model(client, info) for info in self.setup.clients}

    def round(self, number: int) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        mean = WeightedMean()
        for info in self.setup.sampling.choose(self.setup.clients, number, self.setup.seed):
            model, data = self.models[info.id], self.federation.clients[info.id]
            model.load_state_dict({f"backbone.{key}": tensor for key, tensor in self.shared.items()}, strict=False)
            self.train(model, data.train, derive_seed(self.setup.seed, "client", number, info.id))
            accuracy(model, data.validation, self.device)
            accuracy(model, data.test, self.device)
            sent = {key: t for key, t in flatten(model).items() if key.startswith(SHARED)}
            mean.add(sent, info.num_examples)
        self.shared = mean.mean(self.shared)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        return seconds

    def train(self, model: SplitModel, split, seed: int) -> None:
        fit = self.setup.fit
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=fit.lr)
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
        for rows in split.epochs(fit.epochs, fit.batch_size, generator):
            batch = split.batch(rows, self.device)
            optimizer.zero_grad()
            logits, labels = model(batch)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()

    def model(self, client: PFedMoEClient, info: ClientInfo) -> SplitModel:
        """A client's own, with torch's default layout, filters and linear layers."""
        context = ClientContext(info, self.federation.clients[info.id], self.device, 0, ClientState())
        made = client._model(Payload({"params": self.shared}), context)
        for module in made.modules():
            for kind in (nn.Linear, nn.Sequential):
                if isinstance(module, kind):
                    module.__class__ = kind
        return made.to(memory_format=torch.contiguous_format)

    def score(self) -> float:
        """Mean test accuracy with the newest shared extractor."""
        scores = []
        for info in self.setup.clients:
            model = self.models[info.id]
            model.load_state_dict({f"backbone.{key}": tensor for key, tensor in self.shared.items()}, strict=False)
            scores.append(accuracy(model, self.federation.clients[info.id].test, self.device))
        return statistics.mean(scores)


def accuracy(model: SplitModel, split, device: torch.device) -> float:
    model.eval()
    right = 0
    with torch.inference_mode():
        for rows in torch.arange(len(split)).split(256):
            logits, labels = model(split.batch(rows, device))
            right += int((logits.argmax(-1) == labels).sum())
    return right / len(split)


class Peer:
    """The pFedMoE of MHPFL, from a clone of github.com/thuiaaa/MHPFL: its client's training loop over its own data
    loader and models, with the sizes of ours, its server's sums, and the scoring that all sides have. For its steps to
    be those of all sides, its gate has the switchable norm, which it leaves out; it learns from the last short batch,
    which it drops; and after the first round its optimizer still knows the shared extractor."""

    def __init__(self, made: Experiment, threads: int, clone: Path):
        self.setup, self.federation = prepared(made)
        self.threads, self.clients = threads, {}
        sys.path.insert(0, str(clone / "system"))
        for name in ("torchvision", "flcore.trainmodel.models"):  # which what is used here does without
            sys.modules.setdefault(name, ModuleType(name))
        sys.modules["flcore.trainmodel.models"].BaseHeadSplit = None
        from flcore.clients import clientbase, clientpfedmoe
        from flcore.trainmodel import pFMcnn

        def gate(m: int) -> nn.Module:
            theirs = pFMcnn.pfedmoe_gate(m=64)
            theirs.switchnorm, theirs.fc1 = SwitchableNorm(28 * 28), nn.Linear(28 * 28, 64)
            return theirs

        clientpfedmoe.pFMCNN_5 = partial(pFMcnn.pFMCNN_5, in_channels=1, dim=512)
        clientpfedmoe.pfedmoe_gate = gate
        clientbase.read_client_data = partial(self.read, self.setup, self.federation)
        clientbase.DataLoader = self.batches
        sizes = (512, 256, 512, 512, 512)
        settings = SimpleNamespace(
            algorithm="pFedMoE", dataset="Fashion-MNIST", device="cpu", save_folder_name="temp/", lamda=1.0,
            save_folder_name_full="temp/", num_classes=10, batch_size=64, local_learning_rate=0.01, local_epochs=1,
            models=[f"pFMCNN_{i}(in_channels=1, dim={d})" for i, d in enumerate(sizes, 1)],
        )  # fmt: skip
        for number, info in enumerate(self.setup.clients):
            made_by_them = partial(clientpfedmoe.clientpfedmoe, train_slow=False, send_slow=False)
            self.clients[info.id] = made_by_them(settings, number, info.num_examples, 0)
        self.shared = copy.deepcopy(next(iter(self.clients.values())).global_expert_model)

    @staticmethod
    def batches(rows: list, size: int, drop_last: bool, shuffle: bool) -> DataLoader:
        """With the last batch, if it has two rows, which its batch norm needs."""
        return DataLoader(rows, size, drop_last=drop_last and len(rows) % size == 1, shuffle=shuffle)

    @staticmethod
    def read(
        setup: Setup, federation: Federation, dataset: str, number: int, is_train: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """As its `read_client_data`, of arrays that are in memory already."""
        split = federation.clients[setup.clients[number].id].train
        batch = split.batch(range(len(split)), torch.device("cpu"))
        return list(zip(batch["x"], batch["labels"], strict=True))

    def round(self, number: int) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        chosen = self.setup.sampling.choose(self.setup.clients, number, self.setup.seed)
        for client in self.clients.values():
            client.global_expert_model.load_state_dict(self.shared.state_dict())
        for info in chosen:
            self.clients[info.id].train()
            for split in (self.federation.clients[info.id].validation, self.federation.clients[info.id].test):
                accuracy(TheirModel(self.clients[info.id]), split, torch.device("cpu"))
        total = sum(info.num_examples for info in chosen)
        self.shared = copy.deepcopy(self.clients[chosen[0].id].global_expert_model)
        for p in self.shared.parameters():
            p.data.zero_()
        for info in chosen:
            theirs = self.clients[info.id].global_expert_model
            for p, own in zip(self.shared.parameters(), theirs.parameters(), strict=True):
                p.data += own.data.clone() * (info.num_examples / total)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        return seconds


class TheirModel(nn.Module):
    """The parts of a client of theirs as one model."""

    def __init__(self, client: Any):
        super().__init__()
        self.shared, self.private = client.global_expert_model, client.local_expert_model
        self.gate, self.head = client.gate, client.head

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        a = self.gate(batch["x"])
        g, f = self.shared.forward_nohead(batch["x"]), self.private.forward_nohead(batch["x"])
        return self.head(a[:, :1] * g + a[:, 1:] * f), batch["labels"]


class Ours:
    """The engine of a run, with its worker processes."""

    def __init__(self, made: Experiment, folder: Path, workers: int):
        self.setup, federation = prepared(made)
        server, client = made.algorithm.server(self.setup), made.algorithm.client(self.setup)
        store, device = ClientStore(folder), torch.device(made.device)
        self.engine = LocalEngine(server, client, self.setup.clients, federation, store, made.seed, device)
        self.workers = workers
        if device.type != "cpu":
            self.workers, self.engine.together = 0, 100

    @contextmanager
    def working(self) -> Iterator[None]:
        with forked(self.workers, self.engine.work) if self.workers else nullcontext() as self.engine.workers:
            yield

    def round(self, number: int, test: bool = False) -> float:
        start = time.perf_counter()
        self.record = self.engine.round(number, test)
        return time.perf_counter() - start

    @property
    def shared(self):
        return self.engine.server.params


def against(benchmark: Benchmark, clients: int, at_once: int, model: Cohort = FIVE, epochs: int = 1) -> dict:
    """Seconds per round of the plain loop, ours, and ours in bfloat16; how far apart their results are."""
    made = experiment(benchmark, clients, at_once, model=model, epochs=epochs)
    low = experiment(benchmark, clients, at_once, "bfloat16", model, epochs)
    plain = Plain(made, benchmark.workers)
    with tempfile.TemporaryDirectory(dir=benchmark.folder) as folder:
        ours = {
            "ours": Ours(made, Path(folder) / "full", benchmark.workers),
            "ours, bfloat16": Ours(low, Path(folder) / "low", benchmark.workers),
        }
        with ours["ours"].working(), ours["ours, bfloat16"].working():
            sides = {
                "plain": plain,
                **({"MHPFL": Peer(made, benchmark.workers, benchmark.peer)} if benchmark.peer else {}),
            }
            sides |= ours
            seconds = {name: [side.round(1)] for name, side in sides.items()}
            apart = {
                name: max((side.shared[key] - t).abs().max().item() for key, t in plain.shared.items())
                for name, side in ours.items()
            }
            for number in range(2, benchmark.rounds + 1):
                for name, side in sides.items():
                    seconds[name].append(side.round(number))
            scores = {}
            for name, side in ours.items() if benchmark.scores else ():
                side.round(benchmark.rounds + 1, test=True)  # the scores are of one round more, for all
                scores[name] = side.record["scores"]["mean"]
            if benchmark.scores:
                plain.round(benchmark.rounds + 1)
                scores["plain"] = plain.score()
    return {
        "clients": clients,
        "at_once": at_once,
        "models": f"{made.model.path}, {epochs} epoch{'s' if epochs > 1 else ''}",
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "apart": apart,
        "scores": scores,
    }


def growth(benchmark: Benchmark, clients: int) -> dict:
    """Seconds of a round of ours and peak memory, with a tenth of so many clients of CNN-1 in each round."""
    made = replace(experiment(benchmark, clients, clients // 10), model=Cohort(("cnn-1",)))
    made = replace(made, data=replace(made.data, examples=0, clients=clients))
    with tempfile.TemporaryDirectory() as folder, memory() as peak:
        ours = Ours(made, Path(folder), benchmark.workers)
        with ours.working():
            seconds = [ours.round(number) for number in range(1, benchmark.rounds + 1)]
        steps = [sum(c["steps"] for c in ours.record["clients"].values())]
    return {"clients": clients, "at_once": clients // 10, "seconds": seconds[1:], "steps": steps, "bytes": peak[0]}


@contextmanager
def memory() -> Iterator[list[int]]:
    """The most that this process and its children held together, proportional set size, in bytes."""
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            try:
                family = [psutil.Process(), *psutil.Process().children(recursive=True)]
                peak[0] = max(peak[0], sum(process.memory_full_info().pss for process in family))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def main(benchmark: Benchmark) -> None:
    """Measure and write benchmarks/results/cohort.md."""
    if on_gpu := benchmark.device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for both sides
        one = Cohort(("cnn-1",))
        pairs = [against(benchmark, 100, 100, model, n) for model, n in ((one, 1), (one, 10), (FIVE, 10))]
        grown, where, name = [], torch.cuda.get_device_name(), "cohort_gpu"
    else:
        grown = [growth(benchmark, clients) for clients in (100, benchmark.large) if benchmark.large]
        short = replace(benchmark, rounds=3 * benchmark.rounds)
        pairs = [against(benchmark, 20, 20), against(short, 100, 10)]
        where, name = f"{benchmark.workers} cores ({platform.processor() or platform.machine()})", "cohort"
    (RESULTS / f"{name}.json").write_text(json.dumps({"pairs": pairs, "growth": grown}, indent=1))
    told = [
        "The plain loop has as many torch threads as ours has processes. Median [least, most] over rounds; ratios are",
        "of the same round.",
    ]
    if on_gpu:
        told = [
            "The plain loop is on the same GPU and writes no client states; ours has all clients of an architecture in",
            "one computation. Median [least, most] over rounds; ratios are of the same round.",
        ]
    said = f"--rounds {benchmark.rounds}{' --device cuda' if on_gpu else ''}"
    lines = [
        f"# A cohort of small models{' on a GPU' if on_gpu else ''}: seconds per round",
        "",
        f"Made by `python benchmarks/cohort.py --data fashion_mnist.npz {said}` on {where}, torch {torch.__version__}.",
        *told,
        "",
        "| clients | models | side | s per round | plain / side | MHPFL / side | apart after a round | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        for name, values in pair["seconds"].items():
            ratios = [a / b for a, b in zip(pair["seconds"]["plain"], values, strict=True)]
            them = [a / b for a, b in zip(pair["seconds"].get("MHPFL", ()), values, strict=False)]
            apart = f"{pair['apart'][name]:.1e}" if name in pair["apart"] else "-"
            score = f"{100 * pair['scores'][name]:.1f}" if name in pair["scores"] else "-"
            lines.append(
                f"| {pair['at_once']} of {pair['clients']} | {pair['models']} | {name} | {spread(values)} "
                f"| {spread(ratios)} | {spread(them) if them else '-'} | {apart} | {score} |"
            )
    if grown:
        lines += ["", "| CNN-1 clients | s per round | ms per step | peak MB of all processes |", "|---|---|---|---|"]
    for row in grown:
        step = [1000 * value / row["steps"][0] for value in row["seconds"]]
        lines.append(
            f"| {row['at_once']} of {row['clients']} | {spread(row['seconds'])} | {spread(step)} "
            f"| {row['bytes'] / 1e6:.0f} |"
        )
    (RESULTS / f"{'cohort_gpu' if on_gpu else 'cohort'}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Benchmark, description=__doc__))
