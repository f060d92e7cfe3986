"""The imports follow the contracts in pyproject.toml, and docs/architecture.md shows the same floors."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def floors():
    """Return room -> floor by the contract of layers, counted from 0 at the bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {room: floor for floor, layer in enumerate(reversed(layers)) for room in re.split(r"[ |:]+", layer)}


def test_imports_follow_the_contracts():
    """In a process of its own, because import-linter configures the loggers of its process."""
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tree_of_rooms_is_true():
    tree = re.search(r"```text\nsrc/consilium/(.*?)\ntests/", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)[1]
    entries = re.findall(r"^  (\w[\w./, ]*?) +(\d+)  ", tree, re.MULTILINE)
    shown = {name.removesuffix(".py").rstrip("/"): int(floor) for names, floor in entries for name in names.split(", ")}
    assert shown == floors()
