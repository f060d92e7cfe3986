"""Preparation of an experiment: find its clients, work out its budgets and build its server half."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from consilium import disclosure
from consilium.core import ClientId, ClientInfo, Server
from consilium.data.task import Federation
from consilium.data.tensor import on_device
from consilium.engine.account import Account
from consilium.engine.checkpoint import ClientStore
from consilium.engine.local import LocalEngine
from consilium.engine.rounds import Engine, nobody
from consilium.engine.workers import forked
from consilium.errors import BudgetError, CheckpointError, ConfigError, DataError, first_line
from consilium.experiment import Experiment, differences, from_json, to_json
from consilium.moe.budget import bytes_of
from consilium.setup import Setup
from consilium.versions import versions

log = logging.getLogger(__name__)

__all__ = ["MAY_CHANGE", "Prepared", "check_data_unchanged", "check_unchanged", "prepare"]

MAY_CHANGE = ("rounds", "workers", "wire.deadline", "data.path", "model.path")
"""Settings that may differ when a run is resumed; the contents of the paths must be the same."""


def prepare(experiment: Experiment) -> "Prepared":
    """Find an experiment's clients, work out its budgets and build its server half.

    Nothing is run or written.

    Raises:
        ConsiliumError: if it cannot be run; the message says why.
    """
    return Prepared.of(experiment)


@dataclass
class Prepared:
    """An experiment that is ready to run: its clients are known, its budgets worked out, and its server half built.

    Args:
        partition: the data of each client, in the form of partition.json.
        metrics: task -> metric.
        federation: the clients' data, if it is on this machine.
        roster: the sites behind Flower's nodes, otherwise.
        former: differing package versions of earlier parts of the run.
    """

    experiment: Experiment
    infos: tuple[ClientInfo, ...]
    setup: Setup
    server: Server
    partition: dict[str, Any]
    metrics: dict[str, str]
    federation: Federation | None = None
    roster: Any = None
    former: list[dict[str, str]] = field(default_factory=list)

    @property
    def begun(self) -> dict[str, Any]:
        """Return the description of the run that every checkpoint contains, see `check_unchanged`."""
        return {
            "experiment": to_json(self.experiment),
            "model": self.experiment.model.fingerprint,
            "data": self.partition["fingerprint"],
            "versions": versions(),
        }

    @classmethod
    def of(cls, experiment: Experiment) -> "Prepared":
        """Prepare a simulation, whose data is read here."""
        torch.set_num_threads(experiment.threads)
        check_device(experiment.device)
        if experiment.engine == "flower" and importlib.util.find_spec("flwr") is None:
            raise ConfigError("engine flower needs the package flwr: pip install 'consilium[simulation]'")
        experiment.model.ready()
        federation = experiment.data.load(experiment.seed)
        if not federation.clients:
            raise DataError("no client has any data")
        infos = tuple(
            ClientInfo(
                id=client,
                num_examples=len(data.train),
                task=data.task.name,
                memory_bytes=bytes_of(experiment.memory[i % len(experiment.memory)]) if experiment.memory else None,
                architecture=experiment.model.architecture(i),
            )
            for i, (client, data) in enumerate(federation.clients.items())
        )
        labels = [(data.task.name, data.task.labels) for data in federation.clients.values()]
        partition = federation.partition()
        for info in infos:
            partition["clients"][info.id]["memory_bytes"] = info.memory_bytes
            if info.architecture:
                partition["clients"][info.id]["architecture"] = info.architecture
        metrics = {data.task.name: str(data.task.metric) for data in federation.clients.values()}
        return cls._built(experiment, infos, labels, partition, metrics, federation=federation)

    @classmethod
    def across(
        cls,
        experiment: Experiment,
        roster: Any,
        sites: Sequence[str],
        wait: float,
        token: str,
        came: Callable[[ClientId], None] | None = None,
    ) -> "Prepared":
        """Prepare a deployment from the sites' descriptions; their data stays where it is.

        Args:
            token: names the run to the sites' states.
            came: called with the name of each site when it has connected.
        """
        from consilium.engine.flower import PROTOCOL, describe, one_cohort

        torch.set_num_threads(experiment.threads)
        settings = {"experiment": json.dumps(to_json(experiment)), "heads": "{}", "run": token}
        settings |= {"model": experiment.model.fingerprint, "protocol": PROTOCOL}
        descriptions = describe(roster, sites, settings, wait, came)
        infos = tuple(
            ClientInfo(site, int(d["sizes"][0]), str(d["task"]), int(d["memory_bytes"]) or None, str(d["architecture"]))
            for site, d in descriptions.items()
        )
        labels = [(str(d["task"]), d["labels"]) for d in descriptions.values()]
        clients = {
            site: {
                "task": d["task"],
                "labels": list(d["labels"]),
                "sizes": dict(zip(("train", "validation", "test"), d["sizes"], strict=True)),
                "memory_bytes": int(d["memory_bytes"]) or None,
                "threads": int(d["threads"]),
                **({"architecture": str(d["architecture"])} if d["architecture"] else {}),
            }
            for site, d in descriptions.items()
        }
        fingerprints = json.dumps({site: d["fingerprint"] for site, d in descriptions.items()})
        partition = {
            "clients": clients,
            "skipped": {},
            "fingerprint": hashlib.sha256(fingerprints.encode()).hexdigest(),
            "run": token,
        }
        shape: tuple[int, ...] = ()
        if not experiment.model.shared:
            shape = one_cohort(descriptions)
            partition["shape"] = list(shape)
        metrics = {str(d["task"]): str(d["metric"]) for d in descriptions.values()}
        return cls._built(experiment, infos, labels, partition, metrics, shape=shape, roster=roster)

    @classmethod
    def _built(
        cls,
        experiment: Experiment,
        infos: tuple[ClientInfo, ...],
        labels: Iterable[tuple[str, Iterable[str]]],
        partition: dict[str, Any],
        metrics: dict[str, str],
        shape: tuple[int, ...] = (),
        federation: Federation | None = None,
        roster: Any = None,
    ) -> "Prepared":
        setup = experiment.setup(labels, infos, federation.shape if federation else shape)
        if roster is not None and not experiment.model.shared:  # the sites have chosen their architectures
            architectures = tuple(info.architecture for info in infos)
            setup = replace(setup, model=replace(experiment.model, architectures=architectures))
        for data in federation.clients.values() if federation else ():
            setup.check_data(data)
        if experiment.sampling.min_clients > len(infos):
            raise ConfigError(
                f"sampling.min_clients is {experiment.sampling.min_clients}, there are {len(infos)} clients"
            )
        cohort = (
            min(setup.cohort, len({info.task for info in infos})) if setup.sampling.distinct_tasks else setup.cohort
        )
        if (minimum := experiment.merging.needs) > cohort:
            raise ConfigError(
                f"merging.rule {experiment.merging.rule} with {experiment.merging.attackers} attackers needs {minimum} "
                f"contributors, but a round of this federation has at most {cohort}: nothing would ever change; add "
                "clients, or choose another rule"
            )
        Account(None, experiment, len(infos)).check(0)
        disclosure.check(experiment.algorithm.client(setup), experiment.privacy)
        server = experiment.algorithm.server(setup)
        lacks = {c.id: lack for c in infos if (lack := server.unable(c))}
        # A method that fits its models to the clients may find work even if no client can hold the full model.
        if len(lacks) == len(infos) and not server.configure(1, infos):
            raise BudgetError(nobody(lacks))
        return cls(experiment, infos, setup, server, partition, metrics, federation, roster)

    @contextmanager
    def engine(self, folder: Path, store: ClientStore, progress: Callable[..., None]) -> Iterator[Engine]:
        """Open the engine that carries the payloads, for as long as the rounds go on."""
        experiment = self.experiment
        if self.roster is None and experiment.engine == "local":
            device, count = torch.device(experiment.device), min(experiment.at_once, len(self.infos))
            processes = count if device.type == "cpu" else 1
            engine = LocalEngine(
                server=self.server,
                client=experiment.algorithm.client(self.setup),
                infos=self.infos,
                federation=on_device(self.federation, device),
                store=store,
                seed=experiment.seed,
                device=device,
                strict=experiment.strict,
                sampling=self.setup.sampling,
                progress=progress,
                together=count if processes == 1 else 1,
                privacy=experiment.privacy,
            )
            with forked(processes, engine.work) if processes > 1 else nullcontext() as engine.workers:
                yield engine
            return
        from consilium.engine.flower import FlowerEngine, Roster, simulation

        with nullcontext() if self.roster is not None else simulation(experiment, len(self.infos)) as grid:
            names = [info.id for info in self.infos]
            roster = self.roster or Roster(grid, names, patience=experiment.wire.deadline)
            settings = {
                "experiment": json.dumps(to_json(experiment)),
                "heads": json.dumps(self.setup.heads),
                "run": str(self.partition.get("run", "")),
                "model": experiment.model.fingerprint,
                "folder": str(store.folder.absolute()),
                "seed": experiment.seed,
            }
            wire, sampling = experiment.wire, self.setup.sampling
            yield FlowerEngine(self.server, self.infos, roster, store, wire, settings, folder, progress, sampling)


def check_data_unchanged(begun: Mapping[str, Any], prepared: Prepared) -> None:
    """Compare partition.json of a run with the current data.

    Raises:
        CheckpointError: if the data differs. Another number of threads at a site is a warning.
    """
    old_fingerprint, new_fingerprint = begun.get("fingerprint"), prepared.partition["fingerprint"]
    if old_fingerprint != new_fingerprint:
        raise CheckpointError(
            f"the data has changed since the run began (fingerprint {new_fingerprint[:12]}, "
            f"was {str(old_fingerprint)[:12]}): other packages or another file; start a new run"
        )
    for client, description in prepared.partition["clients"].items():
        threads = begun["clients"][client].get("threads")
        if threads != description.get("threads"):
            log.warning(
                f"site {client} trained with {threads} torch threads, now with {description.get('threads')}: perhaps "
                "to other bits"
            )


def check_unchanged(begun: Mapping[str, Any], prepared: Prepared) -> None:
    """Compare the description of the run in its checkpoint with what is about to continue it.

    Raises:
        CheckpointError: for another setting or model. Other versions of packages are a warning.
    """
    if not begun:  # written by a version without this description
        return
    if changes := differences(from_json(begun["experiment"]), prepared.experiment, MAY_CHANGE):
        raise CheckpointError(
            f"the run was begun with other settings: {changes}; put them back in config.json, or start a new run "
            f"(only {', '.join(MAY_CHANGE)} may change)"
        )
    if begun.get("data", data := prepared.partition["fingerprint"]) != data:
        raise CheckpointError(
            f"the data has changed since the run began (fingerprint {data[:12]}, was {begun['data'][:12]}), and "
            "partition.json with it; start a new run"
        )
    if begun["model"].startswith("sha256:"):
        raise CheckpointError(
            f"the run was begun by an earlier version ({begun['versions'].get('consilium')}), whose fingerprint of the "
            "model left out files such as the chat template: it cannot be compared; resume it with that version, or "
            "start a new run"
        )
    if begun["model"] != (model := prepared.experiment.model.fingerprint):
        raise CheckpointError(
            f"the model has changed since the run began ({model[:19]}, was {begun['model'][:19]}): other "
            "weights, configuration, tokenizer or template; start a new run"
        )
    current_versions = versions()
    old_versions = {
        name: version for name, version in begun["versions"].items() if current_versions.get(name) != version
    }
    if old_versions:
        description = ", ".join(
            f"{name} {version} (now {current_versions.get(name)})" for name, version in old_versions.items()
        )
        log.warning(f"the run was begun with {description}: it goes on, but perhaps to other bits")
        prepared.former += [old_versions] if old_versions not in prepared.former else []


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        if name.startswith(("cuda", "gpu")) and not torch.cuda.is_available():
            raise ConfigError(f"device is {name!r}, but this machine has no CUDA GPU; use --device cpu") from error
        if name.startswith("gpu"):
            raise ConfigError(f"device is {name!r}; a GPU is called cuda, or cuda:N of several") from error
        raise ConfigError(f"device {name!r} cannot be used ({first_line(error)}); use cpu, cuda or cuda:N") from error
