"""Five hundred rounds: memory, files and threads stay what they are, and the ledger adds up."""

import itertools
import json

import psutil
import pytest
import runs
import tiny
import torch
import toy

from consilium.core import Algorithm, Sampling
from consilium.loop import run
from consilium.rundir import RunDirectory

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it

ROUNDS, CLIENTS, WARM = 500, 8, 100


class Steady(toy.ToyServer):
    """Its structure does not grow: every line of the record is as long as the one before."""

    def structure(self):
        return None


class Meter:
    """Resident bytes, open files and threads of this process after every round."""

    def __init__(self):
        self.process, self.found = psutil.Process(), []

    def started(self, *_):
        pass

    def step(self, *_):
        pass

    def rounded(self, record, events):
        p = self.process
        self.found.append((p.memory_info().rss, p.num_fds(), p.num_threads()))


@pytest.mark.slow
def test_five_hundred_rounds_of_eight_clients(tmp_path, monkeypatch):
    """400 kB a model, client states on disk, payloads through bytes, one client in eight rejected now and then."""
    monkeypatch.setattr(toy, "SIZE", 100_000)
    monkeypatch.setattr(toy.Toy, "server", lambda self, setup: Steady(setup))
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    real, turns = toy.ToyClient.train, itertools.count(1)

    def train(self, payload, context):
        reply = real(self, payload, context)
        if context.info.id == "site-3" and next(turns) % 5 == 0:  # never three times in a row
            reply.groups["params"]["w"][0] = torch.nan
        return reply

    monkeypatch.setattr(toy.ToyClient, "train", train)
    monkeypatch.setattr(toy.ToyClient, "evaluate", lambda *_: toy.Payload(scalars={"score": 0.5, "examples": 1}))
    data, meter = runs.table(tmp_path, clients=CLIENTS), Meter()
    made = runs.experiment(
        data, toy.Toy(), model=tiny.source(num_experts=4), sampling=Sampling(CLIENTS), rounds=ROUNDS, strict=True
    )
    run(made, tmp_path / "run", meter)
    x = torch.arange(float(ROUNDS - WARM), dtype=torch.float64)
    y = torch.tensor([rss / 1e6 for rss, *_ in meter.found[WARM:]], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    files, threads = ({m[i] for m in meter.found[WARM:]} for i in (1, 2))
    print(json.dumps({"MB per round": slope, "MB": float(y[-1]), "files": sorted(files), "threads": sorted(threads)}))
    told = [record["ledger"] for record in RunDirectory(tmp_path / "run").rounds()]
    assert len(told) == ROUNDS and sum(t["rejected"] for t in told) == ROUNDS // 5
    assert all(t["selected"] == t["ok"] + t["error"] + t["rejected"] + t["missing"] == CLIENTS for t in told)
    assert slope < 0.1 and len(files) == 1 and len(threads) == 1
