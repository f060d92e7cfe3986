"""Descriptions, replies and control messages that nobody would send, against the half that reads them.

Valid messages are taken apart and put together wrongly: values of other kinds, keys renamed or lost, bytes turned,
whole headers made up. The reading half answers with its own errors alone, in bounded time and memory.
"""

import gc
import json
import math
import random
import resource
import shutil
import time
from types import SimpleNamespace

import loopback
import pytest
import runs
import tiny
import torch
import toy
import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from test_codec import mutated as mutated_blob

import consilium.engine.flower as flower
from consilium.core import Algorithm, ClientInfo, Payload, Sampling
from consilium.engine.flower.client import client_app
from consilium.engine.flower.described import checked_description
from consilium.engine.flower.grid import FlowerEngine, _park
from consilium.engine.flower.records import PROTOCOL, STYPE, stamp, to_record
from consilium.engine.flower.roster import failed
from consilium.errors import PayloadError
from consilium.experiment import Wire, to_json

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it

SECONDS, MEMORY = 0.1, 10_000
"""Of the processor, and kB by which the process may grow, for one message."""
COUNTS = [2_000, pytest.param(34_000, marks=pytest.mark.slow)]
"""Three times the latter is 1e5."""

# --- mutations --------------------------------------------------------------------------------------------------------

ODD = [
    0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 0.0, -0.0, 1e-320, 1.7e308, -1.7e308, math.nan,
    math.inf, True, False, "", "a", "../x", "/etc/passwd", "x" * 5000, "\x1b[2J", "a\nb", "\u202e", "{}", "[" * 3000,
    "1e999", "None", b"", b"\xff\xfe",
    [], [0], [-1, 2**40], [1.5, math.nan], ["a", "a"], [True], ["x" * 1000] * 50, list(range(2000)),
]  # fmt: skip


def other(rng, value):
    """A value near this one, or far from it."""
    kind = rng.randrange(4)
    if kind == 0 and isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(["", "\x00", "é", "]", "}", '"', "9" * 30, value[:40]]) + value[place + 1 :]
    if kind == 0 and isinstance(value, list) and value:
        return rng.choice([value[1:], value + value[:1], [str(item) for item in value], value[::-1]])
    if kind == 0 and type(value) in (int, float):
        return rng.choice([value + 1 if value < 2**60 else 0, -min(value, 2**60), float(value), str(value), [value]])
    return rng.choice(ODD)


def spoil_words(rng, record):
    """One to three entries of a ConfigRecord lost, renamed, added or changed."""
    for _ in range(rng.randint(1, 3)):
        keys = list(record)
        kind, key = rng.randrange(8), rng.choice(keys) if keys else "x"
        if kind == 0:
            record.pop(key, None)
        elif kind == 1:
            record[rng.choice(["", "x" * 300, "report/x", "shape w", "failed"])] = rng.choice(ODD)
        elif key in record:
            record[key] = other(rng, record[key])


def some_blob(rng, good):
    """Bytes in place of a good blob: mutated, packed, truncated, of noise, or a header that promises too much."""
    kind = rng.randrange(7)
    if kind == 0:
        return mutated_blob(rng)
    if kind == 1:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 5000]))
    if kind == 2:
        return zstandard.compress(good + bytes(rng.choice([0, 100, 10**6])), 1)
    if kind == 3:
        packed = bytearray(zstandard.compress(good, 1))
        packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        return bytes(packed)
    if kind == 4:
        changed = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 5:
        count = rng.choice([1, 50, 5000])
        entry = {
            "dtype": rng.choice(["F32", "U8", "F8_E4M3", "X"]),
            "shape": [0] * rng.randint(0, 3),
            "data_offsets": [0, 0],
        }
        about = {"payload": rng.choice(['{"groups":["params"],"scalars":{}}', "[]", "[" * 2000, "{}", '"x"'])}
        head = {"__metadata__": about, **{f"params/{i}": entry for i in range(count)}}
        text = json.dumps(head, separators=(",", ":")).encode()
        return len(text).to_bytes(8, "little") + text
    return good[: rng.randrange(len(good))]


def spoil_arrays(rng, record):
    """One to three arrays of an ArrayRecord lost, renamed, doubled, or with other bytes, sizes and kinds."""
    for _ in range(rng.randint(1, 3)):
        keys = list(record)
        kind, key = rng.randrange(6), rng.choice(keys) if keys else "params"
        good = (record[key].data if key in record else b"") or b"x" * 64
        if kind == 0:
            record.pop(key, None)
        elif kind == 1 and key in record:
            record[rng.choice(["", "/", "params/1", "params/2", "usage", "x" * 300, "params.change"])] = record[key]
        elif kind == 2:
            blob = some_blob(rng, good)
            record[key] = Array(
                rng.choice(["uint8", "float32", ""]), (rng.choice([0, len(blob), 2**40]),), "numpy", blob
            )
        else:
            blob = some_blob(rng, good)
            record[key] = Array("uint8", (len(blob),), STYPE, blob)


def spoilt(rng, content):
    """A message's content with one or two of its records spoilt."""
    for _ in range(rng.randint(1, 2)):
        kind, name = rng.randrange(10), rng.choice(list(content) or ["engine"])
        if kind == 0:
            content.pop(name, None)
        elif kind == 1:
            content.pop(name, None)
            content[name] = rng.choice([ConfigRecord({}), MetricRecord({"x": 1.0}), ArrayRecord()])
        elif kind == 2:
            content.pop("failed", None)
            content["failed"] = ConfigRecord({"reason": "no\n" * rng.choice([1, 1000])})
        elif isinstance(content.get(name), ConfigRecord):
            spoil_words(rng, content[name])
        elif isinstance(content.get(name), ArrayRecord):
            spoil_arrays(rng, content[name])
    return content


class Measured:
    """Runs one call after the other, and knows the slowest and by how much one has made the process grow at most."""

    def __enter__(self):
        gc.collect()
        gc.freeze()  # what other tests have left is not searched for garbage in the time of a message
        self.slowest, self.grown, self.refused = 0.0, 0, 0
        return self

    def call(self, work, *args):
        peak, start = _peak(), time.thread_time()
        answer = work(*args)
        self.slowest = max(self.slowest, time.thread_time() - start)
        self.grown = max(self.grown, _peak() - peak)
        return answer

    def __exit__(self, *_):
        gc.unfreeze()


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- what a site says of itself ---------------------------------------------------------------------------------------

SAID = {
    "name": "north", "task": "note", "form": "classification", "metric": "accuracy", "labels": ["low", "high"],
    "sizes": [8, 2, 2], "memory_bytes": 0, "architecture": "", "shape": [], "fingerprint": "ab" * 32, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_descriptions(count):
    rng = random.Random(count)

    def read(told):
        try:
            described = checked_description(told)
        except PayloadError as error:
            assert len(str(error)) < 1000 and str(error).isprintable()
            return 1
        assert all(label.isprintable() or ord(max(label)) > 127 for label in described["labels"])
        return 0

    with Measured() as measured:
        for _ in range(count):
            told = ConfigRecord({key: list(v) if isinstance(v, list) else v for key, v in SAID.items()})
            spoil_words(rng, told)
            measured.refused += measured.call(read, told)
    assert count // 2 < measured.refused < count
    assert measured.slowest < SECONDS and measured.grown < MEMORY


# --- replies, against the server's half -------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """(engine, info, what was sent, a good reply's content, made anew at each call)."""
    loopback.Loopback([])  # Flower messages are of a run
    setup = tiny.setup(clients_per_round=2)
    half = toy.ToyServer(setup)
    info = ClientInfo("site-0", 12, "task")
    engine = FlowerEngine(
        server=half,
        infos=[info],
        roster=SimpleNamespace(grid=None),
        store=None,
        wire=Wire(cap="1MB"),
        told={"experiment": "{}", "run": "x"},
        folder=tmp_path,
        sampling=Sampling(1),
    )
    sent = half.deliver(info)

    def good():
        told = {"rejected": "", "kept": False, "seconds": 0.5, "reset": ""}
        told |= stamp({"experiment": "{}", "run": "x", "round": 3})
        scalars = {"num_examples": 12, "train_loss": 0.5, "steps": 3, "report/x": 0.5, "seconds_evaluate": 0.1}
        return to_record(Payload({"params": {"w": torch.ones(toy.SIZE)}}, scalars), told)

    return engine, info, sent, good


@pytest.mark.parametrize("count", COUNTS)
def test_replies(count, server, tmp_path):
    """Parked, judged and recorded as in a round; what is accepted is what was expected, and its record is JSON."""
    engine, info, sent, good = server
    engine.store = SimpleNamespace(count=lambda *_: None)
    rng, inbox = random.Random(count), tmp_path / "inbox"
    inbox.mkdir()

    def read(content):
        reply = SimpleNamespace(content=content, has_error=lambda: False)
        if failed(reply):
            return 1
        parked = _park(reply, inbox / info.id, 10**6, engine._expected("train", info.id, {info.id: sent}))
        answer, told = engine._take(info.id, 3, parked, sent, 1000)
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        if told["rejected"] is None:
            assert set(answer.group("params")) == {"w"} and answer.group("params")["w"].isfinite().all()
            return 0
        assert len(told["rejected"]) <= 1000 and told["rejected"].isprintable()
        return 1

    with Measured() as measured:
        for _ in range(count):
            content = spoilt(rng, good())
            measured.refused += measured.call(read, content)
            shutil.rmtree(inbox / info.id, ignore_errors=True)
    assert count // 2 < measured.refused < count
    assert measured.slowest < SECONDS and measured.grown < MEMORY


# --- control messages, against the client's half ----------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(a context of a node, the words of a good message); the method does nothing, so that reading is what is timed."""
    loopback.Loopback([])
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    monkeypatch.setattr(toy.ToyClient, "train", lambda *_: Payload(scalars={"num_examples": 1}))
    monkeypatch.setattr(toy.ToyClient, "evaluate", lambda *_: Payload(scalars={"score": 0.5}))
    data = runs.table(tmp_path, clients=1)
    made = runs.experiment(data, toy.Toy(), model=tiny.source(num_experts=4))
    flower.save_site(tmp_path / "site/site.json", "site-0", made)
    told = {
        "protocol": PROTOCOL, "experiment": json.dumps(to_json(made)), "heads": '{"task": ["cat", "dog", "fish"]}',
        "run": "x1", "model": "", "client": "site-0", "round": 2, "version": 0, "seed": 0, "cap": "1MB",
        "reply": "exact", "zstd": False, "deadline": 9.0, "base": "", "hold": False, "nonce": "ab",
    }  # fmt: skip
    return Context(7, 100, {"site": str(tmp_path / "site/site.json")}, RecordDict(), {}), told


@pytest.mark.parametrize("count", COUNTS)
def test_control_messages(count, site):
    """Every answer is a reply or one line; a spoilt experiment is looked at like any other word."""
    context, told = site
    rng, kinds = random.Random(count), ["train", "train", "evaluate", "query.describe", "query.name"]

    def good():
        return to_record(Payload({"params": {"w": torch.ones(toy.SIZE)}}, {"n": 1}), told)

    with Measured() as measured:
        for kind in kinds:  # what is read once is read now
            client_app(loopback.carried(Message(good(), dst_node_id=100, message_type=kind)), context)
        for number in range(count):
            content = good()
            words = content["engine"]
            if rng.random() < 0.3:
                made = json.loads(str(words["experiment"]))
                spoil_json(rng, made)
                words["experiment"] = json.dumps(made)
            else:
                spoilt(rng, content)
            message = Message(content, dst_node_id=100, message_type=rng.choice(kinds))
            message.metadata.__dict__["_message_id"] = str(number)
            reply = measured.call(client_app, message, context)
            if "failed" in reply.content:
                reason = reply.content["failed"]["reason"]
                assert "\n" not in reason and len(reason) <= 1000, reason[:1000]
                measured.refused += 1
    assert count // 4 < measured.refused < count
    assert measured.slowest < SECONDS and measured.grown < MEMORY


def spoil_json(rng, value):
    """One entry somewhere in an experiment lost, or of another value."""
    while True:
        key = rng.choice(list(value))
        if isinstance(value[key], dict) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        odd = [item for item in ODD if not isinstance(item, bytes)]
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = rng.choice(odd)
        return
