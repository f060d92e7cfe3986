"""Rows dealt to clients by flwr_datasets' partitioners: the only module that imports it."""

import warnings
from collections.abc import Sequence
from typing import Literal

from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    PathologicalPartitioner,
)

from consilium.errors import DataError

__all__ = ["divide", "divide_by_client"]


def divide(
    labels: Sequence[str],
    clients: int,
    how: Literal["iid", "dirichlet", "pathological"],
    alpha: float = 0.3,
    each: int = 2,
    seed: int = 0,
) -> list[list[int]]:
    """Indices into `labels` for each of `clients` clients; every row goes to at most one.

    iid: equal shares, shuffled. dirichlet: for each label the clients' shares are drawn from Dirichlet(alpha).
    pathological: every client holds rows of `each` labels only.

    Raises DataError when there are fewer rows than clients, fewer labels than `each`, or an unknown `how`.
    """
    if len(labels) < clients:
        raise DataError(f"{len(labels)} rows cannot be dealt to {clients} clients; ask for fewer clients")
    kinds = len(set(labels))
    rows = Dataset.from_dict({"row": list(range(len(labels))), "label": list(labels)}).shuffle(seed=seed)
    if how == "iid":
        partitioner = IidPartitioner(num_partitions=clients)
    elif how == "dirichlet":
        partitioner = DirichletPartitioner(
            clients, partition_by="label", alpha=alpha, min_partition_size=0, self_balancing=False, seed=seed
        )
    elif how == "pathological":
        if each > kinds:
            raise DataError(f"{each} labels per client asked for, but the data has {kinds}; ask for at most {kinds}")
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
        # Few pathological clients leave labels out, as asked for; the partition written with a run says which.
        warnings.filterwarnings("ignore", message="Classes: ", category=UserWarning)
        return [_rows(partitioner, i) for i in range(clients)]


def divide_by_client(owners: Sequence[str]) -> dict[str, list[int]]:
    """Indices into `owners` for each owner named there, owners sorted."""
    held: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        held.setdefault(owner, []).append(row)
    return dict(sorted(held.items()))


def _rows(partitioner, index: int) -> list[int]:
    return sorted(partitioner.load_partition(index)["row"])
