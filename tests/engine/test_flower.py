"""The engine over Flower's messages, in this process: the same bits as the local engine, and who was missing."""

import dataclasses
import math

import loopback
import pytest
import runs
import tiny
import torch
from flwr.app import Array, ConfigRecord, Message
from hypothesis import given
from hypothesis import strategies as st

import consilium.engine.flower as flower
from consilium.core import Algorithm, Payload
from consilium.engine.flower.records import STYPE, from_record, to_record
from consilium.errors import PayloadError
from consilium.run import run

METHODS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def grid(monkeypatch):
    """Runs with engine "flower" go over this Grid; three nodes, the partitions in no order."""
    made = loopback.Loopback([{"partition-id": i, "num-partitions": 3} for i in (2, 0, 1)])

    class Simulated:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return made

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(flower, "simulation", Simulated)
    return made


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
    """Everything a run leaves but seconds, process memory and the engine's own: bytes are of the blobs there."""
    run(experiment, folder)
    outcome = runs.outcome(folder)

    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if not k.startswith("bytes_")}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(outcome)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bits_and_records(name, dtype, data, grid, tmp_path):
    """In process (for the others `test_registry` shows that strict changes nothing), and through Flower's messages;
    one client in two is short of memory."""
    model = tiny.source(num_experts=4, dtype=dtype)
    made = runs.experiment(data, METHODS[name](), model=model, memory=runs.memory(8, 2), rounds=2)
    local = bits_of(tmp_path / "local", dataclasses.replace(made, strict=True))
    over = bits_of(tmp_path / "flower", dataclasses.replace(made, engine="flower"))
    assert local == over
    assert len([kind for kind, *_ in grid.log if kind == "train"]) == sum(len(m["selected"]) for m in over["metrics"])
