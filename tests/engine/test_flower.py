"""The engine over Flower's messages, in this process: the same bits as the local engine, and who was missing."""

import dataclasses
import itertools
import json
import math
import queue
import random
import re
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import loopback
import pytest
import runs
import tiny
import torch
import toy
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from hypothesis import given
from hypothesis import strategies as st

import consilium.engine.flower as flower
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import Algorithm, Payload, Sampling, derive_seed
from consilium.engine.checkpoint import ClientStore, load_checkpoint
from consilium.engine.flower.grid import within
from consilium.engine.flower.records import STYPE, blobs_of, from_record, payload_of, to_record
from consilium.engine.flower.server import _watched
from consilium.engine.rounding import rounded, travelling
from consilium.errors import CheckpointError, ConfigError, PayloadError, RoundError
from consilium.experiment import Wire, to_json
from consilium.fit import Fit
from consilium.loop import FAILED, resume, run, serve
from consilium.moe.merging import Merging
from consilium.params import Like
from consilium.privacy import Privacy

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it
METHODS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}
SMALL = [name for name, cls in METHODS.items() if "moe" not in cls.worlds]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def grid(monkeypatch):
    return loopback.in_place_of_ray(monkeypatch)


# --- payloads as messages ---------------------------------------------------------------------------------------------

TENSORS = {
    "bf16": torch.tensor([1.0, -0.0, float("nan"), 3.0e38], dtype=torch.bfloat16),
    "fp16": torch.tensor([[1.5], [6e-8]], dtype=torch.float16),
    "fp32": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t(),
    "fp64": torch.tensor(math.pi, dtype=torch.float64),
    "none": torch.empty(0, 3),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "int8": torch.tensor([-128], dtype=torch.int8),
    "uint8": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}


def there_and_back(payload, told=None):
    message = Message(to_record(payload, told or {}), dst_node_id=1, message_type="train")
    return from_record(loopback.carried(message).content)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_every_dtype_comes_back_to_the_bit(grid):
    sent = Payload({"params": TENSORS, "usage": {}, "ein Süd.name": {"x": TENSORS["bf16"]}}, {"n": 3})
    got, told = there_and_back(sent, {"client": "a"})
    assert list(got.groups) == list(sent.groups) and got.scalars == sent.scalars and told == {"client": "a"}
    for group, tensors in sent.groups.items():
        assert {k: bits(t) for k, t in got.group(group).items()} == {k: bits(t) for k, t in tensors.items()}


number = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalar = st.one_of(number, st.integers(0, 2**64 - 1), st.floats(), st.booleans(), text)
lists = st.one_of(st.lists(number), st.lists(st.floats()), st.lists(st.booleans()), st.lists(text))


@given(st.dictionaries(text, st.one_of(scalar, lists), max_size=5))
def test_scalars_come_back_with_their_types(scalars):
    loopback.Loopback([])  # Flower messages are of a run
    got, _ = there_and_back(Payload(scalars=scalars))
    assert repr(got.scalars) == repr(scalars)


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, [2**63, -1], "\ud800"], ids=["too large", "too small", "both signs", "surrogate"]
)
def test_scalars_that_no_message_holds_are_refused(value):
    with pytest.raises(PayloadError, match="scalar 'x'"):
        to_record(Payload(scalars={"x": value}), {})


def test_one_object_per_group_and_not_one_per_tensor():
    many = {f"k{i}": torch.randn(10) for i in range(100)}
    record = to_record(Payload({"params": many, "control": many}), {})
    assert list(record["payload"]) == ["params", "control"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("scalars"),
        lambda r: r.update(payload=ConfigRecord({})),
        lambda r: r["payload"].update(params=Array(torch.zeros(3).numpy())),
        lambda r: r["payload"].update(params=Array("uint8", (3,), STYPE, b"abc")),
        lambda r: r["payload"].update(params=r["payload"]["control"]),
    ],
    ids=["record gone", "another type", "numpy's own", "no payload", "another group"],
)
def test_anything_else_is_refused(spoil):
    record = to_record(Payload({"params": {"w": torch.ones(3)}, "control": {"w": torch.ones(3)}}), {})
    spoil(record)
    with pytest.raises(PayloadError):
        from_record(record)


# --- parity -----------------------------------------------------------------------------------------------------------


def bits_of(folder, experiment):
    run(experiment, folder)
    return runs.bits(folder)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float32" if i % 2 else "bfloat16") for i, name in enumerate(METHODS)]
)
def test_every_method_gives_the_same_bits_and_records(name, dtype, data, grid, tmp_path):
    """In process (for the others `test_registry` shows that strict changes nothing), and through Flower's messages;
    one client in two is short of memory, or of another architecture."""
    made = runs.of_world(METHODS[name].worlds[-1] if name in SMALL else "moe", data, METHODS[name](), dtype)
    if name in SMALL:
        made = dataclasses.replace(made, data=dataclasses.replace(made.data, augment="crop-flip"))
    local = bits_of(tmp_path / "local", dataclasses.replace(made, strict=True))
    over = bits_of(tmp_path / "flower", dataclasses.replace(made, engine="flower"))
    assert local == over
    assert len([kind for kind, *_ in grid.log if kind == "train"]) == sum(len(m["selected"]) for m in over["metrics"])


def test_noise_rules_and_rounds_of_nobody_are_the_same_over_flower(data, grid, tmp_path, monkeypatch):
    """With the randomness of tests: the second round draws nobody, the third all; and a rule of merging likewise."""

    def begin():
        draws = iter([0.1, 0.9, 0.1] + [0.9] * 3 + [0.1] * 3)
        monkeypatch.setattr(random.SystemRandom, "random", lambda self: next(draws))
        monkeypatch.setattr("consilium.privacy.fresh_generator", lambda: torch.Generator().manual_seed(0))

    private = runs.experiment(data, "RandomMoE", privacy=Privacy(noise=1.0, epsilon=100.0, delta=1e-3))
    rule = runs.experiment(data, "RandomMoE", rounds=1, sampling=Sampling(3), merging=Merging("median"))
    pytest.importorskip("dp_accounting")
    for name, made in (("private", private), ("rule", rule)):
        outcomes = []
        for engine in ("local", "flower"):
            begin()
            outcomes.append(bits_of(tmp_path / f"{name}-{engine}", dataclasses.replace(made, engine=engine)))
        assert outcomes[0] == outcomes[1]
        if name == "private":
            assert [len(m["selected"]) for m in outcomes[0]["metrics"]] == [2, 0, 3]


# --- who was missing --------------------------------------------------------------------------------------------------


class Between:
    """A watch that does something after a round."""

    def __init__(self, **steps):
        self.steps = {int(key[1:]): step for key, step in steps.items()}

    def started(self, *_):
        pass

    def step(self, *_):
        pass

    def rounded(self, record, events):
        self.steps.get(record["round"], lambda: None)()


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def toys(data, monkeypatch):
    """Four rounds of all three clients, in milliseconds."""
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    wire = Wire(deadline=0.2)
    small = tiny.source(num_experts=4)
    return runs.experiment(data, toy.Toy(), model=small, sampling=Sampling(3), rounds=4, engine="flower", wire=wire)


def metrics(folder):
    return runs.outcome(folder)["metrics"]


ONE = 101  # the node of partition 0, site-0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("silent", "no answer within 0.2 s"),
        ("lost", "no answer within 0.2 s"),
        ("crashing", "error 8: The process was killed."),
        ("away", "not connected"),
    ],
)
def test_the_round_goes_on_without_who_is_missing(toys, grid, tmp_path, fault, reason):
    """In round 2 one client does not answer; in round 3 it is back, with the state that it had before."""
    where = getattr(grid, fault)
    sick, well = (ONE if fault == "away" else ("train", ONE)), Between()
    well.steps = {1: lambda: where.add(sick), 2: lambda: (where.discard(sick), grid.silent.clear())}
    run(toys, tmp_path / "run", well)
    records = metrics(tmp_path / "run")
    of, not_of = ("errors", "missing") if fault == "crashing" else ("missing", "errors")
    assert [m[of] for m in records] == [{}, {"site-0": reason}, {}, {}] and not any(m[not_of] for m in records)
    assert [m["ledger"]["ok"] for m in records] == [3, 2, 3, 3]
    assert [m["ledger"]["error" if fault == "crashing" else "missing"] for m in records] == [0, 1, 0, 0]
    assert [m["ledger"]["sent"] for m in records] == [3, 2 if fault == "away" else 3, 3, 3]
    states = [record["clients"].get("site-0", {}).get("train_loss") for record in records]
    draws = [
        torch.rand(50, generator=torch.Generator().manual_seed(derive_seed(0, "client", n, "site-0")))
        for n in (1, 3, 4)
    ]
    sums = torch.stack(draws).cumsum(0).sum(1).tolist()
    assert states == pytest.approx([sums[0], None, sums[1], sums[2]])
    assert len({row.data_ptr() for row in draws}) == 3


def test_a_message_lives_as_long_as_its_round(toys, grid, tmp_path):
    run(toys, tmp_path / "run")
    assert {ttl for kind, _, ttl in grid.log if kind != "query.name"} == {0.2}


def test_a_clock_that_jumps_costs_nothing(toys, grid, tmp_path, monkeypatch):
    """The machine's clock goes an hour ahead and back with every look at it: deadlines are of another one."""
    run(toys, tmp_path / "whole")
    real, jumps = time.time, itertools.cycle((3600.0, 0.0, -3600.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    run(dataclasses.replace(toys, wire=Wire(deadline=60)), tmp_path / "run")
    monkeypatch.undo()
    whole, jumped = runs.outcome(tmp_path / "whole"), runs.outcome(tmp_path / "run")
    assert jumped["metrics"] == whole["metrics"] and jumped["summary"] == whole["summary"]


def test_a_round_without_a_quorum_is_tried_again_then_the_run_stops_and_can_go_on(toys, grid, tmp_path):
    run(dataclasses.replace(toys, name="whole"), tmp_path / "whole")
    grid.log.clear()
    sick = Between(_2=lambda: grid.silent.update(("train", node) for node in (100, 101, 102)))
    said = r"round 3 was abandoned 3 times in a row: 0 of 3 selected clients counted, needed are 1 .*site-0: no answer"
    with pytest.raises(RoundError, match=said):
        run(toys, tmp_path / "run", sick)
    assert len([1 for kind, *_ in grid.log if kind == "train"]) == 3 * 2 + 3 * FAILED
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], bool(line["abandoned"])) for line in lines[2:]] == [(3, True)] * FAILED
    grid.silent.clear()
    resume(tmp_path / "run")
    assert (
        runs.outcome(tmp_path / "run")["summary"]["weights"] == runs.outcome(tmp_path / "whole")["summary"]["weights"]
    )
    assert not list(tmp_path.rglob(".replies-*"))


def test_one_answer_in_a_second_attempt_is_enough(toys, grid, tmp_path):
    grid.crashing |= {("train", node) for node in (100, 101, 102)}
    real = grid.push_messages

    def push(messages):
        if len([1 for kind, *_ in grid.log if kind == "train"]) == 3:
            grid.crashing.clear()
        return real(messages)

    grid.push_messages = push
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert first["ledger"]["error"] == 3 and first["abandoned"]
    assert second["ledger"]["ok"] == 3 and second["round"] == 1 and not second["abandoned"]


def of_round_2(well, grid, fault, *where):
    """Only in round 2 of a run."""
    well.steps = {1: lambda: fault(*where), 2: lambda: (grid.silent.clear(), grid.twice.clear(), grid.spoil.clear())}
    return well


def weights_without_site_0_in_round_2(toys, grid, folder):
    run(toys, folder, Between(_1=lambda: grid.crashing.add(("train", ONE)), _2=grid.crashing.clear))
    return runs.outcome(folder)["summary"]["weights"]


def test_a_late_answer_is_noted_and_enters_no_round(toys, grid, tmp_path):
    """Round 2's answer comes in round 3: also the state that the client kept of it does not count."""
    run(toys, tmp_path / "run", of_round_2(Between(), grid, grid.silent.add, ("train", ONE)))
    over = runs.outcome(tmp_path / "run")
    assert [m["late"] for m in over["metrics"]] == [{}, {}, {"site-0": [2]}, {}]
    assert [m["ledger"]["late"] for m in over["metrics"]] == [0, 0, 1, 0]
    assert [m["ledger"]["missing"] for m in over["metrics"]] == [0, 1, 0, 0]
    assert over["summary"]["weights"] == weights_without_site_0_in_round_2(toys, grid, tmp_path / "without")


def test_a_second_answer_counts_for_nothing(toys, grid, tmp_path):
    run(toys, tmp_path / "run", of_round_2(Between(), grid, grid.twice.add, ("train", ONE)))
    run(toys, tmp_path / "once")
    twice, once = runs.outcome(tmp_path / "run"), runs.outcome(tmp_path / "once")
    assert [m["duplicate"] for m in twice["metrics"]] == [{}, {"site-0": 1}, {}, {}]
    assert twice["metrics"][1]["ledger"] == {**once["metrics"][1]["ledger"], "duplicate": 1}
    assert twice["summary"]["weights"] == once["summary"]["weights"]


def test_who_is_slower_than_enough_others_is_not_waited_for(toys, grid, tmp_path):
    """Nodes answer in the order in which they were asked; the third answers a round later, and counts for nothing."""
    made = dataclasses.replace(toys, wire=Wire(deadline=600, enough=2))
    run(made, tmp_path / "run")
    records = metrics(tmp_path / "run")
    slow = {"site-2": "the round had 2 answers before (wire.enough)"}
    assert [m["missing"] for m in records] == [slow] * 4 and [m["ledger"]["ok"] for m in records] == [2] * 4
    assert [m["late"] for m in records] == [{}, *({"site-2": [n]} for n in (1, 2, 3))]
    assert all(len(m["test"]) == 3 for m in records)
    grid.silent.add(("train", 100))
    run(dataclasses.replace(made, wire=Wire(deadline=0.2)), tmp_path / "without")
    assert (
        runs.outcome(tmp_path / "run")["summary"]["weights"] == runs.outcome(tmp_path / "without")["summary"]["weights"]
    )


def failed(code=500):
    request = httpx.Request("POST", "http://127.0.0.1")
    return httpx.HTTPStatusError("locked", request=request, response=httpx.Response(code, request=request))


def broken(grid, monkeypatch, call, times, error):
    """The first calls are answered with an error of the server's own, as while its database is locked."""
    real, left = getattr(grid, call), [times]

    def answer(*args):
        if left[0] > 0:
            left[0] -= 1
            raise error
        return real(*args)

    monkeypatch.setattr(grid, call, answer)
    return left


NOT_STORED = ObjectPushError("0" * 64, 1, "session")


@pytest.mark.parametrize(
    "call, error",
    [
        ("get_nodes", failed()),
        ("push_messages", failed()),
        ("push_messages", NOT_STORED),
        ("pull_messages", failed()),
    ],
)
def test_a_server_that_fails_for_a_while_costs_nothing(toys, grid, tmp_path, monkeypatch, call, error):
    run(toys, tmp_path / "whole")
    monkeypatch.setattr("consilium.engine.flower.patience.exponential", lambda **_: iter(lambda: 0.001, None))
    left = broken(grid, monkeypatch, call, 5, error)
    run(dataclasses.replace(toys, wire=Wire(deadline=60)), tmp_path / "run")
    assert left == [0]
    assert runs.outcome(tmp_path / "run")["metrics"] == runs.outcome(tmp_path / "whole")["metrics"]


@pytest.mark.parametrize("error", [failed(), NOT_STORED])
def test_a_server_that_goes_on_failing_is_counted_and_then_an_error(toys, grid, tmp_path, monkeypatch, error):
    """A message that is not taken is one client's; where nobody can be asked who is there, the run ends, resumable."""
    monkeypatch.setattr("consilium.engine.flower.patience.PATIENCE", 0.05)
    real = grid.push_messages

    def refuse(*_, error=error):
        raise error

    def push(messages):
        told = messages[0].metadata
        return refuse() if (told.message_type, told.dst_node_id) == ("train", ONE) else real(messages)

    monkeypatch.setattr(grid, "push_messages", push)
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["missing"] == {"site-0": "its message was not taken"}
    monkeypatch.setattr(grid, "get_nodes", partial(refuse, error=failed()))
    with pytest.raises(RoundError, match="Flower's server does not say which sites are connected: locked"):
        run(dataclasses.replace(toys, rounds=1), tmp_path / "none")


def test_a_reply_of_which_half_was_sent_keeps_nobody_waiting(toys, grid, tmp_path, monkeypatch):
    """Flower waits up to two hours for the rest of it; the others' replies lie there, and would expire."""
    monkeypatch.setattr("consilium.engine.flower.patience.SLOW", 0.2)
    real, gone = grid.pull_messages, threading.Event()

    def pull(identifiers):
        told = grid.queue[identifiers[0]].metadata
        if (told.message_type, told.dst_node_id, told.group_id) == ("train", ONE, "2"):
            gone.wait(60)
        return real(identifiers)

    monkeypatch.setattr(grid, "pull_messages", pull)

    began = time.monotonic()
    run(dataclasses.replace(toys, wire=Wire(deadline=3)), tmp_path / "run", Between(_3=gone.set))
    assert time.monotonic() - began < 40
    over = runs.outcome(tmp_path / "run")
    assert [m["missing"] for m in over["metrics"]] == [{}, {"site-0": "no answer within 3 s"}, {}, {}]
    assert over["metrics"][1]["ledger"]["ok"] == 2 and over["metrics"][3]["late"] == {"site-0": [2]}
    grid.crashing.clear()
    assert over["summary"]["weights"] == weights_without_site_0_in_round_2(toys, grid, tmp_path / "without")


def test_an_error_that_is_ours_is_not_tried_again(toys, grid, tmp_path, monkeypatch):
    broken(grid, monkeypatch, "push_messages", 1, failed(400))
    with pytest.raises(httpx.HTTPStatusError):
        run(dataclasses.replace(toys, rounds=1), tmp_path / "run")


def put(record, key, value):
    return lambda content: content[record].__setitem__(key, value)


def blob(group, payload):
    return put("payload", group, to_record(payload, {})["payload"][next(iter(payload.groups))])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content["scalars"].pop("num_examples"), "num_examples is missing"),
        (put("scalars", "num_examples", 2**62), "num_examples is 4611686018427387904; it must be"),
        (put("scalars", "num_examples", b"12"), "scalar 'num_examples'"),
        (lambda content: content.pop("scalars"), "does not speak this protocol"),
        (lambda content: content.pop("engine"), "does not speak this protocol"),
        (lambda content: content.__setitem__("payload", ConfigRecord({})), "records of other types"),
        (lambda content: content["payload"].pop("params"), "params w is missing"),
        (put("payload", "params", Array("uint8", (3,), STYPE, b"abc")), "a blob of 3 bytes is not a payload"),
        (put("payload", "params", Array(torch.zeros(3).numpy())), "arrived as 'numpy.ndarray'"),
        (
            blob("params", Payload({"control": {"w": torch.ones(50)}})),
            r"the blob of group 'params' holds \['control'\]",
        ),
        (blob("control", Payload({"control": {"w": torch.ones(50)}})), "group 'control' was not asked"),
        (blob("params", Payload({"params": {"w": torch.ones(())}})), r"params w has shape \(\), it must be \(50,\)"),
        (blob("params", Payload({"params": {"w": torch.full((50,), math.inf)}})), "params w is not finite"),
        (
            blob("params.change", Payload({"params.change": {"w": torch.ones(50)}})),
            "group 'params.change' was not asked",  # replies are exact in this run
        ),
        (put("engine", "round", 1), "it answers round 1, this is round 2"),
        (put("engine", "protocol", 7), "it answers protocol 7, this is protocol 1"),
        (put("engine", "run", "other"), "it answers run 'other', this is run ''"),
        (put("engine", "config", "0" * 16), "it answers config '0000000000000000', this is config '"),
        (put("engine", "rejected", "x " * 10**5), "^x x x"),
    ],
)
def test_a_malformed_reply_is_rejected_whole(toys, grid, tmp_path, spoil, reason):
    """The result is that of its absence; the client's state of round 2 does not count either."""
    run(toys, tmp_path / "run", of_round_2(Between(), grid, grid.spoil.__setitem__, ("train", ONE), spoil))
    over = runs.outcome(tmp_path / "run")
    told = over["metrics"][1]["clients"]["site-0"]
    assert re.search(reason, told["rejected"]) and len(told["rejected"]) <= 1000
    assert [m["ledger"]["rejected"] for m in over["metrics"]] == [0, 1, 0, 0]
    assert over["summary"]["weights"] == weights_without_site_0_in_round_2(toys, grid, tmp_path / "without")


@pytest.mark.parametrize("seconds", [math.nan, "1 s", -1.0, [1.0]])
def test_what_the_far_end_says_of_its_seconds_is_no_reason_to_stop(toys, grid, tmp_path, seconds):
    grid.spoil["train", ONE] = put("engine", "seconds", seconds)
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["ledger"]["ok"] == 3


def test_metrics_that_are_none_are_dropped_and_the_update_counts(toys, grid, tmp_path):
    """Not a number, a megabyte, foreign: the record stays small and JSON, the weights are what they would have been."""
    one = dataclasses.replace(toys, rounds=1)
    run(one, tmp_path / "plain")
    told = {"perplexity": math.nan, "footprint": "x" * 10**6, "report/a": math.inf, "foreign": "y" * 10**6, "cut": -1}
    grid.spoil["train", ONE] = lambda content: [content["scalars"].__setitem__(*item) for item in told.items()]
    run(one, tmp_path / "run")
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(line) < 5000 and "NaN" not in line and "Infinity" not in line
    record = json.loads(line)
    assert record["ledger"]["ok"] == 3 and record["clients"]["site-0"]["perplexity"] is None
    weights = [runs.outcome(tmp_path / name)["summary"]["weights"] for name in ("plain", "run")]
    assert weights[0] == weights[1]


def test_a_client_out_of_memory_is_an_error_of_its_own(toys, grid, tmp_path, monkeypatch):
    real = toy.ToyClient.train

    def train(self, payload, context):
        if context.info.id == "site-0":
            raise MemoryError("cannot allocate 7 GB")
        return real(self, payload, context)

    monkeypatch.setattr(toy.ToyClient, "train", train)
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    (told,) = metrics(tmp_path / "run")
    assert told["errors"] == {"site-0": "MemoryError: cannot allocate 7 GB"} and told["ledger"]["ok"] == 2


@pytest.mark.parametrize("score", [math.nan, 1.5, "0.5", None])
def test_a_score_that_is_none_is_left_out(toys, grid, tmp_path, score):
    grid.spoil["evaluate", ONE] = (
        (lambda content: content["scalars"].pop("score")) if score is None else put("scalars", "score", score)
    )
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    (record,) = metrics(tmp_path / "run")
    assert set(record["untested"]) == {"site-0"} and set(record["test"]) == {"site-1", "site-2"}


def test_a_larger_reply_than_the_cap_is_rejected(toys, grid, tmp_path):
    grid.spoil["train", ONE] = blob("params", Payload({"params": {"w": torch.zeros(2000)}}))
    run(dataclasses.replace(toys, rounds=1, wire=Wire(deadline=0.2, cap="1KB")), tmp_path / "run")
    told = metrics(tmp_path / "run")[0]["clients"]["site-0"]["rejected"]
    assert "is 8.2 kB; at most 1.0 kB are allowed (wire.cap" in told


def test_scalars_are_bounded_too(toys, grid, tmp_path):
    grid.spoil["train", ONE] = put("scalars", "report/x", "x" * 4_000_001)
    run(dataclasses.replace(toys, rounds=1, wire=Wire(deadline=60)), tmp_path / "run")
    told = metrics(tmp_path / "run")[0]["clients"]["site-0"]["rejected"]
    assert "scalars are 4.0 MB; at most 4.0 MB are allowed" in told


@pytest.mark.parametrize(("groups", "said"), [
    (["params"] + [f"x{i}" for i in range(39)], "group 'x0' was not asked of this client"),
    (["params"], r"the blob of group 'params' unfolds to 19\d* bytes; at most \d+ are allowed"),
], ids=["40 groups", "one that is expected"])  # fmt: skip
def test_a_reply_that_unfolds_is_refused_before_it_is_written(toys, grid, tmp_path, monkeypatch, groups, said):
    """A few hundred bytes for 20 MB each; what is kept of it is its line in the record."""
    (packed,) = to_record(Payload({"params": {"w": torch.zeros(4_999_000)}}), {}, compress=True)["payload"].values()
    assert len(packed.data) < 2000
    grid.spoil["train", ONE] = lambda content: content["payload"].update(dict.fromkeys(groups, packed))
    written = []
    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, blob: written.append(len(blob)) or real(self, blob))
    run(dataclasses.replace(toys, rounds=1, wire=Wire(deadline=60, cap="20MB")), tmp_path / "run")
    assert re.search(said, metrics(tmp_path / "run")[0]["clients"]["site-0"]["rejected"])
    assert len(written) == 2 and sum(written) < 2000  # the two honest replies


def test_the_cap_is_of_all_groups_together():
    """As a site checks what it is sent: two groups of which each alone would be allowed."""
    half = {"w": torch.zeros(50_000)}
    record = to_record(Payload({"params": half, "control": half}), {}, compress=True)
    blobs, scalars, _ = blobs_of(record)
    assert sum(map(len, blobs.values())) < 2000 and payload_of(blobs, scalars, 401_000).nbytes == 400_000
    with pytest.raises(PayloadError, match=r"the blob of group 'control' unfolds to 200\d+ bytes; at most 199\d+ are"):
        payload_of(blobs, scalars, 400_000)
    plain, scalars, _ = blobs_of(to_record(Payload({"params": half, "control": half}), {}))
    with pytest.raises(PayloadError, match=r"the payload is 400\.\d kB; at most 400\.0 kB are allowed"):
        payload_of(plain, scalars, 400_000)
    with pytest.raises(PayloadError, match="the message has 65 groups; at most 64"):
        payload_of({f"g{i}": b"" for i in range(65)}, {}, 1)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_rounded_reply_may_bring_changes_and_nothing_else(form):
    likes = {"params": {"w": Like((4, 3), torch.float32)}, "usage": {"b": Like((2,), torch.int64)}}
    assert travelling(likes, "exact") is likes
    groups = travelling(likes, form)
    sent = {"w": torch.zeros(4, 3)}
    reply, _ = rounded(
        Payload({"params": {"w": torch.ones(4, 3)}, "usage": {"b": torch.ones(2).long()}}), sent, form, {}
    )
    assert set(reply.groups) == set(groups)
    for group, tensors in reply.groups.items():
        assert all(groups[group][key].objection(t) is None for key, t in tensors.items())


SILLY = {
    "seconds": (put("engine", "seconds", 1.7e308), lambda told: told["seconds"]["train"] == 0),
    "report": (
        put("scalars", "report/test before aggregation", 1.7e308), lambda told: "report" not in told,
    ),
    "evaluate": (put("scalars", "seconds_evaluate", 1e300), lambda told: told["seconds"]["evaluate"] == 0),
    "loss": (put("scalars", "train_loss", -1e300), lambda told: "a float32 can hold" in told["rejected"]),
}  # fmt: skip


@pytest.mark.parametrize("what", SILLY)
def test_numbers_that_no_client_can_mean_do_not_reach_a_sum(toys, grid, tmp_path, what):
    """Two sites with 1.7e308 of anything made a run that could never write its summary."""
    spoil, holds = SILLY[what]
    grid.spoil |= {("train", node): spoil for node in (ONE, 100)}
    run(dataclasses.replace(toys, rounds=2, wire=Wire(deadline=60)), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(holds(record["clients"]["site-0"]) for record in records)
    assert "best_round_before_aggregation" not in json.loads((tmp_path / "run/summary.json").read_text())


def test_the_record_takes_a_hundred_numbers_of_a_reply(toys, grid, tmp_path):
    grid.spoil["train", ONE] = lambda content: content["scalars"].update({f"report/\x1b{n}": n for n in range(1000)})
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    told = metrics(tmp_path / "run")[0]["clients"]["site-0"]
    assert told["rejected"] is None and len(told["report"]) == 100 and "?7" in told["report"]


def test_a_node_that_says_nonsense_of_itself_is_not_taken(toys, grid, tmp_path, caplog):
    grid.spoil["query.name", ONE] = put("engine", "partition", "one")
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    assert "a node does not say who it is" in caplog.text
    assert metrics(tmp_path / "run")[0]["missing"] == {"site-0": "not connected"}


def test_who_a_node_is_is_asked_when_it_is_new_or_was_restarted(toys, grid, tmp_path):
    """The node of site-0 comes back as site-1, and the other way round: only ids count."""

    def swap():
        grid.configs[1], grid.configs[2] = grid.configs[2], grid.configs[1]
        grid.restarts.update({101: 1, 102: 1})

    run(toys, tmp_path / "run", Between(_2=swap))
    assert [node for kind, node, _ in grid.log if kind == "query.name"] == [100, 101, 102, 101, 102]
    local = dataclasses.replace(toys, engine="local")
    run(local, tmp_path / "local")
    assert (
        runs.outcome(tmp_path / "run")["summary"]["weights"] == runs.outcome(tmp_path / "local")["summary"]["weights"]
    )


def test_two_nodes_of_one_name(toys, grid, tmp_path):
    grid.configs[0] = grid.configs[1]
    with pytest.raises(RoundError, match="two nodes say that they are site-0"):
        run(toys, tmp_path / "run")


def test_a_simulation_that_has_ended_is_not_waited_for(toys, grid, tmp_path):
    """Ray may fail to start after the nodes are there: the run ends with the reason, not after its deadline."""
    ended, reasons = threading.Thread(target=lambda: None), queue.Queue()
    reasons.put(RoundError("Flower's simulation has failed (no memory)"))
    _watched(grid, ended, reasons)
    with pytest.raises(RoundError, match="no memory"):
        run(dataclasses.replace(toys, wire=Wire()), tmp_path / "run")


def test_a_payload_beyond_the_cap_is_not_sent(toys, grid, tmp_path):
    """200 bytes of tensor and their header; the reply is as large, and the far end checks it too."""
    small = dataclasses.replace(toys, wire=Wire(cap="300B"))
    with pytest.raises(
        PayloadError, match=r"the payload of client site-0 is .*more than wire\.cap 300B: raise wire\.cap"
    ):
        run(small, tmp_path / "run")
    assert not any(kind == "train" for kind, *_ in grid.log)


def test_the_meter_counts_the_blobs(toys, grid, tmp_path, monkeypatch):
    seen = []
    real = grid.push_messages
    monkeypatch.setattr(grid, "push_messages", lambda messages: (seen.extend(messages), real(messages))[1])
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    record = metrics(tmp_path / "run")[0]
    sizes = [
        sum(len(array.data) for array in message.content.array_records["payload"].values())
        for message in seen
        if message.metadata.message_type == "train"
    ]
    assert [c["bytes_down"] for c in record["clients"].values()] == sizes and sum(sizes) == record["bytes_down"] > 600


@pytest.mark.parametrize(("form", "most"), [("bf16", 0.65), ("int8", 0.5)])
def test_rounded_replies_are_smaller_and_lose_nothing_for_good(form, most, data, grid, tmp_path):
    """Bytes against exact replies, headers and scales of tiny tensors included; FedAvg keeps only what was lost."""
    made = runs.experiment(
        data, "FedAvg", model=tiny.source(num_experts=4), sampling=Sampling(3), engine="flower", rounds=2
    )
    run(made, tmp_path / "exact")
    run(dataclasses.replace(made, wire=Wire(reply=form)), tmp_path / "rounded")
    exact, less = runs.outcome(tmp_path / "exact"), runs.outcome(tmp_path / "rounded")
    up = [record["bytes_up"] for record in exact["metrics"]], [record["bytes_up"] for record in less["metrics"]]
    assert all(b < most * a for a, b in zip(*up, strict=True))
    weights = [load_checkpoint(tmp_path / name / "checkpoints")[1].group("params") for name in ("exact", "rounded")]
    start = made.model.load()
    moved = sum(float((weights[0][key] - start[key]).square().sum()) for key in start)
    off = sum(float((weights[0][key] - weights[1][key]).square().sum()) for key in start)
    assert 0 < off < 0.05 * moved
    state = ClientStore(tmp_path / "rounded/clients", {"site-0": 2}).load("site-0")
    assert state.params and all(key.startswith("engine/lost/") for key in state.params)
    assert less["summary"]["clients"]["site-0"]["state"] and not exact["summary"]["clients"]["site-0"]["state"]


def test_compressed_payloads_are_the_same(data, grid, tmp_path):
    made = runs.experiment(data, SCAFFOLD(), model=tiny.source(num_experts=4), engine="flower", rounds=1)
    run(made, tmp_path / "plain")
    run(dataclasses.replace(made, wire=Wire(zstd=True)), tmp_path / "packed")
    plain, packed = runs.outcome(tmp_path / "plain"), runs.outcome(tmp_path / "packed")
    assert plain["summary"]["weights"] == packed["summary"]["weights"]
    assert packed["metrics"][0]["bytes_down"] < plain["metrics"][0]["bytes_down"]


def test_a_blob_that_would_unfold_beyond_the_cap_is_refused():
    record = to_record(Payload({"params": {"w": torch.zeros(100_000)}}), {}, compress=True)
    blobs, scalars, _ = blobs_of(record)
    assert len(blobs["params"]) < 1000 and payload_of(blobs, scalars, 401_000).nbytes == 400_000
    with pytest.raises(PayloadError, match="unfolds to 400"):
        payload_of(blobs, scalars, 400_000)
    with pytest.raises(PayloadError, match="compressed blob"):
        payload_of({"params": blobs["params"][:-3]}, scalars)


@pytest.mark.parametrize("compress", [False, True])
def test_a_long_blob_goes_in_parts(compress, monkeypatch):
    """13 parts or more, so that "2" before "10" matters; one that is lost, doubled or moved is noticed."""
    monkeypatch.setattr("consilium.engine.flower.records.PART", 64)
    payload = Payload(
        {"params": {"w": torch.randn(256, generator=torch.Generator().manual_seed(0))}, "x": {}}, {"n": 1}
    )
    record = to_record(payload, {}, compress)
    arrays = record["payload"]
    assert list(arrays)[:3] == ["params", "params/1", "params/2"] and "params/12" in arrays
    assert all(len(array.data) <= 64 for array in arrays.values())
    back, _ = from_record(record)
    assert torch.equal(back.group("params")["w"], payload.group("params")["w"]) and "x" in back.groups
    assert within("1MB", record, "a") == sum(len(array.data) for array in arrays.values())
    with pytest.raises(PayloadError, match=r"more than wire\.cap 1kB"):
        within("1kB", record, "a")
    del arrays["params/2"]
    with pytest.raises(PayloadError, match="'params/3' is not the next part of 'params', of which 2 came"):
        blobs_of(record)


# --- sites: their own data, their own disk --------------------------------------------------------------------------


@pytest.fixture
def sites(data, tmp_path):
    """Three sites, each with a file of its own rows; nodes in no order."""
    lines = data.read_text().splitlines(keepends=True)
    grid = loopback.Loopback([])
    for i in (2, 0, 1):
        folder = tmp_path / f"at-{i}"
        folder.mkdir()
        (folder / "own.jsonl").write_text("".join(line for line in lines if f'"site-{i}"' in line))
        own = runs.experiment(folder / "own.jsonl", model=tiny.source(num_experts=4), memory=runs.memory(8 if i else 2))
        flower.save_site(folder / "site.json", f"site-{i}", own)
        grid.configs.append({"site": str(folder / "site.json")})
    return grid


NAMES = ["site-0", "site-1", "site-2"]


@pytest.mark.parametrize("method", [FedMoE(stage1_epochs=1), SCAFFOLD()], ids=["FedMoE", "SCAFFOLD"])
def test_sites_with_their_own_data_give_the_bits_of_one_machine(method, data, sites, tmp_path):
    model = tiny.source(num_experts=4)
    memory = runs.memory(2, 8, 8)
    made = runs.experiment(data, method, model=model, memory=memory, rounds=2)
    run(made, tmp_path / "local")
    came = []
    serve(made, tmp_path / "run", sites, NAMES, 1.0, came=came.append)
    assert sorted(came) == sorted(NAMES)
    local, over = runs.outcome(tmp_path / "local"), runs.outcome(tmp_path / "run")
    assert over["summary"]["weights"] == local["summary"]["weights"]
    assert over["structure"] == local["structure"] and over["summary"]["tasks"] == local["summary"]["tasks"]
    for site, told in over["partition"]["clients"].items():
        same = ("task", "labels", "sizes", "memory_bytes")
        assert told == {key: local["partition"]["clients"][site][key] for key in same} | {"threads": 1}
    for i, site in enumerate(NAMES):  # states stay at the sites
        kept = list((tmp_path / f"at-{i}").glob("*/*/round-*"))
        assert bool(kept) == (site in local["summary"]["clients"] and bool(local["summary"]["clients"][site]["state"]))
    assert not (tmp_path / "run/clients").exists()


def test_a_server_that_starts_again_goes_on_to_the_same_bits(toys, sites, tmp_path):
    """Interrupted after two of four rounds, with one uncommitted state of round 3 at a site; then changed data."""
    serve(toys, tmp_path / "whole", sites, NAMES, 1.0)
    with pytest.raises(KeyboardInterrupt):
        serve(toys, tmp_path / "run", sites, NAMES, 1.0, Between(_2=interrupt))
    with pytest.raises(CheckpointError, match="start `consilium server` again"):
        resume(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds another experiment \(seed was 0, is 9\)"):
        serve(dataclasses.replace(toys, seed=9), tmp_path / "run", sites, NAMES, 1.0)
    serve(toys, tmp_path / "run", sites, NAMES, 1.0)
    assert (
        runs.outcome(tmp_path / "run")["summary"]["weights"] == runs.outcome(tmp_path / "whole")["summary"]["weights"]
    )
    assert [m["round"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_site_that_trains_with_another_number_of_threads_is_told_of(toys, sites, tmp_path, caplog):
    """It is the site's own to choose, so the run goes on; partition.json says with how many it was begun."""
    with pytest.raises(KeyboardInterrupt):
        serve(toys, tmp_path / "run", sites, NAMES, 1.0, Between(_2=interrupt))
    told = json.loads((tmp_path / "run/partition.json").read_text())["clients"]
    assert [site["threads"] for site in told.values()] == [1, 1, 1]
    path = Path(sites.configs[0]["site"])
    own = json.loads(path.read_text())
    (again := tmp_path / "again").mkdir()
    for file in path.parent.glob("data.*"):
        (again / file.name).write_bytes(file.read_bytes())
    (again / "site.json").write_text(json.dumps({**own, "experiment": {**own["experiment"], "threads": 2}}))
    sites.configs[0] = {"site": str(again / "site.json")}
    try:
        serve(toys, tmp_path / "run", sites, NAMES, 1.0)
    finally:
        torch.set_num_threads(1)
    assert f"site {own['name']} trained with 1 torch threads, now with 2: perhaps" in caplog.text


def says(sites, node, name):
    """The node's settings now give another name."""
    path = Path(sites.configs[node - 100]["site"])
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
    sites.restarts[node] = sites.restarts.get(node, 0) + 1


def test_a_name_belongs_to_a_key(toys, sites, tmp_path, caplog):
    """After round 1 the node with site-2's key says that it is site-0: it is refused, with one event, while site-0 and
    site-1 go on; after round 3 it says its own name again, and takes part."""
    keys = {f"key-{i}".encode(): f"site-{i}" for i in range(3)}
    sites.keys = {100: b"key-2", 101: b"key-0", 102: b"key-1"}
    sites.configs.append({"site": sites.configs[0]["site"]})  # a node with a key that nobody of this run has
    steps = Between(_1=lambda: says(sites, 100, "site-0"), _3=lambda: says(sites, 100, "site-2"))
    serve(toys, tmp_path / "run", sites, NAMES, 1.0, steps, keys)
    assert caplog.text.count("site site-2 is refused") == 1
    reason = "its node says that it is site-0, with site-2's key"
    outcome = runs.outcome(tmp_path / "run")
    assert [m["missing"] for m in outcome["metrics"]] == [{}, {"site-2": reason}, {"site-2": reason}, {}]
    assert [m.get("refused") for m in outcome["metrics"]] == [None, {"site-2": reason}, None, None]
    assert [sorted(m["clients"]) for m in outcome["metrics"]] == [NAMES, NAMES[:2], NAMES[:2], NAMES]
    refused = [event for event in outcome["events"] if event["event"] == "refused"]
    assert refused == [{"round": 2, "event": "refused", "client": "site-2", "reason": reason}]
    assert not any(node == 103 for _, node, _ in sites.log)


def test_a_run_does_not_begin_with_a_site_under_anothers_name(toys, sites, tmp_path, caplog):
    """And who waits for the site is told why it is not there; without keys a site is who it says it is."""
    keys = {f"key-{i}".encode(): f"site-{i}" for i in range(3)}
    sites.keys = {100: b"key-1", 101: b"key-0", 102: b"key-2"}
    said = r"not connected within 0\.1 s: site-1 \(its node says that it is site-2, with site-1's key\), site-2"
    with pytest.raises(RoundError, match=said):
        serve(toys, tmp_path / "run", sites, NAMES, 0.1, keys=keys)
    assert "is refused" in caplog.text
    assert not (tmp_path / "run").exists()
    serve(toys, tmp_path / "run", sites, NAMES, 1.0)
    assert not any(m["missing"] for m in metrics(tmp_path / "run"))


def test_states_at_a_site_are_pruned_and_what_never_counted_is_dropped(toys, sites, tmp_path):
    """Round 2's answer of site-0 is lost: its state of round 2 goes when round 3 says that round 1's counts."""
    (node,) = [100 + i for i, config in enumerate(sites.configs) if "at-0" in config["site"]]
    steps = Between(_1=lambda: sites.lost.add(("train", node)), _2=lambda: (sites.lost.clear(), sites.silent.clear()))
    serve(dataclasses.replace(toys, rounds=6), tmp_path / "run", sites, NAMES, 1.0, steps)
    assert metrics(tmp_path / "run")[1]["missing"] == {"site-0": "no answer within 0.2 s"}
    for i in range(3):
        kept = sorted(path.name for path in (tmp_path / f"at-{i}").glob("*/*/round-*"))
        assert kept == [f"round-0000{n}.safetensors" for n in (4, 5, 6)]


@pytest.mark.parametrize("how", ["lost", "torn"])
def test_a_site_whose_state_is_lost_starts_anew_and_says_so(toys, sites, tmp_path, how):
    def spoil():
        (path,) = (tmp_path / "at-0").glob("*/site-0/round-00002.safetensors")
        path.unlink() if how == "lost" else path.write_bytes(b"torn")

    serve(toys, tmp_path / "run", sites, NAMES, 1.0, Between(_2=spoil))
    told = [record["clients"]["site-0"] for record in metrics(tmp_path / "run")]
    said = [one.get("state_reset", "") for one in told]
    assert said[0] == said[1] == said[3] == "" and "the state of client site-0 in " in said[2]
    assert [record["ledger"]["ok"] for record in metrics(tmp_path / "run")] == [3] * 4
    draws = [
        float(torch.rand(50, generator=torch.Generator().manual_seed(derive_seed(0, "client", n, "site-0"))).sum())
        for n in (1, 2, 3, 4)
    ]
    sums = [draws[0], draws[0] + draws[1], draws[2], draws[2] + draws[3]]
    assert [one["train_loss"] for one in told] == pytest.approx(sums)


def test_a_straggler_stops_by_itself(data, sites, tmp_path):
    """A site that learns of the deadline in every message does not train on when nobody waits for it any more."""
    made = runs.experiment(
        data, model=tiny.source(num_experts=4), rounds=1, sampling=Sampling(3), wire=Wire(deadline=1e-3)
    )
    with pytest.raises(RoundError, match=r"the round's deadline of 0\.001 s has passed after \d of \d steps"):
        serve(made, tmp_path / "run", sites, NAMES, 1.0)


def test_a_site_that_is_not_there_or_cannot_take_part(toys, sites, tmp_path):
    sites.away.add(100)
    with pytest.raises(RoundError, match=r"not connected within 0\.1 s: site-2; start their clients"):
        serve(toys, tmp_path / "run", sites, NAMES, 0.1)
    (tmp_path / "at-2/data.json").unlink()
    sites.away.clear()
    with pytest.raises(RoundError, match=r"a site cannot take part: ConfigError: the site's settings in \[path\]"):
        serve(toys, tmp_path / "run", sites, NAMES, 1.0)
    assert not (tmp_path / "run").exists()


SAYS = {"protocol": 1, "experiment": "{}", "heads": "{}", "run": "x", "model": ""}


def asked(sites, kind, content):
    """Why a site refuses a message; a refusal is one line, and leaves nothing behind."""
    before = sorted(Path(sites.configs[0]["site"]).parent.rglob("*"))
    (sent,) = sites.push_messages([Message(content, dst_node_id=100, message_type=kind)])
    (reply,) = sites.pull_messages([sent])
    assert sorted(Path(sites.configs[0]["site"]).parent.rglob("*")) == before
    reason = reply.content["failed"]["reason"]
    assert "\n" not in reason and len(reason) < 1200
    return reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "unknown type None"),
        ({"experiment": '{"type": "os.system"}'}, "unknown type 'os.system'"),
        ({"experiment": "{"}, "the server's experiment is no JSON"),
        ({"experiment": "[" * 10**5}, "the server's experiment is no JSON: RecursionError"),
        ({"experiment": "[]"}, r"the server's experiment is '\[\]'"),
        ({"protocol": 2}, "the server speaks protocol 2, this client 1: install one version"),
        ({"protocol": None}, "the server speaks protocol None"),
        ({"heads": 3}, "the server says heads 3; it must be str"),
        ({"run": "../../x"}, r"the run's token is '\.\./\.\./x'; it must be up to 64 letters and digits"),
        ({"run": "/etc"}, "the run's token is '/etc'"),
        ({"run": "x" * 10**4}, "the run's token is 'xxx"),
        ({"heads": '{"task": 3}'}, "the server's heads is"),
        ({"model": "files:0"}, "the server's model is files:0, this site's is files:.*same files"),
    ],
)
def test_what_a_server_says_of_a_run_is_refused_unless_it_is_what_it_must_be(change, reason, data, sites, tmp_path):
    """Also: it cannot leave the site's folder, and names no unknown classes."""
    good = {"experiment": json.dumps(to_json(runs.experiment(data, model=tiny.source(num_experts=4))))}
    if change and "experiment" not in change:
        change = good | change
    told = {key: value for key, value in (SAYS | change).items() if value is not None}
    assert re.search(reason, asked(sites, "query.describe", RecordDict({"engine": ConfigRecord(told)})))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"round": 0}, "round 0, and to go on from that of round 0"),
        ({"round": -1}, "round -1"),
        ({"round": "2"}, "the server says round '2'; it must be int"),
        ({"version": 3}, "round 2, and to go on from that of round 3"),
        ({"version": -1}, "of round -1"),
        ({"round": 10**6}, r"the server asks for round 1000000, this site allows 100000 \(--max-rounds\)"),
        ({"client": "../site-2"}, r"a message for \.\./site-2 reached site-2"),
        ({"seed": "x"}, "the server says seed 'x'; it must be int"),
        ({"cap": "lots"}, "size 'lots' is no number of bytes"),
        ({"zstd": 1}, "the server says zstd 1; it must be bool"),
        ({"base": 1}, "the server says base 1; it must be str"),
        ({"hold": 1}, "the server says hold 1; it must be bool"),
        ({"deadline": "soon"}, "the server says deadline 'soon'; it must be float"),
    ],
)
def test_what_a_server_says_of_a_round_likewise(change, reason, data, sites):
    made = runs.experiment(data, model=tiny.source(num_experts=4))
    told = SAYS | {
        "client": "site-2",
        "round": 2,
        "version": 0,
        "seed": 0,
        "cap": "1GB",
        "reply": "exact",
        "zstd": False,
        "deadline": 9.0,
        "base": "",
        "hold": False,
    }
    told |= {"experiment": json.dumps(to_json(made)), **change}
    assert re.search(reason, asked(sites, "train", to_record(Payload({"params": {"w": torch.ones(3)}}), told)))


@pytest.mark.parametrize(
    ("change", "limits", "reason"),
    [
        ({"fit": Fit(lr=1e30)}, {}, r"the server asks for fit\.lr 1e\+30, this site allows 10 \(--max-lr\)"),
        ({"fit": Fit(head_lr=0.5)}, {"lr": 0.1}, r"fit\.head_lr 0\.5, this site allows 0\.1"),
        ({"fit": Fit(epochs=101)}, {}, r"fit\.epochs 101, this site allows 100 \(--max-epochs\)"),
        ({"fit": Fit(batch_size=64)}, {"batch_size": 32}, r"fit\.batch_size 64, this site allows 32"),
        ({"fit": Fit(epochs=9, batch_size=1)}, {"steps": 50}, r"steps of a round \d+, this site allows 50"),
        ({"rounds": 11}, {"rounds": 10}, r"rounds 11, this site allows 10"),
        ({"algorithm": FedMoE(stage1_epochs=8)}, {"epochs": 7}, r"algorithm\.stage1_epochs 8, this site allows 7"),
        ({}, {"bytes": "1KB"}, r"the server sent .*, this site takes 1KB \(--max-bytes\)"),
    ],
)
def test_a_site_keeps_to_its_own_limits(change, limits, reason, data, sites, tmp_path):
    """The server is told before the first round, or, of bytes, in it; within the limits nothing is different."""
    (folder,) = [Path(config["site"]).parent for config in sites.configs if "at-1" in config["site"]]
    own = runs.experiment(folder / "own.jsonl", model=tiny.source(num_experts=4))
    flower.save_site(folder / "site.json", "site-1", own, flower.Limits(**limits))
    made = runs.experiment(data, model=tiny.source(num_experts=4), rounds=1, sampling=Sampling(3))
    if "bytes" in limits:
        serve(made, tmp_path / "run", sites, NAMES, 1.0)
        assert re.search(reason, metrics(tmp_path / "run")[0]["errors"]["site-1"])
        return
    with pytest.raises(RoundError, match="a site cannot take part: ConfigError: ") as told:
        serve(dataclasses.replace(made, **change), tmp_path / "run", sites, NAMES, 1.0)
    assert re.search(reason, str(told.value)) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"lr": math.nan}, {"epochs": 0}, {"epochs": 1.5}, {"steps": True}, {"bytes": "much"}]
)
def test_limits_that_are_none(bad):
    with pytest.raises(ConfigError, match=r"--max-|no number of bytes"):
        flower.Limits(**bad)
