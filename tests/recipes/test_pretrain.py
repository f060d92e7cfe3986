"""The pretraining recipe at toy size: it learns, balances, saves, resumes to the same bits, and ships what loads."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, SwitchTransformersEncoderModel

from consilium.data.docstrings import DocstringData
from consilium.data.source import Doc
from consilium.errors import CheckpointError, ConfigError, DataError
from consilium.recipes.pretrain import Pretrain, Pretraining
from consilium.recipes.pretrain_card import Card, mutual_information, specialisation, usage
from consilium.recipes.pretrain_card import main as write_card
from consilium.recipes.pretrain_model import MASK, PAD, balance_loss, build, train_tokenizer

TOPICS = {"numpy": "array matrix shape axis", "rich": "console colour table style", "scipy": "root solve curve fit"}


def documents() -> list[Doc]:
    """240 documents whose package shows in their words."""
    rng = random.Random(0)
    docs = []
    for i in range(240):
        package = list(TOPICS)[i % 3]
        text = " ".join(rng.choices([*TOPICS[package].split(), "the", "of", "a", "to", "and"], k=rng.randint(4, 12)))
        kind = ("function", "class")[i // 3 % 2]
        name = ("get_item", "set_item")[i % 2]
        docs.append(Doc(package, f"{package}.m", name, kind, text, "", ""))
    return docs


def toy(out, **changes) -> Pretrain:
    values = {"minutes": 0.0, "steps": 30, "vocabulary": 300, "width": 16, "hidden": 16, "layers": 2, "heads": 2}
    values |= {"experts": 4, "length": 16, "tokens": 512, "rate": 1e-2, "heldout": 40, "save_minutes": 100.0}
    return Pretrain(out, **{**values, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished toy run: its settings and the job."""
    job = Pretraining(toy(tmp_path_factory.mktemp("pretrain")), documents())
    job.run(lambda line: None)
    return job


def test_a_bag_of_words_comes_first_when_asked_for(tmp_path):
    """Two passes move the embeddings, and leave all of them at root mean square 0.1."""
    job = Pretraining(toy(tmp_path, bag_epochs=2, smoothing=0.1), documents())
    before = job.model.shared.weight.detach().clone()
    job.warm_start()
    after = job.model.shared.weight.detach()
    torch.testing.assert_close(after.pow(2).mean(-1).sqrt(), torch.full((len(after),), 0.1), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(before / before.norm(dim=-1, keepdim=True), after / after.norm(dim=-1, keepdim=True))


def test_it_learns_the_packages(done):
    """Chance is 1/3; the words tell nearly everything."""
    found = done.evaluate()
    assert found["topic"] > 0.6
    assert 0 <= found["least_used"] <= 0.25 <= found["most_used"] <= 1


def test_what_is_saved_opens_in_transformers_in_float32(done):
    out = done.settings.out
    model = SwitchTransformersEncoderModel.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    for name, parameter in done.model.named_parameters():
        expected = parameter.detach().bfloat16().float()
        assert torch.equal(dict(model.named_parameters())[name], expected), name
    batch = tokenizer(["the array of a matrix", "root"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1].tolist().count(PAD) == int((batch["attention_mask"] == 0).sum())
    assert model(**batch).last_hidden_state.isfinite().all()


def test_sorted_experts_compute_what_the_stock_experts_do(done):
    model = SwitchTransformersEncoderModel.from_pretrained(done.settings.out).eval()
    fast = build(done.settings, len(done.tokenizer)).eval()
    fast.load_state_dict(model.state_dict())
    ids = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(fast(input_ids=ids).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


def test_every_layer_is_sparse_and_no_token_is_dropped(done):
    for block in done.model.encoder.block:
        router = block.layer[1].mlp.router
        chosen, _, _ = router(torch.zeros(1, 96, 16))
        assert int(chosen.sum()) == 96  # all to one expert, all within capacity


def test_resuming_gives_the_bits_of_an_unbroken_run(tmp_path):
    docs = documents()
    whole = Pretraining(toy(tmp_path / "whole", steps=8, dropout=0.1), docs)
    whole.run(lambda line: None)
    first = Pretraining(toy(tmp_path / "parts", steps=8, dropout=0.1), docs)
    first.progress = lambda: min(1.0, first.step / 8) if first.step < 5 else 1.0  # stopped after five steps
    first.run(lambda line: None)
    second = Pretraining(toy(tmp_path / "parts", steps=8, dropout=0.1), docs)
    assert second.resume() and second.step == 5
    second.run(lambda line: None)
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_model_is_refused(done):
    other = Pretraining(toy(done.settings.out, experts=8), documents())
    with pytest.raises(CheckpointError, match="of another model"):
        other.resume()
    assert not Pretraining(toy(done.settings.out / "empty"), documents()).resume()


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed():
    """E * sum_e f_e P_e. Even over 4: 4 * 4 * (1/4 * 1/4) = 1. Collapsed: 4 * (1 * 1) = 4.

    By hand, two experts, tokens with logits (ln 3, 0), (ln 3, 0), (0, ln 3) and a padded one that must not count:
    f = (2/3, 1/3), P = ((.75 + .75 + .25) / 3, (.25 + .25 + .75) / 3) = (7/12, 5/12); 2 * (14/36 + 5/36) = 19/18.
    """
    real = torch.ones(1, 4, dtype=torch.bool)
    assert balance_loss(50 * torch.eye(4)[None], real).item() == pytest.approx(1.0)
    assert balance_loss(50 * torch.eye(4)[[0, 0, 0, 0]][None], real).item() == pytest.approx(4.0)
    three = math.log(3)
    logits = torch.tensor([[[three, 0], [three, 0], [0, three], [9.0, 0]]])
    real = torch.tensor([[True, True, True, False]])
    assert balance_loss(logits, real).item() == pytest.approx(19 / 18)


def test_a_batch_keeps_to_its_tokens_and_every_document_comes_once(done):
    batches = list(done.train.batches(64, random.Random(0)))
    assert all(batch.ids.numel() <= 64 for batch in batches)
    assert sum(len(batch.ids) for batch in batches) == 200
    assert all(MASK not in batch.ids for batch in batches)
    sums = torch.cat([batch.words.sum(1) for batch in batches])
    torch.testing.assert_close(sums, torch.ones(200))


def test_any_text_survives_the_tokenizer(done):
    tokenizer = train_tokenizer(["some text of words"] * 3, 300, 96)
    for text in ("Ünïcode → 数 `x`", "tabs\tand\nlines", "a  b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_settings_and_documents_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="both minutes and steps are 0"):
        toy(tmp_path, steps=0)
    with pytest.raises(ConfigError, match="not a multiple of heads"):
        toy(tmp_path, heads=3)
    with pytest.raises(DataError, match="3 public documents"):
        Pretraining(toy(tmp_path), documents()[:3])


def test_mutual_information_is_one_for_a_key_and_zero_for_noise():
    """A diagonal table tells the row exactly; a constant one tells nothing."""
    assert mutual_information(torch.eye(3) * 5) == pytest.approx(1.0)
    assert mutual_information(torch.ones(3, 4)) == pytest.approx(0.0)


def test_specialisation_is_the_total_variation_between_groups():
    """Group a uses experts (3, 1), group b (1, 3), as shares (3/4, 1/4) and (1/4, 3/4): variation 1/2."""
    counts = {"block": torch.tensor([[2.0, 1.0], [1.0, 0.0], [1.0, 3.0]])}
    assert specialisation(counts, ["a", "a", "b"])["block"]["variation"] == 0.5


def test_usage_counts_every_real_token_once(done):
    docs = documents()[:10]
    lengths = [len(done.tokenizer(doc.text, truncation=True)["input_ids"]) for doc in docs]
    for table in usage(done.settings.out, docs).values():
        assert table.shape == (10, 4)
        assert table.sum(1).tolist() == lengths


def test_the_card_says_what_was_measured(done, monkeypatch, tmp_path):
    docs = documents()
    monkeypatch.setattr(DocstringData, "public", lambda self: docs[:120])
    monkeypatch.setattr(DocstringData, "private", lambda self: docs[120:])
    (tmp_path / "scores.json").write_text('{"topic": {"words": 0.5, "model": 0.75}}')
    write_card(Card(done.settings.out, tmp_path / "scores.json", documents=60))
    card = json.loads((done.settings.out / "card.json").read_text())
    assert set(card["usage_public"]) == {"encoder.block.0.layer.1.mlp", "encoder.block.1.layer.1.mlp"}
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in card["usage_public"].values())
    assert card["gates_public"].keys() == card["usage_public"].keys()
    for scales in card["gates_public"].values():
        assert len(scales) > 1 and 0 < scales[0] < 1 == scales[-1]
    assert card["training"]["steps"] == 30
    assert card["data"]["packages"]["numpy"]["documents"] == 40
    text = (done.settings.out / "README.md").read_text()
    assert "| topic | 50.0 % | 75.0 % |" in text and "30 steps" in text
