"""Nothing in the source runs code from outside. The files are searched; nothing is imported."""

import re
from pathlib import Path

import pytest

import consilium

SRC = Path(consilium.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

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


@pytest.mark.parametrize(
    ("what", "line"),
    [("pickle, which runs code when read", "import pickle"), ("eval and exec", "x = eval(text)"),
     ("code from a model's directory", "f(trust_remote_code=True)"), ("torch.load and torch.save", "torch.load(path)")],
)  # fmt: skip
def test_the_search_would_find_it(what, line):
    assert re.search(FORBIDDEN[what], line)
    assert not re.search(FORBIDDEN["eval and exec"], "model.eval()")
