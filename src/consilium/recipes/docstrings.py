"""The default recipes: teams fine-tune the shipped Switch Transformer on the documentation of their Python packages."""

from dataclasses import replace

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.algorithms.standalone import Standalone
from consilium.core import Sampling
from consilium.data.docstrings import DocstringData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.recipes import recipe

__all__ = ["EQUAL_MEMORY", "fedmoe_docstrings", "hfedmoe_docstrings"]

EQUAL_MEMORY = {
    "FedAvg": FedAvg(experts="fit"),
    "FedAvg-full": FedAvg(),
    "FedProx": FedProx(experts="fit"),
    "SCAFFOLD": SCAFFOLD(eta_l=0.01, experts="fit"),
    "Standalone": Standalone(experts="fit"),
}
"""Rivals for a comparison at equal memory.

A method with one model for all clients gets the largest model that the smallest device can train. A name with "-full"
ignores the small devices and leaves them out.
"""


@recipe("fedmoe-docstrings", rivals=EQUAL_MEMORY)
def fedmoe_docstrings() -> Experiment:
    """FedMoE on three docstring tasks: 12 teams, four sizes of device, 5 teams per round.

    Stage one trains 2 epochs of LoRA instead of the paper's 5, to keep the run short.
    """
    return Experiment(
        name="fedmoe-docstrings",
        algorithm=FedMoE(stage1_epochs=2),
        data=DocstringData(tasks=("topic", "kind", "verb"), clients=12, train=200, validation=80, test=100),
        fit=Fit(lr=3e-4, head_lr=3e-3, batch_size=16, max_length=64),
        sampling=Sampling(clients_per_round=5),
        rounds=12,
        memory=("95MB", "105MB", "126MB", "160MB"),
        evaluate_every=3,
    )


@recipe(
    "hfedmoe-docstrings",
    rivals=EQUAL_MEMORY
    | {
        "FedMoE": FedMoE(stage1_epochs=2),
        "RandomChoice": HFedMoE(select="random", experts="plain", router="plain"),
        "HFedMoE-no-selection": HFedMoE(select="random"),
        "HFedMoE-plain-experts": HFedMoE(experts="plain"),
        "HFedMoE-plain-router": HFedMoE(router="plain"),
    },
)
def hfedmoe_docstrings() -> Experiment:
    """HFedMoE on the same tasks, teams and devices as fedmoe-docstrings."""
    return replace(fedmoe_docstrings(), name="hfedmoe-docstrings", algorithm=HFedMoE())
