"""The codec gives back every legal payload bit for bit, and refuses every other blob with one exception type."""

import contextlib
import gc
import json
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from consilium.core import _DTYPES, Payload
from consilium.engine.codec import Bounds, check, decode, encode, mapped
from consilium.errors import PayloadError
from consilium.params import Like

names = st.text(min_size=1, max_size=12).filter(lambda name: "\x00" not in name and name.isprintable())
groups = names.filter(lambda name: "/" not in name)
shapes = st.lists(st.integers(0, 3), max_size=3)
items = (
    st.integers(-(2**63), 2**63) | st.booleans() | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=True)
)  # fmt: skip
lists = st.one_of(*(st.lists(kind, max_size=4) for kind in (st.integers(), st.text(max_size=5), st.booleans())))


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(_DTYPES, key=str)))
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


@st.composite
def payloads(draw):
    held = draw(st.dictionaries(groups, st.dictionaries(names, tensors(), max_size=3), max_size=3))
    return Payload(held, draw(st.dictionaries(names, items | lists, max_size=4)))


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def told(payload):
    """Everything a payload says, in comparable form."""
    return (
        {group: {key: bits(t) for key, t in params.items()} for group, params in payload.groups.items()},
        {key: (type(value), value) for key, value in payload.scalars.items()},
    )


@given(payloads())
def test_every_legal_payload_comes_back(payload):
    back = decode(encode(payload))
    assert told(back) == told(payload)
    assert list(back.groups) == list(payload.groups)
    assert back.nbytes == payload.nbytes


def test_a_key_may_hold_slashes_and_a_group_may_be_empty():
    payload = Payload({"control": {}, "params": {"a/b/c": torch.ones(2)}})
    assert told(decode(encode(payload))) == told(payload)


def test_nan_and_infinity_keep_their_bits():
    payload = Payload({"g": {"x": torch.tensor([float("nan"), float("-inf"), -0.0])}}, {"loss": float("nan")})
    back = decode(encode(payload))
    assert bits(back.group("g")["x"]) == bits(payload.group("g")["x"])
    assert back.scalars["loss"] != back.scalars["loss"]


def test_views_shared_storage_and_strides():
    base = torch.arange(12.0).reshape(3, 4)
    shared = {"whole": base, "row": base[1], "column": base[:, 2], "turned": base.T, "again": base, "0-d": base[0, 3]}
    back = decode(encode(Payload({"params": shared}))).group("params")
    assert {k: t.tolist() for k, t in back.items()} == {k: t.tolist() for k, t in shared.items()}


def test_a_view_of_a_large_tensor_costs_only_itself():
    """A router row is a view of the router: sending one must not send all."""
    table = torch.zeros(1000, 100)
    assert len(encode(Payload({"router": {"row": table[3]}}))) < 2000


def test_a_decoded_tensor_is_its_own():
    tensor = torch.ones(3)
    back = decode(encode(Payload({"g": {"x": tensor}}))).group("g")["x"]
    back.zero_()
    assert tensor.tolist() == [1, 1, 1]


GOOD = encode(Payload({"params": {"w": torch.arange(6.0)}}, {"n": 3}))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD + b"\x00",
        save({"params/w": torch.ones(2)}),  # safetensors, but without our header
        save({"params/w": torch.ones(2)}, {"payload": '{"groups": [], "scalars": {}}'}),  # a group the header lacks
        save({}, {"payload": "{}"}),
        save({}, {"payload": "[1, 2]"}),
        save({}, {"payload": "["}),
        save({}, {"payload": "[" * 100_000}),
        save({}, {"payload": '{"groups": 3, "scalars": {}}'}),
        save({}, {"payload": '{"groups": [[]], "scalars": {}}'}),
        save({}, {"payload": '{"groups": [3], "scalars": {}}'}),
        save({}, {"payload": '{"groups": ["a/b"], "scalars": {}}'}),
        save({}, {"payload": '{"groups": [], "scalars": []}'}),
        save({}, {"payload": '{"groups": [], "scalars": {"x": null}}'}),
        save({}, {"payload": '{"groups": [], "scalars": {"x": [1, "a"]}}'}),
    ],
)
def test_a_foreign_blob_is_refused(blob):
    with pytest.raises(PayloadError, match=r"not a payload|not an int|group name"):
        decode(blob)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_changed_byte_is_either_refused_or_still_a_payload(place, value):
    blob = GOOD[:place] + bytes([value]) + GOOD[place + 1 :]
    with contextlib.suppress(PayloadError):
        assert isinstance(decode(blob), Payload)


PARTS = [
    b"", b"\x00", b"\xff" * 8, b'"__metadata__"', b'{"', b"}", b"[" * 3000, b'"F8_E4M3"', b'"F64"', b'"BOOL"', b'"C64"',
    b'"dtype"', b'"shape":[0]', b'"shape":[9999999999999]', b"-1", b"1e999", b"9" * 5000, b"null", b"\\ud800",
]  # fmt: skip
SEEDS = [
    GOOD,
    encode(Payload()),
    encode(Payload({"usage": {"b": torch.ones(2, 2).bfloat16()}, "x": {}}, {"a": [1, 2], "b": "t", "c": 0.5})),
    encode(Payload({"g": {str(i): torch.zeros(i, dtype=torch.uint8) for i in range(20)}})),
]


def mutated(rng):
    """A valid message with one to four faults: bits, bytes, parts cut out, doubled, put in, a false length."""
    blob = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(blob) + 1)
        end = min(start + rng.choice([1, 4, 8, 40]), len(blob))
        kind = rng.randrange(7)
        if kind == 0 and start < len(blob):
            blob[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            blob[start:end] = rng.randbytes(end - start)
        elif kind == 2:
            del blob[start:end]
        elif kind == 3:
            blob[start:start] = blob[start:end] * rng.randint(1, 3)
        elif kind == 4:
            blob[start:end] = rng.choice(PARTS)
        elif kind == 5:
            blob[:8] = rng.choice([0, 1, len(blob), 10**8, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
        else:
            blob = bytearray(blob[:start] + rng.choice(SEEDS)[start:])
    return bytes(blob)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_messages_give_a_payload_or_its_own_error(count):
    """In at most 0.1 s of the processor each, and without growing by more than 10 MB."""
    rng, refused, slowest = random.Random(count), 0, 0.0
    gc.freeze()  # what other tests have left is not searched for garbage in the time of a message
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        blob = mutated(rng)
        start = time.thread_time()
        try:
            assert isinstance(decode(blob), Payload)
        except PayloadError:
            refused += 1
        slowest = max(slowest, time.thread_time() - start)
    gc.unfreeze()
    assert slowest < 0.1 and count // 2 < refused < count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 10_000  # kB


# --- headers, before anything parses them -----------------------------------------------------------------------------

LIKES = {"w": Like((2, 3), torch.float32), "router.ä": Like((None,), torch.int64), "b": Like((), torch.bfloat16)}
BOUNDS = Bounds.of("params", LIKES)


def blob(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(place=0):
    return {"dtype": "U8", "shape": [0], "data_offsets": [place, place]}


ABOUT = {"__metadata__": {"payload": json.dumps({"groups": ["params"], "scalars": {}})}}
FIRST = json.dumps(ABOUT, separators=(",", ":")).encode()[:-1]
BOMBS = {
    "400,000 empty tensors": blob(ABOUT | {f"params/{i}": entry() for i in range(400_000)}),
    "lists in the metadata": blob({"__metadata__": {"payload": "[" + "[]," * 10_000_000 + "[]]"}}),
    "lists in the header": blob(FIRST + b',"params/w":' + b"[" + b"[]," * 10_000_000 + b"[]]}"),
    "a long shape": blob(
        FIRST + b',"params/w":{"dtype":"U8","shape":[' + b"0," * 10_000_000 + b'0],"data_offsets":[0,0]}}'
    ),
    "a long name": blob(ABOUT | {"params/" + "x" * 30_000_000: entry()}),
    "a name of escapes": blob(FIRST + b',"params/' + b"\\u0041" * 5_000_000 + b'":1}'),
    "more metadata": blob({"__metadata__": {**ABOUT["__metadata__"], "more": "x" * 30_000_000}}),
    "spaces": blob(FIRST + b"}" + b" " * 30_000_000),
    "no JSON": blob(b"[" * 30_000_000),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_hostile_header_is_refused_before_it_is_parsed(what):
    """Within 0.1 s of the processor and 10 MB, with an error of one line."""
    bomb = BOMBS[what]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(PayloadError, match=r"header of a blob (is|has)|is not a payload") as error:
        decode(bomb, BOUNDS)
    assert time.thread_time() - start < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 10_000  # kB
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("what", [what for what in BOMBS if what != "400,000 empty tensors"])
def test_a_hostile_header_is_refused_where_nothing_is_known_of_the_blob(what):
    with pytest.raises(PayloadError, match="is not a payload"):
        decode(BOMBS[what])


def test_honest_blobs_are_within_their_bounds():
    """Also with a name that JSON escapes, a dimension that is free, and one tensor too many, which the judge names."""
    tensors = {"w": torch.ones(2, 3), "router.ä": torch.arange(10**6), "b": torch.ones((), dtype=torch.bfloat16)}
    for held in (tensors, {}, {"w": torch.ones(2, 3).double()}, {**tensors, "x": torch.ones(4)}):
        payload = Payload({"params": held})
        assert told(decode(encode(payload), BOUNDS)) == told(payload)
    many = {f"block.{i}.experts.{e}.down_proj": Like((64, 16), torch.float32) for i in range(4) for e in range(64)}
    payload = Payload({"params": {key: torch.zeros(64, 16) for key in many}})
    header = check(encode(payload), Bounds.of("params", many))
    assert header.tensors == 256 and header.size < Bounds.of("params", many).header


def test_a_blob_of_another_writer_is_still_read():
    """safetensors' own, as checkpoints were written once."""
    params = {"params/w": torch.ones(2), "params/ü": torch.zeros(0, 3)}
    back = decode(save(params, {"payload": '{"groups": ["params"], "scalars": {"n": 3}}'}))
    assert list(back.group("params")["w"]) == [1, 1] and back.scalars == {"n": 3}


def test_no_error_holds_a_whole_foreign_value():
    for payload in ("[" + "1," * 10**6 + "null]", '"' + "x" * 10**6 + '"', json.dumps({"a": ["y" * 10**6, 1]})):
        with pytest.raises(PayloadError) as error:
            decode(save({}, {"payload": f'{{"groups": [], "scalars": {{"x": {payload}, "z": [1, "a"]}}}}'}))
        assert len(str(error.value)) < 300


def test_the_header_holds_no_pickle_and_no_code():
    size = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + size])
    assert set(header) == {"__metadata__", "params/w"}
    assert json.loads(header["__metadata__"]["payload"]) == {"groups": ["params"], "scalars": {"n": 3}}


def test_equal_payloads_are_equal_bytes_in_every_process():
    code = (
        "import hashlib, torch; from consilium.core import Payload; from consilium.engine.codec import encode;"
        "p = Payload({'params': {'w': torch.arange(6.0), 'b': torch.ones(2)}, 'c': {}}, {'n': 3, 'x': 'y'});"
        "print(hashlib.sha256(encode(p)).hexdigest())"
    )
    digests = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(digests) == 1


def test_mapped_from_a_file_that_is_gone(tmp_path):
    """The same payload to the bit, though its file has no name any more; a broken file is told like a broken blob."""
    payload = Payload(
        {"params": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}, "x": {}}, {"n": 3}
    )
    path = tmp_path / "blob"
    path.write_bytes(encode(payload))
    back = mapped(path)
    path.unlink()
    assert encode(back) == encode(payload) and list(back.groups) == ["params", "x"]
    path.write_bytes(encode(payload)[:-1])
    with pytest.raises(PayloadError, match=f"a blob of {len(encode(payload)) - 1} bytes is not a payload"):
        mapped(path)
