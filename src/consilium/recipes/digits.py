"""pFedMoE on the digits that scikit-learn ships (no file, no network), and on your own images, tables and texts."""

from dataclasses import replace
from pathlib import Path

from consilium.algorithms.fd import FD
from consilium.algorithms.fedproto import FedProto
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Sampling
from consilium.data.arrays import ImageData, TableData
from consilium.data.textfile import TextFileData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.models.cohort import Cohort
from consilium.recipes import recipe

__all__ = ["ABLATIONS", "SMALL_FIT", "pfedmoe_digits", "pfedmoe_images", "pfedmoe_table", "pfedmoe_texts"]

COMPARED = "pFedMoE,pFedMoE-static,Standalone,LGFedAvg,FedProto,FML"

ABLATIONS = {
    "pFedMoE-static": pFedMoE(mixing="static"),
    "pFedMoE-shared": pFedMoE(mixing="shared"),
    "pFedMoE-local": pFedMoE(mixing="local"),
    "pFedMoE-batch-norm": pFedMoE(norm="batch"),
    "pFedMoE-features": pFedMoE(gate_input="features"),
    "pFedMoE-trained": pFedMoE(deploy="trained"),
    "FedProto-nearest": FedProto(infer="prototype"),
    "FD-kl": FD(distance="kl"),
}
"""Variants of pFedMoE with one part changed, and other settings of rivals, by the name that `--algorithms` takes."""

SMALL_FIT = {"optimizer": "sgd", "clip": 0.0, "label_smoothing": 0.0, "balance": 0.0}
"""The paper's training, which is plain SGD on the cross-entropy."""


@recipe("pfedmoe-digits", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_digits() -> Experiment:
    """pFedMoE on scikit-learn's digits: 10 clients with 2 digits each, five architectures, all take part."""
    return Experiment(
        name="pfedmoe-digits",
        algorithm=pFedMoE(),
        data=ImageData(partition="pathological", clients=10, classes=2),
        model=Cohort(tuple(f"mnist-{i}" for i in range(1, 6)), small="mnist-5", width=50, kernel=3, padding=1),
        fit=Fit(lr=0.1, head_lr=0.1, batch_size=32, **SMALL_FIT),
        sampling=Sampling(clients_per_round=10),
        rounds=20,
        evaluate_every=2,
    )


@recipe("pfedmoe-images", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_images() -> Experiment:
    """pFedMoE and the five CNNs on your own images: --data.path PATH, a folder per class, Parquet, .npz, `datasets`."""
    return replace(
        pfedmoe_digits(),
        name="pfedmoe-images",
        data=ImageData(path=Path("fashion_mnist.npz")),
        model=Cohort(),
        fit=Fit(lr=0.01, head_lr=0.01, batch_size=64, **SMALL_FIT),
    )


@recipe("pfedmoe-table", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_table() -> Experiment:
    """pFedMoE on your own table of numbers: --data.path FILE --data.target COLUMN --data.client COLUMN."""
    return replace(
        pfedmoe_digits(),
        name="pfedmoe-table",
        data=TableData(path=Path("heart_disease.parquet"), target="num", client="hospital", positive=True),
        model=Cohort(("mlp-1", "mlp-2", "mlp-3"), small="mlp-3", width=16),
    )


TEXT_RIVALS = {
    "pFedMoE-static": pFedMoE(mixing="static"),
    "pFedMoE-local": pFedMoE(mixing="local", gate_input="features"),
}


@recipe("pfedmoe-texts", rivals=TEXT_RIVALS, compared="pFedMoE,pFedMoE-static,Standalone,FML")
def pfedmoe_texts() -> Experiment:
    """pFedMoE on texts: --data.path FILE --data.text COLUMN --model.architectures DIR,DIR --model.small DIR."""
    return Experiment(
        name="pfedmoe-texts",
        algorithm=pFedMoE(gate_input="features"),
        data=TextFileData(path=Path("examples.csv")),
        model=Cohort(
            ("google-bert/bert-base-uncased", "google-bert/bert-large-uncased"), "distilbert/distilbert-base-uncased"
        ),
        fit=Fit(lr=2e-5, head_lr=1e-3, batch_size=16, max_length=96, label_smoothing=0.0, balance=0.0),
        sampling=Sampling(clients_per_round=10),
        rounds=10,
    )
