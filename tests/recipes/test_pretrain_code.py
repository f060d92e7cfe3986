"""The language model's pretraining at toy size: it learns, saves what loads, and resumes to the same bits."""

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from consilium.errors import CheckpointError, ConfigError, DataError
from consilium.recipes.pretrain_code import PretrainCode, Pretraining, train_tokenizer


def texts() -> list[str]:
    rng = random.Random(0)
    words = ["def", "return", "value", "self", "x", "+", "(", ")", ":", "\n    "]
    return [" ".join(rng.choices(words, k=200)) for _ in range(60)]


def toy(out, **changes) -> PretrainCode:
    values = {"steps": 12, "rows": 4, "length": 32, "vocabulary": 300, "width": 16, "hidden": 16, "layers": 2}
    values |= {"heads": 2, "experts": 4, "rate": 1e-2, "threads": 1, "save_minutes": 100.0}
    return PretrainCode(out, **{**values, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    job = Pretraining(toy(tmp_path_factory.mktemp("pretrain-code"), steps=40), texts())
    job.losses = []
    update = job._update
    job._update = lambda ids, tap: job.losses.append(update(ids, tap)) or job.losses[-1]
    job.run(lambda line: None)
    return job


def test_it_learns(done):
    assert done.losses[-1] < done.losses[0] - 1


def test_plain_transformers_loads_it_and_computes_the_same(done):
    model = AutoModelForCausalLM.from_pretrained(done.settings.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(done.settings.out)
    ids = tokenizer("def value", return_tensors="pt")["input_ids"]
    done.model.backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, done.model.backbone(ids).logits, atol=0.05, rtol=0.05)  # bfloat16
    assert model.config.model_type == "olmoe" and model.config.norm_topk_prob is False
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_resuming_gives_the_same_bits(tmp_path):
    whole = Pretraining(toy(tmp_path / "whole"), texts())
    whole.run(lambda line: None)
    part = Pretraining(toy(tmp_path / "part"), texts())

    def stop(ids, tap, update=part._update):
        if part.step == 5:
            raise KeyboardInterrupt
        return update(ids, tap)

    part._update = stop
    with pytest.raises(KeyboardInterrupt):
        part.run(lambda line: None)
    part.save()
    again = Pretraining(toy(tmp_path / "part"), texts())
    assert again.resume() and again.step == 5
    again.run(lambda line: None)
    first, second = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "part"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_state_of_other_settings_is_refused(tmp_path):
    Pretraining(toy(tmp_path, steps=1), texts()).run(lambda line: None)
    with pytest.raises(CheckpointError, match="other settings"):
        Pretraining(toy(tmp_path, steps=2), texts()).resume()


def test_the_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(texts(), 300)
    for text in ("    if x:\n\t\treturn 1.50  # ä 漢字 \U0001f600\r\n", " leading", "trailing \n\n\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps is 0"):
        PretrainCode(tmp_path, steps=0)
    with pytest.raises(ConfigError, match="width is 10"):
        PretrainCode(tmp_path, width=10)
    with pytest.raises(DataError, match="no public documents"):
        Pretraining(toy(tmp_path), [])
    with pytest.raises(DataError, match="one step needs 128"):
        next(Pretraining(toy(tmp_path), ["a"]).batches())
