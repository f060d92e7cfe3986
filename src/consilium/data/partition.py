"""Partitions of rows over clients by flwr_datasets' partitioners; this is the only module that imports flwr_datasets.

An official test set must be dealt in the same proportions as the training set (`deal`). For that, the proportions are
drawn first, as a table of shares, because flwr_datasets has no such partitioner.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    PathologicalPartitioner,
)

from consilium.errors import DataError

__all__ = ["class_shares", "deal", "divide"]


def divide(
    labels: Sequence[str],
    clients: int,
    how: Literal["iid", "dirichlet", "pathological"],
    alpha: float = 0.3,
    each: int = 2,
    seed: int = 0,
) -> list[list[int]]:
    """Return the indices into `labels` of each of `clients` clients; every row goes to at most one client.

    iid: equal shares, shuffled. dirichlet: for each label the clients' shares are drawn from Dirichlet(alpha).
    pathological: every client holds rows of `each` labels only.

    Raises:
        DataError: if there are fewer rows than clients or fewer labels than `each`, or `how` is unknown.
    """
    if len(labels) < clients:
        raise DataError(f"{len(labels)} rows cannot be dealt to {clients} clients; ask for fewer clients")
    label_count = len(set(labels))
    rows = Dataset.from_dict({"row": list(range(len(labels))), "label": list(labels)}).shuffle(seed=seed)
    if how == "iid":
        partitioner = IidPartitioner(num_partitions=clients)
    elif how == "dirichlet":
        partitioner = DirichletPartitioner(
            clients, partition_by="label", alpha=alpha, min_partition_size=0, self_balancing=False, seed=seed
        )
    elif how == "pathological":
        if each > label_count:
            raise DataError(
                f"{each} labels per client asked for, but the data has {label_count}; ask for at most {label_count}"
            )
        partitioner = PathologicalPartitioner(
            clients,
            partition_by="label",
            num_classes_per_partition=each,
            class_assignment_mode="deterministic",
            seed=seed,
        )
    else:
        raise DataError(f"partition {how!r} is unknown; use iid, dirichlet or pathological")
    partitioner.dataset = rows
    with warnings.catch_warnings():
        # With few pathological clients some labels are left out by design; a run records its partition.
        warnings.filterwarnings("ignore", message="Classes: ", category=UserWarning)
        return [_rows(partitioner, i) for i in range(clients)]


def class_shares(
    classes: int,
    clients: int,
    how: Literal["iid", "dirichlet", "pathological"],
    alpha: float = 0.3,
    each: int = 2,
    seed: int = 0,
) -> np.ndarray:
    """Return each client's share of each class's rows: float64 [clients, classes], columns sum to 1 (or to 0).

    pathological: `each` classes per client, chosen so that all classes have about the same number of clients. The
    clients of a class share it in proportion to draws from U(0.4, 0.6) (Shamsian et al., pFedHN, as the pFedMoE family
    uses it; a class is never given to a client twice, which their code may do). With few clients some classes have no
    client. dirichlet: each class's shares are drawn from Dirichlet(alpha). iid: equal shares.

    Raises:
        DataError: if `each` is larger than the number of classes (pathological), or `how` is unknown.
    """
    rng = np.random.default_rng(seed)
    if how == "iid":
        return np.full((clients, classes), 1 / clients)
    if how == "dirichlet":
        return rng.dirichlet([alpha] * clients, size=classes).T
    if how != "pathological":
        raise DataError(f"partition {how!r} is unknown; use iid, dirichlet or pathological")
    if each > classes:
        raise DataError(f"{each} classes per client asked for, but the data has {classes}; ask for at most {classes}")
    shares, holder_counts = np.zeros((clients, classes)), np.zeros(classes, dtype=int)
    for client in range(clients):
        for _ in range(each):
            free_classes = np.flatnonzero(shares[client] == 0)
            class_index = rng.choice(free_classes[holder_counts[free_classes] == holder_counts[free_classes].min()])
            holder_counts[class_index] += 1
            shares[client, class_index] = rng.uniform(0.4, 0.6)
    return shares / np.maximum(shares.sum(0), np.finfo(float).tiny)


def deal(labels: Sequence[int], shares: np.ndarray, seed: int = 0) -> list[list[int]]:
    """Return the rows of each client; the shuffled rows of a class are cut at the rounded cumulative shares.

    Args:
        labels: class of each row, 0..classes-1.
        shares: [clients, classes], see `class_shares`.
    """
    rng = np.random.default_rng(seed)
    client_rows: list[list[int]] = [[] for _ in shares]
    for class_index in range(shares.shape[1]):
        rows = rng.permutation(np.flatnonzero(np.asarray(labels) == class_index))
        ends = np.rint(np.cumsum(shares[:, class_index]) * len(rows)).astype(int)
        for part, start, end in zip(client_rows, [0, *ends[:-1]], ends, strict=True):
            part += rows[start:end].tolist()
    return [sorted(part) for part in client_rows]


def _rows(partitioner, index: int) -> list[int]:
    return sorted(partitioner.load_partition(index)["row"])
