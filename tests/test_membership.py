"""The membership-inference attack of benchmarks/membership.py: by hand, and that it finds what is there."""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@lru_cache
def benchmark():
    """benchmarks/membership.py as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("membership_benchmark", FOLDER / "membership.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_the_threshold_by_hand():
    """Of members 1, 2, 3, 7 and others 2.5, 8, 9, 10: up to 7 all members and one of four others, 3/4; up to 2 one half
    and none; up to 3 three quarters and a quarter."""
    members, others = torch.tensor([1.0, 2.0, 3.0, 7.0]), torch.tensor([2.5, 8.0, 9.0, 10.0])
    found = benchmark()
    assert found.best_threshold(members, others) == 7
    assert float(found.taken(members, others, 7.0)) == 0.75
    assert float(found.taken(members, others, 2.0)) == 0.5
    assert float(found.taken(members, others, 0.0)) == 0


def test_the_attack_finds_members_and_nothing_where_nothing_is():
    """Losses around 0.1 and 2: nearly all. Equal losses and equal distributions: nothing, on the half that was not
    looked at."""
    rng = torch.Generator().manual_seed(0)
    low, high = (torch.rand(400, generator=rng) * 0.2, 1 + torch.rand(400, generator=rng))
    advantage, area = benchmark().attack(low, high, 0)
    assert advantage > 0.97 and area == 1
    assert benchmark().attack(high, low, 0)[1] == 0
    assert benchmark().attack(torch.ones(100), torch.ones(100), 0) == (0.0, 0.5)
    found = [benchmark().attack(torch.rand(400, generator=rng), torch.rand(400, generator=rng), s) for s in range(20)]
    advantages, areas = zip(*found, strict=True)
    assert abs(sum(advantages) / 20) < 0.05 and sum(areas) / 20 == pytest.approx(0.5, abs=0.03)


def test_losses_of_a_run_that_has_memorised_its_data(tmp_path):
    """Twelve rounds of the benchmark's own run: every image is scored once, members' losses are the lower ones."""
    from dataclasses import replace

    from consilium.loop import run

    found = benchmark()
    path = found.write_digits(tmp_path / "digits.npz", 1.0, 0)
    made = found.experiment_of(found.Benchmark(rounds=12), path, 0.0, 0)
    made = replace(made, data=replace(made.data, clients=5, examples=100))
    run(made, tmp_path / "run")
    members, others, accuracy = found.losses_of(made, tmp_path / "run")
    federation = made.data.load(0)
    assert len(members) == sum(len(data.train) for data in federation.clients.values())
    assert len(others) == sum(len(data.validation) + len(data.test) for data in federation.clients.values())
    assert accuracy < 0.35 and members.mean() < 0.5 * others.mean()
    advantage, area = found.attack(members, others, 0)
    assert advantage > 0.3 and area > 0.7
    private = found.experiment_of(found.Benchmark(), path, 1.0, 0).privacy
    assert (private.noise, private.clip) == (1.0, 1.0)
