"""Weights go out as changes of what a client holds: fewer bytes, nothing lost for good, and whole where a base is."""

import dataclasses
import shutil

import loopback
import pytest
import runs
import tiny
import torch

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import Payload, Sampling
from consilium.engine.checkpoint import load_checkpoint
from consilium.engine.codec import encode
from consilium.engine.flower.held import Held
from consilium.errors import ConfigError
from consilium.experiment import Wire
from consilium.loop import resume, run


def weights(rows=64, columns=64, seed=0):
    return {"a": torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))}


def moved(params, by):
    return {
        key: tensor + by * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
        for key, tensor in params.items()
    }


@pytest.mark.parametrize(("form", "share"), [("bf16", 0.5), ("int8", 0.25)])
def test_both_ends_hold_the_same_and_it_follows_the_weights(form, share, tmp_path):
    """w moves once and then stays: what the client holds comes to it, by a factor with every message."""
    server, client, w, sizes, off = Held(tmp_path / "server"), Held(tmp_path / "client"), weights(256, 256), [], []
    for number in range(1, 5):
        less, base = server.change("c", number, Payload({"params": w}, {"x": 1}), form)
        got = client.received("c", number, less, base)
        assert tiny.same(got.group("params"), server.sent("c", number, Payload({"params": w})).group("params"))
        assert got.scalars == {"x": 1} and set(got.groups) == {"params"}
        sizes.append(len(encode(less)))
        off.append(float((got.group("params")["a"] - w["a"]).abs().max()))
        if number == 1:
            w = moved(w, 0.1)
    assert off[0] == 0 and off[1] > 10 * off[2] and off[2] >= off[3]
    assert all(share <= size / sizes[0] < share + 0.02 for size in sizes[1:])


def test_only_what_both_hold_is_a_change(tmp_path):
    """An expert that is new to the client travels whole, one that it no longer has is forgotten; other groups stay."""
    server, client = Held(tmp_path / "server"), Held(tmp_path / "client")
    one, other, count = weights()["a"], weights(seed=1)["a"], torch.tensor([3])
    for number, params in enumerate(
        ({"e1": one, "n": count}, {"e1": one + 0.1, "e2": other, "n": count}, {"e2": other}), 1
    ):
        less, base = server.change("c", number, Payload({"params": params, "control": {"e1": one}}), "int8")
        got = client.received("c", number, less, base)
        whole = {1: {"e1", "n"}, 2: {"e2", "n"}, 3: set()}[number]
        assert set(less.group("params")) == whole and torch.equal(got.group("control")["e1"], one)
        assert set(got.group("params")) == set(params) == set(client.load("c", number))
        assert all(torch.equal(got.group("params")[key], params[key]) for key in whole)


def test_a_base_that_is_not_held(tmp_path):
    """Lost, of another content, or of a round that the client never saw."""
    server, client, w = Held(tmp_path / "server"), Held(tmp_path / "client"), weights()
    client.received("c", 1, *server.change("c", 1, Payload({"params": w}), "bf16"))
    less, base = server.change("c", 2, Payload({"params": moved(w, 1)}), "bf16")
    assert (
        client.received("c", 2, less, "1:" + "0" * 64) is None and client.received("c", 2, less, "7" + base[1:]) is None
    )
    assert client.received("c", 2, less, "../x:") is None
    (tmp_path / "client/c/round-00001.safetensors").write_bytes(b"broken")
    assert client.received("c", 2, less, base) is None
    assert server.before("c", 2)[0] == 1 and server.before("c", 3)[0] == 2 and server.before("c", 1) == (0, {})


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(monkeypatch):
    return loopback.in_place_of_ray(monkeypatch)


def experiment(tmp_path, method="FedAvg", **changes):
    settings = {
        "model": tiny.source(num_experts=4),
        "sampling": Sampling(3),
        "rounds": 3,
        "engine": "flower",
        **changes,
    }
    return runs.experiment(runs.table(tmp_path), method, **settings)


class After:
    """A watch that does something after a round."""

    def __init__(self, number, work):
        self.number, self.work = number, work

    def started(self, *_):
        pass

    step = started

    def rounded(self, record, events):
        if record["round"] == self.number:
            self.work()


def bytes_down(folder):
    return [record["bytes_down"] for record in runs.outcome(folder)["metrics"]]


@pytest.mark.parametrize(("form", "most"), [("bf16", 0.65), ("int8", 0.5)])
def test_a_run_with_changes_is_smaller_and_ends_near_the_exact_one(form, most, grid, tmp_path):
    """Headers and scales of tiny tensors included; the first round's weights go out whole."""
    made = experiment(tmp_path)
    run(made, tmp_path / "exact")
    run(dataclasses.replace(made, wire=Wire(send=form)), tmp_path / "less")
    (first, *later), (whole, *less) = bytes_down(tmp_path / "exact"), bytes_down(tmp_path / "less")
    assert whole == first and all(b < most * a for a, b in zip(later, less, strict=True))
    ends = [load_checkpoint(tmp_path / name / "checkpoints")[1].group("params") for name in ("exact", "less")]
    start = made.model.load()
    far = sum(float((ends[0][key] - start[key]).square().sum()) for key in start)
    off = sum(float((ends[0][key] - ends[1][key]).square().sum()) for key in start)
    assert 0 < off < 0.05 * far
    assert not (tmp_path / "exact/sent").exists()


RESTLESS = FedMoE(stage1_epochs=1, patience=1, K=2, freeze=False, floor=0.0)


@pytest.mark.parametrize("method", [RESTLESS, SCAFFOLD()], ids=["FedMoE", "SCAFFOLD"])
def test_experts_come_and_go_and_both_ways_may_be_rounded(method, grid, tmp_path):
    made = experiment(tmp_path, method, rounds=5, evaluate_every=5, wire=Wire(send="int8", reply="int8"))
    run(made, tmp_path / "run")
    outcome = runs.outcome(tmp_path / "run")
    assert all(not m["errors"] and not m["missing"] and m["ledger"]["ok"] == 3 for m in outcome["metrics"])


@pytest.mark.parametrize("fault", ["lost", "never came"])
def test_who_does_not_hold_the_base_is_sent_the_whole_within_the_round(fault, grid, tmp_path):
    made = experiment(tmp_path, wire=Wire(send="int8", deadline=30.0))
    run(made, tmp_path / "well")
    after = After(1, lambda: shutil.rmtree(tmp_path / "run/received/site-0"))
    if fault == "never came":
        after = After(2, lambda: Held(tmp_path / "run/sent").save("site-0", weights(), 2))
    run(made, tmp_path / "run", after)
    records = runs.outcome(tmp_path / "run")["metrics"]
    assert all(not m["errors"] and not m["missing"] and m["ledger"]["ok"] == 3 for m in records)
    hit = 1 if fault == "lost" else 2
    here, there = bytes_down(tmp_path / "well"), bytes_down(tmp_path / "run")
    assert [a == b for a, b in zip(here, there, strict=True)][:hit] == [True] * hit and there[hit] > 1.5 * here[hit]
    kinds = [kind for kind, *_ in grid.log if kind == "train"]
    assert len(kinds) == 2 * 9 + 1


def test_a_resumed_run_goes_on_to_the_same_bits(grid, tmp_path):
    """Round 3 was sent before the run was stopped in it: its bases do not count."""
    made = experiment(tmp_path, wire=Wire(send="bf16"), rounds=4)
    run(made, tmp_path / "whole")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "run", After(2, stop))
    for name in ("sent", "received"):  # as if it had been stopped in round 3
        last, next_ = (f"{name}/site-0/round-0000{n}.safetensors" for n in (4, 3))
        shutil.copy(tmp_path / "whole" / last, tmp_path / "run" / next_)
    resume(tmp_path / "run")
    ends = [runs.outcome(tmp_path / name)["summary"]["weights"] for name in ("run", "whole")]
    assert ends[0] == ends[1]


def test_other_forms_are_refused():
    with pytest.raises(ConfigError, match=r"wire\.send is 'int4'; it must be one of exact, bf16, int8"):
        Wire(send="int4")
