"""The package from Python: what `import consilium` gives, and how fast; comparing; reading a run."""

import ast
import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import runs

import consilium
from consilium import api
from consilium.core import Algorithm
from consilium.errors import CheckpointError, ConfigError
from consilium.report import methods, read_runs


def test_every_name_is_there_and_every_algorithm_has_one():
    assert set(consilium.__all__) <= set(dir(consilium))
    given = {name: getattr(consilium, name) for name in consilium.__all__}
    built_in = {n: c for n, c in Algorithm.registry.items() if c.__module__.startswith("consilium.")}
    assert {name: value for name, value in given.items() if value in built_in.values()} == built_in
    assert callable(given["run"]) and given["recipes"].find("fedmoe-text").make().name == "fedmoe-text"
    assert consilium.__version__ == metadata.version("consilium")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        consilium.nothing  # noqa: B018


def test_the_types_are_those_of_the_names():
    tree = ast.parse(Path(consilium.__file__).with_suffix(".pyi").read_text())
    typed = {a.asname: (n.module, a.name) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(typed) == set(consilium.__all__)
    for name, (module, own) in typed.items():
        if name not in ("run", "recipes"):
            assert getattr(sys.modules[module], own) is getattr(consilium, name)
    assert (Path(consilium.__file__).parent / "py.typed").is_file()


def test_importing_it_imports_nothing_else():
    program = (
        "import sys; before = set(sys.modules); import consilium; more = {m.split('.')[0] for m in set(sys.modules) - "
        "before}; assert more <= {'consilium', 'importlib', 'warnings', '_frozen_importlib_external'}, more; "
        "from consilium import run; assert callable(run) and consilium.run is run and run.__name__ == 'run'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    cell = runs.experiment(runs.table(root), "FedMoE", memory=runs.memory(8, 2, 3), evaluate_every=2)
    summary = consilium.run(dataclasses.replace(cell, algorithm=consilium.FedMoE(stage1="none")), root / "run")
    return root / "run", summary


def test_a_run_is_read_as_it_was_made(finished):
    folder, summary = finished
    run = consilium.load_run(str(folder))
    assert (run.folder, run.status, run.summary) == (folder, "finished", json.loads(json.dumps(summary)))
    assert run.experiment.algorithm == consilium.FedMoE(stage1="none") and run.config["rounds"] == 3
    assert run.scores["mean"] == summary["mean"] and run.report == folder / "report.html"
    assert {client: [len(ids) for ids in blocks.values()] for client, blocks in run.experts.items()} == {
        client: told["experts"] for client, told in summary["clients"].items()
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.status = "running"


def test_rounds_and_clients_as_frames(finished):
    folder, summary = finished
    run = consilium.load_run(folder)
    rounds, clients = run.rounds(), run.clients()
    assert list(rounds.index) == [1, 2, 3] and rounds["bytes_up"].sum() == summary["bytes_up"]
    assert list(rounds["mean"].notna()) == [False, True, True] and rounds["mean"].iloc[-1] == summary["mean"]
    assert clients.index.names == ["round", "client"]
    assert clients["bytes_up"].sum() == summary["bytes_up"]
    last = clients.loc[3]["test"].dropna()
    assert dict(last) == {client: told["test"] for client, told in summary["clients"].items()}


def test_a_run_that_has_only_begun(finished, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    config = json.loads((finished[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "status": "running"}))
    run = consilium.load_run(folder)
    assert (run.summary, run.scores, run.experts, len(run.rounds()), len(run.clients())) == (None, {}, {}, 0, 0)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        consilium.load_run(tmp_path / "nowhere")


def test_the_plan_has_every_algorithm_and_seed():
    recipe = consilium.recipes.find("pfedmoe-digits")
    own = dataclasses.replace(recipe.make(), algorithm=consilium.pFedMoE(mixing="shared"), seed=5)
    planned = api.plan(recipe, own, ["pFedMoE", "pFedMoE-static", "FML"], 2, Path("runs"))
    assert [folder.name for folder in planned] == [
        f"{name}-seed{seed}" for name in ("pFedMoE", "pFedMoE-static", "FML") for seed in (5, 6)
    ]
    mixing = [e.algorithm.mixing for e in planned.values() if isinstance(e.algorithm, consilium.pFedMoE)]
    assert mixing == ["shared", "shared", "static", "static"]  # a rival's own setting stays what it is called


def test_compare_returns_the_table(finished, tmp_path, monkeypatch):
    """The comparison's processes stand in here for themselves: `test_watch` runs them for real."""
    folder, _ = finished

    def run(self):
        for path, cell in self.planned.items():
            consilium.run(cell, path)

    monkeypatch.setattr(api.Comparison, "run", run)
    cell = runs.experiment(folder.parent / "table.jsonl", rounds=1, name="both")
    table = consilium.compare(cell, ["FedAvg", "Standalone"], seeds=2, out=tmp_path)
    assert isinstance(table, pd.DataFrame) and list(table.index) == ["FedAvg", "Standalone"]
    assert Path(table.attrs["report"]) == tmp_path / "both/report.html" and (tmp_path / "both/report.csv").is_file()
    found = methods(read_runs(sorted((tmp_path / "both").glob("*-seed*"))))
    assert table.loc["FedAvg", "task"] == found[0].tasks["task"].mean and table.loc["Standalone", "pairs"] == 2
    with pytest.raises(ConfigError, match="did you mean 'FedAvg'"):
        consilium.compare(cell, ["FedAvgg"], out=tmp_path)
