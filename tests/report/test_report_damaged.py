"""Damaged run directories: a line each, never a traceback, whatever a file holds."""

import json
import re

import pytest
from report_runs import make_run

from consilium.__main__ import main
from consilium.errors import ConfigError
from consilium.report import read_run, render, write_report
from consilium.report.results import columns, number

FILES = ("config.json", "partition.json", "summary.json", "metrics.jsonl", "events.jsonl", "structure.json")
ODD = (7, -1e308, "x", "", [1], [[]], {"a": 1}, {"a": {"b": [None]}}, True, 10**400)


def make(path):
    return make_run(path, clients=2, blocks=2, experts=3, rounds=3, tasks={"topic": "accuracy"})


def places(value, at=()):
    """Paths to all values inside one; of the entries of an array the first alone."""
    yield at
    items = value.items() if isinstance(value, dict) else [(0, value[0])] if isinstance(value, list) and value else []
    for key, item in items:
        yield from places(item, (*at, key))


def replaced(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


def mutations(path):
    """The texts of a file with one of its values replaced, one for each kind of place."""
    text, lines = path.read_text(), path.suffix == ".jsonl"
    whole, rest = text.split("\n", 1) if lines else (text, "")
    value, seen = json.loads(whole), set()
    for at in places(value):
        kind = re.sub(r"topic-\d+|(?:en|de)coder\.[\w.]+|\b\d+\b", "*", "/".join(map(str, at)))
        if kind not in seen:
            seen.add(kind)
            for new in ODD:
                yield at, new, json.dumps(replaced(value, at, new)) + ("\n" + rest if lines else "")


@pytest.mark.parametrize("name", FILES)
def test_any_value_of_another_type(tmp_path, monkeypatch, name):
    """Read and summed up for each; the page, which takes its time, is made for one in fifty that could be read, and for
    the values that once broke it."""
    monkeypatch.setattr("consilium.report.image.data_uri", lambda *_: "data:,")
    folder, drawn, n = make(tmp_path / "run"), 0, 0
    for at, new, text in mutations(folder / name):
        (folder / name).write_text(text)
        try:
            found = read_run(folder)
            columns([found])
            drawn += 1
            if drawn % 50 == 1 or at[-1:] in (("memory_bytes",), ("experts",), ("round",)):
                render([found])
        except ConfigError as error:
            assert "\n" not in str(error) and name in str(error) and len(str(error)) < 800
        except Exception as error:
            pytest.fail(f"{'/'.join(map(str, at))} is {new!r:.20}: {type(error).__name__}: {error}")
        n += 1
    assert n > 20


BROKEN = {
    "deep": "[" * 10**5, "deep objects": '{"a":' * 10**5, "null": "null", "list": "[]", "text": '"x"', "number": "7",
    "of lists": '{"clients": [[[]]]}', "binary": "\x00", "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_one_line_for_each_damaged_file(tmp_path, capsys, monkeypatch, name, text):
    folder = make(tmp_path / "run")
    rest = "\n{}\n" if name.endswith("jsonl") else ""
    (folder / name).write_text(text + rest)
    monkeypatch.setattr("consilium.report.image.data_uri", lambda *_: "data:,")
    code = main(["report", str(folder)])
    said = capsys.readouterr()
    if code:
        assert said.err.count("\n") == 1 and name in said.err
    elif name == "summary.json" or (name == "structure.json" and "clients" not in text):
        assert f"{name} cannot be read and was left out" in (folder / "report.html").read_text()


def test_numbers_that_no_float_holds():
    assert number(10**400) is None and number(float("nan")) is None and number(3) == 3.0


def test_sums_beyond_any_number(tmp_path):
    """A duration of 1.7e308 in each round is not a duration of the run."""
    folder = make(tmp_path / "run")
    (folder / "summary.json").unlink()
    text = (folder / "metrics.jsonl").read_text().replace('"round": 14.0', '"round": 1.7e308')
    (folder / "metrics.jsonl").write_text(text)
    assert write_report([folder], folder / "report.html").exists()
