"""The client's end: a ClientApp that answers a server's messages with the client half of whatever method it names.

Every message brings the server's experiment as JSON, of which the algorithm, the training and the seed count here;
classes are looked up among the known ones, no code travels. What is the site's own comes from its own settings: a
simulated client takes its partition of the experiment's data; a site's node names a file, `site=".../site.json"`,
with its name, its own data and model and its memory. In the same folder its states survive rounds and restarts, and
lies the model that it was last delivered, for `consilium export`.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from consilium.core import Client, ClientContext, ClientInfo, Payload, Scalar, derive_seed
from consilium.data.task import ClientData, Federation, Split, Task
from consilium.engine import codec
from consilium.engine.checkpoint import KEEP, ClientStore, write_atomic
from consilium.engine.flower.grid import within
from consilium.engine.flower.records import blobs_of, payload_of, to_record
from consilium.engine.judge import diverged
from consilium.engine.rounding import rounded
from consilium.engine.rounds import tested, trained
from consilium.errors import ConfigError, ConsiliumError, DataError, PayloadError
from consilium.experiment import Experiment, from_json, to_json
from consilium.moe.budget import bytes_of

LOST = "engine/lost/"
"""In a client's state: what rounding has taken from its replies; the method does not see it."""

DELIVERED = "delivered.safetensors"
"""In a site's state folder: the payload that was last scored there, with what the server said of the run."""

__all__ = ["DELIVERED", "Site", "client_app", "read_site", "save_site"]


@dataclass(frozen=True)
class Site:
    """A client's own side, as its settings and the server's experiment make it.

    Args:
        info: as the server knows it. data: the client's. client: the method's client half.
        fingerprint: of the data.
        folder: of the client's states for this run; None: where the message says (a simulation).
        device: where to train.
    """

    info: ClientInfo
    data: ClientData
    client: Client
    fingerprint: str
    folder: Path | None
    device: torch.device


@functools.lru_cache(maxsize=16)
def simulated(experiment: str, heads: str, name: str) -> Site:
    """A client of a simulation: its partition of the experiment's own data."""
    made = from_json(json.loads(experiment))
    torch.set_num_threads(made.threads)
    federation = _federation(made)
    if name not in federation.clients:
        raise DataError(f"no client {name!r} in the data; there are {', '.join(list(federation.clients)[:5])}, ...")
    place = list(federation.clients).index(name)
    memory = bytes_of(made.memory[place % len(made.memory)]) if made.memory else None
    return _site(made, heads, name, federation.clients[name], memory, federation.fingerprint, None, place)


@functools.lru_cache(maxsize=1)
def _federation(experiment: Experiment):
    return experiment.data.load(experiment.seed)


@functools.lru_cache(maxsize=4)
def deployed(experiment: str, heads: str, settings: Path, run: str) -> Site:
    """A site of a deployment: algorithm, training and seed are the server's; data, model and memory its own, and its
    way of telling usage where that tells less.

    Args:
        experiment: the server's, as JSON. heads: task -> labels of all sites, as JSON.
        settings: what `save_site` wrote. run: the run's token, a folder beside it.
    """
    given, data = read_site(settings)
    own, name = from_json(given["experiment"]), str(given["name"])
    made = from_json(json.loads(experiment))
    made = replace(made, data=own.data, model=own.model, privacy=made.privacy.stricter(own.privacy))
    torch.set_num_threads(own.threads)
    memory = bytes_of(own.memory[0]) if own.memory else None
    if not run.isalnum():
        raise PayloadError(f"the run's token is {run!r}; it must be letters and digits")
    site = _site(made, heads, name, data, memory, str(given["fingerprint"]), settings.parent / run)
    return replace(site, device=torch.device(own.device))


def save_site(path: Path, name: str, experiment: Experiment) -> None:
    """Write a site's settings, and beside them its data, which every message would otherwise have to read anew.

    Args:
        experiment: of which data, model, the first memory, device, threads and `privacy.usage` are the site's own.

    Raises:
        DataError: if the data is of several clients and none has the site's name.
    """
    federation = experiment.data.load(experiment.seed)
    if name not in federation.clients and len(federation.clients) != 1:
        raise DataError(
            f"the data of site {name} has the clients {', '.join(federation.clients)}: name the site like one of them, "
            "or give data with one client (data.clients 1)"
        )
    data = federation.clients.get(name) or next(iter(federation.clients.values()))
    own = {"name": name, "fingerprint": Federation({name: data}).fingerprint, "experiment": to_json(experiment)}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file, content in ((path, own), (path.with_name("data.json"), asdict(data))):
        write_atomic(file, json.dumps(content).encode())
        file.chmod(0o600)


def read_site(path: Path) -> tuple[dict[str, Any], ClientData]:
    """The settings and the data that `save_site` wrote.

    Raises:
        ConfigError: if they cannot be read.
    """
    try:
        given, data = json.loads(path.read_text()), json.loads(path.with_name("data.json").read_text())
        task = Task(**{**data["task"], "labels": tuple(data["task"]["labels"])})
        return given, ClientData(task, *(Split(**data[key]) for key in ("train", "validation", "test")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the site's settings in {path.parent} cannot be read: {type(error).__name__}") from error


def _site(
    experiment: Experiment,
    heads: str,
    name: str,
    data: ClientData,
    memory: int | None,
    fingerprint: str,
    folder: Path | None,
    place: int = 0,
) -> Site:
    setup = experiment.setup(json.loads(heads).items(), shape=data.train.shape)
    setup.check(data.task)
    return Site(
        info=ClientInfo(name, len(data.train), data.task.name, memory, experiment.model.architecture(place)),
        data=data,
        client=experiment.algorithm.client(setup),
        fingerprint=fingerprint,
        folder=folder,
        device=torch.device(experiment.device),
    )


def _site_of(told: dict[str, Scalar], context: Context) -> Site:
    experiment, heads = str(told["experiment"]), str(told["heads"])
    if "site" in context.node_config:
        return deployed(experiment, heads, Path(str(context.node_config["site"])), str(told["run"]))
    return simulated(experiment, heads, str(told["client"]))


# --- the three kinds of message -------------------------------------------------------------------------------------


def train(message: Message, context: Context) -> RecordDict:
    """One round: the client half trains; its state is kept under the round's number."""
    payload, told = _opened(message)
    site, store, work = _begin(told, context)
    state = work.state
    lost = {key[len(LOST) :]: state.params.pop(key) for key in list(state.params) if key.startswith(LOST)}
    sent = payload.group("params") if told["reply"] != "exact" else {}
    reply, seconds = trained(site.client, payload, work)
    del payload
    rejected = diverged(reply)
    if rejected is None:
        reply, lost = rounded(reply, sent, str(told["reply"]), lost)
        state.params |= {f"{LOST}{key}": tensor for key, tensor in lost.items()}
        store.save(site.info.id, state, int(told["round"]))
    kept = rejected is None and site.info.id in store.versions
    answer = {"rejected": rejected or "", "kept": kept, "seconds": seconds, "round": told["round"]}
    content = to_record(reply if rejected is None else Payload(scalars=reply.scalars), answer, bool(told["zstd"]))
    within(str(told["cap"]), content, site.info.id)
    return content


def evaluate(message: Message, context: Context) -> RecordDict:
    """Score the delivered model on the client's test data."""
    payload, told = _opened(message)
    site, _, work = _begin(told, context)
    for key in [key for key in work.state.params if key.startswith(LOST)]:
        del work.state.params[key]
    answer = tested(site.client, payload, work)
    params = payload.group("params") or work.state.params
    if site.folder is not None and params:
        about = {key: told[key] for key in ("experiment", "round")} | {"score": answer.scalars["score"]}
        scalars = {**payload.scalars, **{f"engine/{key}": value for key, value in about.items()}}
        write_atomic(site.folder.parent / DELIVERED, codec.encode(Payload({"params": params}, scalars)))
    return to_record(answer, {"rejected": ""})


def name(message: Message, context: Context) -> RecordDict:
    """Who this node is: a partition's number, or the site's name."""
    if "site" in context.node_config:
        own = {"name": str(read_site(Path(str(context.node_config["site"])))[0]["name"])}
    else:
        own = {"partition": int(context.node_config["partition-id"])}
    return RecordDict({"engine": ConfigRecord(own)})


def describe(message: Message, context: Context) -> RecordDict:
    """What the server may know about a site: sizes, task, labels, memory; no rows and no counts of labels."""
    site = _site_of(dict(message.content["engine"]), context)
    task = site.data.task
    return RecordDict(
        {
            "engine": ConfigRecord(
                {
                    "name": site.info.id,
                    "task": task.name,
                    "form": task.form,
                    "metric": task.metric,
                    "labels": list(task.labels),
                    "sizes": [len(split) for _, split in site.data.splits()],
                    "memory_bytes": site.info.memory_bytes or 0,
                    "fingerprint": site.fingerprint,
                }
            )
        }
    )


def _opened(message: Message) -> tuple[Payload, dict[str, Scalar]]:
    blobs, scalars, told = blobs_of(message.content)
    return payload_of(blobs.items(), scalars, bytes_of(str(told["cap"]))), told


def _begin(told: dict[str, Scalar], context: Context) -> tuple[Site, ClientStore, ClientContext]:
    """The site, its store at the version that counts, and the context to work in."""
    site, number, version = _site_of(told, context), int(told["round"]), int(told["version"])
    client = site.info.id
    if told["client"] != client:
        raise ConfigError(f"a message for {told['client']} reached {client}")
    store = ClientStore(site.folder or Path(str(told["folder"])), {client: version} if version else {})
    if site.folder is not None:  # a simulation's states are the server's to prune
        store.drop(client, version, number)
        store.prune(oldest=number - KEEP)
    work = ClientContext(
        info=site.info,
        data=site.data,
        device=site.device,
        seed=derive_seed(int(told["seed"]), "client", number, client),
        state=store.load(client),
    )
    return site, store, work


def _answering(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """What goes wrong is told in one line, whole, in place of Flower's report of a crash."""

    @functools.wraps(work)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = work(message, context)
        except (ConsiliumError, OSError, MemoryError) as error:
            content = RecordDict({"failed": ConfigRecord({"reason": f"{type(error).__name__}: {error}"})})
        return Message(content, reply_to=message)

    return answer


client_app = ClientApp()
client_app.train()(_answering(train))
client_app.evaluate()(_answering(evaluate))
client_app.query("name")(_answering(name))
client_app.query("describe")(_answering(describe))
