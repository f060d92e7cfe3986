"""SECURITY.md: the tests that it names exist, and what it says of files on a shared machine."""

import re
import stat
from pathlib import Path

import pytest
import runs
import torch

from consilium.moe.merging import Merging, RobustMean
from consilium.params import WeightedMean

ROOT = Path(__file__).parent.parent


def named(text: str) -> list[tuple[str, str]]:
    """(file, test) of every `file::test` in a text; `::test` is of the file named last before it."""
    found, file = [], ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = path or file
        found.append((file, name))
    return found


NAMED = named((ROOT / "SECURITY.md").read_text())


def test_the_names_are_read():
    assert named("`tests/a.py::test_x`, `::test_y` and `tests/b/c.py::test_z`") == [
        ("tests/a.py", "test_x"), ("tests/a.py", "test_y"), ("tests/b/c.py", "test_z"),
    ]  # fmt: skip
    assert len(NAMED) > 30


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_is_named_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M)


def test_a_sites_folder_is_its_users_alone(tmp_path):
    pytest.importorskip("flwr")
    from consilium.engine.flower import save_site

    save_site(tmp_path / "at/site.json", "site-0", runs.experiment(runs.table(tmp_path)))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "at", *(tmp_path / "at").iterdir())}
    assert modes == {"at": 0o700, "site.json": 0o600, "data.json": 0o600, "secret": 0o600}


def test_waiting_replies_are_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mean = RobustMean(Merging("median"), {"w": torch.zeros(1)}, WeightedMean())
    mean.add({"w": torch.ones(1)}, 1)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
