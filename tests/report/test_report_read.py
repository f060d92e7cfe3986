"""Reading run directories, whole, unfinished and damaged."""

import json

import pytest
from report_runs import make_run

from consilium.errors import ConfigError
from consilium.report import read_run, read_runs
from consilium.report.results import (
    best,
    client_scores,
    columns,
    format_bytes,
    format_score,
    format_seconds,
    result,
    shared_mean,
    unable_clients,
)


def test_whole_run(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert (run.algorithm, run.status, run.finished) == ("FedMoE", "finished", True)
    assert run.tasks == ("kind", "topic", "verb")
    assert [run.clients[c].task for c in run.order] == ["kind"] * 4 + ["topic"] * 4 + ["verb"] * 4
    assert run.metric("verb") == "token_f1"
    assert len(run.rounds) == 20
    assert run.notes == ()


def test_not_a_run_names_what_is_missing_and_the_runs_near_by(tmp_path):
    make_run(tmp_path / "runs" / "good")
    (tmp_path / "runs" / "empty").mkdir()
    for wrong in (tmp_path / "runs" / "empty", tmp_path / "runs" / "goood", tmp_path / "runs"):
        with pytest.raises(ConfigError) as caught:
            read_run(wrong)
        assert "\n" not in str(caught.value)
        assert "good" in str(caught.value).split("runs near by:")[1]
    with pytest.raises(ConfigError, match=r"no config\.json and no partition\.json"):
        read_run(tmp_path / "runs" / "empty")
    with pytest.raises(ConfigError, match="no run is near by"):
        read_run(tmp_path / "elsewhere" / "x")
    with pytest.raises(ConfigError, match="no run given"):
        read_runs([])


def test_unfinished_run_is_summed_from_its_rounds(tmp_path):
    path = make_run(tmp_path / "a", finished=False)
    (path / "structure.json").unlink()
    run = read_run(path)
    row = result(run)
    assert not run.finished and run.summary is None and run.structure is None
    assert row.rounds == 10
    assert row.bytes_total == sum(r["bytes_down"] + r["bytes_up"] for r in run.rounds)
    last = [r["test"] for r in run.rounds if r["test"]][-1]
    assert client_scores(run) == last


def test_torn_last_line_is_left_out_and_said(tmp_path):
    path = make_run(tmp_path / "a", finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 10, "sta')
    with (path / "events.jsonl").open("ab") as file:
        file.write(b'{"round": 10, "client": "\xe2\x82')  # cut inside a character
    run = read_run(path)
    assert len(run.rounds) == 10
    assert [note for note in run.notes if "torn" in note] == [
        "the last line of metrics.jsonl is torn and was left out",
        "the last line of events.jsonl is torn and was left out",
    ]


def test_broken_line_in_the_middle_is_refused(tmp_path):
    path = make_run(tmp_path / "a")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:40], *lines[4:]]))
    with pytest.raises(ConfigError, match="line 4 of 20 is not JSON"):
        read_run(path)


def test_round_told_twice_counts_once(tmp_path):
    path = make_run(tmp_path / "a", finished=False)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    again = json.dumps(json.loads(lines[-1]) | {"bytes_down": 7})
    (path / "metrics.jsonl").write_text("\n".join([*lines, again]) + "\n")
    run = read_run(path)
    assert len(run.rounds) == 10 and run.rounds[-1]["bytes_down"] == 7
    assert any("twice" in note for note in run.notes)


def test_labels_tell_runs_apart(tmp_path):
    paths = [make_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1)]
    assert [r.label for r in read_runs(paths)] == ["FedMoE seed 0", "FedMoE seed 1"]
    assert [r.label for r in read_runs([paths[0], paths[0]])] == ["FedMoE (s0) #1", "FedMoE (s0) #2"]
    assert [r.label for r in read_runs([paths[0], make_run(tmp_path / "f", "FedAvg")])] == ["FedMoE", "FedAvg"]


def test_label_counts_may_be_per_split(tmp_path):
    path = make_run(tmp_path / "a")
    partition = json.loads((path / "partition.json").read_text())
    partition["clients"]["kind-00"]["label_counts"] = {"train": {"a": 9, "b": 1}, "test": {"a": 3, "b": 1}}
    (path / "partition.json").write_text(json.dumps(partition))
    assert read_run(path).clients["kind-00"].commonest_label_share == 0.75


def test_means_over_the_clients_that_all_runs_scored(tmp_path):
    runs = read_runs([make_run(tmp_path / "a", "FedMoE"), make_run(tmp_path / "b", "FedAvg")])
    assert len(unable_clients(runs[1])) == 6
    scores = client_scores(runs[0])
    kept = {t: [v for c, v in scores.items() if runs[0].clients[c].task == t and c not in unable_clients(runs[1])]
            for t in runs[0].tasks}  # fmt: skip
    by_hand = sum(sum(v) / len(v) for v in kept.values()) / 3
    assert shared_mean(runs)[0] == pytest.approx(by_hand)
    assert shared_mean(runs)[1] == pytest.approx(result(runs[1]).mean)


def test_best_marks_differences_that_can_be_seen(tmp_path):
    runs = read_runs([make_run(tmp_path / a.lower(), a) for a in ("FedMoE", "FedAvg", "Standalone")])
    shown = {column.head: column for column in columns(runs)}
    assert best(shown["mean"], [True] * 3) == {0}
    assert best(shown["clients"], [True] * 3) == {0, 2}
    assert best(shown["traffic"], [True] * 3) == {2}
    assert best(shown["time"], [True] * 3) == set()  # all alike: nobody is best
    assert best(shown["mean"], [False, True, True]) == {1}
    assert best(shown["run"], [True] * 3) == set()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (93.1e6, "93.1 MB"),
        (999.96e6, "1.00 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes(value, text):
    assert format_bytes(value) == text


def test_small_formats():
    assert format_bytes(50e6, trim=True) == "50 MB" and format_bytes(0, trim=True) == "0"
    assert format_seconds(1.7e308) == format_seconds(float("inf")) == format_seconds(float("nan")) == "–"
    assert [format_seconds(s) for s in (None, 4.21, 42.3, 59.7, 754, 7500)] == [
        "–", "4.2 s", "42 s", "1m 00s", "12m 34s", "2h 05m"
    ]  # fmt: skip
    assert (format_score(0.634), format_score(0.634, 0.042), format_score(None)) == ("63.4", "63.4 ± 4.2", "–")


def test_device_limits_may_stand_in_the_summary_only(tmp_path):
    path = make_run(tmp_path / "a")
    partition = json.loads((path / "partition.json").read_text())
    limits = {client: entry.pop("memory_bytes") for client, entry in partition["clients"].items()}
    (path / "partition.json").write_text(json.dumps(partition))
    assert {c: r.memory_bytes for c, r in read_run(path).clients.items()} == limits


def test_client_that_trains_is_not_unable(tmp_path):
    """In FedMoE's stage one a client may be unable to profile and still take part in the round."""
    path = make_run(tmp_path / "a", finished=False)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["unable"] = {"topic-00": "needs 2 MB, has 1 MB", "kind-00": "needs 2 MB, has 1 MB"}
        line["clients"]["topic-00"] = {"experts": 3}
        line["clients"].pop("kind-00", None)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(unable_clients(read_run(path))) == ["kind-00"]
