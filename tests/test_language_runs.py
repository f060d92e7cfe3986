"""Instruction data and plain text through the local loop and whole rounds, for every family that reads them."""

import copy
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pandas
import pytest
import runs
import tiny
import torch
from torch.nn import functional as F

from consilium.core import Algorithm, Sampling
from consilium.data.causal import Packed
from consilium.data.encode import token_bytes
from consilium.data.language import LanguageData
from consilium.data.task import ClientData, Split, Task
from consilium.errors import ConfigError, ConsiliumError
from consilium.experiment import from_json, to_json
from consilium.fit import Fit
from consilium.loop import run
from consilium.moe.budget import MemoryModel
from consilium.moe.build import ModelSource
from consilium.moe.routing import Tap
from consilium.params import checksum
from consilium.prepare import prepare
from consilium.scoring import assess, evaluate
from consilium.training import fit

CPU = torch.device("cpu")
DECODERS = [family for family in tiny.FAMILIES if family != "switch_transformers"]
PACKING = [family for family in DECODERS if family != "gpt_oss"]  # whose masks do not look at position ids
ANSWERS = ("the cat is old", "we see a house", "some fish near here", "again", "very old and very near")


def context(metric="token_accuracy", plain=False, answers=ANSWERS):
    """A client with five answers to five questions, or five documents."""
    given = ["" if plain else json.dumps([{"role": "user", "content": f"{'see ' * i}?"}]) for i in range(len(answers))]
    split = Split(given, list(answers))
    data = ClientData(Task("answer", "language", (), metric), split, split, split)
    return dataclasses.replace(tiny.context(form="text-to-text"), data=data)


def made(model_type="olmoe", plain=False, metric="token_accuracy", changes=None, **settings):
    """(model, encoded data, context, setup)."""
    settings = (
        dict(max_length=40, target_length=20, label_smoothing=0.0, rows="documents" if plain else "examples") | settings
    )
    setup = tiny.setup(tiny.source(model_type, "text-to-text", **changes or {}), **settings)
    owner = context(metric, plain)
    model = setup.build(setup.initial_params(), owner)
    return model, setup.encode(owner, owner.data.train), owner, setup


def packed(data):
    """Rows in which the longest example shares one with the shortest."""
    sizes = [len(source) + len(target) for source, target in zip(data.sources, data.targets, strict=True)]
    return Packed.of(data, max(sizes) + min(sizes))


def loss(model, batch):
    logits, labels = model(batch)
    return F.cross_entropy(logits.float(), labels)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["answers", "documents"])
@pytest.mark.parametrize("model_type", PACKING)
def test_packed_loss_is_unpacked_loss(model_type, plain):
    """And so are its gradients: neither attention nor the loss reaches from one example into another."""
    model, data, *_ = made(model_type, plain)
    model.eval()
    found = []
    for rows in (data, packed(data)):
        assert rows is data or 1 < len(rows) < len(data)
        value = loss(model, rows.batch(range(len(rows)), CPU))
        value.backward()
        found.append((value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=2e-5)


def test_where_examples_would_see_each_other_packing_is_refused():
    """gpt-oss: the loss of packed rows differs, and no run begins with them."""
    model, data, owner, setup = made("gpt_oss")
    model.eval()
    with torch.no_grad():
        found = [loss(model, d.batch(range(len(d)), CPU)).item() for d in (data, packed(data))]
    assert abs(found[0] - found[1]) > 1e-3
    refused = dataclasses.replace(setup, fit=dataclasses.replace(setup.fit, rows="packed"))
    with pytest.raises(ConfigError, match="in gpt-oss examples in one row would see each other"):
        refused.check(owner.data.task)


@pytest.mark.parametrize("rows", ["examples", "packed"])
def test_what_a_model_learns_it_can_say(rows):
    """Five answers by heart: as tokens after true ones, and as generated texts."""
    model, data, owner, setup = made(changes={"attention_dropout": 0.0}, rows=rows, epochs=100, lr=5e-3, max_length=100)
    before = assess(model, data, owner, setup)
    steps = fit(model, data, setup.fit, owner).steps
    assert steps == 100 * (2 if rows == "examples" else 1)
    after = assess(model, data, owner, setup)
    assert after["score"] == 1.0 and after["perplexity"] < 1.1 < before["perplexity"]
    assert evaluate(model, data, context("token_f1"), setup) == 1.0
    assert evaluate(model, data, context("rouge2", answers=ANSWERS), setup) >= 0.8  # "again" has no bigram


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["answers", "documents"])
def test_token_accuracy_and_perplexity_from_the_full_logits(plain):
    """Each example alone, all logits: hits and losses of the predicted tokens, every token with the same weight.

    Nothing is generated, whatever the batch; usage is that of the same forward passes, two experts a token.
    """
    model, data, owner, setup = made("mixtral", plain, batch_size=1)
    model.eval()
    hits, losses = [], []
    for source, target in zip(data.sources, data.targets, strict=True):
        tokens = torch.tensor([source + target])
        with torch.no_grad():
            logits = model.backbone(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        for place in range(max(len(source), 1), tokens.shape[1]):
            hits.append(int(logits[place - 1].argmax()) == int(tokens[0, place]))
            losses.append(-float(logits[place - 1, tokens[0, place]]))
    model.backbone.generate = None  # nobody may call it
    with Tap(model) as tap:
        told = assess(model, data, owner, setup, tap)
    assert told["score"] == sum(hits) / len(hits)
    assert told["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    predicted = [id for s, t in zip(data.sources, data.targets, strict=True) for id in (t if s else t[1:])]
    sizes = token_bytes(setup.model.tokenizer())
    expected = sum(losses) / math.log(2) / int(sizes[predicted].sum())
    assert told["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    again = assess(model, data, owner, dataclasses.replace(setup, fit=dataclasses.replace(setup.fit, batch_size=5)))
    assert again["score"] == told["score"]
    read = sum(len(s) + len(t) for s, t in zip(data.sources, data.targets, strict=True))
    assert set(tap.usage.slots.values()) == {2 * read}


# --- what is refused, and what memory is promised ---------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused():
    task = context().data.task
    with pytest.raises(ConfigError, match="Switch Transformers is an encoder-decoder; instruction data and plain text"):
        tiny.setup(tiny.source("switch_transformers", "text-to-text")).check(task)
    with pytest.raises(ConfigError, match="task answer is language, the model is set up for classification"):
        tiny.setup(tiny.source("olmoe")).check(task)
    with pytest.raises(
        ConfigError, match=r"fit\.rows is 'packed'; task animal is classification, which takes examples"
    ):
        tiny.setup(tiny.source("olmoe"), rows="packed").check(tiny.context().data.task)
    with pytest.raises(ConfigError, match=r"fit\.rows is 'row'; it must be one of examples, documents, blocks, packed"):
        Fit(rows="row")


@pytest.mark.parametrize("rows", ["examples", "documents", "blocks", "packed"])
def test_memory_is_promised_for_rows_of_all_tokens(rows):
    """S + T tokens in any way; of them T are predicted where a row is an example, else all."""
    setup = tiny.setup(tiny.source("olmoe", "text-to-text"), max_length=30, target_length=10, rows=rows)
    S, T = (30, 10) if rows == "examples" else (0, 40)
    shape = {"max_length": S, "target_length": T, "optimizer": "adamw"}
    counts = setup.model.counts
    assert setup.footprint(counts, "forward") == MemoryModel.of(setup.model).footprint(
        counts, mode="forward", batch_size=4, **shape
    )
    data = setup.encode(context(plain=rows != "examples"), context(plain=rows != "examples").data.train)
    shown = Packed.of(data, 40) if rows == "packed" else data
    batch = shown.batch(range(len(shown)), CPU)
    assert batch["input_ids"].shape[1] <= S + T
    assert ((batch["labels"] != -100).sum(1) <= T).all()


# --- whole runs -------------------------------------------------------------------------------------------------------


def table(folder: Path) -> Path:
    """Instructions of three sites: the answer says the animal of the question again."""
    source = [json.loads(line) for line in runs.table(folder).read_text().splitlines()]
    rows = [{"ask": f"what is {r['label']}", "say": f"the {r['label']} {runs.WORDS[r['label']]}", **r} for r in source]
    path = folder / "instructions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def experiment(path, method="FedAvg", columns=None, **changes):
    rows = changes.pop("rows", "examples")
    columns = columns or {"prompt": "ask", "response": "say"}
    shape = Fit(lr=5e-3, batch_size=4, max_length=80, target_length=60, label_smoothing=0.0, rows=rows)
    model = changes.pop("model", None) or tiny.source("olmoe", "text-to-text")
    data = LanguageData(path, **columns, client="site", validation=0.15, test=0.25)
    return runs.experiment(path, method, data=data, model=model, fit=shape, sampling=Sampling(3), **changes)


METHODS = sorted(
    n for n, c in Algorithm.registry.items() if c.__module__.startswith("consilium.") and "moe" in c.worlds
)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_instructions(method, tmp_path):
    """Through bytes, with what was cut counted, scores of tokens and perplexities for all; packed rows train too."""
    found = []
    for name in ("one", "two"):
        trial = experiment(
            table(tmp_path), method, name=name, strict=True, rows="packed" if name == "one" else "examples"
        )
        assert from_json(json.loads(json.dumps(to_json(trial)))) == trial
        found.append(run(trial, tmp_path / name))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert set(last["perplexity"]) == set(last["test"]) == {"site-0", "site-1", "site-2"}
        for told in last["clients"].values():
            assert 0 <= told["validation"] <= 1 < told["perplexity"] and told["cut"] == 0 and told["rejected"] is None
        assert found[-1]["tasks"]["answer"]["metric"] == "token_accuracy" and 0 <= found[-1]["mean"] <= 1
    assert method in ("Standalone", "FedLEASE") or found[0]["weights"] != found[1]["weights"]


@pytest.mark.parametrize("rows", ["blocks", "documents", "packed"])
def test_plain_text_runs_again_to_the_same_bits(rows, tmp_path):
    trial = experiment(table(tmp_path), "FedAvg", {"text": "text"}, rows=rows, rounds=2)
    found = [run(trial, tmp_path / name)["weights"] for name in ("one", "two")]
    assert found[0] == found[1] != checksum(tiny.setup(trial.model).initial_params())


def test_what_does_not_fit_is_refused_before_the_run(tmp_path):
    path = table(tmp_path)
    with pytest.raises(ConfigError, match=r"fit\.rows is 'examples', which plain text has not"):
        experiment(path, columns={"text": "text"})
    with pytest.raises(ConfigError, match="the data asks for text-to-text, the model is set up for classification"):
        experiment(path, model=tiny.source("olmoe"))
    with pytest.raises(ConfigError, match="Switch Transformers is an encoder-decoder"):
        prepare(experiment(path, model=tiny.source("switch_transformers", "text-to-text")))
    with pytest.raises(ConfigError, match="in gpt-oss examples in one row would see each other"):
        prepare(experiment(path, model=tiny.source("gpt_oss", "text-to-text"), rows="packed"))


def dolly() -> Path:
    """Dolly 15k, which the repository does not carry: in $CONSILIUM_DATA, or in shared/data beside the project."""
    folder = os.environ.get("CONSILIUM_DATA") or Path(__file__).parents[2] / "shared/data"
    path = Path(folder) / "dolly15k_fedit.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def test_dolly(tmp_path):
    """Three rounds of three of its clients, 40 rows each: the loss and the perplexity fall in every round."""
    rows = pandas.read_parquet(dolly())
    rows = rows[rows.part.isin(["client_0", "client_1", "client_2"])].groupby("part").head(40)
    rows.to_parquet(tmp_path / "dolly.parquet")
    data = LanguageData(
        tmp_path / "dolly.parquet", prompt="instruction", context="context", response="response", client="part"
    )
    shape = Fit(lr=3e-3, batch_size=8, max_length=96, target_length=96, label_smoothing=0.0, rows="packed")
    model = tiny.source("olmoe", "text-to-text", max_position_embeddings=256)
    run(runs.experiment(tmp_path, data=data, model=model, fit=shape, sampling=Sampling(3)), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for client in ("client_0", "client_1", "client_2"):
        losses = [record["clients"][client]["train_loss"] for record in records]
        perplexities = [record["perplexity"][client] for record in records]
        assert losses[0] > losses[1] > losses[2] and perplexities[0] > perplexities[1] > perplexities[2]
        assert all(0 < record["clients"][client]["cut"] <= 32 for record in records)


def test_what_the_first_step_needs_is_checked_before_anything_is_written(tmp_path):
    """A chat template that is broken, and a tokenizer with more tokens than the model has rows: no run directory."""
    rows = [{"q": f"cat {i}", "a": "old house", "who": i % 2} for i in range(16)]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = LanguageData(tmp_path / "qa.jsonl", prompt="q", response="a", client="who")
    for name, says in (("template", "chat template"), ("tokens", "embedding rows")):
        tokenizer = copy.deepcopy(tiny.tokenizer())
        if name == "template":
            tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no ' ~ m.role) }}{% endfor %}"
        else:
            tokenizer.add_tokens([f"<f{i}>" for i in range(tiny.VOCABULARY)])
        folder = shutil.copytree(tiny.directory("olmoe", "text-to-text"), tmp_path / name)
        tokenizer.save_pretrained(folder)
        made = runs.experiment(tmp_path / "unused")
        made = dataclasses.replace(made, data=data, model=ModelSource(str(folder), "text-to-text"))
        with pytest.raises(ConsiliumError, match=says):
            run(made, tmp_path / "run")
        assert not (tmp_path / "run").exists()
