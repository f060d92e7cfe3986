"""Following runs: what the terminal shows, and several runs at once, each in a process of its own."""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest
import runs
import tiny
from rich.console import Console

from consilium import watch
from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.core import CLIENT_ID, Sampling
from consilium.errors import ConfigError, ConsiliumError
from consilium.experiment import to_json
from consilium.export.deployed import Finished, of_run
from consilium.loop import run
from consilium.report.read import read_run
from consilium.rundir import RunDirectory
from consilium.watch import Comparison, Terminal


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def terminal(**options):
    return Console(file=io.StringIO(), **{"width": 80, **options})


# --- one run ----------------------------------------------------------------------------------------------------------


def test_lines_at_80_columns(tmp_path):
    """A log file gets whole lines, no bars and no escape codes; names in brackets are no markup."""
    data = runs.table(tmp_path)
    with data.open("a") as file:
        file.write(json.dumps({"text": "alone", "label": "cat", "site": "site-9"}) + "\n")
    console = terminal()
    with Terminal(console) as follower:
        run(runs.experiment(data, FedMoE(stage1="none"), memory=runs.memory(8, 2, 3)), tmp_path / "run", follower)
    said = console.file.getvalue()
    assert "\x1b" not in said and "\r" not in said
    assert "  skipped site-9: " in said and "devices: " in said
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("round")] == [
        f"round {n} (stage two)" for n in (1, 2, 3)
    ]
    assert all(line == line.rstrip() for line in said.splitlines())


@pytest.mark.parametrize(
    ("method", "experts", "is_told"),
    [(FedMoE(stage1="none"), (), True), (FedMoE(stage1="none"), (8, 2, 3), False), (FedAvg(), (), False)],
    ids=["FedMoE", "FedMoE with memory", "FedAvg"],
)
def test_without_a_limit_of_memory_there_is_nothing_to_choose(tmp_path, method, experts, is_told):
    console = terminal(width=400)
    memory = runs.memory(*experts) if experts else ()
    with Terminal(console) as follower:
        run(runs.experiment(runs.table(tmp_path), method, rounds=1, memory=memory), tmp_path / "run", follower)
    note = "note: no --memory is given, so every client holds nearly all experts and nothing is chosen: FedMoE"
    assert (note in console.file.getvalue()) == is_told


def test_a_client_has_a_name_everywhere_and_an_id_in_paths(tmp_path):
    """In any alphabet and of any length: on the screen, in the report; its model is had by name, or by id."""
    names = ["北京协和", "Köln", "University Hospital, Department of Internal Medicine / " + "A" * 250]
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"text {i}", "label": ("cat", "dog")[i // 3 % 2], "site": names[i % 3]} for i in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = terminal(force_terminal=True, no_color=True, width=600)
    with Terminal(console) as follower:
        run(runs.experiment(data, rounds=1, sampling=Sampling(clients_per_round=3)), tmp_path / "run", follower)
    partition = json.loads((tmp_path / "run/partition.json").read_text())
    assert sorted(partition["names"].values()) == sorted(names)
    assert all(CLIENT_ID.fullmatch(id) for id in partition["clients"])
    shown = read_run(tmp_path / "run")
    assert set(shown.clients) == set(names) == set(shown.rounds[0]["test"])
    said = console.file.getvalue()
    assert [name for name in names if name not in said] == []
    finished = Finished.of(tmp_path / "run")
    assert finished.info("Köln") == finished.info("Koln") and finished.info(names[0]).id.startswith("client-")
    assert of_run(finished, "北京协和").client == "北京协和"


def test_the_cursor_is_given_back_after_ctrl_c(tmp_path):
    """On a terminal the bars hide the cursor; however the run ends, the last word shows it again."""
    console = terminal(force_terminal=True)

    class Stopped(Terminal):
        def rounded(self, record, events):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Stopped(console) as follower:
        run(runs.experiment(runs.table(tmp_path)), tmp_path / "run", follower)
    said = console.file.getvalue()
    assert said.count("\x1b[?25l") == 1
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")


def test_a_diverged_round_shows_dashes(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = terminal(force_terminal=True, no_color=True)
    client = {"train_loss": None, "validation": None, "experts": None, "bytes_down": 5, "bytes_up": 5}
    client["rejected"] = "train_loss is nan"
    record = {
        "round": 1, "stage": "", "clients": {"a": client | {"seconds": {"train": 1.0, "evaluate": 0.5}}},
        "scores": None, "unable": {"b": "needs more"}, "seconds": {"round": 2.0},
    }  # fmt: skip
    Terminal(console).rounded(record, [{"event": "grow", "client": "a", "experts": 7}])
    lines = console.file.getvalue().splitlines()
    assert lines[0].split() == [
        "a",
        "-",
        "experts",
        "loss",
        "-",
        "validation",
        "-",
        "sent+received",
        "10",
        "B",
        "1.5",
        "s",
    ]
    assert lines[1].split(maxsplit=1) == ["a", "left out of this round: train_loss is nan"]
    assert lines[2:] == ["  grow a to 7 experts", "round 1: 1 clients, 1 unable  2.0 s"]


# --- several runs, for real -------------------------------------------------------------------------------------------


def processes(text):
    """Ids of the processes whose command line names `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if text in path.read_bytes().decode(errors="replace") else []
    return found


def flags(data):
    return [
        "--data.path", str(data), "--data.client", "site", "--fit.batch-size", "4", "--fit.max-length", "12",
        "--model.path", str(tiny.directory("switch_transformers", num_experts=4)), "--rounds", "2",
    ]  # fmt: skip


def test_compare_runs_keeps_and_resumes(tmp_path, capsys, monkeypatch):
    """Two methods, two seeds, two at a time; then again, with one of them interrupted after its first round."""
    monkeypatch.setenv("COLUMNS", "80")
    root = tmp_path / "runs/fedmoe-text"
    command = [
        "compare", "fedmoe-text", *flags(runs.table(tmp_path)), "--algorithms", "FedAvg,RandomMoE", "--seeds", "2",
        "--jobs", "2", "--out", str(tmp_path / "runs"),
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr()
    names = ["FedAvg-seed0", "FedAvg-seed1", "RandomMoE-seed0", "RandomMoE-seed1"]
    assert sorted(p.name for p in root.iterdir()) == [*names, "report.csv", "report.html", "report.tex"]
    assert all(RunDirectory(root / name).config()["status"] == "finished" for name in names)
    assert [RunDirectory(root / name).config()["experiment"]["seed"] for name in names] == [0, 1, 0, 1]
    assert "\x1b" not in said.out and "FedAvg" in said.out and "RandomMoE" in said.out
    outcomes = {name: runs.outcome(root / name) for name in names}
    assert outcomes[names[0]]["partition"] != outcomes[names[1]]["partition"]  # seeds deal anew
    assert outcomes[names[0]]["partition"]["fingerprint"] == outcomes[names[2]]["partition"]["fingerprint"]

    cut = root / "RandomMoE-seed1"
    (cut / "config.json").write_text(json.dumps({**RunDirectory(cut).config(), "status": "interrupted"}))
    for name in ("summary.json", "checkpoints/round-00002.safetensors"):
        (cut / name).unlink()
    files = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert main(command) == 0
    changed = {p.relative_to(root).parts[0] for p, at in files.items() if p.stat().st_mtime_ns != at}
    assert changed == {"RandomMoE-seed1", "report.csv", "report.html", "report.tex"}
    assert {name: runs.outcome(root / name) for name in names} == outcomes
    assert processes(str(tmp_path)) == []


def test_as_many_runs_at_a_time_as_cores_and_memory_allow(tmp_path, monkeypatch):
    """The tiny Switch needs little beside the libraries; devices that are limited make a run smaller."""
    cell = runs.experiment(tmp_path / "a.csv", threads=2)
    need = watch._process_bytes(cell)
    model = 4 * sum(tensor.numel() for tensor in tiny.source().load().values())
    assert need > watch.LIBRARIES + 4 * model
    limited = watch._process_bytes(dataclasses.replace(cell, memory=("1MB", "2MB")))
    assert 2_000_000 < limited - watch.LIBRARIES < need - watch.LIBRARIES
    for cores, free, most in [(8, 100 * need, 4), (8, 2.5 * need, 2), (8, 0, 1), (1, 100 * need, 1)]:
        monkeypatch.setattr(watch, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(watch, "free_memory", lambda free=free: int(free))
        assert watch.at_a_time([cell]) == most
    monkeypatch.undo()
    assert watch.free_memory() > 0


# --- several runs, with a program in place of consilium ---------------------------------------------------------------

PROGRAM = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
command, path = sys.argv[3:5]
folder = Path(path) if command == "resume" else Path(path).parent
(folder / "pid").write_text(str(os.getpid()))
with (folder / "calls").open("a") as file:
    file.write(command + "\\n")
if "bad" in folder.name:
    print("starting", flush=True)
    sys.exit("consilium: something is wrong")
if "dies" in folder.name:
    os.kill(os.getpid(), signal.SIGKILL)
if "slow" in folder.name:
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    while True:
        time.sleep(0.01)
saved = json.loads((folder / "experiment.json").read_text())
(folder / "config.json").write_text(json.dumps({{"experiment": saved, "status": "finished"}}))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Comparisons whose runs are short scripts: `ok...`, `bad...`, `dies...`, `slow...` do what they say."""
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(watch.sys, "executable", str(program))
    monkeypatch.setattr(watch, "prepare", lambda _: None)

    def plan(*names, jobs=2):
        folders = {tmp_path / name: runs.experiment(Path("a.csv"), name=name) for name in names}
        return Comparison(terminal(), folders, jobs)

    return plan


def alive(folder):
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_all_are_run_and_then_none(plan, tmp_path):
    comparison = plan("ok-1", "ok-2", "ok-3", jobs=2)
    comparison.run()
    comparison.run()
    assert [(tmp_path / f"ok-{n}/calls").read_text() for n in (1, 2, 3)] == ["run\n"] * 3


def test_at_most_so_many_at_a_time(plan, monkeypatch):
    comparison = plan(*(f"ok-{n}" for n in range(5)), jobs=2)
    real, most = comparison._start, []
    counted = []

    def start(folder):
        most.append(sum(process.poll() is None for process in counted))
        counted.append(real(folder))
        return counted[-1]

    monkeypatch.setattr(comparison, "_start", start)
    comparison.run()
    assert len(counted) == 5 and max(most) <= 1  # before each start


def test_a_failing_run_is_reported_with_its_last_line_and_the_others_go_on(plan, tmp_path):
    with pytest.raises(ConsiliumError) as caught:
        plan("ok-1", "bad-1", "ok-2").run()
    message = str(caught.value)
    assert message.startswith("bad-1 failed with code 1 (consilium: something is wrong); see ")
    assert message.endswith("bad-1/log.txt") and "\n" not in message
    assert (tmp_path / "ok-1/calls").exists() and (tmp_path / "ok-2/calls").exists()
    with pytest.raises(ConsiliumError, match=r"2 of 3 runs failed: bad-2 failed with code 1 .*; bad-3 failed with"):
        plan("bad-2", "bad-3", "ok-3").run()


def test_a_run_killed_from_outside_is_reported(plan):
    with pytest.raises(ConsiliumError, match=r"dies failed with code -9 \(no output\)"):
        plan("dies").run()


def test_ctrl_c_ends_the_children(plan, tmp_path, monkeypatch):
    """They are asked to end and waited for: no process is left."""
    real = watch.time.sleep

    def sleep(seconds):
        if all((tmp_path / name / "ready").exists() for name in ("slow-1", "slow-2")):
            raise KeyboardInterrupt
        real(0.01)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        plan("slow-1", "slow-2", "ok-1").run()
    for name in ("slow-1", "slow-2"):
        assert (tmp_path / name / "stopped").exists() and not alive(tmp_path / name)
    assert not (tmp_path / "ok-1").exists()


def test_an_interrupted_run_is_resumed(plan, tmp_path):
    comparison = plan("ok-1")
    saved = to_json(comparison.planned[tmp_path / "ok-1"])
    (tmp_path / "ok-1").mkdir()
    (tmp_path / "ok-1/experiment.json").write_text(json.dumps(saved))
    (tmp_path / "ok-1/config.json").write_text(json.dumps({"experiment": saved, "status": "interrupted"}))
    comparison.run()
    assert (tmp_path / "ok-1/calls").read_text() == "resume\n"


def test_another_experiment_in_the_directory_is_refused(plan, tmp_path):
    comparison = plan("ok-1", "ok-2")
    saved = to_json(comparison.planned[tmp_path / "ok-2"]) | {"rounds": 99}
    (tmp_path / "ok-2").mkdir()
    (tmp_path / "ok-2/config.json").write_text(json.dumps({"experiment": saved, "status": "finished"}))
    with pytest.raises(ConfigError, match=r"ok-2 holds another experiment; choose another --name or --out"):
        comparison.run()
    assert not (tmp_path / "ok-1").exists()


def test_what_cannot_run_is_found_before_anything_starts(tmp_path):
    """FedAvg would be found out in a minute, after FedMoE had run for an hour."""
    data = runs.table(tmp_path)
    planned = {
        tmp_path / "runs" / name: runs.experiment(data, method, memory=runs.memory(2))
        for name, method in {"FedMoE": FedMoE(), "FedAvg-full": FedAvg()}.items()
    }
    with pytest.raises(ConfigError, match=r"FedAvg-full cannot run: no client can hold the model"):
        Comparison(terminal(), planned, 1).run()
    assert not (tmp_path / "runs").exists()


def test_a_terminal_shows_how_far_the_runs_are(plan, tmp_path):
    comparison = plan("ok-1")
    console = comparison.console = terminal(force_terminal=True)
    (tmp_path / "ok-1").mkdir()
    rounds = [{"round": n, "scores": {"mean": n / 10} if n == 2 else None} for n in (1, 2, 3)]
    torn = "".join(json.dumps(r) + "\n" for r in rounds)
    (tmp_path / "ok-1/metrics.jsonl").write_text(torn)
    comparison.run()
    said = console.file.getvalue()
    assert "ok-1" in said and "3/3" in said and "test 0.200" in said
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")


def test_every_record_is_read_once(tmp_path, monkeypatch):
    """Also over a torn line, an abandoned round, and a file that a resumed run has put in place of the one before."""
    path, parsed, real = tmp_path / "metrics.jsonl", [], json.loads
    monkeypatch.setattr(watch.json, "loads", lambda line: parsed.append(line) or real(line))
    followed = watch._Followed(path)
    assert followed.new() == []
    path.write_text('{"round": 1}\n{"round": 2, "abandoned": "few"}\n{"rou')
    assert followed.new() == [{"round": 1}] and followed.new() == []
    with path.open("a") as file:
        file.write('nd": 2}\n{"round": 3}\n')
    assert followed.new() == [{"round": 2}, {"round": 3}] and len(parsed) == 4
    watch.write_atomic(path, b'{"round": 1}\n{"round": 2}\n')
    assert [record["round"] for record in followed.new()] == [1, 2] and followed.new() == []
    assert len(parsed) == 6
