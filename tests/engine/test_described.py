"""What a site says of itself is held to the rules of local names, and an error names the site."""

import io
import re
from dataclasses import replace

import loopback
import pytest
import runs
import tiny
import toy
from flwr.app import Array, ArrayRecord, ConfigRecord
from rich.console import Console

import consilium.engine.flower as flower
from consilium.core import Algorithm, Sampling
from consilium.engine.flower.described import checked_description, checked_name
from consilium.errors import DataError, PayloadError, RoundError
from consilium.experiment import Wire
from consilium.loop import serve
from consilium.watch import Terminal

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it

GOOD = {
    "name": "north", "task": "note", "form": "classification", "metric": "accuracy", "labels": ["low", "high"],
    "sizes": [8, 2, 2], "memory_bytes": 0, "architecture": "", "shape": [], "fingerprint": "ab" * 32, "threads": 1,
}  # fmt: skip
GOODS = [
    GOOD,
    GOOD | {"labels": ["Müdigkeit und Übelkeit", "心不全"], "shape": [3, 32, 32], "architecture": "cnn-1"},
    GOOD | {"form": "text-to-text", "metric": "token_f1", "labels": []},
    GOOD | {"memory_bytes": 2**40, "task": "x" * 58, "labels": ["a" * 256, "b"], "more": "x"},
]
BAD = [
    ("name", None, "name is None"), ("name", "a/b", "name is 'a/b'; it must be 1 to 64"), ("name", ["a"], "name is"),
    ("name", "\x1b]0;owned", "name is"), ("name", "north\n", "name is"),
    ("task", "x[/nothing]", r"task is 'x\[/nothing\]'; it must be 1 to 58 of A-Z a-z 0-9 _ -"),
    ("task", 'a" if __import__("os").system("touch PWNED") else "', "task is"), ("task", "t\x1b[2J", "task is"),
    ("task", "a.b", "task is"), ("task", "", "task is"), ("task", "x" * 59, "task is"), ("task", 7, "task is 7"),
    ("form", "song", "form is 'song'; it must be one of classification"), ("form", ["language"], "form is"),
    ("metric", "luck", "metric is 'luck'; it must be one of accuracy"), ("metric", None, "metric is None"),
    ("labels", "low", "labels is 'low'; it must be a list"), ("labels", [1, 2], "label 1 must be a text"),
    ("labels", ["low", "low"], "names a label twice"), ("labels", ["low"], r"has 1 label\(s\)"),
    ("labels", ["low", "hi\ngh"], r"label 'hi\\ngh' must be a text of 1 to 256 characters without control"),
    ("labels", ["low", "\x1b[31m"], "without control"), ("labels", ["low", "\u202egh"], "without control"),
    ("labels", ["low", "\x85"], "without control"), ("labels", ["low", "\u2028"], "without control"),
    ("labels", ["low", ""], "label '' must be"), ("labels", ["low", "x" * 257], "label 'xxx"),
    ("labels", [str(i) for i in range(65_537)], "65537 labels; at most 65536"),
    ("sizes", [], r"sizes is \[\]; it must be three whole numbers of at least 1"), ("sizes", "two", "sizes is 'two'"),
    ("sizes", [1, 2], "sizes is"), ("sizes", [0, 2, 2], "sizes is"), ("sizes", [2**60, 2, 2], "sizes is"),
    ("sizes", [8.0, 2.0, 2.0], "sizes is"), ("sizes", [True, True, True], "sizes is"), ("sizes", None, "sizes is None"),
    ("memory_bytes", "much", "memory_bytes is 'much'"), ("memory_bytes", -1, "memory_bytes is -1"),
    ("memory_bytes", 2**63, "memory_bytes is"), ("memory_bytes", 1.5, "memory_bytes is 1.5"),
    ("architecture", "cnn\x1b", "architecture is"), ("architecture", "x" * 1001, "architecture is"),
    ("architecture", 3, "architecture is 3"),
    ("shape", [0], r"shape is \[0\]"), ("shape", "3x3", "shape is"), ("shape", [2**20, 2**20], "numbers in all"),
    ("shape", [1] * 9, "shape is"), ("shape", [-3], "shape is"),
    ("fingerprint", "", "fingerprint is"), ("fingerprint", "a b", "fingerprint is"),
    ("fingerprint", b"x", "fingerprint is"),
    ("threads", 0, "threads is 0"), ("threads", "all", "threads is 'all'"), ("threads", None, "threads is None"),
]  # fmt: skip


@pytest.mark.parametrize("told", GOODS)
def test_what_a_site_may_say(told):
    assert checked_description(told) == {key: told[key] for key in GOOD}


@pytest.mark.parametrize(("key", "value", "said"), BAD, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(BAD)])
def test_what_a_site_may_not_say(key, value, said):
    with pytest.raises(PayloadError, match=said) as error:
        checked_description(GOOD | {key: value})
    line = str(error.value)
    assert len(line) < 500 and line.isprintable()


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64])
def test_a_name(name):
    assert checked_name(name) == name


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """(experiment, Grid): two sites; what the first answers is the test's to spoil."""
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    data = runs.table(tmp_path, clients=2)
    lines = data.read_text().splitlines(keepends=True)
    grid = loopback.Loopback([])
    for i in range(2):
        folder = tmp_path / f"at-{i}"
        folder.mkdir()
        (folder / "own.jsonl").write_text("".join(line for line in lines if f'"site-{i}"' in line))
        own = runs.experiment(folder / "own.jsonl", model=tiny.source(num_experts=4))
        flower.save_site(folder / "site.json", f"site-{i}", own)
        grid.configs.append({"site": str(folder / "site.json")})
    made = runs.experiment(
        data, toy.Toy(), model=tiny.source(num_experts=4), sampling=Sampling(2), rounds=1, wire=Wire(deadline=0.2)
    )
    return made, grid


def put(key, value):
    return lambda content: content["engine"].__setitem__(key, value)


SPOILT = [
    (lambda content: content.pop("engine"), "a site cannot take part: .*name is None"),
    (lambda content: content.__setitem__("engine", ArrayRecord()), "a site cannot take part: .*name is None"),
    (put("sizes", []), r"site site-0 cannot take part: what it says of itself is not allowed: sizes is \[\]"),
    (put("sizes", ["two"]), "site site-0 cannot take part: .*sizes is"),
    (put("labels", [1, 2, 3]), "site site-0 cannot take part: .*label 1 must be"),
    (put("memory_bytes", "much"), "site site-0 cannot take part: .*memory_bytes is 'much'"),
    (put("task", "x[/nothing]"), "site site-0 cannot take part: .*task is"),
    (put("name", "\x1b[2J"), r"a site cannot take part: .*name is '\\x1b\[2J'"),
    (
        lambda content: content.__setitem__("failed", ConfigRecord({"reason": "no\n\x1b[31m" + "x" * 2_000_000})),
        r"site site-0 cannot take part: no \?\[31mxxx",
    ),
    (
        lambda content: content.__setitem__("failed", ArrayRecord(array_dict={"x": Array("uint8", (1,), "x", b"1")})),
        "site site-0 cannot take part: unknown",
    ),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT, ids=range(len(SPOILT)))
def test_a_run_does_not_begin_and_names_the_site(federation, tmp_path, spoil, said):
    made, grid = federation
    grid.spoil["query.describe", 100] = spoil
    with pytest.raises(RoundError) as error:
        serve(made, tmp_path / "run", grid, ["site-0", "site-1"], 1.0)
    line = str(error.value)
    assert re.search(said, line) and len(line) < 1100 and line.isprintable()
    assert not (tmp_path / "run").exists()


def test_the_owner_of_a_key_is_named_whatever_the_node_says(federation, tmp_path):
    made, grid = federation
    grid.keys = {100: b"key-0", 101: b"key-1"}
    grid.spoil["query.describe", 100] = put("name", 7)
    keys = {b"key-0": "site-0", b"key-1": "site-1"}
    with pytest.raises(RoundError, match=r"site site-0 cannot take part: .*name is 7"):
        serve(made, tmp_path / "run", grid, ["site-0", "site-1"], 1.0, keys=keys)


def test_what_honest_sites_say_is_shown(federation, tmp_path):
    made, grid = federation
    out = io.StringIO()
    with Terminal(Console(file=out, width=200)) as watch:
        serve(made, tmp_path / "run", grid, ["site-0", "site-1"], 1.0, watch)
    assert "task" in out.getvalue() and (tmp_path / "run/summary.json").exists()


def test_a_site_that_comes_later_is_asked_the_same(federation, tmp_path):
    made, grid = federation
    grid.away.add(101)
    real = grid.pull_messages

    def pulled(identifiers):
        replies = real(identifiers)
        if replies:  # the first site has answered
            grid.away.clear()
        return replies

    grid.pull_messages = pulled
    serve(made, tmp_path / "run", grid, ["site-0", "site-1"], 30.0)
    assert [kind for kind, *_ in grid.log].count("query.describe") == 2
    assert runs.outcome(tmp_path / "run")["metrics"][0]["ledger"]["ok"] == 2


def test_a_node_that_answers_with_no_name_is_missing(federation, tmp_path, caplog):
    """After the run has begun, a node that was restarted is asked for its name alone."""
    made, grid = federation

    class Restart(Terminal):
        def rounded(self, record, events):
            super().rounded(record, events)
            grid.restarts[100] = 1
            grid.spoil["query.name", 100] = put("name", "../site-0")

    with Restart(Console(file=io.StringIO())) as watch:
        serve(replace(made, rounds=2), tmp_path / "run", grid, ["site-0", "site-1"], 1.0, watch)
    assert "a node does not say who it is: name is '../site-0'; it must be" in caplog.text
    assert runs.outcome(tmp_path / "run")["metrics"][1]["missing"] == {"site-0": "not connected"}


def test_a_sites_own_labels_are_checked_before_it_starts(tmp_path):
    lines = runs.table(tmp_path, clients=1).read_text().replace('"dog"', '"dog\\nand cat"')
    (tmp_path / "own.jsonl").write_text(lines)
    own = runs.experiment(tmp_path / "own.jsonl", model=tiny.source(num_experts=4))
    with pytest.raises(DataError, match="without control characters"):
        flower.save_site(tmp_path / "at/site.json", "site-0", own)
    assert not (tmp_path / "at").exists()
