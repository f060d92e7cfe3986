"""Methods from a file of the user's own: in a run, a resumed run, a comparison, and `list`."""

import json
import os
import sys
from pathlib import Path

import pytest

from consilium.__main__ import main
from consilium.cli.app import take_imports
from consilium.core import Algorithm
from consilium.plugins import VARIABLE, import_plugins

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


def test_all_other_arguments_stay_as_they_are():
    """An empty value, too: `--data.client=` is not a flag that takes the next argument as its value."""
    args = ["run", "r", "--data.client=", "--fit.lr", "1", "--algorithm", "FedAvg"]
    assert take_imports(args) == args
