"""Three sites with a table each, and small models of architectures that they choose."""

import random
from pathlib import Path

import runs

from consilium.core import Algorithm, Sampling
from consilium.data.arrays import TableData
from consilium.experiment import Experiment
from consilium.models.cohort import Cohort

NAMES = ["east", "north", "west"]
CHOSEN = {"east": "mlp-1", "north": "mlp-3", "west": "mlp-2"}


def written(folder: Path) -> Path:
    """A folder "whole" with the rows of all sites and one for each with its own, all called ill.csv: west has none of
    the class "much", and its columns have other means."""
    rng = random.Random(0)
    head, rows = "a,b,grade,site\n", []
    for site in NAMES:
        for i in range(30):
            grade = ("none", "some", "much")[i % (2 if site == "west" else 3)]
            a = ("none", "some", "much").index(grade) + rng.gauss(10 if site == "west" else 0, 0.5)
            rows.append(f"{a:.4f},{rng.random():.4f},{grade},{site}\n")
    for name in ("whole", *NAMES):
        (folder / name).mkdir()
        own = [row for row in rows if name == "whole" or row.endswith(f",{name}\n")]
        (folder / name / "ill.csv").write_text(head + "".join(own))
    return folder / "whole/ill.csv"


def experiment(path: Path, method: Algorithm | str = "pFedMoE") -> Experiment:
    """Two rounds of all three on one machine; `path`: of the whole table."""
    method = Algorithm.registry[method]() if isinstance(method, str) else method
    return runs.experiment(
        path,
        method,
        data=TableData(path=path, target="grade", client="site"),
        model=Cohort(tuple(CHOSEN.values()), small="mlp-3", width=6),
        sampling=Sampling(3),
        rounds=2,
    )
