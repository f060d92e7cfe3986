"""Recipes that have no model of their own ask for one, before anything is loaded or written."""

import pytest

from consilium.__main__ import main
from consilium.recipes import find


@pytest.mark.parametrize("name", ["fedmoe-plaintext", "fedmoe-instructions"])
def test_a_recipe_without_a_model_asks_for_one(name, tmp_path, monkeypatch, capsys):
    """In one line with what to do, and without a look at the hub."""
    (tmp_path / "x.jsonl").write_text('{"text": "one two", "prompt": "a", "response": "b"}\n' * 40)
    monkeypatch.chdir(tmp_path)
    assert find(name).make().model.path == ""
    columns = ["--data.text", "text"] if name == "fedmoe-plaintext" else ["--data.prompt", "prompt"]
    columns += [] if name == "fedmoe-plaintext" else ["--data.response", "response"]
    assert main(["run", name, "--data.path", "x.jsonl", "--data.clients", "2", *columns]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no model is given: name one with --model.path" in line and "docs/models.md" in line
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
