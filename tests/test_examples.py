"""The examples, run as they stand, small; and what makes the package fit to publish that needs no build."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import runs
import tiny
import yaml

import consilium
from consilium.core import Algorithm

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def example(name):
    """Its `main`, without running it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_each_is_short_and_says_how_it_is_run():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == ["deployment", "new_algorithm", "own_data", "own_source", "reading_a_run", "sub_moe"]
    for name in names:
        source = (EXAMPLES / f"{name}.py").read_text()
        assert len(source.splitlines()) <= 60 and f"examples/{name}.py" in source, name


def test_own_data_and_reading_it(tmp_path, capsys):
    """Three hospitals of a CSV; then the run is read with pandas."""
    example("own_data")(tmp_path)
    said = capsys.readouterr().out
    assert all(f"{hospital}: accuracy " in said for hospital in ("north", "south", "coast"))
    example("reading_a_run")(str(tmp_path / "notes"))
    said = capsys.readouterr().out
    assert said.startswith("FedMoE, 3 rounds, finished") and "seconds_round" in said and "last_test" in said
    assert said.count(" is held by ") == 3


def test_a_new_algorithm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Algorithm, "registry", dict(Algorithm.registry))  # it is gone again for other tests
    base = runs.experiment(runs.table(tmp_path), rounds=1, sampling=consilium.Sampling(3))
    example("new_algorithm")(tmp_path, base)
    assert "Decay" in capsys.readouterr().out
    decay, plain = (consilium.load_run(tmp_path / name) for name in ("Decay", "FedAvg"))
    assert decay.config["algorithm"] == {"type": "Decay", "rho": 0.01}
    assert decay.summary["weights"] != plain.summary["weights"]


def test_a_sub_moe(capsys):
    example("sub_moe")(str(tiny.directory("olmoe", "text-to-text")))
    said = capsys.readouterr().out
    assert said.startswith("2 sparse layers") and "(0, 2, 4, 6)" in said
    before, after = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+\d) (?:parameters|after)", said))
    assert 0 < after < before


@pytest.mark.slow
def test_a_deployment_on_loopback(tmp_path, capfd):
    pytest.importorskip("flwr")
    model = str(tiny.directory("switch_transformers", num_experts=4))
    example("deployment")(tmp_path, ["--model.path", model, "--fit.batch-size", "4", "--fit.max-length", "12"])
    assert "scores: {" in capfd.readouterr().out


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    sources = [ROOT / "CITATION.cff", *(ROOT / "src/consilium").glob("*.py")]
    assert not [path.name for path in sources if project["version"] in path.read_text()]


def test_the_citation_has_what_the_format_asks_for():
    """cff 1.2.0: these keys are required, and every author has a name."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    for work in (cited, *cited["references"]):
        assert work["title"] and all("name" in a or "family-names" in a for a in work["authors"])
    assert all({"type", "authors", "title"} <= work.keys() for work in cited["references"])
