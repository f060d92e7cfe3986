"""The floors: a module imports only from lower ones, and from its own package. Read with `ast`, nothing is imported."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import consilium

SRC = Path(consilium.__file__).parent
FLOORS = {
    "work": 0,
    "addresses": 0, "errors": 0, "escape": 0, "inside": 0, "machine": 0, "params": 0, "core": 0, "blocked": 0,
    "masters": 0, "versions": 0, "plugins": 0,
    "pointers": 0, "products": 0,
    "moe": 1, "models": 1, "data": 1, "privacy": 1,
    "disclosure": 2, "fit": 2,
    "planner": 3,
    "setup": 4,
    "batched": 5,
    "scoring": 6,
    "completions": 7, "training": 7,
    "algorithms": 8,
    "experiment": 9,
    "engine": 10, "settings": 10,
    "certificates": 11, "rundir": 11, "prepare": 11, "summary": 12, "loop": 13,
    "export": 14, "report": 14, "recipes": 14, "tracking": 14, "watch": 14,
    "api": 15, "deployment": 15,
    "oneshot": 16,
    "cli": 17,
    "__main__": 18,
}  # fmt: skip
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


def inner(path: Path) -> set[str]:
    """The parts of the package (first names below `consilium`) that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "consilium" and "." in name}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_on_a_floor(module):
    assert module.split(".")[0] in {*FLOORS, "__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_floors(module):
    own = module.split(".")[0]
    floor = FLOORS.get(own, -1)  # consilium/__init__.py stands below all
    for part in inner(MODULES[module]) & FLOORS.keys():
        allowed = part == own or FLOORS[part] < floor or FLOORS[part] == floor == 0
        assert allowed, f"{module} (floor {floor}) imports consilium.{part} (floor {FLOORS[part]})"


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
