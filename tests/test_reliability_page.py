"""docs/reliability.md names tests: they are there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/reliability.md"


def test_the_page_names_tests_that_exist():
    files = {path.stem: path.read_text() for path in HERE.rglob("test_*.py")}
    there = {*files, *(name for text in files.values() for name in re.findall(r"def (test_\w+)", text))}
    named = re.findall(r"\btest_\w+", PAGE.read_text())
    lost = [
        name for name in named if name not in there and not any(t.startswith(name) for t in there if name[-1] == "_")
    ]
    assert len(named) > 100 and not lost


def test_every_id_has_a_row():
    """F1 to F22, B1 to B20, C1 to C6, P1 to P8, properties 1 to 22."""
    rows = [row.split("|")[1].strip() for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    ids = [part for row in rows for part in row.split(", ")]
    lists = {"F": 22, "B": 20, "C": 6, "P": 8, "": 22}
    wanted = [f"{letter}{n}" for letter, most in lists.items() for n in range(1, most + 1)]
    assert [i for i in wanted if ids.count(i) != 1] == []
