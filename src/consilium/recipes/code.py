"""The testbed: a small language model of code, on domains of text that it has not seen; see `data.code`."""

from dataclasses import replace

from consilium.algorithms.affinitymoe import AffinityMoE
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.core import Sampling
from consilium.data.code import CodeData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.moe.build import ModelSource
from consilium.recipes import recipe

__all__ = ["DEVICE", "affinitymoe_code", "fedmoe_code"]

DEVICE = "80.8MB"
"""The memory of every client. By the memory model, a client can train 16 of the 64 experts, and run all of them."""
FEDMOE = FedMoE(stage1="forward", stage2=False, alpha=1.0)
RIVALS = {
    "alone": AffinityMoE(likeness="self"),
    "FedMoE": FEDMOE,
    "RandomMoE": RandomMoE(),
    "nested": AffinityMoE(choice="public", likeness="none"),
    "FedAvg": FedAvg(experts="fit"),
}


@recipe("affinitymoe-code", rivals=RIVALS, compared="AffinityMoE,alone,FedMoE,RandomMoE,nested")
def affinitymoe_code() -> Experiment:
    """AffinityMoE on private domains of code and text: three teams per domain with little text, small devices.

    The task is the next token, scored in bits per byte. The model was pretrained on other domains; a device can train a
    quarter of its experts.
    """
    return Experiment(
        name="affinitymoe-code",
        algorithm=AffinityMoE(),
        data=CodeData(("generated-c", "json", "metrics", "lexers"), 12, train=10, validation=9, test=62),
        model=ModelSource("code-olmoe", form="text-to-text"),
        fit=Fit(
            lr=6e-4,
            batch_size=4,
            max_length=64,
            target_length=64,
            rows="blocks",
            label_smoothing=0.0,
            balance=0.0,
            personal="best",
        ),
        sampling=Sampling(clients_per_round=12),
        rounds=6,
        memory=(DEVICE,),
        evaluate_every=6,
        completions=3,
    )


@recipe("fedmoe-code", rivals=RIVALS, compared="FedMoE,alone,RandomMoE")
def fedmoe_code() -> Experiment:
    """FedMoE on the same domains, teams and devices as affinitymoe-code."""
    return replace(affinitymoe_code(), name="fedmoe-code", algorithm=FEDMOE)
