"""Every command of the README, the pages of docs/, SECURITY.md and the docstrings of modules.

A command is run as it stands, with the flags of `SMALL` after it, in a folder that has what it names; or, if `PARSED`
says why it is not, it is taken by the real command line, which then stops short of its work. A command that a page gets
is run from then on.
"""

import ast
import importlib
import io
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pictures
import pytest
import runs
import tiny
from test_transcripts import PAGES

from consilium import watch
from consilium.__main__ import main
from consilium.core import Algorithm
from consilium.experiment import to_json
from consilium.plugins import VARIABLE
from consilium.recipes import RECIPES, find

ROOT = Path(__file__).parent.parent
PAGES_OF_DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "algorithms"]
"""Without docs/algorithms, which docs/conf.py generates."""
DOCS = [ROOT / "README.md", ROOT / "SECURITY.md", *PAGES_OF_DOCS]

ELSEWHERE = {f"docs/{name}.md": "test_transcripts.py" for name in PAGES} | {"docs/deployment.md": "test_deployment.py"}
"""Pages whose fenced commands are run by another test."""

PARSED = {
    r"consilium compare .*": "runs of minutes each; tests of comparisons have smaller ones",
    r"consilium (server|client|certificates) .*": "processes over a network: test_deployment.py runs them",
    r"consilium export north .*": "a site's state comes of a deployment: test_deployment.py exports one",
    r"consilium resume .* --rounds .*": "test_settings.py goes on with a finished run",
    r"consilium run .* --device cuda": "needs a GPU: test_gpu.py runs there",
    r"consilium (expert|hub) .*": "tests/oneshot runs all of them",
    r"consilium upcycle .*": "moe/test_upcycle.py runs every family",
    r"consilium run pfedmoe-cifar10 .*": "a data set of 160 MB",
    r"scripts/(demo|test|setup|release-check|docs).*": "installs packages; the demo's own command is parsed",
    r"python -m consilium\.recipes\.pretrain.*": "hours; its parts are tested in recipes/test_pretrain.py",
}
"""Pattern -> why such a command is not run here."""

DOCSTRINGS = "--rounds 1 --data.clients 3 --data.train 16 --data.validation 8 --data.test 8 --fit.max-length 16"
LANGUAGE = "--rounds 1 --fit.max-length 16 --data.clients 2 --model.dtype float32 --algorithm.stage1 forward"
CODE = "--rounds 2 --data.clients 4 --data.train 4 --data.validation 4 --data.test 4 --fit.max-length 16"
SMALL = {
    "fedmoe-code": CODE,
    "affinitymoe-code": CODE,
    "fedmoe-docstrings": f"{DOCSTRINGS} --algorithm.stage1 forward",
    "hfedmoe-docstrings": DOCSTRINGS,
    "fedmoe-text": "--rounds 1 --fit.max-length 16 --algorithm.stage1 forward",
    "fedmoe-instructions": f"{LANGUAGE} --fit.target-length 4",
    "lora-instructions": "--rounds 1 --fit.max-length 16 --data.clients 2 --model.dtype float32 --fit.target-length 4",
    "fedmoe-plaintext": f"{LANGUAGE} --fit.target-length 64",
    "pfedmoe-digits": "--rounds 1",
    "pfedmoe-images": "--rounds 1 --data.clients 2 --model.width 8",
    "pfedmoe-table": "--rounds 1",
}
"""Recipe -> flags that make a run of it short."""


# --- what there is ----------------------------------------------------------------------------------------------------


def commands(text):
    """Commands of Markdown, or of a docstring: lines of code blocks, and spans of code with an argument."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^(?: *\$ | {4,}|)((?:consilium|scripts/\w|python -m consilium)[^\n`]*)$", joined, re.M)
    spans = re.findall(r"(?<!`)`((?:consilium \w+|scripts/)[^`\n]*)`(?!`)", joined)
    found = [re.split(r"\s+#\s|\s{3,}", line)[0].strip() for line in (*lines, *spans)]
    return [c for c in dict.fromkeys(found) if not re.search(r'(?<!")\.\.\.', c)]


def collected():
    found = {}
    for page in DOCS:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        if name in ELSEWHERE:
            text = re.sub(r"^```(bash|console)\n.*?^```", "", text, flags=re.M | re.S)
        found |= {command: name for command in commands(text) if command not in found}
    for module in sorted((ROOT / "src").rglob("*.py")):
        told = ast.get_docstring(ast.parse(module.read_text())) or ""
        found |= {c: module.name for c in commands(told) if c not in found}
    return found


ALL = collected()
USAGE = re.compile(r"[|\[\]]|\bRECIPE\b|COMMAND\b| --[\w-]+$")
"""A synopsis, not a command: alternatives, options, a flag without its value."""
NAMED = {c: page for c, page in ALL.items() if (len(c.split()) == 2 and c != "consilium list") or USAGE.search(c)}


def reason(command):
    return next((why for pattern, why in PARSED.items() if re.fullmatch(pattern, command)), None)


RUN = [c for c in ALL if c not in NAMED and reason(c) is None]
TAKEN = [c for c in ALL if c not in NAMED and reason(c) is not None]


def test_commands_are_found():
    text = "    consilium run a --b 1   # c\n`consilium data x`, `consilium chat`\n\nconsilium run a \\\n  --c 2\n"
    assert commands(text) == ["consilium run a --b 1", "consilium run a --c 2", "consilium data x", "consilium chat"]
    assert len(RUN) >= 15 and len(TAKEN) >= 10


@pytest.mark.parametrize("command", NAMED)
def test_a_command_that_is_only_named_exists(command, capsys):
    """And where flags are named with it, its help has them."""
    words = command.split()
    if words[0] != "consilium" or words[1] == "COMMAND":
        return
    helped = [] if words[1] not in ("run", "compare", "server", "client") else ["fedmoe-docstrings"]
    with pytest.raises(SystemExit) as stop:
        main([words[1], *helped, "--help"])
    said = capsys.readouterr().out
    assert not stop.value.code
    assert all(flag in said for flag in re.findall(r"--[a-z][\w.-]*", command) if flag != "--help")


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Name in a command -> what it stands for."""
    folder = tmp_path_factory.mktemp("shelf")
    rows = [(f"{['chest', 'knee', 'skin'][i % 3]} pain in case {i}", f"{'abc'[i % 3]}") for i in range(60)]
    hospitals = [("north", "south")[i // 3 % 2] for i in range(60)]
    texts, labels = zip(*rows, strict=True)
    notes = {"text": texts, "label": labels, "note": texts, "ward": labels, "hospital": hospitals}
    pandas.DataFrame(notes).to_csv(folder / "notes.csv", index=False)
    pandas.DataFrame({"question": texts, "answer": labels}).to_json(folder / "qa.jsonl", orient="records", lines=True)
    pandas.DataFrame({"text": texts}).to_parquet(folder / "books.parquet")
    rng = np.random.default_rng(0)
    heart = {"age": rng.random(60), "pulse": rng.random(60), "disease": [i % 2 for i in range(60)]}
    pandas.DataFrame(heart | {"hospital": hospitals}).to_parquet(folder / "heart.parquet")
    pandas.DataFrame(heart).head(3).to_csv(folder / "new.csv", index=False)
    pictures.folder(folder / "photos", 60, side=16)
    made = {path.name: path for path in folder.iterdir()}
    qa = ["--data.path", folder / "qa.jsonl", "--data.prompt", "question", "--data.response", "answer"]
    table = ["--data.path", folder / "heart.parquet", "--data.target", "disease"]
    olmoe = tiny.directory("olmoe", "text-to-text")
    for recipe, flags, client, exported in (
        ("fedmoe-docstrings", [], "topic-00", "mine"),
        ("fedmoe-text", ["--data.path", folder / "notes.csv", "--data.client", "hospital"], "north", "north-model"),
        ("fedmoe-instructions", [*qa, "--model.path", olmoe], "answer-00", "chat"),
        ("pfedmoe-images", ["--data.path", folder / "photos"], "photos-00", "small"),
        ("pfedmoe-table", [*table, "--data.client", "hospital"], "north", "of-rows"),
    ):
        run = ["run", recipe, *flags, *SMALL[recipe].split(), "--out", folder / "runs", "--quiet"]
        export = ["export", folder / "runs" / recipe, "--client", client, "--out", folder / exported]
        for arguments in (run, export):
            assert main([str(argument) for argument in arguments]) == 0
        made |= {f"runs/{recipe}": folder / "runs" / recipe, exported: folder / exported}
    made |= {"runs/a": made["runs/fedmoe-docstrings"], "runs/b": made["runs/fedmoe-text"]}
    made |= {"config.json": folder / "runs/fedmoe-text/config.json", "scan.png": folder / "photos/cat/000.png"}
    return made | {"DIR": olmoe, "path/to/olmoe": olmoe, "PATH": folder / "photos"}


@pytest.fixture
def desk(shelf, tmp_path, monkeypatch):
    """A function that puts what a command names into the working folder."""

    def lay(command):
        words = shlex.split(command)
        outs = {words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"}
        kinds = {"chat": "chat", "--image": "small", "--table": "of-rows"}
        model = shelf[next((kind for word, kind in kinds.items() if word in words), "mine")]
        taken = {name: model for name in ("mine", "DIR") if words[1] in ("chat", "predict")}
        taken |= {"north-model": model} if "--table" in words else {}
        for name, path in (shelf | taken).items():
            if any(word == name or word.startswith(f"{name}/") for word in words) and name not in outs:
                place = tmp_path / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    return lay


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, desk, capsys, monkeypatch):
    desk(command)
    words = shlex.split(command)[1:]
    recipe = words[1] if words[0] == "run" else ""
    if "MyMethod" in command:
        my_method(monkeypatch)
    if recipe.endswith("MyMethod/config.json"):
        saved(Path(recipe))
    small = SMALL.get(recipe, "")
    if "--algorithm" in words:  # another method than the recipe's
        small = small.replace("--algorithm.stage1 forward", "")
    assert main([*words, *small.split()]) == 0, capsys.readouterr().err


def my_method(monkeypatch):
    """The method that docs/adding-a-method.md writes, in my_file.py; what a test registers is forgotten after it."""
    monkeypatch.setattr(Algorithm, "registry", dict(Algorithm.registry))
    monkeypatch.setenv(VARIABLE, "")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding-a-method.md").read_text(), re.M | re.S)
    Path("my_file.py").write_text(code)


def saved(config):
    """A saved experiment of that method."""
    method = runpy.run_path("my_file.py", run_name="my_file")["MyMethod"]
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(to_json(runs.experiment(runs.table(Path.cwd()), method(), rounds=1))))


# --- parsed -----------------------------------------------------------------------------------------------------------


class Taken(Exception):
    """The command line has taken all of a command, and would begin its work."""


def stop(*args, **kwargs):
    raise Taken


@pytest.mark.parametrize("command", TAKEN)
def test_a_command_is_taken(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Algorithm, "registry", dict(Algorithm.registry) | {"MyMethod": Algorithm.registry["FedProx"]})
    monkeypatch.setattr(watch, "Comparison", stop)
    monkeypatch.setattr("consilium.cli.sites.load_deployment", Deployment)
    monkeypatch.setenv(VARIABLE, "")
    Path("my_file.py").write_text("")  # its method is registered above
    for name in ("consilium.loop.run", "consilium.rundir.RunDirectory.config", "consilium.moe.upcycle.upcycle"):
        monkeypatch.setattr(name, stop)
    if re.search("--one-shot|^consilium (expert|hub)", command):
        pytest.importorskip("flwr")
        for name in ("network.offer", "network.collect", "hub.Hub.open", "commands.create", "train.site_data"):
            monkeypatch.setattr(f"consilium.oneshot.{name}", stop)
    words = shlex.split(command)
    if words[0].startswith("scripts/"):
        assert subprocess.run(["bash", "-n", ROOT / words[0]], check=False).returncode == 0
        demo = re.search(r"consilium\" (compare .*) \"\$@\"", (ROOT / "scripts/demo").read_text())[1]
        words = ["consilium", *demo.split()]
    if words[0] == "python":
        assert callable(importlib.import_module(words[2]).main)
        return
    if words[1] == "certificates":
        pytest.importorskip("flwr")
        assert main(words[1:]) == 0
        return
    if words[1] == "export":
        Path("north").mkdir()
        Path("north/site.json").touch()
        pytest.importorskip("flwr")
        monkeypatch.setattr("consilium.engine.flower.read_site", stop)
    with pytest.raises(Taken):
        main(words[1:])


class Deployment:
    """Stands for `consilium.deployment`, which starts processes."""

    def __new__(cls):
        real = pytest.importorskip("consilium.deployment")
        return type("Stopping", (), {**vars(real), "server": stop, "client": stop})


def test_reasons_are_of_use():
    assert all(any(re.fullmatch(pattern, command) for command in ALL) for pattern in PARSED)
    assert all((ROOT / page).is_file() for page in ELSEWHERE)
    assert all(find(name) for name in SMALL) and SMALL.keys() <= RECIPES.keys()
