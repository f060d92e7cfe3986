"""What is taken away: equal to what the run scored, loaded by the card's own lines, tried on the command line."""

import contextlib
import io
import json
import math
import re
import zipfile
from pathlib import Path

import pandas
import pictures
import pytest
import runs
import tables
import tiny
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image

from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.algorithms.standalone import Standalone
from consilium.core import Payload, Sampling
from consilium.data.arrays import ImageData
from consilium.data.language import LanguageData
from consilium.data.textfile import TextFileData
from consilium.engine.codec import encode
from consilium.experiment import from_json, to_json
from consilium.export import cohort
from consilium.export.deployed import Deployed, Finished, of_run
from consilium.export.folder import write
from consilium.fit import Fit
from consilium.loop import run
from consilium.models.cohort import Cohort
from consilium.moe.addressing import flatten
from consilium.moe.lora import Lora, add_lora

TEXTS = ["old cat purrs at the house", "we see a dog near a tree", "fish"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Finished runs: fm (FedMoE, three sub-MoEs), alone, chat (LoRA on a decoder)."""
    folder = tmp_path_factory.mktemp("export")
    table = runs.table(folder)
    run(runs.experiment(table, FedMoE(stage1="forward"), memory=runs.memory(6, 3, 2)), folder / "fm")
    run(runs.experiment(table, Standalone(), rounds=1), folder / "alone")
    rows = [{"ask": f"see {t}?", "say": t, "site": f"site-{i % 2}"} for i, t in enumerate(TEXTS * 8)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = runs.experiment(
        table,
        FedAvg(),
        data=LanguageData(folder / "qa.jsonl", prompt="ask", response="say", client="site"),
        model=tiny.source("olmoe", "text-to-text"),
        fit=Fit(lr=0.02, batch_size=4, max_length=40, target_length=12, lora=Lora(rank=2, alpha=3.0)),
        rounds=1,
    )
    run(lora, folder / "chat")
    return folder


def call(capsys, *args, typed="", monkeypatch=None):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    if monkeypatch:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return code, said.out, said.err


def taken(capsys, root, *args):
    code, out, err = call(capsys, "export", *args)
    assert (code, err) == (0, "")
    return out


def ours(deployed):
    """The live model, as the run's clients build it."""
    experiment = deployed.experiment
    task, labels = next(iter(deployed.labels.items()), ("", ()))
    return experiment.model.build(deployed.params, task, labels, deployed.held, deployed.gates).eval()


def as_the_card_says(folder, given=TEXTS[0], **names):
    """The variables after the card's code has run, with `DIR` the folder and "..." a text, or a file."""
    text = (folder / "README.md").read_text()
    ModelCard(text)  # its YAML can be read
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("DIR", str(folder)).replace('"..."', repr(given))
    exec(code, names)
    return names


# --- a mixture of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["site-0", "site-2", None])
def test_plain_transformers_gives_the_logits_of_the_run(client, root, tmp_path, capsys):
    out = taken(capsys, root, root / "fm", *(("--client", client) if client else ()), "--out", tmp_path / "m")
    assert out.startswith(f"{tmp_path / 'm'}: the {f'model of {client}' if client else 'global model'} after 3 rounds")
    deployed = of_run(Finished.of(root / "fm"), client)
    found = as_the_card_says(tmp_path / "m")
    assert type(found["model"]).__name__ == "SwitchTransformersEncoderModel"
    batch = {**found["inputs"], "labels": torch.zeros(1).long()}
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], ours(deployed)(batch)[0], rtol=0, atol=1e-5)
    assert found["labels"] == {"task": list(deployed.labels["task"])}
    assert not list(tmp_path.glob(".m*"))


def test_the_export_scores_what_the_run_tells(root, tmp_path, capsys, monkeypatch):
    """All test texts of a client through `consilium predict`: the share of right labels is the summary's score."""
    taken(capsys, root, root / "fm", "--client", "site-1", "--out", tmp_path / "m")
    test = runs.experiment(root / "table.jsonl").data.load(0).clients["site-1"].test
    code, out, _ = call(capsys, "predict", tmp_path / "m", typed="\n".join(test.texts) + "\n", monkeypatch=monkeypatch)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and [text for *_, text in lines] == [text[:60] for text in test.texts]
    score = sum(line[0] == target for line, target in zip(lines, test.targets, strict=True)) / len(test)
    assert score == json.loads((root / "fm/summary.json").read_text())["clients"]["site-1"]["test"]
    assert all(1 / 3 <= float(p) <= 1 for _, p, _ in lines)


def test_predictions_as_json_and_several_labels(root, tmp_path, capsys, monkeypatch):
    """Texts keep their line breaks; the labels come the most probable first, and all of them add up to 1."""
    taken(capsys, root, root / "fm", "--client", "site-0", "--out", tmp_path / "m")
    typed = json.dumps("a cat\nis old") + "\nplain words\n"
    code, out, _ = call(capsys, "predict", tmp_path / "m", "--json", "--top", "9", typed=typed, monkeypatch=monkeypatch)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [told["text"] for told in found] == ["a cat\nis old", "plain words"]
    for told in found:
        p = [label["probability"] for label in told["labels"]]
        assert sorted(p, reverse=True) == p and sum(p) == pytest.approx(1)
        assert {label["label"] for label in told["labels"]} == {"cat", "dog", "fish"}
    code, out, _ = call(capsys, "predict", tmp_path / "m", "--top", "2", "--text", "a cat")
    assert code == 0 and len(out.splitlines()) == 2
    assert call(capsys, "predict", tmp_path / "m", "--top", "0", "--text", "a cat")[0] == 2


def test_the_models_of_all_clients_at_once(root, tmp_path, capsys):
    """A folder per client, the same as exported one by one, for everybody to read; then the texts of a file."""
    code, out, _ = call(capsys, "export", root / "fm", "--client", "all", "--out", tmp_path / "all")
    assert code == 0 and out.splitlines()[-1] == f"3 of 3 clients: {tmp_path / 'all'}/CLIENT"
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["site-0", "site-1", "site-2"]
    call(capsys, "export", root / "fm", "--client", "site-1", "--out", tmp_path / "one")
    for name in ("model.safetensors", "head.safetensors", "labels.json"):
        alone, together = tmp_path / "one" / name, tmp_path / "all/site-1" / name
        assert alone.read_bytes() == together.read_bytes()
        assert together.stat().st_mode & 0o044 == (tmp_path / "all/site-1").stat().st_mode & 0o044
    code, _, err = call(capsys, "export", root / "fm", "--client", "all", "--out", tmp_path / "all")
    assert code == 2 and "is not empty" in err
    rows = "".join(f'"{text}, yes",x\n' for text in TEXTS) + ",y\n"
    (tmp_path / "new.csv").write_text("text,other\n" + rows)
    folder = tmp_path / "one"
    code, out, _ = call(capsys, "predict", folder, "--csv", tmp_path / "new.csv")
    texts = [f"{text}, yes" for text in TEXTS] + [""]
    typed = [word for text in texts[:3] for word in ("--text", text)]
    assert code == 0 and len(out.splitlines()) == 4
    assert out.splitlines()[:3] == call(capsys, "predict", folder, *typed)[1].splitlines()
    code, out, _ = call(capsys, "predict", folder, "--csv", tmp_path / "new.csv", "--column", "text", "--json")
    assert code == 0 and [json.loads(line)["text"] for line in out.splitlines()] == texts


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("a,b\n1,2\n", ["--csv", "x.csv"], "--column is missing: x.csv has a | b"),
        ("a,b\n1,2\n", ["--csv", "x.csv", "--column", "c"], "x.csv has no column 'c'"),
        ("a,b\n1,2\n", ["--column", "a"], "no file is given: --csv FILE --column a"),
        ("a,b\n1,2\n", ["--table", "x.csv"], "reads texts: --text, or --csv FILE --column COLUMN"),
    ],
)
def test_files_of_texts_that_cannot_be_read(content, arguments, said, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text(content)
    call(capsys, "export", root / "fm", "--client", "site-1", "--out", "one")
    code, _, err = call(capsys, "predict", "one", *arguments)
    assert code == 2 and said in err


def test_the_card_tells_what_the_model_is(root, tmp_path, capsys):
    taken(capsys, root, root / "fm", "--client", "site-0", "--out", tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "feature-extraction"
    held = of_run(Finished.of(root / "fm"), "site-0").held
    counts = ", ".join(str(len(ids)) for ids in held.values())
    for part in ("FedMoE in 3 rounds of 3 clients", "cat, dog, fish", f"{counts} of 8, 8", "table.jsonl", "site-0"):
        assert part in text
    assert str(root) not in text and str(tiny.root) not in text  # no place of this machine


def test_with_a_keep_map(root, tmp_path, capsys):
    taken(capsys, root, root / "fm", "--client", "site-0", "--out", tmp_path / "m", "--format", "consilium")
    code, plain, _ = call(capsys, "predict", tmp_path / "m", *(part for text in TEXTS for part in ("--text", text)))
    assert code == 0 and len(plain.splitlines()) == len(TEXTS)
    taken(capsys, root, root / "fm", "--client", "site-0", "--out", tmp_path / "n")
    assert call(capsys, "predict", tmp_path / "n", *(part for text in TEXTS for part in ("--text", text)))[1] == plain


def test_a_model_that_stayed_with_its_client(root, tmp_path, capsys):
    """Standalone: what site-0 deploys is in its state; there is no global model."""
    taken(capsys, root, root / "alone", "--client", "site-0", "--out", tmp_path / "m")
    deployed = of_run(Finished.of(root / "alone"), "site-0")
    assert deployed.params and as_the_card_says(tmp_path / "m")["logits"].abs().max() > 0
    assert "no global model; name a client" in call(capsys, "export", root / "alone", "--out", tmp_path / "x")[2]


# --- adapters, and language -------------------------------------------------------------------------------------------


def test_adapters_merged_and_apart_are_the_model_of_the_run(root, tmp_path, capsys):
    """Merged into the base, and loaded by PEFT on it as the card says, routers too."""
    deployed = of_run(Finished.of(root / "chat"), "site-0")
    source, fit = deployed.experiment.model, deployed.experiment.fit
    context = tiny.context(form="text-to-text")
    setup = tiny.setup(source, lora=fit.lora)
    model = setup.build(deployed.params, context, deployed.held, deployed.gates).eval()
    batch = tiny.batch(source)
    with torch.no_grad():
        want = model(batch)[0]
        base = source.build(source.load(), "", ()).eval()
        assert (base(batch)[0] - want).abs().max() > 1e-2
        taken(capsys, root, root / "chat", "--client", "site-0", "--out", tmp_path / "merged")
        base.backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(base(batch)[0], want, rtol=0, atol=1e-5)
        taken(capsys, root, root / "chat", "--out", tmp_path / "apart", "--format", "adapter")
        text = (
            (tmp_path / "apart/README.md")
            .read_text()
            .replace(repr(str(source.path).rpartition("/")[2]), repr(source.path))
        )
        (tmp_path / "apart/README.md").write_text(text)
        base.backbone = as_the_card_says(tmp_path / "apart")["model"].base_model.model
        torch.testing.assert_close(base(batch)[0], want, rtol=0, atol=1e-5)


def test_chat_reads_to_the_end_of_its_input(root, tmp_path, capsys, monkeypatch):
    taken(capsys, root, root / "chat", "--out", tmp_path / "m")
    code, out, err = call(
        capsys, "chat", tmp_path / "m", "--tokens", 3, typed="see fish?\n\nsee fish?\n", monkeypatch=monkeypatch
    )
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    code, said, _ = call(capsys, "predict", tmp_path / "m", "--text", "see fish?", "--tokens", 3)
    assert code == 0 and said.split() == out.splitlines()[0].split()


# --- at a site --------------------------------------------------------------------------------------------------------


def test_a_site_exports_what_it_was_delivered(root, tmp_path, capsys):
    """The same weights as the server would export for it; before the first scoring there are none."""
    flower = pytest.importorskip("consilium.engine.flower")
    experiment = from_json(json.loads((root / "fm/config.json").read_text())["experiment"])
    flower.save_site(tmp_path / "state/site.json", "site-2", experiment)
    code, _, err = call(capsys, "export", tmp_path / "state", "--out", tmp_path / "m")
    assert code == 2 and "has no model yet" in err
    run = Finished.of(root / "fm")
    payload = run.server().deliver(run.info("site-2"))
    about = {"engine/experiment": json.dumps(to_json(experiment)), "engine/round": 3, "engine/score": 0.25}
    (tmp_path / "state" / flower.DELIVERED).write_bytes(encode(Payload({flower.OWN: {}}, about)))
    code, _, err = call(capsys, "export", tmp_path / "state", "--out", tmp_path / "m")
    assert code == 2 and "has no model yet" in err
    blob = encode(Payload(payload.groups, {**payload.scalars, **about}))
    (tmp_path / "state" / flower.DELIVERED).write_bytes(blob)
    code, _, err = call(capsys, "export", tmp_path / "state", "--client", "site-1", "--out", tmp_path / "m")
    assert code == 2 and "is the state of site site-2, not of 'site-1'" in err
    taken(capsys, root, tmp_path / "state", "--out", tmp_path / "m")
    taken(capsys, root, root / "fm", "--client", "site-2", "--out", tmp_path / "n")
    for name in ("model.safetensors", "head.safetensors", "config.json", "labels.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()
    assert "accuracy 0.250 on its own test examples" in (tmp_path / "m/README.md").read_text()


# --- small models -----------------------------------------------------------------------------------------------------


def test_a_small_model_of_a_mixed_cohort(tmp_path, capsys):
    experiment = runs.experiment(
        tmp_path,
        pFedMoE(),
        data=ImageData(clients=3, examples=60),
        model=Cohort(("mnist-5", "mlp-3"), "mlp-3", width=6, kernel=3, padding=1),
        fit=Fit(batch_size=4, lr=0.1, head_lr=0.1, optimizer="sgd"),
        sampling=Sampling(3),
        rounds=1,
    )
    told = run(experiment, tmp_path / "run")["clients"]
    client = sorted(told)[1]
    code, out, _ = call(capsys, "export", tmp_path / "run", "--client", client, "--out", tmp_path / "m")
    assert code == 0 and f"the model of {client}" in out
    model, data = cohort.load(tmp_path / "m"), experiment.data.load(0).clients[client]
    batch = data.test.batch(range(len(data.test)), torch.device("cpu"))
    with torch.no_grad():
        hits = model.head(model.backbone(batch["x"])).argmax(-1) == batch["labels"]
    assert hits.float().mean().item() == pytest.approx(told[client]["test"])
    # Plain torch has the same logits, for any number of examples.
    plain = torch.export.load(tmp_path / "m/model.pt2").module()
    for x in (batch["x"], batch["x"][:1]):
        torch.testing.assert_close(plain(x), model.head(model.backbone(x)))
    assert "name a client" in call(capsys, "export", tmp_path / "run", "--out", tmp_path / "x")[2]
    with zipfile.ZipFile(tmp_path / "m/model.pt2") as file:  # of the client's data nothing goes along
        assert not [e.filename for e in file.infolist() if "sample_inputs" in e.filename and e.file_size]


def small(tmp_path, capsys, **changes):
    """A run of pFedMoE on coloured images in folders of two clients, and what is exported of the first."""
    for seed, site in enumerate(("a", "b")):
        pictures.folder(tmp_path / "pets" / site, 60, seed=seed)
    experiment = runs.experiment(
        tmp_path,
        pFedMoE(),
        data=ImageData(tmp_path / "pets", **changes),
        model=Cohort(("mnist-5",), "mlp-3", width=6, kernel=3, padding=1),
        fit=Fit(batch_size=4, lr=0.1, head_lr=0.1, optimizer="sgd"),
        sampling=Sampling(2),
        rounds=4,
    )
    run(experiment, tmp_path / "run")
    code, out, _ = call(capsys, "export", tmp_path / "run", "--client", "a", "--out", tmp_path / "m")
    assert code == 0 and out.endswith(f"try it: consilium predict {tmp_path}/m --image FILE\n")
    return tmp_path / "m"


@pytest.mark.parametrize("size", [0, 6])
def test_predict_images_as_the_run_and_the_card_do(tmp_path, capsys, size, monkeypatch):
    """A line per image, from flags or standard input; the card's lines in plain torch find the same labels."""
    folder = small(tmp_path, capsys, size=size)
    files = [str(tmp_path / f"pets/a/{kind}/00{i}.png") for i, kind in enumerate(pictures.CLASSES)]
    code, out, _ = call(capsys, "predict", folder, *(part for file in files for part in ("--image", file)))
    found = [line.split("\t")[0] for line in out.splitlines()]
    assert code == 0 and len(set(found)) > 1 and all(line.count("\t") == 2 for line in out.splitlines())
    code, piped, _ = call(capsys, "predict", folder, typed="\n".join(files), monkeypatch=monkeypatch)
    assert piped == out
    for file, label in zip(files, found, strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            as_the_card_says(folder, file)
        assert said.getvalue() == f"{[label]}\n"


def test_predict_the_rows_of_a_table_as_the_run_and_the_card_do(tmp_path, capsys):
    """Columns in another order and one more, a value that is missing: the client's own mean and deviation make numbers
    of them, and 0 of what is missing, as in training. The card's lines in plain torch find the same labels."""
    experiment = tables.experiment(tables.written(tmp_path))
    run(experiment, tmp_path / "run")
    code, out, _ = call(capsys, "export", tmp_path / "run", "--client", "west", "--out", tmp_path / "m")
    assert code == 0 and out.endswith(f"try it: consilium predict {tmp_path}/m --table FILE\n")
    scale = json.loads((tmp_path / "m/config.json").read_text())["table"]
    frame = pandas.read_csv(tmp_path / "west/ill.csv")[["grade", "b", "a"]]
    used = experiment.data.scale("west", experiment.seed)  # of the rows that were trained on
    assert scale == {"columns": ["a", "b"], "mean": list(used.mean), "deviation": list(used.deviation)}
    assert scale["mean"] != pytest.approx([frame["a"].mean(), frame["b"].mean()])
    frame.loc[0, "b"] = math.nan
    frame.to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = call(capsys, "predict", tmp_path / "m", "--table", tmp_path / "new.csv")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and [line[2] for line in lines] == [f"row {i}" for i in range(30)]
    model = cohort.load(tmp_path / "m")
    x = (frame[["a", "b"]] - scale["mean"]) / scale["deviation"]
    logits = model.head(model.backbone(torch.tensor(x.fillna(0).to_numpy("float32"))))
    assert [line[0] for line in lines] == [model.labels[i] for i in logits.argmax(-1)]
    assert [line[1] for line in lines] == [f"{p:.3f}" for p in logits.softmax(-1).amax(-1)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        as_the_card_says(tmp_path / "m", str(tmp_path / "new.csv"))
    assert said.getvalue() == f"{[line[0] for line in lines]}\n"
    frame[["grade", "b"]].to_csv(tmp_path / "less.csv", index=False)
    for args, said in (
        (("--table", tmp_path / "less.csv"), "no column 'a'"),
        (("--text", "x"), "reads a table: --table"),
    ):
        code, out, err = call(capsys, "predict", tmp_path / "m", *args)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_what_small_models_refuse(tmp_path, capsys):
    folder, large = small(tmp_path, capsys), tmp_path / "large.png"
    Image.new("RGB", (9, 8)).save(large)
    for args, said in (
        (("--image", large), "large.png is 9 x 8 pixels, in colour; the model was trained on 8 x 8, in colour"),
        (("--image", tmp_path / "no.png"), "no.png cannot be decoded"),
        (("--text", "x"), "m reads images: --image FILE"),
        (("--table", large), "reads images: --image FILE"),
    ):
        code, out, err = call(capsys, "predict", folder, *args)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert "m holds a small model: use `consilium predict" in call(capsys, "chat", folder)[2]


# --- what is refused, in one line, and leaves nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("export fm --client site-00 --out x", "no client 'site-00'; it has site-0, site-1, site-2; did you mean"),
        ("export fm --out full", "full is not empty: choose another --out"),
        ("export nowhere --out x", "nowhere is not a run directory"),
        ("export fm --out x --format adapter", "the run trained whole experts"),
        ("export broken --out x", "has not finished (it is interrupted): `consilium resume broken` to go on with it"),
        ("predict fm --text a", "fm is not what `consilium export` makes"),
        ("chat given", "given holds no causal language model: use `consilium predict given`"),
        ("predict given --text a --tokens 0", "--tokens is 0"),
    ],
)  # fmt: skip
def test_refused_in_one_line(arguments, said, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    (root / "full").mkdir(exist_ok=True)
    (root / "full/note").touch()
    if not (root / "given").exists():
        taken(capsys, root, "fm", "--client", "site-0", "--out", "given")
        (root / "broken").mkdir()
        saved = json.loads((root / "fm/config.json").read_text())
        (root / "broken/config.json").write_text(json.dumps({**saved, "status": "interrupted"}))
    code, out, err = call(capsys, *arguments.split())
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
    assert not (root / "x").exists() and not list(root.glob(".x*"))


# --- adapters of every kind of layout, for PEFT -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("switch_transformers", "classification"), ("qwen3_moe", "text-to-text"), ("gpt_oss", "text-to-text"),
     ("deepseek_v3", "text-to-text")],
)  # fmt: skip
def test_peft_loads_adapters_with_trained_routers(model_type, form, root, tmp_path):
    source, lora = tiny.source(model_type, form), Lora(rank=2, alpha=3.0)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    whole = source.load() | tiny.heads("animal", labels)
    live = add_lora(source.build(whole, "animal", labels).eval(), lora)
    rng = torch.Generator().manual_seed(0)
    routers = [p for block in live.blocks().values() for p in block.get_submodule(source.family.router).parameters()]
    for parameter in [*live.adapters.parameters(), *routers]:
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    table = root / "table.jsonl" if form == "classification" else root / "qa.jsonl"
    data = TextFileData(table) if form == "classification" else LanguageData(table, prompt="ask", response="say")
    experiment = runs.experiment(table, data=data, model=source, fit=Fit(lora=lora))
    heads = {"animal": labels} if labels else {}
    write(tmp_path / "m", Deployed(experiment, "me", heads, flatten(live), None, {}, {}, 2, 1), "adapter")
    readme = tmp_path / "m/README.md"
    readme.write_text(readme.read_text().replace(repr(Path(source.path).name), repr(source.path)))
    plain, batch = source.build(whole, "animal", labels).eval(), tiny.batch(source)
    plain.backbone = as_the_card_says(tmp_path / "m")["model"].base_model.model
    with torch.no_grad():
        torch.testing.assert_close(plain(batch)[0], live(batch)[0], rtol=0, atol=1e-5)
