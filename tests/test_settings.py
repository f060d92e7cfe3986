"""Settings by name: of one method, swept, from a file; more rounds of a finished run; completion in a shell."""

import subprocess
from pathlib import Path

import pytest
import runs
import tiny

from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.api import plan
from consilium.cli.app import COMMANDS
from consilium.cli.completion import SHELLS, suggestions
from consilium.errors import ConfigError
from consilium.loop import resume, run
from consilium.recipes import find
from consilium.rundir import RunDirectory
from consilium.settings import changed, merged, read_settings, read_sweep, read_variant, sweeps


@pytest.fixture(scope="module")
def base():
    return find("fedmoe-docstrings").make()


def test_single_settings(base):
    made = changed(base, {"fit.lr": "1e-3", "algorithm.stage2": "False", "memory": '["60MB"]', "fit.lora.rank": "4"})
    assert (made.fit.lr, made.algorithm.stage2, made.memory, made.fit.lora.rank) == (1e-3, False, ("60MB",), 4)
    assert changed(made, {"fit.lr": str(base.fit.lr)}).fit == changed(base, {"fit.lora.rank": "4"}).fit
    for settings, said in (
        ({"fit.lrr": "1"}, "no field 'lrr'; did you mean 'lr'"),
        ({"fit.lr": "high"}, "Fit.lr is 'high'"),
        ({"fit.lr": "0"}, "Fit.lr is 0; it must be greater than 0"),
        ({"seed.x": "1"}, "saved"),
    ):
        with pytest.raises(ConfigError, match=said):
            changed(base, settings)


def test_a_file_is_laid_over_a_recipe(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("part.yaml").write_text("rounds: 3\nfit:\n  lr: 0.01\nalgorithm: {type: FedProx, mu: 0.5}\n")
    made = merged(base, read_settings(Path("part.yaml")))
    assert (made.rounds, made.fit.lr, made.fit.epochs) == (3, 0.01, base.fit.epochs)
    assert (type(made.algorithm).__name__, made.algorithm.mu) == ("FedProx", 0.5)
    assert main(["plan", "fedmoe-docstrings", "--config", "part.yaml", "--algorithm.mu", "-1"]) == 2
    assert "mu is -1" in capsys.readouterr().err  # the file's method has the flag, and takes it
    for text, said in (
        ("- 1", "holds a list"),
        ("fit: 3", "fit is 3; it must hold settings"),
        ("a: [", "cannot be read"),
    ):
        Path("bad.yaml").write_text(text)
        assert main(["plan", "fedmoe-docstrings", "--config", "bad.yaml"]) == 2
        assert said in capsys.readouterr().err


def test_methods_with_options_and_sweeps(base):
    """Two methods, one of them with an option, two values, two seeds: eight runs in folders named after them."""
    names = ["FedProx:mu=0.5", "FedAvg"]
    planned = plan(find("fedmoe-docstrings"), base, names, 2, Path("r"), ["fit.lr=1e-4,1e-3"])
    told = [f"{name}-lr{lr}" for name in ("FedProx-mu0.5", "FedAvg") for lr in ("1e-4", "1e-3")]
    assert [path.name for path in planned] == [f"{name}-seed{seed}" for name in told for seed in (0, 1)]
    first = planned[Path("r/FedProx-mu0.5-lr1e-4-seed0")]
    assert (first.algorithm.mu, first.fit.lr, first.seed, first.name) == (0.5, 1e-4, 0, "FedProx-mu0.5-lr1e-4-seed0")
    assert sweeps(["a=1,2", "b=x,y"]) == [{"a": a, "b": b} for a in "12" for b in "xy"] and sweeps([]) == [{}]
    for wrong in ("fit.lr", "fit.lr=", "=1", "fit.lr=1,1"):
        with pytest.raises(ConfigError, match="--sweep"):
            read_sweep(wrong)
    with pytest.raises(ConfigError, match="NAME:option=value"):
        read_variant("FedAvg:experts")
    with pytest.raises(ConfigError, match="no field 'muu'; did you mean 'mu'"):
        plan(find("fedmoe-docstrings"), base, ["FedProx:muu=1"], 1, Path("r"))


def test_a_finished_run_goes_on_for_more_rounds(tmp_path, monkeypatch):
    """Two rounds and then two more leave the weights of four rounds at once."""
    monkeypatch.chdir(tmp_path)
    made = runs.experiment(runs.table(tmp_path), FedAvg(), model=tiny.source(num_experts=4), rounds=4)
    run(made, Path("whole"))
    summary = run(runs.experiment(made.data.path, FedAvg(), model=made.model, rounds=2), Path("more"))
    assert resume("more") == summary == resume("more", rounds=2)
    assert main(["resume", "more", "--rounds", "4", "--quiet"]) == 0
    whole, more = RunDirectory(Path("whole")), RunDirectory(Path("more"))
    assert more.summary()["weights"] == whole.summary()["weights"] and more.summary()["rounds"] == 4
    assert [r["round"] for r in more.rounds()] == [1, 2, 3, 4] and more.config()["experiment"]["rounds"] == 4
    with pytest.raises(ConfigError, match="--rounds is 3; the run has 4 rounds, and can only go on to more"):
        resume("more", rounds=3)


def test_completion(capsys):
    commands = list(COMMANDS)
    assert suggestions(["ru"], commands) == ["run"]
    assert suggestions(["run", "fedmoe-c"], commands) == ["fedmoe-code"]
    assert suggestions(["run", "fedmoe-code", "--fit.l"], commands) == [
        flag for flag in suggestions(["run", "fedmoe-code", "--fit."], commands) if flag.startswith("--fit.l")
    ]
    assert "--fit.lr" in suggestions(["run", "fedmoe-code", "--fit.l"], commands)
    assert suggestions(["run", "fedmoe-code", "--algorithm", "FedPr"], commands) == ["FedProto", "FedProx", "FedProxFT"]
    assert suggestions(["report", "x"], commands) == []
    assert main(["complete", "--", "compare", "pfedmoe-d"]) == 0
    assert capsys.readouterr().out == "pfedmoe-digits\n"
    assert main(["completion", "fish"]) == 2
    program = f"{SHELLS['bash']}\nCOMP_WORDS=(consilium ru); COMP_CWORD=1; consilium() {{ echo run; }}; _consilium; "
    done = subprocess.run(["bash", "-c", program + "echo ${COMPREPLY[@]}"], capture_output=True, text=True, check=True)
    assert done.stdout == "run\n"
