"""Experiments that run in a second: a file of sentences, the tiny Switch, three clients; and what two runs share."""

import json
import random
from pathlib import Path

import tiny

from consilium.core import Algorithm, Sampling
from consilium.data.arrays import ImageData
from consilium.data.textfile import TextFileData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.models.cohort import Cohort
from consilium.rundir import RunDirectory

WORDS = {"cat": "purrs at the old house", "dog": "barks near a tree", "fish": "swims in some water"}


def table(folder: Path, clients: int = 3, rows: int = 16) -> Path:
    """A JSONL file with the columns text, label, site; `rows` rows per client."""
    rng = random.Random(0)
    lines = []
    for client in range(clients):
        for i in range(rows):
            label = list(WORDS)[i % len(WORDS)]
            filler = " ".join(rng.choices(tiny.FILL, k=4))
            lines.append({"text": f"{filler} {label} {WORDS[label]} {i}", "label": label, "site": f"site-{client}"})
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def experiment(data: Path, method: str | Algorithm = "FedAvg", /, **changes) -> Experiment:
    """Three rounds of two clients on a `table`, clients named by its column "site"."""
    if isinstance(method, str):
        method = Algorithm.registry[method]()
    settings = dict(
        name="short",
        algorithm=method,
        data=TextFileData(path=data, client="site"),
        model=tiny.source(),
        fit=Fit(batch_size=4, max_length=12),
        sampling=Sampling(2),
        rounds=3,
    )
    return Experiment(**settings | changes)


def memory(*experts: int) -> tuple[str, ...]:
    """Devices that can just train so many experts per layer, in the order of the clients."""
    setup = tiny.setup(batch_size=4, max_length=12)
    return tuple(f"{setup.footprint(dict.fromkeys(setup.model.counts, n)).total}B" for n in experts)


def outcome(folder: Path) -> dict:
    """What must not depend on interruptions: every recorded number but seconds and process memory."""

    def lines(name):
        path = folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None

    summary = json.loads((folder / "summary.json").read_text())
    return _timeless(
        {
            "summary": summary,
            "metrics": lines("metrics.jsonl"),
            "events": lines("events.jsonl"),
            "structure": RunDirectory(folder).structure() if (folder / "structure.jsonl").exists() else None,
            "partition": json.loads((folder / "partition.json").read_text()),
            "status": json.loads((folder / "config.json").read_text())["status"],
        }
    )


def bits(folder: Path) -> dict:
    """What must not depend on the engine either: `outcome` without bytes, which are of blobs where there are blobs."""
    return _without(outcome(folder), lambda key: key.startswith("bytes"))


def _timeless(value):
    return _without(value, lambda key: key in ("seconds", "peak_rss_bytes"))


def _without(value, left_out):
    if isinstance(value, dict):
        return {k: _without(v, left_out) for k, v in value.items() if not left_out(k)}
    return [_without(v, left_out) for v in value] if isinstance(value, list) else value


def of_world(world: str, data: Path, method: Algorithm, dtype: str = "float32", /, **changes) -> Experiment:
    """Two rounds of a method in one of its worlds: three clients, of which one is short of memory ("moe") or has an
    architecture of its own ("mixed"). `data`: a `table`, for "moe"."""
    settings = {"rounds": 2, **changes}
    if world == "moe":
        model = tiny.source(num_experts=4, dtype=dtype)
        return experiment(data, method, **{"model": model, "memory": memory(16, 2), **settings})
    names = ("mnist-5",) if world == "cohort" else ("mnist-4", "mnist-5")
    model = Cohort(names, small="mnist-5", width=8, kernel=3, padding=1)
    return experiment(data, method, **{"data": ImageData(clients=3, examples=60), "model": model, **settings})
