"""The model that a client would deploy at the end of a run: the weights that its last score belongs to."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consilium.core import ClientInfo, ClientState, ExpertSet, Payload, experts_from_scalars
from consilium.data.task import ClientData
from consilium.engine.checkpoint import ClientStore, load_checkpoint
from consilium.engine.codec import decode
from consilium.engine.rounds import PRIVATE, taken
from consilium.errors import CheckpointError, ConfigError, PayloadError
from consilium.experiment import Experiment, from_json
from consilium.inside import refuse_links
from consilium.moe.gates import Gates, absent_rows, gates_from_scalars
from consilium.params import Params
from consilium.rundir import SITES, RunDirectory
from consilium.setup import Setup

__all__ = ["Deployed", "Finished", "delivered", "of_run", "of_site"]


@dataclass(frozen=True)
class Deployed:
    """A mixture of experts as a client would deploy it, or the global one, with the facts for its card.

    Args:
        experiment: experiment of the run, with the model at its location on this machine.
        client: name of the client; "": the global model.
        labels: task -> labels, of the heads that are included; {}: no heads.
        params: flat names -> tensors; with `fit.lora` adapters, router rows and head rows.
        held: experts per block; None: all.
        gates: scale of the experts' gates.
        scores: task -> (metric, score in [0, 1]) on test data; for the global model, the mean over the task's clients.
        sizes: split -> examples; for the global model, of all clients together.
        clients: number of clients of the whole run.
        rounds: number of rounds of the run.
        privacy: privacy that was spent, as the summary records it; {}: nothing, or it is not known here.
        notes: data that was left out when it was read, and labels that the client does not answer in.
    """

    experiment: Experiment
    client: str
    labels: Mapping[str, tuple[str, ...]]
    params: Params
    held: ExpertSet | None
    scores: Mapping[str, tuple[str, float | None]]
    sizes: Mapping[str, int]
    clients: int
    rounds: int
    privacy: Mapping[str, Any] = field(default_factory=dict)
    gates: Gates = field(default_factory=Gates)
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Return the kind of use: "classification", "text-to-text", "conversation" or "document" (continues a text)."""
        data = self.experiment.data
        if data.gives == "language":
            return "document" if data.plain else "conversation"
        return self.experiment.model.form


@dataclass(frozen=True)
class Finished:
    """A finished run, read from its directory.

    No client's data is needed, except that small models need the shape of an example.

    Args:
        partition: as in the run directory.
        summary: as in the run directory.
        setup: setup with all clients.
        store: the clients' committed states.
    """

    folder: Path
    experiment: Experiment
    partition: Mapping[str, Any]
    summary: Mapping[str, Any]
    setup: Setup
    store: ClientStore
    away: bool
    state: Payload = field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> "Finished":
        """Read a finished run.

        Raises:
            CheckpointError: if the run has not finished, or the folder is not a run.
            ConfigError: if the run's small models are at its sites.
        """
        config = RunDirectory(folder).config()
        if config["status"] != "finished":
            advice = "start `consilium server` again" if config.get("data") == SITES else f"`consilium resume {folder}`"
            raise CheckpointError(f"{folder} has not finished (it is {config['status']}): {advice} to go on with it")
        partition, summary = (_read(folder / name) for name in ("partition.json", "summary.json"))
        checkpoint = load_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{folder / 'checkpoints'} is empty: the weights are gone, run it anew")
        experiment = from_json(config["experiment"])
        infos = tuple(
            ClientInfo(
                name, entry["sizes"]["train"], entry["task"], entry.get("memory_bytes"), entry.get("architecture", "")
            )
            for name, entry in partition["clients"].items()
        )
        labels = [(client_entry["task"], client_entry["labels"]) for client_entry in partition["clients"].values()]
        is_shared, at_sites = experiment.model.shared, config.get("data") == SITES
        if at_sites and not is_shared:
            raise ConfigError(f"the small models of {folder} are at its sites: export them there, from their --state")
        setup = experiment.setup(labels, infos, () if is_shared else experiment.data.load(experiment.seed).shape)
        store = ClientStore(folder / "clients", checkpoint[2])
        return cls(folder, experiment, partition, summary, setup, store, at_sites, checkpoint[1])

    def server(self) -> Any:
        """Return the server half as it ended."""
        server = self.experiment.algorithm.server(self.setup)
        server.restore(self.state)
        return server

    def name(self, client: str) -> str:
        """Return the name of a client by its id, or the id if it has no other name."""
        return (self.partition.get("names") or {}).get(client, client)

    def notes(self, client: str | None) -> tuple[str, ...]:
        """Return the notes on the reading of the data; of the notes on clients' own labels, only those of `client`."""
        notes = self.partition.get("notes") or []
        prefix = f"{self.name(client)} answers in " if client else "\0"
        return tuple(note for note in notes if " answers in " not in note or note.startswith(prefix))

    def info(self, client: str) -> ClientInfo:
        """Return the client with a name or id.

        Raises:
            ConfigError: for an unknown client, or a client that can hold no model.
        """
        infos = {self.name(info.id): info for info in self.setup.clients}
        client = self.name(client)
        if client not in infos:
            matches = difflib.get_close_matches(client, infos, n=1)
            hint = f"; did you mean {matches[0]}?" if matches else ""
            raise ConfigError(f"{self.folder} has no client {client!r}; it has {', '.join(infos)}{hint}")
        if reason := self.summary["clients"][infos[client].id]["reason"]:
            raise ConfigError(f"there is no model for {client}: it {reason}")
        return infos[client]


def of_run(run: Finished, client: str | None) -> Deployed:
    """Return the model that `client` would deploy after the last round of a finished run; None: the global model.

    Raises:
        ConfigError: for an unknown client (naming all), or if there is no such model.
    """
    server, summary, client_entries = run.server(), run.summary, run.partition["clients"]
    metrics = {task: (values["metric"], values["score"]) for task, values in summary["tasks"].items()}
    name = type(run.experiment.algorithm).__name__
    if client is None:
        if run.experiment.fit.lora.rank and run.experiment.fit.lora.rule == "share_a":
            raise ConfigError(
                f"with fit.lora.rule share_a there is no global model; name a client: {', '.join(client_entries)}"
            )
        if not server.params:
            raise ConfigError(
                f"{name} has no global model; name a client, --client: {', '.join(map(run.name, client_entries))}"
            )
        labels, params, experts, scores, members = run.setup.heads, server.params, None, metrics, list(client_entries)
        gates = Gates()
    else:
        info = run.info(client)
        client = info.id
        payload = server.deliver(info)
        experts = experts_from_scalars(payload.scalars)
        shared_a = run.experiment.fit.lora.rank and run.experiment.fit.lora.rule == "share_a"
        if (not payload.groups or shared_a) and run.away:
            raise ConfigError(
                f"{name} keeps the model of {run.name(client)}, or a part of it, at the site: export it there, from "
                "its --state"
            )
        state = ClientState() if run.away else run.store.load(client)
        params = _params(payload, state, run.setup)
        if not params:
            payload = Payload(run.setup.sub_moe(run.setup.initial_params(), info.task, experts).groups, payload.scalars)
            params = payload.group("params")
        gates = _gates(run.experiment, payload, params)
        labels = {info.task: tuple(client_entries[client]["labels"])} if client_entries[client]["labels"] else {}
        scores, members = {info.task: (metrics[info.task][0], summary["clients"][client]["test"])}, [client]
    params = run.experiment.model.round(params)
    sizes = {
        key: sum(client_entries[member]["sizes"][key] for member in members) for key in ("train", "validation", "test")
    }
    privacy = summary.get("privacy", {})
    return Deployed(
        run.experiment,
        run.name(client) if client else "",
        labels,
        params,
        experts,
        scores,
        sizes,
        len(client_entries),
        summary["rounds"],
        privacy,
        gates,
        run.notes(client),
    )


def delivered(folder: Path) -> tuple[dict[str, Any], ClientData, Payload, dict[str, Any]]:
    """Return a site's settings and data, the payload that it was last delivered, and the metadata of that payload.

    Args:
        folder: the state folder of the site.

    Raises:
        ConfigError: if the server has not yet had the site's model scored.
        CheckpointError: if the payload cannot be read.
    """
    from consilium.engine.flower import DELIVERED, read_site
    from consilium.engine.flower.site import FLOWERS

    refuse_links(folder, FLOWERS)
    settings, data = read_site(folder / "site.json")
    try:
        payload = decode((folder / DELIVERED).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no model yet: a site gets one when the server has it scored, in the last round at the latest"
        ) from error
    except PayloadError as error:
        raise CheckpointError(f"{folder / DELIVERED} cannot be read: {error}") from error
    return (
        settings,
        data,
        payload,
        {key[7:]: value for key, value in payload.scalars.items() if key.startswith("engine/")},
    )


def of_site(given: dict[str, Any], data: ClientData, payload: Payload, told: dict[str, Any]) -> Deployed:
    """Return the mixture of experts that a site was `delivered`.

    Raises:
        ConfigError: if there is none yet.
    """
    from consilium.engine.flower import OWN

    if not any(payload.groups.values()):
        raise ConfigError(f"{given['name']} has no model yet: with its method a site has none before it has trained")
    site_experiment = from_json(given["experiment"])
    # The server's settings count, and data and model are where the site has them.
    experiment = replace(
        from_json(json.loads(str(told["experiment"]))), data=site_experiment.data, model=site_experiment.model
    )
    labels = {data.task.name: data.task.labels} if data.task.labels else {}
    setup = experiment.setup([(data.task.name, data.task.labels)])
    params = _params(payload, ClientState(payload.group(OWN)), setup)
    experts = experts_from_scalars(payload.scalars)
    return Deployed(
        experiment=experiment,
        client=str(given["name"]),
        labels=labels,
        params=site_experiment.model.round(params),
        held=experts,
        scores={data.task.name: (data.task.metric, float(told["score"]))},
        sizes={key: len(split) for key, split in data.splits()},
        clients=0,
        rounds=int(told["round"]),
        gates=_gates(experiment, payload, params),
    )


def _params(payload: Payload, state: ClientState, setup: Setup) -> Params:
    """Return the delivered weights, or those that the client keeps, with the halves of adapters that are never sent.

    Weights that an engine has put into the client's state are left out.
    """
    client_params = {key: tensor for key, tensor in state.params.items() if not key.startswith("engine/")}
    params = payload.group("base") | (payload.group("params") or client_params)
    return setup.both_halves(params, taken(state, PRIVATE).params) if params else params


def _gates(experiment: Experiment, payload: Payload, params: Params) -> Gates:
    """Return the scale of the gates; a client that keeps its model keeps the rows of absent experts with it."""
    experts = experts_from_scalars(payload.scalars)
    rows = payload.group("router") or (absent_rows(params, experts) if experts else {})
    return gates_from_scalars(experiment.fit.gates, payload.scalars, rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__})") from error
