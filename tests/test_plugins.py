"""Methods from a file of the user's own: in a run, a resumed run, a comparison, and `list`."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from consilium import experiment, recipes
from consilium import setup as setups
from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.cli.app import take_imports
from consilium.core import Algorithm
from consilium.data.code import CodeData
from consilium.errors import ConfigError
from consilium.kinds import DataSource, Model
from consilium.models.cohort import Cohort
from consilium.plugins import VARIABLE, import_plugins
from consilium.recipes.digits import pfedmoe_digits

METHOD = Path(__file__).parent.parent / "examples/new_algorithm.py"
SMALL = [
    "--data.clients",
    "3",
    "--data.train",
    "16",
    "--data.validation",
    "8",
    "--data.test",
    "8",
    "--fit.max-length",
    "16",
    "--rounds",
    "2",
    "--sampling.clients-per-round",
    "2",
]


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch, tmp_path):
    """Each test begins without the method, and leaves none behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(Algorithm, "registry", {k: v for k, v in Algorithm.registry.items() if k != "Decay"})
    for name in [name for name in sys.modules if name.startswith("consilium_user_")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_method_of_ones_own_runs_and_resumes(capsys, monkeypatch):
    assert main(["run", "fedmoe-docstrings", "--algorithm", f"{METHOD}:Decay", "--algorithm.rho", "0.02", *SMALL]) == 0
    folder = Path("runs/fedmoe-docstrings")
    saved = json.loads((folder / "config.json").read_text())["experiment"]["algorithm"]
    assert saved == {"type": "Decay", "rho": 0.02}
    assert "new_algorithm" not in (folder / "config.json").read_text()  # a run never names code to import

    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delitem(Algorithm.registry, "Decay")
    (folder / "summary.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "status": "interrupted"}))
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 2
    assert "unknown type 'Decay'" in (said := capsys.readouterr().err) and "--import its file" in said
    for name in [name for name in sys.modules if name.startswith("consilium_user_")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["resume", str(folder), "--import", str(METHOD)]) == 0
    assert json.loads((folder / "summary.json").read_text())["algorithm"] == "Decay"


def test_a_comparison_takes_it_into_its_processes(monkeypatch):
    arguments = ["--algorithms", "Decay,FedAvg", "--import", str(METHOD), "--quiet", *SMALL]
    assert main(["compare", "fedmoe-docstrings", *arguments]) == 0
    summary = json.loads(Path("runs/fedmoe-docstrings/Decay/summary.json").read_text())
    assert summary["algorithm"] == "Decay" and summary["rounds"] == 2


def test_list_shows_it(capsys):
    assert main(["list", "--import", str(METHOD)]) == 0
    out = capsys.readouterr().out
    assert "  Decay  " in out and "FedAvg with weights that are pulled" in out and "  FedMoE  " in out


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "is not a file"), ("1 / 0", "cannot be imported: ZeroDivisionError"), ("x = 1", "unknown algorithm")],
)
def test_a_file_that_is_none_or_broken(text, said, capsys, tmp_path):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert main(["run", "fedmoe-docstrings", "--algorithm", "mine.py:Mine"]) == 2
    assert said in capsys.readouterr().err


def test_an_entry_point_is_imported(monkeypatch, tmp_path):
    """As pip would install it: a distribution with an entry point of the group "consilium"."""
    (tmp_path / "theirs.py").write_text(METHOD.read_text())
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[consilium]\nmethods = theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins()
    assert "Decay" in Algorithm.registry
    (tmp_path / "theirs.py").unlink()
    monkeypatch.delitem(sys.modules, "theirs")
    with pytest.raises(Exception, match="entry point theirs cannot be imported"):
        import_plugins()
    assert os.environ[VARIABLE] == ""


SOURCE = METHOD.parent / "own_source.py"


@pytest.fixture
def _own_source(monkeypatch):
    monkeypatch.setattr(experiment, "DATA", dict(experiment.DATA))
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))


@pytest.mark.usefixtures("_own_source")
def test_a_data_source_and_a_recipe_of_ones_own_run_and_resume(capsys):
    """The flags of the source are those of its dataclass; a saved run names its class, and never its file."""
    small = ["--data.poets", "2", "--sampling.clients-per-round", "2", "--data.verses", "12"]
    assert main(["run", "poems", "--import", str(SOURCE), *small, "--rounds", "1"]) == 0
    saved = json.loads(Path("runs/poems/config.json").read_text())
    assert saved["experiment"]["data"] == {"type": "Poems", "poets": 2, "verses": 12}
    assert "own_source" not in json.dumps(saved)
    assert main(["resume", "runs/poems", "--import", str(SOURCE), "--rounds", "2"]) == 0
    assert json.loads(Path("runs/poems/summary.json").read_text())["rounds"] == 2
    del experiment.DATA["Poems"]
    os.environ[VARIABLE] = ""
    capsys.readouterr()
    assert main(["resume", "runs/poems", "--rounds", "3"]) == 2
    assert "unknown type 'Poems'" in (said := capsys.readouterr().err) and "--import its file" in said


@pytest.mark.usefixtures("_own_source")
def test_a_data_source_that_lacks_something_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Half(DataSource):
        gives: ClassVar[str] = "language"

    with pytest.raises(ConfigError, match="data source Half lacks load"):
        experiment.register_data(Half)
    with pytest.raises(ConfigError, match="already"):
        experiment.register_data(type("CodeData", (CodeData,), {"__module__": "mine"}))


def test_a_kind_of_model_of_ones_own(monkeypatch):
    """A cohort that says its name differently is a kind of its own, with the set-up of cohorts."""
    monkeypatch.setattr(setups, "SETUPS", dict(setups.SETUPS))
    monkeypatch.setattr(experiment, "SETUPS", setups.SETUPS)

    @dataclasses.dataclass(frozen=True)
    class Tiny(Cohort):
        architectures: tuple[str, ...] = ("mlp-3",)

    class Half(Model):
        pass

    cell = dataclasses.replace(pfedmoe_digits(), model=Tiny(), algorithm=FedAvg())
    with pytest.raises(ConfigError, match=r"model kind Half lacks architecture, check_site, counts"):
        setups.register_model(Half, setups.CohortSetup)
    with pytest.raises(ConfigError, match="unknown type 'Tiny'"):
        experiment.from_json(experiment.to_json(cell))
    setups.register_model(Tiny, setups.CohortSetup)
    assert experiment.from_json(experiment.to_json(cell)) == cell
    made = cell.setup([("digits", ("0", "1"))], shape=(8, 8, 1))
    assert isinstance(made, setups.CohortSetup) and set(made.initial_params()) >= {"head.digits.0.weight"}


def test_all_other_arguments_stay_as_they_are():
    """An empty value, too: `--data.client=` is not a flag that takes the next argument as its value."""
    args = ["run", "r", "--data.client=", "--fit.lr", "1", "--algorithm", "FedAvg"]
    assert take_imports(args) == args
