"""Two and more sites with questions and answers of their own in CSV files, and a tiny decoder that knows neither."""

import csv
import random
from functools import cache
from pathlib import Path

import tiny
import torch
import transformers

from consilium.algorithms.fedavg import FedAvg
from consilium.certificates import site_key
from consilium.core import Sampling
from consilium.data.language import LanguageData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.moe.build import ModelSource
from consilium.moe.model import TaskModel
from consilium.oneshot.base import Base
from consilium.oneshot.layout import Layout
from consilium.oneshot.package import Package
from consilium.oneshot.train import Trainer, Training, site_data, train

ANSWERS = {
    "north": {"cat": "the cat purrs", "dog": "the dog barks", "fish": "the fish swims"},
    "south": {"red": "red is warm", "green": "green is calm", "blue": "blue is cold"},
    "coast": {"one": "one is odd", "two": "two is even", "three": "three is odd"},
}
"""Site -> what its rows ask about -> the answer."""


def table(folder: Path, site: str, rows: int = 40) -> Path:
    """Write <site>.csv with the columns question and answer, and return its path."""
    rng, path = random.Random(site), folder / f"{site}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["question", "answer"])
        for i in range(rows):
            word = list(ANSWERS[site])[i % 3]
            lines.writerow([f"{' '.join(rng.choices(tiny.FILL, k=3))} {word}", ANSWERS[site][word]])
    return path


@cache
def dense(model_type: str = "llama") -> Path:
    """A saved tiny dense decoder with a tokenizer."""
    folder = tiny.root / f"oneshot-{model_type}"
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def olmoe() -> Path:
    """A saved tiny OLMoE with a tokenizer."""
    return tiny.directory("olmoe", "text-to-text")


def experiment(folder: Path, site: str, model: Path | None = None, rounds: int = 4, **fit: object) -> Experiment:
    """An experiment on the table of a site; one client."""
    settings = dict(lr=1e-2, batch_size=8, max_length=24, target_length=12, label_smoothing=0.0, balance=0.0)
    return Experiment(
        name="oneshot",
        algorithm=FedAvg(),
        data=LanguageData(path=table(folder, site), prompt="question", response="answer", clients=1),
        model=ModelSource(str(model or olmoe()), "text-to-text"),
        fit=Fit(**settings | fit),
        sampling=Sampling(1),
        rounds=rounds,
    )


def package(folder: Path, site: str, training: Training, model: Path | None = None, **changes: object):
    """Train a site's package, not signed."""
    made = experiment(folder, site, model, **changes)
    return train(made, site, training, folder / f"state-{site}", site_data(made))


def trainer(folder: Path, site: str, training: Training, model: Path | None = None, **changes: object) -> Trainer:
    """A trainer that has not begun."""
    made = experiment(folder, site, model, **changes)
    return Trainer(made, site, training, site_data(made))


@cache
def signed(kind: str, site: str, model: str = "olmoe", **training: object) -> Package:
    """A trained and signed package, made once: kind "adapter", "gated" or "expert"."""
    folder = tiny.root / "oneshot-packages"
    folder.mkdir(exist_ok=True)
    settings = dict(rank=4, moments=kind != "adapter", gate_steps=4, save_every=8) | training
    where = olmoe() if model == "olmoe" else dense(model)
    made = package(folder / f"{kind}-{model}-{len(list(folder.iterdir()))}", site, Training(kind, **settings), where)
    return made.signed(site_key(folder / f"key-{site}"))


def base(model: str = "olmoe") -> Base:
    """The public model of the packages."""
    return Base(ModelSource(str(olmoe() if model == "olmoe" else dense(model)), "text-to-text"))


@cache
def layout(model: str = "olmoe") -> Layout:
    """What packages for it look like."""
    return Layout.of(base(model))


def batch(rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens, of which all but the first are predicted."""
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def logits(model: TaskModel) -> torch.Tensor:
    """What a live model says of `batch`."""
    with torch.no_grad():
        return model.eval()(batch())[0]
