"""Libraries with one door, and ways to run foreign code that nobody takes. Sources are read, nothing is imported.

That a module imports only from lower floors is checked by import-linter, see pyproject.toml and scripts/test.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import consilium

SRC = Path(consilium.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in FILES}


@cache
def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too; relative imports are resolved."""
    package = ("consilium", *path.relative_to(SRC).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def importers(library: str) -> set[str]:
    return {m for m, path in MODULES.items() if any(name.split(".")[0] == library for name in imports(path))}


def test_one_door_to_each_federated_library():
    assert importers("flwr_datasets") == {"data.partition"}
    assert {module for module in importers("flwr") if not module.startswith("engine.flower.")} == set()
    assert importers("flwr") and importers("ray") == set()


FORBIDDEN = {
    "pickle, which runs code when read": r"\b(?:c?[pP]ickle|dill|cloudpickle|joblib|shelve)\b(?=\.|\s*$| as )",
    "torch.load and torch.save": r"(?<![\w.])torch\.(?:load|save)\b",
    "eval and exec": r"(?<![\w.])(?:eval|exec)\(",
    "yaml that builds objects": r"\byaml\.(?:load|unsafe_load|full_load)\b",
    "code from a model's directory": r"trust_remote_code\s*=\s*True",
    "a shell": r"shell\s*=\s*True|\bos\.(?:system|popen)\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_runs_foreign_code(what):
    hits = [
        f"{path.relative_to(SRC)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not hits


def test_no_unsafe_serialiser_is_imported():
    for library in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
        assert importers(library) == set()


@pytest.mark.parametrize(
    ("what", "line"),
    [("pickle, which runs code when read", "import pickle"), ("eval and exec", "x = eval(text)"),
     ("code from a model's directory", "f(trust_remote_code=True)"), ("torch.load and torch.save", "torch.load(path)")],
)  # fmt: skip
def test_the_search_would_find_it(what, line):
    assert re.search(FORBIDDEN[what], line)
    assert not re.search(FORBIDDEN["eval and exec"], "model.eval()")
