"""Worker processes: the same bits and records as in one process, errors and deaths told, nobody left behind."""

import dataclasses
import itertools
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import runs
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.core import Payload, Sampling
from consilium.data import template
from consilium.data.arrays import ImageData
from consilium.engine import workers as workers_of
from consilium.engine.workers import forked
from consilium.errors import BudgetError, CheckpointError, ConfigError, RoundError
from consilium.experiment import Experiment
from consilium.loop import run
from consilium.models.cohort import Cohort

COHORT = Experiment("small", FedAvg(), ImageData(), Cohort(("mnist-5",)), sampling=Sampling(4))


@pytest.fixture(scope="module", autouse=True)
def _no_templates():
    """End the process that renders chat templates, which serves all tests of the session."""
    template.close()


def children():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


calls = itertools.count(1)  # of each worker


def double(kind, client, number, version, payload, progress, later):
    progress(1, 1)
    if client == "full":
        later(full_disk)
    if client.startswith("/"):
        later(lambda: time.sleep(0.3) or Path(client).write_text(str(os.getpid())))
    if client == "bad":
        raise BudgetError("too small")
    if client == "odd":
        raise ZeroDivisionError("division by zero")
    if client == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = {"pid": os.getpid(), "call": next(calls)}
    return Payload({"w": {"w": payload.group("w")["w"] * 2}}, answer), {"number": number, "of": version}


def full_disk():
    raise CheckpointError("No space left on device")


def tasks(*names):
    for i, name in enumerate(names):
        yield name, i, Payload({"w": {"w": torch.full((3,), float(i))}})


def test_answers_come_in_the_order_of_the_tasks_from_several_processes():
    seen = []
    with forked(2, double) as workers:
        answers = list(workers.each("train", 7, tasks(*"dbacfe"), lambda *step: seen.append(step)))
    assert [client for client, *_ in answers] == list("dbacfe")
    for i, (_, sent, reply, told) in enumerate(answers):
        assert torch.equal(sent.group("w")["w"] * 2, reply.group("w")["w"]) and told == {"number": 7, "of": i}
    pids = {reply.scalars["pid"] for _, _, reply, _ in answers}
    assert len(pids) == 2 and os.getpid() not in pids and not any(map(psutil.pid_exists, pids))
    assert set(seen) <= {(client, "train", 1, 1) for client in "abcdef"} and seen


@pytest.mark.parametrize("bytes", [1, 300, 2**26])
@pytest.mark.parametrize("alike", [True, False])
def test_payloads_arrive_through_memory_and_through_the_pipe(bytes, alike, monkeypatch):
    """Also where all clients are sent the very same tensors, which then are encoded once, and other scalars, which are
    not; two million numbers are more than a pipe holds at once, and than 300 bytes."""
    made, parts = [], workers_of.parts
    monkeypatch.setattr(workers_of, "MEMORY", bytes)
    monkeypatch.setattr(workers_of, "parts", lambda payload: made.append(payload) or parts(payload))
    one = torch.arange(2_000_000.0)

    def sent():
        for i in range(12):
            w = one if alike else one[: 2 if i % 2 else 2_000_000] + i
            yield f"c{i:02}", 0, Payload({"w": {"w": w}}, {"later": i >= 6})

    with forked(2, double) as workers:
        for _ in range(2):
            for i, (_, payload, reply, _) in enumerate(workers.each("train", 1, sent(), lambda *_: None)):
                assert payload.scalars["later"] == (i >= 6)
                assert torch.equal(reply.group("w")["w"], payload.group("w")["w"] * 2)
    assert len(made) == (4 if alike and bytes == 2**26 else 24)


def test_a_tensor_that_has_changed_by_the_next_round_is_sent_anew():
    w = torch.ones(3)
    with forked(1, double) as workers:
        for value in (1.0, 5.0):
            w.fill_(value)
            ((_, _, reply, _),) = workers.each("train", 1, [("a", 0, Payload({"w": {"w": w}}))], lambda *_: None)
            assert reply.group("w")["w"].tolist() == [2 * value] * 3


@pytest.mark.parametrize(("room", "most"), [(0, 4), (96, 8)])
def test_tasks_are_made_when_there_is_room_for_them(room, most, monkeypatch):
    """Two workers: at most four payloads and answers at a time, or eight of 12 bytes in 96, however many clients."""
    monkeypatch.setattr("consilium.engine.workers.ROOM", room)
    made = []

    def counted():
        for task in tasks(*(f"c{i}" for i in range(20))):
            made.append(task[0])
            yield task

    with forked(2, double) as workers:
        for done, _ in enumerate(workers.each("train", 1, counted(), lambda *_: None)):
            assert len(made) <= done + most
        assert done == 19


def test_of_the_last_the_longest_begin(monkeypatch):
    """One worker, room for four tasks: in turn, until there is room and no more come; answers are in turn always."""
    monkeypatch.setattr("consilium.engine.workers.ROOM", 48)
    takes = {"a": 1, "b": 9, "c": 2, "d": 4, "e": 5}.__getitem__
    with forked(1, double) as workers:
        answers = list(workers.each("train", 1, tasks(*"abcde"), lambda *_: None, takes))
    assert [client for client, *_ in answers] == list("abcde")
    assert [reply.scalars["call"] for *_, reply, _ in answers] == [1, 2, 3, 5, 4]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("bad", BudgetError, "too small"),
        ("odd", RuntimeError, "division by zero"),
        ("full", CheckpointError, "No space left on device"),
        ("killed", RoundError, "worker process of client killed has ended with code -9"),
    ],
)
def test_an_error_in_a_worker_is_one_here(name, error, text):
    with pytest.raises(error, match=text), forked(2, double) as workers:
        list(workers.each("train", 1, tasks("a", name, "c"), lambda *_: None))
    assert not children()


def test_what_clients_leave_is_written_when_all_have_answered(tmp_path):
    names = [str(tmp_path / name) for name in "abcde"]
    with forked(2, double) as workers:
        for round in (1, 2):
            answers = list(workers.each("train", round, tasks(*names), lambda *_: None))
            for client, _, reply, _ in answers:
                assert Path(client).read_text() == str(reply.scalars["pid"])
                Path(client).unlink()


@pytest.mark.parametrize("status", ["finished", "killed"])
def test_a_run_leaves_nobody_behind(status, tmp_path):
    """Over a mixture of experts, which by itself is trained in one process; the weights are those of one. A run whose
    process is killed takes its workers along."""
    made = runs.experiment(runs.table(tmp_path), FedAvg(), model=tiny.source(num_experts=4), rounds=2)
    assert made.at_once == 1
    if status == "finished":
        run(made, tmp_path / "one")
        run(dataclasses.replace(made, workers=2), tmp_path / "two")
        one, two = runs.outcome(tmp_path / "one"), runs.outcome(tmp_path / "two")
        assert one["summary"]["weights"] == two["summary"]["weights"] and one["metrics"] == two["metrics"]
        assert not children()
        return
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with forked(2, double) as workers:
            os.write(writing, b" ".join(b"%d" % process.pid for process in workers.processes))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    orphans = [psutil.Process(int(pid)) for pid in os.read(reading, 100).split() if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(orphans, timeout=30)[1]


@pytest.mark.parametrize(("said", "count"), [("1", 1), ("3", 3), ("99", 4), ("2,1", None), ("", None)])
def test_how_many(said, count, monkeypatch):
    """A cohort takes a core per client of a round at most; OMP_NUM_THREADS is what one process may use."""
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert COHORT.at_once == (count or min(4, len(os.sched_getaffinity(0))))


@pytest.mark.parametrize(("changes", "text"), [({"workers": -1}, "workers is -1"), ({"threads": 2}, "threads is 2")])
def test_workers_that_cannot_be(changes, text):
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(COHORT, **{"workers": 2, **changes})
