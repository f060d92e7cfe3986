"""Payload legality, seeds, client infos, sampling, expert sets as scalars, the registry."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.core import (
    Algorithm,
    ClientInfo,
    Payload,
    Sampling,
    derive_seed,
    experts_from_scalars,
    experts_to_scalars,
)
from consilium.errors import ConfigError, PayloadError

CLIENTS = [ClientInfo(f"{task}-{i:02d}", 10, task) for task in ("a", "b", "c", "d") for i in range(3)]


# --- payloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_payload_takes_plain_tensors(dtype, shape):
    tensor = torch.zeros(shape, dtype=dtype)
    payload = Payload({"params": {"w": tensor}})
    assert payload.group("params")["w"] is tensor
    assert payload.nbytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("value", [1, 1.5, -math.inf, "text", "", True, [], [1, 2], [0.5], ["a"], [True, False]])
def test_payload_takes_plain_scalars(value):
    assert Payload(scalars={"x": value}).scalars["x"] == value


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(2, dtype=torch.complex64), id="complex"),
        pytest.param(torch.zeros(2, device="meta"), id="meta"),
        pytest.param(torch.eye(2).to_sparse(), id="sparse"),
        pytest.param([1.0, 2.0], id="list"),
        pytest.param(np.zeros(2), id="numpy"),
        pytest.param(None, id="none"),
    ],
)
def test_payload_refuses_tensors(tensor):
    with pytest.raises(PayloadError, match="'params/w' is"):
        Payload({"params": {"w": tensor}})


@pytest.mark.parametrize(
    "value",
    [None, {"a": 1}, [[1]], [1, 2.0], [1, True], [None], (1, 2), {1}, np.float64(1), np.int64(1), [np.float64(1)],
     torch.tensor(1.0), b"bytes", 1j],
)  # fmt: skip
def test_payload_refuses_scalars(value):
    with pytest.raises(PayloadError, match="scalar 'x'"):
        Payload(scalars={"x": value})


@pytest.mark.parametrize("name", ["", "a/b", "/"])
def test_payload_refuses_group_names(name):
    with pytest.raises(PayloadError, match="group name"):
        Payload({name: {}})


def test_a_group_is_a_copy_of_the_dict_not_of_the_tensors():
    tensor = torch.zeros(2)
    payload = Payload({"params": {"w": tensor}})
    payload.group("params").clear()
    assert payload.group("params")["w"] is tensor
    assert payload.group("nothing") == {}


# --- seeds and infos --------------------------------------------------------------------------------------------------


def test_derived_seeds_never_change():
    """Golden numbers: another value here means that old runs cannot be resumed or repeated."""
    assert derive_seed(0) == 5254295370254170289
    assert derive_seed(0, "sampling", 1) == 7529006434190393739
    assert derive_seed(7, "client", 3, "topic-00") == 6167934131335914308


@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4))
def test_derived_seeds_fit_a_generator(parts):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    torch.Generator().manual_seed(seed)


def test_derived_seeds_keep_parts_apart():
    assert (
        len(
            {
                derive_seed("a", "b"),
                derive_seed("ab"),
                derive_seed("b", "a"),
                derive_seed("a", 1),
                derive_seed("a", "1"),
            }
        )
        == 5
    )


@pytest.mark.parametrize("id", ["topic-00", "a", "A.b_c-9", "x" * 64])
def test_client_ids(id):
    assert ClientInfo(id, 1, "t").id == id


@pytest.mark.parametrize("id", ["", "a/b", "..", ".hidden", "a b", "é", "x" * 65, "a\n"])
def test_bad_client_ids(id):
    with pytest.raises(ConfigError, match="client id"):
        ClientInfo(id, 1, "t")


@settings(max_examples=400)
@given(
    st.text(st.characters(), max_size=70)
    | st.text("./\\~-aA\x00\n", max_size=6)
    | st.sampled_from(["..", "CON", "a/../b"])
)
def test_no_id_leads_out_of_its_folder(id):
    """Every id is refused, or is a name directly below the folder that it is put in."""
    try:
        ClientInfo(id, 1, "t")
    except ConfigError:
        return
    root = Path("/somewhere/clients")
    assert (root / id).parent == root and Path(os.path.normpath(root / id)).parent == root and id.isprintable()


def test_empty_clients_are_refused():
    with pytest.raises(ConfigError, match="client a has 0 training examples; leave empty clients out"):
        ClientInfo("a", 0, "t")


@given(
    st.dictionaries(
        st.sampled_from(["encoder.block.1.layer.1.mlp", "layers.0.mlp"]),
        st.sets(st.integers(0, 63)).map(lambda ids: tuple(sorted(ids))),
        min_size=1,
    )
)
def test_expert_sets_travel_as_scalars(held):
    scalars = {"stage": "two", **experts_to_scalars(held)}
    assert experts_from_scalars(Payload(scalars=scalars).scalars) == held


def test_no_expert_set_means_the_whole_model():
    assert experts_from_scalars({"stage": "one", "num_examples": 3}) is None


# --- sampling ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 15), st.integers(0, 99), st.integers(0, 99), st.randoms(), st.booleans())
def test_sampling(n, round, seed, rng, distinct):
    """In id order, as many as asked for (or as there are), whatever order the clients are listed in."""
    sampling = Sampling(n, distinct)
    chosen = sampling.choose(CLIENTS, round, seed)
    shuffled = list(CLIENTS)
    rng.shuffle(shuffled)
    assert sampling.choose(shuffled, round, seed) == chosen
    ids = [c.id for c in chosen]
    assert ids == sorted(set(ids))
    assert len(ids) == min(n, 4 if distinct else 12)
    if distinct:
        assert len({c.task for c in chosen}) == len(chosen)


def test_sampling_varies_with_round_and_seed_and_reaches_everybody():
    for sampling in (Sampling(3), Sampling(3, distinct_tasks=True)):
        rounds = [tuple(c.id for c in sampling.choose(CLIENTS, r, 0)) for r in range(60)]
        assert len(set(rounds)) > 10
        assert {client for chosen in rounds for client in chosen} == {c.id for c in CLIENTS}
        assert rounds != [tuple(c.id for c in sampling.choose(CLIENTS, r, 1)) for r in range(60)]


def test_sampling_from_nobody():
    assert Sampling(3).choose([], 1, 0) == Sampling(3, True).choose([], 1, 0) == []


def test_sampling_needs_a_client():
    with pytest.raises(ConfigError, match="clients_per_round is 0; it must be at least 1"):
        Sampling(0)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_an_algorithm_registers_itself_under_its_class_name():
    before = dict(Algorithm.registry)
    try:

        @dataclass(frozen=True)
        class Homemade(Algorithm):
            def server(self, setup): ...
            def client(self, setup): ...

        assert Algorithm.registry == {**before, "Homemade": Homemade}
    finally:
        Algorithm.registry.pop("Homemade", None)
