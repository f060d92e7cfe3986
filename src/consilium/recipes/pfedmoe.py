"""The table of pFedMoE (arXiv 2402.01350): MNIST, CIFAR-10 and CIFAR-100 from files of your own, and Fed-Heart-Disease.

There are N clients, and 10 of them take part in a round: N = 10 (100 %), 50 (20 %) or 100 (10 %), set by
`--data.clients N`. Client k has the (k mod 5 + 1)-th of five CNNs; `--model.architectures cnn-1` gives all clients the
first, which is the paper's homogeneous setting. Each client has 2 of 10 classes, or 10 of 100, in shares from
U(0.4, 0.6); `--data.partition dirichlet --data.alpha 0.3` gives it some of all classes. The paper searches T in
{100, 500} rounds, E in {1, 10} epochs and batch sizes of {64, ..., 512}; these recipes use the smallest of each. The
authors' code trains with --rounds 500 --fit.epochs 10 --fit.batch-size 512 --fit.momentum 0.9 --fit.weight-decay 1e-3
--fit.clip 50, and augments the images (--data.augment crop-flip is nearest to it).
"""

from dataclasses import replace
from pathlib import Path

from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Sampling
from consilium.data.arrays import ImageData, TableData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.models.cohort import Cohort
from consilium.recipes import recipe
from consilium.recipes.digits import ABLATIONS, COMPARED, SMALL_FIT, pfedmoe_table

__all__ = ["pfedmoe_cifar10", "pfedmoe_cifar100", "pfedmoe_heart", "pfedmoe_mnist"]


@recipe("pfedmoe-cifar10", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_cifar10() -> Experiment:
    """pFedMoE's table: --data.path DIR with CIFAR-10 (*.bin, Parquet, folders, .npz), --data.clients 10, 50 or 100."""
    return Experiment(
        name="pfedmoe-cifar10",
        algorithm=pFedMoE(),
        data=ImageData(path=Path("cifar-10-batches-bin"), clients=10, classes=2),
        model=Cohort(),
        fit=Fit(lr=0.01, head_lr=0.01, batch_size=64, **SMALL_FIT),
        sampling=Sampling(clients_per_round=10),
        rounds=100,
        evaluate_every=10,
    )


@recipe("pfedmoe-cifar100", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_cifar100() -> Experiment:
    """pFedMoE's table: --data.path DIR with CIFAR-100, 10 classes a client, --data.clients 10, 50 or 100."""
    data = ImageData(path=Path("cifar-100-binary"), clients=10, classes=10)
    return replace(pfedmoe_cifar10(), name="pfedmoe-cifar100", data=data)


@recipe("pfedmoe-mnist", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_mnist() -> Experiment:
    """pFedMoE's table: --data.path DIR or FILE with MNIST or Fashion-MNIST, --data.clients 10, 50 or 100."""
    return replace(
        pfedmoe_cifar10(),
        name="pfedmoe-mnist",
        data=ImageData(path=Path("mnist"), clients=10, classes=2),
        model=Cohort(tuple(f"mnist-{i}" for i in range(1, 6)), small="mnist-5", width=50),
    )


@recipe("pfedmoe-heart", rivals=ABLATIONS, compared=COMPARED)
def pfedmoe_heart() -> Experiment:
    """pFedMoE on Fed-Heart-Disease: --data.path heart_disease.parquet, four hospitals, is there a disease (num > 0)?

    The paper does not print its settings for this data; the MLPs, rates and rounds are our choice.
    """
    data = TableData(path=Path("heart_disease.parquet"), target="num", client="hospital", positive=True)
    return replace(pfedmoe_table(), name="pfedmoe-heart", data=data, sampling=Sampling(clients_per_round=4))
