"""Small slips of users, answered in a line that says what to do."""

import dataclasses
import json

import pytest
import runs
import tiny

from consilium.__main__ import main
from consilium.api import split_names
from consilium.core import Client
from consilium.engine import rounds
from consilium.errors import CheckpointError, ConfigError, PayloadError
from consilium.experiment import from_json, to_json
from consilium.privacy import Privacy
from consilium.rundir import RunDirectory


def test_version(capsys):
    assert main(["--version"]) == 0
    name, number = capsys.readouterr().out.split()
    assert name == "consilium" and number[0].isdigit()


@pytest.mark.parametrize(
    ("given", "names"),
    [("FedMoE, FedAvg", ["FedMoE", "FedAvg"]), ("A,B,", ["A", "B"]), (["A", " B"], ["A", "B"]), ("", []), ((), [])],
)
def test_lists_with_commas_and_blanks(given, names):
    assert split_names(given) == names


def test_a_method_that_is_named_twice_is_pointed_out():
    with pytest.raises(ConfigError, match="'A' is named twice"):
        split_names("A,B,A")


def test_sites_with_blanks():
    from consilium.cli.sites import site_names

    assert site_names("north, south") == ["north", "south"]


class Forgetful(Client):
    """Returns what is no Payload."""

    def train(self, payload, context):
        return {"params": {}}

    def evaluate(self, payload, context):
        return None


def test_a_client_that_returns_no_payload_is_named():
    from consilium.core import Payload

    with pytest.raises(PayloadError, match=r"Forgetful\.train returned dict, not a Payload"):
        rounds.trained(Forgetful(), Payload(), tiny.context(), Privacy())
    with pytest.raises(PayloadError, match=r"Forgetful\.evaluate returned NoneType, not a Payload"):
        rounds.tested(Forgetful(), Payload(), tiny.context(), Privacy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s["fit"].update(lrr=1.0),
            r"Fit does not fit .*: it has no field 'lrr'; did you mean 'lr'\?",
        ),
        (lambda s: s.update(fit={**s["fit"], "type": "Fitt"}), r"unknown type 'Fitt'; did you mean 'Fit'\?"),
        (lambda s: s.update(fit={"lr": 0.1}), r"unknown type None: each part needs a .type"),
        (
            lambda s: s["algorithm"].update(qqq=1),
            r"FedAvg does not fit .*: it has no field 'qqq'; known are",
        ),
    ],
    ids=["field", "type", "no type", "far from all"],
)
def test_json_by_hand(change, said, tmp_path):
    saved = json.loads(json.dumps(to_json(runs.experiment(runs.table(tmp_path)))))
    change(saved)
    with pytest.raises(ConfigError, match=said):
        from_json(saved)


def test_a_run_that_is_named_without_its_folder(tmp_path, monkeypatch):
    (tmp_path / "runs/fedmoe-text").mkdir(parents=True)
    (tmp_path / "runs/fedmoe-text/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    none = "is not a run directory: it does not exist"
    with pytest.raises(CheckpointError, match=rf"^fedmoe-text {none}; did you mean runs/fedmoe-text\?"):
        RunDirectory(Path("fedmoe-text")).config()
    with pytest.raises(CheckpointError, match=rf"^runs/fedmoe-txt {none}; did you mean runs/fedmoe-text\?"):
        RunDirectory(Path("runs/fedmoe-txt")).config()
    with pytest.raises(CheckpointError, match=rf"^x/y {none}$"):
        RunDirectory(Path("x/y")).config()
    with pytest.raises(CheckpointError, match=r"runs is a comparison|runs/fedmoe-text is not a run directory: config"):
        RunDirectory(Path("runs/fedmoe-text")).config()


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(name, tmp_path, monkeypatch):
    import torch

    from consilium.prepare import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def none_here(*_, **__):
        raise RuntimeError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("consilium.prepare.torch.empty", none_here)
    with pytest.raises(ConfigError, match=f"device is '{name}', but this machine has no CUDA GPU; use --device cpu"):
        prepare(dataclasses.replace(runs.experiment(runs.table(tmp_path)), device=name))
