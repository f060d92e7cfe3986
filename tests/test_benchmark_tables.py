"""The tables of the benchmarks: seeds are the unit of every interval."""

import importlib
import importlib.util
import json
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


# --- the testbed's own reader and table -------------------------------------------------------------------------------


@pytest.fixture
def testbed(monkeypatch, tmp_path):
    """benchmarks/testbed.py as a module, which writes its results to a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("testbed")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_finished_run_of_the_testbed_is_read(testbed, tmp_path):
    """Validation of the clients' best models 1.5 and 2.5; traffic 30 MB over two clients."""

    def line(number, **more):
        told = {c: {"peak_bytes_model": 4_000_000} for c in ("a", "b")}
        return {
            "round": number,
            "clients": told,
            "bytes_down": 10**7,
            "bytes_up": 5 * 10**6,
            "seconds": {"round": 2.0},
        } | more

    last = {
        "bits_per_byte": {"a": 2.0, "b": 3.0},
        "personal_bits_per_byte": {"a": 1.9, "b": 2.9},
        "personal_validation": {"a": 1.5, "b": 2.5},
        "test": {"a": 0.4, "b": 0.3},
    }
    rounds = [line(1), line(2, **last)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    (tmp_path / "config.json").write_text(json.dumps({"experiment": {"fit": {"lr": 5e-4}}}))
    found = testbed.read(tmp_path)
    assert found["validation"] == 2.0 and found["megabytes"] == 15.0 and found["peak_megabytes"] == 4.0
    assert found["G"] == {"a": 2.0, "b": 3.0} and found["seconds"] == 4.0 and found["rate"] == 5e-4


def test_the_testbeds_table_has_paired_differences(testbed, tmp_path, capsys):
    """Alone is 0.2 and 0.4 worse on two seeds: mean -0.3, half width 12.706 * 0.1 = 1.271."""
    cells = {}
    for seed, gap in enumerate((0.2, 0.4)):
        for method, more in (("AffinityMoE", 0.0), ("alone", gap)):
            values = {"cuda-0": 1.0 + more, "yaml-0": 2.0 + more}
            cells[f"C-{method}-{seed}"] = {
                "rate": 6e-4, "G": values, "S": values, "accuracy": {c: 0.5 for c in values}, "megabytes": 1.0,
                "peak_megabytes": 1.0, "seconds": 1.0,
            }  # fmt: skip
    testbed.write(cells)
    assert "| AffinityMoE - alone | -0.300 ± 1.271 | -0.300 ± 1.271 |" in (tmp_path / "testbed.md").read_text()
    assert "| alone | 2 | 0.0006 |" in capsys.readouterr().out


# --- rules for adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(monkeypatch, tmp_path):
    """benchmarks/adapters.py as a module, which writes its results to a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("adapters")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_methods_are_read_at_equal_bytes(adapters, tmp_path, capsys):
    """Half of the budget a round: two rounds count, so svd has 1.5 - 1.6 and 1.5 - 1.8 of `mean`: -0.2, half width
    12.706 * 0.1. A method whose first round is dearer than the budget is read after that one."""

    def run(megabytes, *scores):
        rounds = [
            {"megabytes": (i + 1) * megabytes, "G": s, "S": s, "worst": s, "effective_rank": 2.0 - i / 2,
             "energy_beyond": 0.5 / (i + 1)}
            for i, s in enumerate(scores)
        ]  # fmt: skip
        return {"rounds": rounds}

    half = adapters.BUDGET / 2
    cells = {
        "mean-0": run(half, 2.0, 1.6, 1.0), "mean-1": run(half, 2.0, 1.8, 1.0), "svd-0": run(half, 1.9, 1.5, 0.9),
        "svd-1": run(half, 1.9, 1.5, 0.9), "stack-0": run(3 * adapters.BUDGET, 1.2, 1.1),
    }  # fmt: skip
    adapters.write(cells)
    text = (tmp_path / "adapters.md").read_text()
    assert "| svd | 2 | 2 of 5 | 14.0 | 1.500 | 1.500 | 1.500 | -0.20 [-1.47, +1.07] | -0.20 [-1.47, +1.07] |" in text
    assert "| stack | 1 | 1 of 5 | 42.0 | 1.200 |" in text
    assert "| svd | 2.00 | 1.00 | 0.500 | 0.167 |" in text  # all rounds, whatever the bytes
    assert capsys.readouterr().out
