"""Rows dealt to clients by flwr_datasets' partitioners: the only module that imports it."""

from collections.abc import Sequence
from typing import Literal

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner, PathologicalPartitioner

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
        raise DataError(f"{len(labels)} rows cannot be dealt to {clients} clients; ask for at most {len(labels)} clients")
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
            clients, partition_by="label", num_classes_per_partition=each, class_assignment_mode="deterministic", seed=seed
        )
    else:
        raise DataError(f"partition {how!r} is unknown; use iid, dirichlet or pathological")
    partitioner.dataset = rows
    return [_rows(partitioner, i) for i in range(clients)]


def divide_by_client(owners: Sequence[str]) -> dict[str, list[int]]:
    """Indices into `owners` for each owner named there, owners sorted."""
    partitioner = NaturalIdPartitioner(partition_by="client")
    partitioner.dataset = Dataset.from_dict({"row": list(range(len(owners))), "client": list(owners)})
    names = partitioner.partition_id_to_natural_id if partitioner.num_partitions else {}
    return {names[i]: _rows(partitioner, i) for i in sorted(names, key=lambda i: names[i])}


def _rows(partitioner, index: int) -> list[int]:
    return sorted(partitioner.load_partition(index)["row"])
