"""From two CSV files at two sites to one model of plain transformers, in five commands; and the other commands."""

import os
import subprocess
import sys

import pytest
import sites
import torch
from processes import ENVIRONMENT
from transformers import AutoModelForCausalLM, AutoTokenizer

from consilium.__main__ import main

READ = [
    "--data.prompt", "question", "--data.response", "answer", "--model.dtype", "float32", "--fit.lora.rank", "0",
    "--fit.max-length", "32", "--fit.target-length", "16",
]  # fmt: skip


def train(site, model, rounds=12):
    return [
        "expert", "train", "fedmoe-instructions", "--name", site, "--out", f"{site}.safetensors", "--kind", "expert",
        "--data.path", f"{site}.csv", *READ, "--model.path", model, "--rounds", str(rounds), "--fit.lr", "0.01",
        "--about", f"questions of {site}", "--licence", "CC0-1.0",
    ]  # fmt: skip


def consilium(folder, *command):
    """Run a command in a process of its own, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "consilium", *command], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def loss(model, tokenizer, site):
    """Mean loss of a site's answers in plain transformers, nats per token, in the form of the recipe."""
    losses = []
    for word, said in sites.ANSWERS[site].items():
        prompt = tokenizer(f"### User:\nold near house {word}\n\n### Assistant:\n", return_tensors="pt")["input_ids"]
        answer = tokenizer(said, return_tensors="pt")["input_ids"]
        labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
        losses.append(float(model(input_ids=torch.cat([prompt, answer], dim=1), labels=labels).loss))
    return sum(losses) / len(losses)


def test_five_commands_lead_to_one_model_for_both(tmp_path):
    """The tiny public model knows neither site's answers; the model for both has a lower loss on those of each. Without
    moments the rows, trained apart on the same words around other answers, send the tokens of one site to the other."""
    model = str(sites.olmoe())
    for site in ("north", "south"):
        sites.table(tmp_path, site, rows=60)
    consilium(tmp_path, *train("north", model), "--moments")
    consilium(tmp_path, *train("south", model), "--moments")
    consilium(tmp_path, "hub", "init", "hub", "--model", model)
    consilium(tmp_path, "hub", "add", "hub", "north.safetensors", "south.safetensors")
    said = consilium(tmp_path, "hub", "build", "hub", "--router", "flexolmo", "--out", "both")
    assert "format transformers" in said and "note" not in said

    folder = tmp_path / "both"
    both, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    public = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for site in ("north", "south"):
            assert loss(both, tokenizer, site) < 0.6 * loss(public, tokenizer, site)

    consilium(tmp_path, "hub", "build", "hub", "--router", "flexolmo", "--apart", "0", "--out", "left")
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "left").eval()
    with torch.no_grad():
        assert loss(left, tokenizer, "north") > 0.9 * loss(public, tokenizer, "north")


def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(sites.olmoe())
    sites.table(tmp_path, "north")
    for command, said in (
        (["hub", "move", "x"], "unknown command hub 'move'; allowed are init, add"),
        (["hub", "list", "nothing"], "is no hub"),
        (["expert", "train", "--name", "north", "--out", "n"], "name a recipe"),
        (["expert", "train", "fedmoe-instruction", "--name", "n", "--out", "n"], "unknown recipe"),
        (["hub", "list", "hub", "--data.path", "x"], "name a recipe by --rows first"),
        ([*train("north", model), "--rank", "0"], "rank is 0; it must be at least 1"),
        ([*train("north", model), "--kind", "expertt"], "allowed are adapter, gated, expert"),
        ([*train("../x", model)], "--name is '../x'"),
        ([*train("north", model), "--memory", "1MB"], "training a part of kind expert"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err, command
    assert not (tmp_path / "north.safetensors").exists()
    for room, command in (("hub", "withdraw"), ("expert", "memory")):
        with pytest.raises(SystemExit):
            main([room, "--help"])
        assert f"consilium {room} {command}" in capsys.readouterr().out


def test_the_rest_of_the_commands(tmp_path, monkeypatch, capsys):
    """List, check, evaluate, report, memory, withdraw, and building again."""
    monkeypatch.chdir(tmp_path)
    model, rows = str(sites.olmoe()), ["--rows", "fedmoe-instructions", "--data.path", "north.csv", *READ]
    for site in ("north", "south"):
        sites.table(tmp_path, site)
        assert main([*train(site, model, 2), "--moments"]) == 0
    assert main(["hub", "init", "hub", "--model", model]) == 0
    assert main(["hub", "add", "hub", "north.safetensors", "south.safetensors"]) == 0
    assert main(["hub", "list", "hub"]) == 0
    assert "north expert row 32 examples" in " ".join(capsys.readouterr().out.split())
    assert main(["hub", "check", "hub", *rows]) == 0
    assert main(["hub", "evaluate", "hub", *rows]) == 0
    said = capsys.readouterr().out
    assert "router flexolmo:" in said and "router ridge:" in said and "without north" in said
    assert main(["hub", "report", "hub", "--scores", "scores.json"]) == 0
    assert "CC0-1.0" in (tmp_path / "hub.html").read_text()
    assert (
        main(["expert", "memory", "north.safetensors", *rows, "--model.path", model, "--prefix", "8", "--length", "4"])
        == 0
    )
    assert "with the package:" in capsys.readouterr().out
    assert main(["hub", "build", "hub", "--router", "ridge", "--out", "first", *rows]) == 0
    assert main(["hub", "withdraw", "hub", "south"]) == 0
    assert main(["hub", "build", "hub", "--out", "second", "--again", "first"]) == 0
    assert "1 sites, router ridge" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["hub", "build", "--help"])
    assert "--top-k" in capsys.readouterr().out
