"""The Python of docs/api.md, executed block after block as it stands, with a recipe that is small."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import runs

import consilium

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def test_the_api_page(tmp_path, monkeypatch):
    """A run's folder may be a text. The recipe is small, and keeps what the page sets but for the number of rounds."""
    monkeypatch.chdir(tmp_path)
    small = runs.experiment(runs.table(tmp_path), rounds=1)
    monkeypatch.setattr(consilium.recipes, "find", lambda name: SimpleNamespace(make=lambda: small))
    names = {}
    for block in blocks("docs/api.md"):
        exec(compile(block.replace("rounds=6", "rounds=1"), "docs/api.md", "exec"), names)
    assert consilium.load_run("runs/first").summary["rounds"] == 1
    assert names["experiment"] == replace(small, name="first", sampling=consilium.Sampling(clients_per_round=3))
    assert consilium.resume("runs/first")["rounds"] == 1


def test_the_readme(tmp_path, monkeypatch, capsys):
    """`compare` makes its runs in processes of its own, so here the runs are made before and it is only called."""
    monkeypatch.chdir(tmp_path)
    small = runs.experiment(runs.table(tmp_path), rounds=1)
    seen = []

    def compare(recipe, algorithms, seeds):
        seen.append((recipe, algorithms, seeds))
        consilium.run(replace(small, name="FedMoE-seed0"), f"runs/{recipe}/FedMoE-seed0")

    monkeypatch.setattr(consilium, "compare", compare, raising=False)
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), {})
    assert seen == [("fedmoe-docstrings", ["FedMoE", "FedAvg"], 3)] and "round" in capsys.readouterr().out
