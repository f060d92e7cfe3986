"""The memory model: exact arithmetic by hand, and the promise kept by a real training process."""

import importlib.util
import sys
import time
import timeit
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import OlmoeConfig, SwitchTransformersConfig

from consilium.errors import ConfigError
from consilium.moe.budget import OVERHEAD, PARTS, SLACK, MemoryModel, bytes_of, human
from consilium.moe.build import ModelSource

ROOT = Path(__file__).parents[2]
BATCH = {"batch_size": 4, "max_length": 10, "target_length": 5, "optimizer": "adamw"}


@lru_cache
def benchmark():
    """benchmarks/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def switch(folder: Path, form: str = "classification", **change) -> MemoryModel:
    """D 8, F 12, two heads of 4, two layers of which the second is sparse with 4 experts, 50 tokens."""
    shape = {"vocab_size": 50, "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_experts": 4}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    plain = {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
    SwitchTransformersConfig(**(shape | layers | plain | change)).save_pretrained(folder)
    return MemoryModel.of(ModelSource(str(folder), form))


def olmoe(folder: Path, form: str = "classification", **change) -> MemoryModel:
    """D 8, F 12, two heads of 4, two layers of 4 experts, top-2, 50 tokens."""
    shape = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_experts": 4}
    rest = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1}
    OlmoeConfig(**(shape | rest | change)).save_pretrained(folder)
    return MemoryModel.of(ModelSource(str(folder), form))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[MemoryModel]:
    """Both families, both forms."""
    made = []
    for make in (switch, olmoe):
        for form in ("classification", "text-to-text"):
            made.append(make(tmp_path_factory.mktemp("model"), form))
    return made


# --- parameters ---------------------------------------------------------------------------------------------------


def test_tiny_switch_by_hand(tmp_path):
    model = switch(tmp_path)
    block = "encoder.block.1.layer.1.mlp"
    assert model.counts == {block: 4}
    assert model.expert_params == {block: 2 * 8 * 12}
    assert model.row_params == {block: 8}
    attention, feed_forward, norms, bias = 4 * 8 * 8, 2 * 8 * 12, 5 * 8, 32 * 2
    assert model.dense_params == 50 * 8 + 2 * attention + feed_forward + norms + bias
    assert model.params({block: 3}) == model.dense_params + 3 * (192 + 8)
    assert model.bytes({block: 3}) == 4 * model.params({block: 3})


def test_tiny_olmoe_by_hand(tmp_path):
    model = olmoe(tmp_path, "text-to-text")
    assert list(model.counts) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert set(model.expert_params.values()) == {3 * 8 * 12}
    assert set(model.row_params.values()) == {8}
    assert model.dense_params == 2 * 50 * 8 + 2 * (4 * 8 * 8 + 4 * 8) + 8  # embedding, logits, attention with norms


def test_switch_base_8(tmp_path):
    layers = {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    SwitchTransformersConfig(d_ff=3072, **layers).save_pretrained(tmp_path)
    model = MemoryModel.of(ModelSource(str(tmp_path), "text-to-text"))
    assert len(model.counts) == 12 and set(model.counts.values()) == {8}
    assert model.dense_params == 166_280_448  # tied embedding once, without the 73,728 parameters of router rows
    assert set(model.expert_params.values()) == {4_718_592}
    assert set(model.row_params.values()) == {768}
    assert model.params(model.counts) == 619_339_008
    assert 2.30 < model.bytes(model.counts) / 2**30 < 2.31  # 2.3072; 2.3069 without router rows


def test_every_family_has_a_row():
    assert PARTS.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_every_family_has_a_footprint(model_type, form):
    """Fewer experts need less, adapters less than all weights, and none is made up for a family without a row."""
    setup = tiny.setup(tiny.source(model_type, form))
    counts = setup.model.counts
    few = dict.fromkeys(counts, tiny.FAMILIES[model_type].least)
    assert setup.footprint(few).total < setup.footprint(counts).total
    assert setup.footprint(counts, "lora").total < setup.footprint(counts).total
    assert setup.reported(counts) == {"footprint": setup.footprint(counts).total}


def test_a_family_without_a_row_is_measured(monkeypatch):
    """What is measured on a tiny model is above what is counted, and below twice that."""
    sizes = dict(batch_size=4, max_length=64, target_length=8, optimizer="adamw")
    counted = MemoryModel.of(tiny.source("olmoe"))
    monkeypatch.delitem(PARTS, "olmoe")
    measured = MemoryModel.of(tiny.source("olmoe", vocab_size=161))
    for mode in ("full", "lora", "forward"):
        a, b = (model.footprint(model.counts, mode=mode, **sizes).activations for model in (counted, measured))
        assert a < b < 2 * a


# --- footprints ---------------------------------------------------------------------------------------------------


def test_full_training_by_hand(tmp_path):
    model = switch(tmp_path)
    footprint = model.footprint({"encoder.block.1.layer.1.mlp": 3}, mode="full", **BATCH)
    weights = 4 * model.params({"encoder.block.1.layer.1.mlp": 3})
    assert (footprint.weights, footprint.gradients, footprint.optimizer) == (weights, weights, 2 * weights)
    assert footprint.references == 0
    norm, attention, scores = 3 * 8, 4 * 8, 2
    layer = 40 * (2 * norm + attention) + 4 * 10 * 10 * scores
    dense, sparse = 40 * 12, 40 * (12 + 3 * 8 + 3 * 3)  # hidden; and gathered, output, gated, three of E
    ends, last = 40 * 3 * 8 + 10 * 10 * (2 + 2), 40 * 2 * 8
    assert footprint.activations == 4 * (2 * layer + dense + sparse + ends + last)
    assert footprint.between == min(weights, footprint.activations) // 4  # half a layer of two
    assert footprint.absent == 4 * 8  # bytes of the one router row that is not held
    live = 3 * weights + 32 + footprint.activations + footprint.between  # gradients come when the activations have gone
    assert footprint.overhead == OVERHEAD + live // SLACK
    assert footprint.total == live + footprint.overhead


def test_gradients_or_activations_whichever_is_more(tmp_path):
    model = switch(tmp_path)
    few, many = (model.footprint(model.counts, mode="full", **BATCH | {"batch_size": n}) for n in (1, 64))
    huge = replace(few, gradients=few.activations + 1000)
    assert huge.total == few.weights + few.optimizer + few.activations + 1000 + few.between + few.overhead
    assert many.activations > many.gradients
    assert many.total == many.weights + many.optimizer + many.activations + many.between + many.overhead


def test_sgd_has_no_state_and_references_are_copies(tmp_path):
    model = switch(tmp_path)
    plain = model.footprint(model.counts, mode="full", **BATCH | {"optimizer": "sgd"})
    assert plain.optimizer == 0
    heavy = model.footprint(model.counts, mode="full", **BATCH | {"optimizer": "sgd", "momentum": 0.9})
    assert heavy.optimizer == heavy.weights == plain.weights  # one number for each that is trained
    assert heavy.total - plain.total >= heavy.weights
    assert model.footprint(model.counts, mode="full", **BATCH | {"momentum": 0.0}).optimizer == 2 * plain.weights
    twice = model.footprint(model.counts, mode="full", references=2, **BATCH)
    assert twice.references == 2 * twice.weights


def test_lora_trains_adapters_alone(tmp_path):
    model = switch(tmp_path)
    footprint = model.footprint(model.counts, mode="peft", rank=2, **BATCH)
    adapters = 4 * 4 * 2 * 2 * (8 + 12)  # bytes, experts, matrices, rank, inputs + outputs
    assert footprint.gradients == adapters
    assert footprint.optimizer == 2 * adapters
    assert footprint.weights == model.bytes(model.counts) + adapters
    ours = model.footprint(model.counts, mode="lora", rank=2, **BATCH)
    assert ours.gradients == adapters + 4 * 4 * 8  # and router rows
    assert ours.weights == footprint.weights and ours.optimizer == 2 * ours.gradients


def test_forward_holds_two_copies_while_building(tmp_path):
    model = switch(tmp_path, d_ff=2000)
    footprint = model.footprint(model.counts, mode="forward", **BATCH | {"batch_size": 1})
    assert footprint.gradients == footprint.optimizer == 0
    assert footprint.activations < footprint.weights
    assert footprint.total == 2 * footprint.weights + footprint.overhead


def test_optimizer_step_can_be_the_peak(tmp_path):
    model = olmoe(tmp_path, intermediate_size=4000)
    footprint = model.footprint(model.counts, mode="full", **BATCH | {"batch_size": 1, "max_length": 1})
    assert footprint.activations < footprint.gradients
    assert footprint.total == 4 * footprint.weights + footprint.between + footprint.overhead


def test_logits_by_hand(tmp_path):
    """Two sequences of 3 target tokens over 5000 words: three times B x T x V on the way back through the loss."""
    batch = BATCH | {"batch_size": 2, "target_length": 3}
    for make in (switch, olmoe):
        few, many = (make(tmp_path / f"{make.__name__}{v}", "text-to-text", vocab_size=v) for v in (4000, 5000))
        a, b = (model.footprint(model.counts, mode="lora", **batch).activations for model in (few, many))
        assert b - a == 3 * 4 * 2 * 3 * 1000
        # Of one sequence, the gradient of the V x D matrix beside one B x T x V is more.
        one = batch | {"batch_size": 1}
        a, b = (model.footprint(model.counts, mode="full", **one).activations for model in (few, many))
        assert b - a == 4 * 1000 * (3 + 8)


def test_checkpointing_saves(models):
    for model in models:
        saving = model.footprint(model.counts, mode="full", gradient_checkpointing=True, **BATCH)
        assert saving.activations < model.footprint(model.counts, mode="full", **BATCH).activations


def test_bfloat16_halves_what_is_stored(tmp_path):
    whole = switch(tmp_path)
    half = MemoryModel.of(ModelSource(str(tmp_path), "classification", "bfloat16"))
    assert 2 * half.bytes(half.counts) == whole.bytes(whole.counts)
    training, n = half.footprint(half.counts, mode="full", **BATCH), half.params(half.counts)
    assert (training.weights, training.masters, training.optimizer) == (2 * n, 4 * n, 8 * n)
    assert training.gradients == 2 * n + 4 * n  # and one chunk of them in float32
    assert whole.footprint(whole.counts, mode="full", **BATCH).masters == 0


@given(data=st.data())
def test_more_never_costs_less(models, data):
    model = data.draw(st.sampled_from(models))
    mode = data.draw(st.sampled_from(["full", "lora", "peft", "forward"]))
    sizes = {key: data.draw(st.integers(1, 64)) for key in ("batch_size", "max_length", "target_length")}
    options = {
        "mode": mode,
        "optimizer": data.draw(st.sampled_from(["adamw", "sgd"])),
        "gradient_checkpointing": data.draw(st.booleans()),
        "references": data.draw(st.integers(0, 2)),
    }
    few = {block: data.draw(st.integers(1, n)) for block, n in model.counts.items()}
    many = {block: data.draw(st.integers(few[block], n)) for block, n in model.counts.items()}
    small = model.footprint(few, **sizes, **options)
    assert all(getattr(small, part.name) >= 0 for part in fields(small))
    assert small.total <= model.footprint(many, **sizes, **options).total
    longer = {key: n + data.draw(st.integers(0, 8)) for key, n in sizes.items()}
    assert small.total <= model.footprint(few, **longer, **options).total


def test_built_once_and_fast(models):
    model = models[1]
    calls = 200
    seconds = min(
        timeit.repeat(
            lambda: model.footprint(model.counts, mode="full", **BATCH), number=calls, repeat=5, timer=time.process_time
        )
    )
    assert seconds / calls < 5e-5


def test_of_is_cached(tmp_path):
    assert switch(tmp_path) is MemoryModel.of(ModelSource(str(tmp_path), "classification"))


# --- sizes as text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("60MB", 60_000_000),
        ("12GiB", 12 * 2**30),
        ("1.5GB", 1_500_000_000),
        (" 512 kib ", 512 * 1024),
        ("2_000", None),
        ("123", 123),
        (7, 7),
    ],
)
def test_bytes_of(size, expected):
    if expected is None:
        with pytest.raises(ConfigError):
            bytes_of(size)
    else:
        assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "MB", "12 XB", "-5MB", "0", 0, -1, True, "1e6", "1.2.3GB", "12G", None, 1.5])
def test_bytes_of_names_the_value_and_the_forms(size):
    with pytest.raises(ConfigError) as caught:
        bytes_of(size)
    assert repr(size) in str(caught.value)
    assert "12GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (950, "950 B"), (1_500, "1.5 kB"), (60_000_000, "60.0 MB"), (999_960_000, "1.0 GB")],
)
def test_human(n, text):
    assert human(n) == text


# --- the promise kept ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("family", "place", "change", "tolerance"),
    [
        ("SWITCH", 0, {}, 0.15),
        ("OLMOE", 1, {"share": 0.25, "batch_size": 8, "max_length": 256}, 0.15),
        ("SWITCH", 1, {"mode": "peft"}, 0.20),
    ],
    ids=["switch-77MB", "olmoe-quarter-269MB", "switch-lora"],
)
def test_a_training_process_takes_what_was_promised(family, place, change, tolerance):
    measuring = benchmark()
    point = replace(getattr(measuring, family)[place], **change)
    assert measuring.promise(point).total == pytest.approx(next(measuring.measure([point]))[0], rel=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("family", ["SWITCH", "OLMOE"])
def test_a_large_training_process_takes_what_was_promised(family):
    measuring = benchmark()
    point = getattr(measuring, family)[2]
    assert measuring.promise(point).total == pytest.approx(next(measuring.measure([point]))[0], rel=0.15)
