"""The tables of the benchmarks: seeds are the unit of every interval."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cells():
    """benchmarks/cells.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_cells", ROOT / "benchmarks" / "cells.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_interval_by_hand(cells):
    """Mean 2, deviation 1, t(0.975, 2) = 4.302653: 4.302653 / sqrt(3) = 2.484138."""
    assert cells.interval([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48]"
    assert cells.interval([1.0]) == "+1.00 (one seed)"


def test_settings_do_not_count_as_seeds(cells):
    """Three seeds, four settings that differ by 10 points: their spread must not enter, nor twelve pairs be counted."""
    names = {(s, m): [f"{s}-{m}-{seed}" for seed in range(3)] for s in "abcd" for m in ("one", "two")}
    found = {}
    for place, setting in enumerate("abcd"):
        for seed in range(3):
            found[f"{setting}-one-{seed}"] = {"mean": 50.0 + 10 * place + (seed - 1)}
            found[f"{setting}-two-{seed}"] = {"mean": 48.0}
    line = cells.pairs("one", names, found, "abcd", ["one", "two"])[-2]
    assert line.endswith("| +17.00 [+14.52, +19.48] | 3/3 |")


def test_a_seed_counts_where_all_its_settings_are_there(cells):
    names = {(s, m): [f"{s}-{m}-{seed}" for seed in range(3)] for s in "ab" for m in ("one", "two")}
    found = {name: {"mean": 50.0} for own in names.values() for name in own if name != "b-two-2"}
    assert cells.pairs("one", names, found, "ab", ["one", "two"])[-2].endswith("| +0.00 [+0.00, +0.00] | 0/2 |")
