"""A new algorithm in one file: FedAvg whose clients shrink what they send, and how it does beside FedAvg.

python examples/new_algorithm.py FOLDER
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import consilium
from consilium.algorithms.fedavg import FedAvgServer, common_experts
from consilium.constraints import Factor
from consilium.report import print_table
from consilium.training import local_round, local_test


@dataclass(frozen=True)
class Decay(consilium.Algorithm):
    """FedAvg with weights that are pulled towards zero in every step.

    Args:
        rho: strength of the pull, in [0, 1e4].
    """

    rho: Factor = consilium.setting(0.01, "factor")

    def server(self, setup):
        return FedAvgServer(setup, common_experts(setup, "fit"))  # a whole server half, reused

    def client(self, setup):
        return DecayClient(setup, self.rho)


@dataclass
class DecayClient(consilium.Client):
    setup: object
    rho: float

    def train(self, payload, context):
        def correct(trainable, weights):  # after each backward pass
            for path, weight in trainable.items():
                if weight.grad is not None:
                    weight.grad.add_(weights[path].detach(), alpha=self.rho)

        return local_round(self.setup, payload, context, lambda model: correct)[1]

    def evaluate(self, payload, context):
        return local_test(self.setup, payload, context)


def main(folder: Path, base: consilium.Experiment) -> None:
    for method in (Decay(), consilium.FedAvg(experts="fit")):
        name = type(method).__name__
        consilium.run(replace(base, name=name, algorithm=method), folder / name)
    print_table([folder / "Decay", folder / "FedAvg"])


if __name__ == "__main__":
    small = replace(consilium.recipes.find("fedmoe-docstrings").make(), rounds=5)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "new-algorithm"), small)
