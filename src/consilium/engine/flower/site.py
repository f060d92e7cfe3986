"""The state folder of a site: its settings, and its data as read at the start.

    site.json           its name, its experiment (the data, model, memory, device and threads in it are its own), the
                        fingerprint of its model, its limits, the score of a simple model of its own data, which the
                        server is not told; for a table, the means and deviations of its columns
    secret              32 random bytes, the key of the digest of its data
    data.json           its task; for texts, its three splits
    data.safetensors    for images and tables: x [N, *S] and y [N] of its own rows, and the row numbers of each split

Messages come every round, each to a new process, and none of these processes reads the source of the data again.
"""

import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from consilium.core import Payload
from consilium.data.arrays import TableData
from consilium.data.simple import simple_score
from consilium.data.task import ClientData, Federation, Split, Task, check_labels
from consilium.data.tensor import TensorSplit
from consilium.engine.checkpoint import write_atomic
from consilium.engine.codec import decode, encode
from consilium.engine.flower.limits import Limits
from consilium.errors import ConfigError, ConsiliumError, DataError
from consilium.escape import one_line
from consilium.experiment import Experiment, to_json
from consilium.inside import refuse_links
from consilium.models.cohort import ARCHITECTURES, Cohort

__all__ = ["check_model", "read_site", "relabelled", "save_site"]

ALLOWED = ", ".join(ARCHITECTURES)
SECRET = "secret"
SPLITS = ("train", "validation", "test")
FLOWERS = ("flower",)
"""Folders in a site's state that belong to Flower."""


def save_site(path: Path, name: str, experiment: Experiment, limits: Limits | None = None) -> None:
    """Write a site's settings, and its data next to them.

    Args:
        experiment: the data, the model, the first memory, the device and the threads in it are the site's own;
            `privacy` says what the site discloses (`Privacy.at_site`).
        limits: the most that a server may ask of the site.

    Raises:
        DataError: if the data has several clients and none with the site's name.
        CheckpointError: if the folder holds a link.
        ConfigError: if the folder is the state of another site, or a cohort does not have exactly one architecture, or
            the data does not fit the architecture.
    """
    refuse_links(path.parent, FLOWERS)
    if path.exists():
        try:
            former_name = json.loads(path.read_text())["name"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({type(error).__name__}); choose another --state") from error
        if former_name != name:
            raise ConfigError(
                f"{path.parent} is the state of site {one_line(former_name, 64)}, not {name}; choose another --state"
            )
    federation = experiment.data.load(experiment.seed)
    if name not in federation.clients and len(federation.clients) != 1:
        raise DataError(
            f"the data of site {name} has the clients {', '.join(federation.clients)}: name the site like one of them, "
            "or give data with one client (data.clients 1)"
        )
    client = name if name in federation.clients else next(iter(federation.clients))
    data = federation.clients[client]
    check_labels(data.task.labels)  # the server will check them, too
    experiment.model.check_site(data.train.shape)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = {
        "name": name,
        "fingerprint": hmac.digest(_secret(path.parent), Federation({name: data}).fingerprint.encode(), "sha256").hex(),
        "model": experiment.model.fingerprint,
        "limits": asdict(limits or Limits()),
        **(
            {"scale": asdict(experiment.data.scale(client, experiment.seed))}
            if isinstance(experiment.data, TableData)
            else {}
        ),
        "simple": simple_score(data),
        "experiment": to_json(experiment),
    }
    for file, content in {path: json.dumps(settings).encode(), **_written(path.parent, data)}.items():
        write_atomic(file, content)
        file.chmod(0o600)


def _secret(folder: Path) -> bytes:
    """Return the site's secret, which is created once.

    A digest of the data that is keyed with the secret shows the server whether the data has changed. Without the
    secret, the digest cannot be computed to test a guess of the data.

    Raises:
        ConfigError: if the file does not hold such a secret.
    """
    path = folder / SECRET
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=folder)  # of mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    if len(secret := path.read_bytes()) != 32:
        raise ConfigError(f"{path} has {len(secret)} bytes, not 32; put it back, or remove it and start new runs")
    return secret


def read_site(path: Path) -> tuple[dict[str, Any], ClientData]:
    """Return the settings and the data that `save_site` wrote.

    Raises:
        ConfigError: if they cannot be read.
    """
    try:
        settings, data = json.loads(path.read_text()), json.loads(path.with_name("data.json").read_text())
        task = Task(**{**data["task"], "labels": tuple(data["task"]["labels"])})
        if "train" in data:
            return settings, ClientData(task, *(Split(**data[key]) for key in SPLITS))
        tensors = decode(path.with_name("data.safetensors").read_bytes()).group("data")
        x, y, options = tensors["x"], tensors["y"], {"cut": data["cut"], "augment": data["augment"]}
        return settings, ClientData(task, *(TensorSplit(x, y, tensors[key], task.labels, **options) for key in SPLITS))
    except (OSError, ValueError, KeyError, TypeError, ConsiliumError) as error:
        raise ConfigError(f"the site's settings in {path.parent} cannot be read: {type(error).__name__}") from error


def _written(folder: Path, data: ClientData) -> dict[Path, bytes]:
    """Return file -> content for a site's data."""
    if not isinstance(data.train, TensorSplit):
        return {folder / "data.json": json.dumps(asdict(data)).encode()}
    splits = [split for _, split in data.splits()]
    ends = torch.tensor([len(split) for split in splits]).cumsum(0).tolist()
    tensors = {
        "x": torch.cat([split.x[split.index] for split in splits]),
        "y": torch.cat([split.y[split.index] for split in splits]),
        **{key: torch.arange(start, end) for key, start, end in zip(SPLITS, [0, *ends], ends, strict=False)},
    }
    return {
        folder / "data.safetensors": encode(Payload({"data": tensors})),
        folder / "data.json": json.dumps(
            {"task": asdict(data.task), "cut": data.train.cut, "augment": data.train.augment}
        ).encode(),
    }


def relabelled(data: ClientData, labels: Sequence[str]) -> ClientData:
    """Return the same examples with these labels in this order: the labels of all sites, which include the site's own.

    Raises:
        DataError: if a label of the data is not among them.
    """
    labels, site_labels = tuple(labels), data.task.labels
    if labels == site_labels:
        return data
    if unknown_labels := set(site_labels) - set(labels):
        raise DataError(f"the labels {sorted(unknown_labels)} are not among those of the run: {', '.join(labels)}")
    places = torch.tensor([labels.index(label) for label in site_labels])
    splits = (replace(split, y=places[split.y], labels=labels) for _, split in data.splits())
    return ClientData(replace(data.task, labels=labels), *splits)


def check_model(own: Cohort, theirs: Cohort) -> None:
    """Raise ConfigError if a site's cohort and the server's do not match.

    They may differ in architectures alone, and in none if all clients have the same one. The server may name only
    architectures of the package's table or the site's own cohort: another name may stand for a function that is
    imported, or a model that is fetched, and only the site may decide that.
    """
    if unknown_names := [
        name for name in theirs.architectures if name not in ARCHITECTURES and name not in own.architectures
    ]:
        raise ConfigError(
            f"the server names the architecture {unknown_names[0]!r}; a site builds those of {ALLOWED} alone"
        )
    for name in ("width", "small", "kernel", "padding"):
        if (site_value := getattr(own, name)) != (server_value := getattr(theirs, name)):
            raise ConfigError(
                f"model.{name} is {site_value} at the site and {server_value} at the server; it must be the same"
            )
    if theirs.world == "cohort" and own.path != theirs.path:
        raise ConfigError(
            f"the architecture is {own.path} at the site, and {theirs.path} is the one that the server says all have; "
            "give the server more than one (--model.architectures) to let them differ"
        )
