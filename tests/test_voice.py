"""What a run says where: --quiet, --json, pipes, notebooks, NO_COLOR."""

import io
import json
import warnings

import pytest
import runs
import tiny
from rich.console import Console

from consilium import watch
from consilium.__main__ import main
from consilium.engine.checkpoint import write_atomic
from consilium.loop import run
from consilium.watch import Comparison, JsonLines, Several, Terminal, _Followed


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def command(tmp_path, *more):
    data = runs.table(tmp_path)
    return [
        "run", "fedmoe-text", "--data.path", str(data), "--data.client", "site", "--fit.batch-size", "4",
        "--fit.max-length", "12", "--model.path", str(tiny.directory("switch_transformers", num_experts=4)),
        "--rounds", "2", "--algorithm.stage1", "none", "--out", str(tmp_path), "--name", "mine", *more,
    ]  # fmt: skip


def test_json_is_a_line_a_round_and_the_summary_and_nothing_else(tmp_path, capsys):
    assert main(command(tmp_path, "--json")) == 0
    said = capsys.readouterr()
    first, second, last = map(json.loads, said.out.splitlines())
    kept = [json.loads(line) for line in (tmp_path / "mine/metrics.jsonl").read_text().splitlines()]
    for record, line in zip(kept, (first, second), strict=True):
        assert {**line, "seconds": None} == {**record, "seconds": None, "events": line["events"]}
    assert [event["event"] for event in first["events"]] == ["structure"] * len(first["events"])
    assert last["summary"] == json.loads((tmp_path / "mine/summary.json").read_text())
    assert last["report"] == str(tmp_path / "mine/report.html") and (tmp_path / "mine/report.html").is_file()
    assert "round 2" in said.err  # progress, for whoever watches

    assert main(["resume", str(tmp_path / "mine"), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["summary"] == last["summary"] and said.err == ""


def test_quiet_is_the_last_line(tmp_path, capsys):
    assert main(command(tmp_path, "--quiet")) == 0
    said = capsys.readouterr()
    assert said.out == f"report: {tmp_path / 'mine/report.html'}\n" and "round" not in said.err
    assert main(command(tmp_path, "--quiet")) == 2
    said = capsys.readouterr()
    assert said.out == "" and "already holds a run" in said.err
    assert main(["list"]) == 0 and "Recipes" in capsys.readouterr().out  # and only for that command


def test_a_pipe_gets_a_line_a_round(tmp_path):
    """Whatever happens in a round: clients are counted, not listed."""
    console = Console(file=io.StringIO(), width=80)
    with Terminal(console) as follower:
        run(runs.experiment(runs.table(tmp_path)), tmp_path / "run", follower)
        client = {"rejected": "loss is nan", "experts": 1, "train_loss": None, "validation": None}
        record = {
            "round": 4, "stage": "", "clients": {"a": client}, "missing": {"b": "late", "c": "late"},
            "errors": {"d": "x"}, "scores": None, "unable": {}, "seconds": {"round": 1.0},
            "abandoned": "1 of 2 replies [too few]",
        }  # fmt: skip
        follower.rounded(record, [{"event": "benched", "client": "a", "reason": "bad"}])
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("  ")] == [
        "short",
        *(f"round {n}" for n in (1, 2, 3, 4)),
    ]
    assert lines[-1] == (
        "round 4: 1 clients  1.0 s  1 rejected  2 missing  1 failed  a benched: bad"
        "  abandoned: 1 of 2 replies [too few]"
    )
    assert len(lines) == 3 + 4 and "\x1b" not in console.file.getvalue()


def test_no_color_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    Terminal(console).rounded(
        {"round": 1, "stage": "", "clients": {}, "scores": {"mean": 0.5}, "unable": {}, "seconds": {"round": 1.0}}, []
    )
    said = console.file.getvalue()
    assert "test mean 0.500" in said and not any(f"\x1b[{n}m" in said for n in range(30, 38))


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_bars_where_it_can_show_them(tmp_path, monkeypatch, widgets):
    """Without ipywidgets rich would warn at every step; a line a round remains."""
    monkeypatch.setattr(watch, "find_spec", lambda name: object() if widgets else None)
    console = Console(file=io.StringIO(), width=80, force_jupyter=True)
    follower = Terminal(console)
    cell = runs.experiment(runs.table(tmp_path), rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if widgets else "error")
        with follower:
            run(cell, tmp_path / "run", follower)
    assert follower._bars.disable == (not widgets)


def test_several_watches_are_told_in_order():
    told = []

    class Ear:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, what):
            return lambda *args: told.append((self.name, what, args))

    both = Several([Ear("a"), Ear("b")])
    both.started(1, 2, 3, 4)
    both.step(5, 6, 7, 8)
    both.rounded(9, 10)
    assert told == [
        (n, w, a) for w, a in (("started", (1, 2, 3, 4)), ("step", (5, 6, 7, 8)), ("rounded", (9, 10))) for n in "ab"
    ]


def test_json_of_a_comparison_names_the_run(tmp_path):
    """Rounds of earlier sittings are not told again; a resumed run that repeats a round tells it once."""
    folder, told = tmp_path / "FedAvg", []
    folder.mkdir()

    def write(*numbers):
        lines = [json.dumps({"round": n, "scores": None}) + "\n" for n in numbers]
        write_atomic(folder / "metrics.jsonl", "".join(lines).encode())

    write(1, 2)
    comparison = Comparison(Console(file=io.StringIO()), {}, 1, rounded=lambda *what: told.append(what))
    comparison._followed[folder] = _Followed(folder / "metrics.jsonl")
    bars = type("Bars", (), {"update": lambda *args, **more: None})()
    comparison._show(bars, 0, folder, None)
    for numbers in ((1, 2), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)):
        write(*numbers)
        comparison._show(bars, 0, folder, comparison.rounded)
    assert [(name, record["round"]) for name, record in told] == [("FedAvg", 3), ("FedAvg", 4)]
    lines = JsonLines(io.StringIO())
    lines.rounded({"round": 1}, ({"event": "grow"},))
    assert lines.file.getvalue() == '{"round": 1, "events": [{"event": "grow"}]}\n'
