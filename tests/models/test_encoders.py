"""Extractors from outside: functions of one's own, image and text encoders of transformers; and runs on them."""

import dataclasses
import json
import sys
from functools import cache

import pytest
import runs
import tiny
import torch
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    DistilBertConfig,
    DistilBertModel,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmrl import FedMRL
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Algorithm, Sampling
from consilium.data.arrays import ImageData
from consilium.errors import ConfigError, ConsiliumError, ModelError
from consilium.experiment import Experiment, from_json, to_json
from consilium.export import cohort
from consilium.export.commands import Export
from consilium.fit import Fit
from consilium.loop import run
from consilium.models import encoders
from consilium.models.cohort import Cohort

IMAGE = (1, 4, 4)

# --- functions of one's own -------------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

def narrow(shape):
    made = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    made.width = 3
    return made

def pair(shape):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 6), nn.Dropout(0.1)), 6

def flat(shape): return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 6), nn.Tanh()), 6

def nothing(shape): return None
def unsaid(shape): return nn.Flatten()
def zero(shape): return nn.Flatten(), 0
def wrong(shape): return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), 6
def deaf(shape): return nn.Linear(7, 6), 6
def lazy(shape): return nn.LazyLinear(6), 6
def half(shape): return nn.Linear(4, 6, dtype=torch.float16), 6
def failing(shape): raise KeyError("no such layer")
def nullary(): return None
number = 3

def tied(shape):
    made = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
    made[2].weight = made[1].weight
    return made, 16
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The module `own_nets`, importable."""
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    yield "own_nets"
    sys.modules.pop("own_nets", None)


def test_a_function_gives_an_extractor(nets):
    cohort = Cohort(("own_nets:narrow", "own_nets:pair", "mlp-1"), "mlp-3", width=4)
    for name, width in (("own_nets:narrow", 3), ("own_nets:pair", 6), ("mlp-1", 4)):
        assert cohort.extractor(name, IMAGE).eval()(torch.zeros(2, *IMAGE)).shape == (2, width)
        assert cohort.width_of(name, IMAGE) == width
    assert cohort.world == "mixed" and cohort.reads == {"tensors"}


def test_a_name_alone_imports_nothing(nets):
    """What a server sends is read so; nothing is imported until an extractor is built."""
    experiment = Experiment("own", pFedMoE(), ImageData(), Cohort(("own_nets:pair",), "own_nets:narrow"))
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == experiment
    assert "own_nets" not in sys.modules
    experiment.model.extractor("own_nets:pair", IMAGE)
    assert "own_nets" in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_nets:make", r"absent_nets .* cannot be imported \(ModuleNotFoundError.*PYTHONPATH"),
        ("broken_nets:make", r"broken_nets .* cannot be imported \(ZeroDivisionError"),
        ("own_nets:make", "own_nets has no function 'make'"),
        ("own_nets:number", "own_nets has a int and no function 'number'"),
        ("own_nets:failing", r"own_nets:failing\(\(1, 4, 4\)\) failed with KeyError: 'no such layer'"),
        ("own_nets:nullary", "failed with TypeError"),
        ("own_nets:nothing", "returned a NoneType; it must return a torch module"),
        ("own_nets:unsaid", "width is None; give the module an attribute"),
        ("own_nets:zero", "width is 0"),
        ("own_nets:wrong", r"two examples give \(2, 5\); with width 6 it must be \(2, 6\)"),
        ("own_nets:deaf", r"cannot take \(2, 1, 4, 4\), two examples: RuntimeError"),
        ("own_nets:lazy", "weight is lazy; give the sizes"),
        ("own_nets:half", "weight is torch.float16; it must be torch.float32"),
        ("own_nets:tied", "a parameter has two names"),
    ],
)
def test_each_way_a_function_can_be_wrong(nets, name, message):
    with pytest.raises(ConfigError, match=message):
        Cohort((name,), name).extractor(name, IMAGE)


MIXED = [name for name, method in Algorithm.registry.items() if "mixed" in method().worlds]
NEED_ONE_WIDTH = {"LGFedAvg", "FedProto", "FedGH", "FedTGP", "FedSSA", "pFedAFM"}


@pytest.mark.parametrize("name", MIXED)
def test_every_mixed_method_joins_unequal_widths_or_says_why_not(nets, name):
    """Widths 6 and 4, the shared model's 3: a round of training and a score, or the reason."""
    model = Cohort(("own_nets:pair", "mlp-1"), "own_nets:narrow", width=4)
    setup = dataclasses.replace(tiny.small_setup(), model=model)
    clients = [dataclasses.replace(c, architecture=model.architecture(i)) for i, c in enumerate(setup.clients)]
    setup = dataclasses.replace(setup, clients=tuple(clients))
    method = Algorithm.registry[name]()
    if name in NEED_ONE_WIDTH:
        with pytest.raises(
            ConfigError, match=r"depends on the width of representations, but it is \{'own_nets:pair': 6"
        ):
            method.server(setup)
        return
    server, half = method.server(setup), method.client(setup)
    replies = []
    for info in clients[:2]:
        context = dataclasses.replace(tiny.small_context(info.id), info=info)
        sent = server.deliver(info)
        replies.append((info.id, half.train(sent, context)))
        assert 0 <= half.evaluate(sent, context).scalars["score"] <= 1
    server.aggregate(1, iter(replies))
    assert all(t.isfinite().all() for t in server.params.values())


def test_a_nested_model_must_be_the_smaller_one(nets):
    setup = dataclasses.replace(tiny.small_setup(), model=Cohort(("own_nets:narrow",), "own_nets:pair"))
    with pytest.raises(ConfigError, match="own_nets:pair has 6 numbers; it must be at most 3"):
        FedMRL().server(setup)


# --- image encoders ---------------------------------------------------------------------------------------------------

PLAIN = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
IMAGES = {
    "vit": lambda: ViTModel(ViTConfig(hidden_size=8, image_size=8, patch_size=4, **PLAIN)),
    "resnet": lambda: ResNetModel(ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1])),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(num_channels=1, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, patch_size=2, image_size=8)
    ),
}
WIDTHS = {"vit": 8, "resnet": 6, "convnext": 6}


@cache
def saved(kind):
    """A tiny model of random weights, in a directory as transformers writes it."""
    folder = tiny.root / f"encoder-{kind}"
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        {**IMAGES, **TEXTS}[kind]().save_pretrained(folder)
    if kind in TEXTS:
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_encoder(kind):
    """In three builds: with its weights, by its configuration alone, and from flat parameters."""
    name = saved(kind)
    cohort = Cohort((name,), name)
    made = cohort.extractor(name, IMAGE)
    x = torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    assert made(x).shape == (2, WIDTHS[kind]) == (2, made.width) and cohort.width_of(name, IMAGE) == made.width
    setup = dataclasses.replace(tiny.small_setup(), model=cohort)
    info = dataclasses.replace(setup.clients[0], architecture=name)
    context = dataclasses.replace(tiny.small_context(info.id), info=info)
    model = setup.build(setup.own_params(context), context).eval()
    torch.testing.assert_close(model.backbone(x), made.eval()(x))


def test_pixels_are_resized_and_normalised_by_the_checkpoints_own_numbers(tmp_path):
    """x = 0 is the pixel 1/2: (1/2 - 1/4) / 1/2 = 1/2 in the first channel, (1/2 - 1) / 2 = -1/4 in the second."""
    IMAGES["vit"]().save_pretrained(tmp_path)
    told = {"image_mean": [0.25, 1.0, 0.5], "image_std": [0.5, 2.0, 0.5], "do_normalize": True, "size": {"height": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    made = encoders.extractor(str(tmp_path), IMAGE)
    seen = []
    made.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["pixel_values"]), with_kwargs=True)
    made(torch.zeros(1, *IMAGE))
    assert seen[0].shape == (1, 3, 8, 8) and seen[0][0, :, 0, 0].tolist() == [0.5, -0.25, 0.0]


def test_a_classifiers_checkpoint_without_its_pooling_layer_is_read(tmp_path):
    """The usual ViT on the hub: no `pooler`; the first token's last hidden state is the representation."""
    config = ViTConfig(hidden_size=8, image_size=4, patch_size=2, num_channels=1, **PLAIN)
    whole = ViTForImageClassification(config).eval()
    whole.save_pretrained(tmp_path)
    x = torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    made = encoders.extractor(str(tmp_path), IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier(made(x)), whole(pixel_values=x).logits)


def test_what_is_no_encoder_is_refused(tmp_path):
    T5Model(T5Config(vocab_size=20, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    for name, shape, message in (
        (str(tmp_path), (), "is t5, which is no encoder"),
        (str(tmp_path / "absent"), IMAGE, "is no directory"),
        ("nobody/nothing", IMAGE, "'nobody/nothing' cannot be read"),
        (saved("vit"), (), "takes images .*, the examples are texts"),
        (saved("vit"), (2, 4, 4), "images have 2 channels, vit takes 3"),
        (saved("bert"), IMAGE, r"takes texts, the examples are of shape \(1, 4, 4\)"),
    ):
        with pytest.raises(ModelError, match=message):
            encoders.extractor(name, shape)
    other = tmp_path / "other"
    BertConfig(**BERT).save_pretrained(other)
    weights = other / "model.safetensors"
    weights.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"lacks [0-9]+ weights of its encoder"):
        encoders.extractor(str(other), ())
    weights.write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be read"):
        encoders.extractor(str(other), ())


def test_pfedmoe_on_image_encoders(tmp_path):
    """A transformer and a convolutional network of their own sizes, a smaller CNN shared; on scikit-learn's digits."""
    experiment = Experiment(
        "images",
        pFedMoE(m=4),
        ImageData(clients=2, examples=80),
        Cohort((saved("vit"), saved("resnet")), "mnist-5", width=6, kernel=3, padding=1),
        Fit(batch_size=16),
        Sampling(2),
        rounds=1,
    )
    summary = run(experiment, tmp_path / "run")
    assert summary["coverage"] == "2/2" and 0 <= summary["mean"] <= 1


# --- text encoders ----------------------------------------------------------------------------------------------------

BERT = dict(vocab_size=tiny.VOCABULARY, hidden_size=8, max_position_embeddings=16, **PLAIN)
TEXTS = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "bert-small": lambda: BertModel(BertConfig(**{**BERT, "hidden_size": 4})),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=tiny.VOCABULARY, dim=6, n_layers=1, n_heads=2, hidden_dim=8)
    ),
}


def test_padding_changes_no_representation():
    made = encoders.extractor(saved("bert"), ()).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        both = made(ids)
        torch.testing.assert_close(both[1:], made(ids[1:, :1]))
        hidden = made.model(input_ids=ids[:1, :3]).last_hidden_state
        torch.testing.assert_close(both[:1], hidden.mean(1))
        assert made(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()
    with pytest.raises(ModelError, match=r"has 17 tokens, bert reads 16; lower fit.max_length"):
        made(torch.ones(1, 17, dtype=torch.int64))


def texts(tmp_path, method, **changes):
    return runs.experiment(
        runs.table(tmp_path, clients=2),
        method,
        model=Cohort((saved("bert"), saved("distilbert")), saved("bert-small")),
        rounds=1,
        **changes,
    )


def test_texts_become_rows_of_token_ids(tmp_path):
    experiment = texts(tmp_path, pFedMoE(gate_input="features"))
    federation = experiment.data.load(0)
    data = next(iter(federation.clients.values()))
    setup = experiment.setup([(data.task.name, data.task.labels)])
    context = dataclasses.replace(tiny.small_context(), data=data)
    split = setup.encode(context, data.train)
    assert split.x.shape == (len(data.train), 12) and split.x.dtype == torch.int64 and split.cut == len(data.train)
    assert split.targets == data.train.targets and setup.encode(context, split) is split
    ids = tiny.tokenizer()(data.train.texts[0])["input_ids"][:12]
    assert split.x[0].tolist() == ids + [0] * (12 - len(ids))


def test_pfedmoe_on_texts(tmp_path):
    """Encoders of widths 8 and 6 with a shared one of 4; the gate reads features, and ids as numbers are refused."""
    summary = run(texts(tmp_path, pFedMoE(m=4, gate_input="features")), tmp_path / "run")
    assert summary["coverage"] == "2/2" and 0 <= summary["mean"] <= 1
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert all(client["cut"] > 0 for client in told["clients"].values())
    with pytest.raises(ConfigError, match=r"use --algorithm.gate-input features"):
        run(texts(tmp_path, pFedMoE()), tmp_path / "raw")


@pytest.mark.parametrize("name", ["FedAPEN", "FedMRL", "FD"])
def test_other_methods_on_texts(tmp_path, name):
    assert run(texts(tmp_path, name), tmp_path / "run")["coverage"] == "2/2"


def test_fedavg_on_one_text_encoder(tmp_path):
    one = Cohort((saved("bert"),), saved("bert"))
    experiment = dataclasses.replace(texts(tmp_path, pFedMoE()), algorithm=FedAvg(), model=one)
    assert run(experiment, tmp_path / "run")["coverage"] == "2/2"


def test_texts_need_encoders_of_one_tokenizer(tmp_path):
    other = tmp_path / "other"
    BertModel(BertConfig(**BERT)).save_pretrained(other)
    with pytest.raises(ConsiliumError, match="other"):
        Cohort((saved("bert"), str(other)), saved("bert")).tokenizer()
    tokenizer = tiny.tokenizer().__class__.from_pretrained(saved("bert"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="have different tokenizers"):
        Cohort((saved("bert"), str(other)), saved("bert")).tokenizer()
    few = tmp_path / "few"
    BertModel(BertConfig(**{**BERT, "vocab_size": 9})).save_pretrained(few)
    tokenizer.save_pretrained(few)
    with pytest.raises(ConfigError, match=r"few has [0-9]+ tokens, its model 9; they are no pair"):
        Cohort((str(few),), str(few)).tokenizer()
    with pytest.raises(ConfigError, match=r"TextFileData cannot feed a Cohort.*text encoders"):
        dataclasses.replace(texts(tmp_path, pFedMoE()), model=Cohort((saved("bert"),), "cnn-5"))


def test_a_directory_is_named_so_that_a_run_resumes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    cohort = Cohort(("./vit,google/vit-base",), "./absent")
    assert cohort.architectures == (str(tmp_path / "vit"), "google/vit-base") and cohort.small == str(
        tmp_path / "absent"
    )


def test_a_model_taken_away_imports_code_only_if_asked(nets, tmp_path):
    """A folder may come from anybody."""
    experiment = Experiment(
        "own",
        pFedMoE(m=4),
        ImageData(clients=2, examples=60),
        Cohort(("own_nets:flat", "mnist-5"), "mlp-3", width=6, kernel=3, padding=1),
        Fit(batch_size=16),
        Sampling(2),
        rounds=1,
    )
    told = run(experiment, tmp_path / "run")["clients"]
    first, second = sorted(told)
    for client in (first, second):
        list(Export(tmp_path / "run", tmp_path / client, client).lines())
    assert cohort.load(tmp_path / second).labels
    with pytest.raises(ConfigError, match="own_nets:flat imported; if the folder and that code are yours"):
        cohort.load(tmp_path / first)
    model, data = cohort.load(tmp_path / first, own_code=True), experiment.data.load(0).clients[first]
    batch = data.test.batch(range(len(data.test)), torch.device("cpu"))
    with torch.no_grad():
        hits = model.head(model.backbone(batch["x"])).argmax(-1) == batch["labels"]
    assert hits.float().mean().item() == pytest.approx(told[first]["test"])
