"""The client's end: a ClientApp that answers a server's messages with the client half of the method that they name.

Every message brings the server's experiment as JSON; only its algorithm, training and seed count here. Classes are
looked up among the known ones, and no code travels. The site's own settings provide the rest:

- A simulated client takes its partition of the experiment's data.
- A site's node names a file, `site=".../site.json"` (`engine.flower.site`). It holds the site's name, its own data and
  model (or the architecture of its small model), its memory, and its limits (`Limits`). The site does nothing beyond
  its limits.

The folder of that file keeps the site's states across rounds and restarts, and the model that was last delivered to the
site, for `consilium export`.
"""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from consilium import disclosure
from consilium.core import Client, ClientContext, ClientInfo, Payload, Scalar, Work, derive_seed
from consilium.data.task import ClientData
from consilium.engine import codec
from consilium.engine.checkpoint import KEEP, ClientStore, remove_unfinished, write_atomic
from consilium.engine.flower.grid import within
from consilium.engine.flower.held import Held
from consilium.engine.flower.limits import Limits, check_texts, is_run, prune_runs, size_of
from consilium.engine.flower.offered import piece, site_name
from consilium.engine.flower.records import SAID, TOLD, blobs_of, checked, parsed, payload_of, stamp, to_record
from consilium.engine.flower.site import check_model, read_site, relabelled
from consilium.engine.judge import diverged
from consilium.engine.rounding import rounded
from consilium.engine.rounds import tested, trained
from consilium.engine.starting import started
from consilium.errors import ConfigError, ConsiliumError, DataError, PayloadError
from consilium.escape import one_line
from consilium.experiment import Experiment, from_json
from consilium.logs import start_from_environment
from consilium.moe.budget import bytes_of, human
from consilium.privacy import Privacy

log = logging.getLogger(__name__)

LOST = "engine/lost/"
"""Prefix of the rounding errors of a client's replies in its state; the method does not see them."""

DELIVERED, OWN = "delivered.safetensors", "own"
"""Names in a site's state folder. The file `DELIVERED` holds the payload that was last scored there, with the server's
description of the run. If the payload is not the whole model, its group `OWN` holds the parameters of the state that
it was scored with, and the scalars of that state are named `own/...`."""

__all__ = ["DELIVERED", "OWN", "Site", "client_app"]


@dataclass(frozen=True)
class Site:
    """The client's own side of a run, made from its settings and the server's experiment.

    Args:
        info: the client as the server knows it.
        data: the client's data.
        client: the method's client half.
        fingerprint: fingerprint of the data.
        privacy: settings for what the client may disclose.
        folder: folder of the client's states for this run; None: the folder that the message names (a simulation).
        device: device to train on.
        rounds: number of rounds of the whole run.
        limits: the site's own limits; None: no limits (a simulation).
        simple: score of a simple model that the site trained alone (`simple_score`), which the server is not told.
    """

    info: ClientInfo
    data: ClientData
    client: Client
    fingerprint: str
    privacy: Privacy
    folder: Path | None
    device: torch.device
    rounds: int
    limits: Limits | None = None
    simple: Mapping[str, Any] | None = None


@functools.lru_cache(maxsize=16)
def simulated(experiment: str, heads: str, name: str) -> Site:
    """Return a client of a simulation, with its partition of the experiment's own data."""
    parsed_experiment = from_json(json.loads(experiment))
    torch.set_num_threads(parsed_experiment.threads)
    federation = _federation(parsed_experiment)
    if name not in federation.clients:
        raise DataError(f"no client {name!r} in the data; there are {', '.join(list(federation.clients)[:5])}, ...")
    position = list(federation.clients).index(name)
    memory = (
        bytes_of(parsed_experiment.memory[position % len(parsed_experiment.memory)])
        if parsed_experiment.memory
        else None
    )
    data, architecture = federation.clients[name], parsed_experiment.model.architecture(position)
    return _site(parsed_experiment, heads, name, data, memory, federation.fingerprint, None, architecture)


@functools.lru_cache(maxsize=1)
def _federation(experiment: Experiment):
    return experiment.data.load(experiment.seed)


@functools.lru_cache(maxsize=4)
def deployed(experiment: str, heads: str, settings: Path, run: str, model: str) -> Site:
    """Return a site of a deployment.

    The algorithm, the training and the seed are the server's. The data, the model and the memory are the site's own,
    and so is `privacy` where the site discloses less.

    Args:
        experiment: the server's experiment, as JSON.
        heads: task -> labels of all sites, as JSON.
        settings: the file that `save_site` wrote.
        run: the run's token, which names a folder next to the settings.
        model: fingerprint of the server's model.

    Raises:
        ConfigError: for a request beyond the site's limits, a model other than the site's, or a method that needs what
            the site does not disclose.
    """
    site_settings, data = read_site(settings)
    site_experiment, name = from_json(site_settings["experiment"]), str(site_settings["name"])
    limits = Limits(**site_settings.get("limits", {}))
    check_texts(experiment, heads)
    server_experiment = from_json(parsed("experiment", experiment))
    limits.check(server_experiment, len(data.train))
    site_model = str(site_settings.get("model", ""))
    # They are compared if both are of one kind: a directory's files, or a name on the hub.
    if model[:4] == site_model[:4] and model != site_model:
        raise ConfigError(
            f"the server's model is {model[:80]}, this site's is {site_model[:80]}: --model.path must be the same files"
        )
    is_cohort = not (site_experiment.model.shared or server_experiment.model.shared)
    privacy = server_experiment.privacy.at_site(site_experiment.privacy)
    merged_experiment = replace(
        server_experiment,
        data=site_experiment.data,
        model=server_experiment.model if is_cohort else site_experiment.model,
        privacy=privacy,
        device=site_experiment.device,
    )
    if is_cohort:
        check_model(site_experiment.model, server_experiment.model)
        data = relabelled(data, parsed("heads", heads).get(data.task.name, data.task.labels))
    torch.set_num_threads(site_experiment.threads)
    memory = bytes_of(site_experiment.memory[0]) if site_experiment.memory else None
    if not is_run(run):
        raise PayloadError(one_line(f"the run's token is {run!r}; it must be up to 64 letters and digits"))
    architecture = site_experiment.model.architecture(0)
    site = _site(
        merged_experiment,
        heads,
        name,
        data,
        memory,
        str(site_settings["fingerprint"]),
        settings.parent / run,
        architecture,
    )
    return replace(site, limits=limits, simple=site_settings.get("simple"))


def _site(
    experiment: Experiment,
    heads: str,
    name: str,
    data: ClientData,
    memory: int | None,
    fingerprint: str,
    folder: Path | None,
    architecture: str,
) -> Site:
    task = data.task
    known_heads = parsed("heads", heads).items() or [(task.name, task.labels)]
    setup = experiment.setup(known_heads, shape=data.train.shape)
    setup.check(data.task)
    client = experiment.algorithm.client(setup)
    disclosure.check(client, experiment.privacy)
    return Site(
        info=ClientInfo(name, len(data.train), data.task.name, memory, architecture),
        data=data,
        client=client,
        fingerprint=fingerprint,
        privacy=experiment.privacy,
        folder=folder,
        device=torch.device(experiment.device),
        rounds=experiment.rounds,
    )


def _site_of(told: dict[str, Scalar], context: Context) -> Site:
    experiment, heads = str(told["experiment"]), str(told["heads"])
    if "site" in context.node_config:
        settings = Path(str(context.node_config["site"]))
        return deployed(experiment, heads, settings, str(told["run"]), str(told["model"]))
    return simulated(experiment, heads, str(told["client"]))


# --- the three kinds of message -------------------------------------------------------------------------------------


def train(message: Message, context: Context) -> RecordDict:
    """Train in one round, and keep the client's state under the round's number."""
    payload, metadata, (site, store, work) = _opened(message, context)
    if metadata["hold"]:
        bases = Held((site.folder or Path(str(metadata["folder"])).parent) / "received")
        whole_payload = bases.received(site.info.id, int(metadata["round"]), payload, str(metadata["base"]))
        if whole_payload is None:
            return RecordDict({"resend": ConfigRecord({})})
        payload = whole_payload
    state = work.state
    rounding_errors = {key[len(LOST) :]: state.params.pop(key) for key in list(state.params) if key.startswith(LOST)}
    sent = payload.group("params") if metadata["reply"] != "exact" else {}
    reply, seconds = trained(site.client, payload, work, site.privacy)
    del payload
    rejection, has_state = diverged(reply), False
    if rejection is None:
        reply, rounding_errors = rounded(reply, sent, str(metadata["reply"]), rounding_errors)
        state.params |= {f"{LOST}{key}": tensor for key, tensor in rounding_errors.items()}
        has_state = store.write(site.info.id, state, int(metadata["round"]))
    answer = {"rejected": rejection or "", "kept": has_state, "seconds": seconds, **stamp(metadata)}
    reset_reason = store.reset.get(site.info.id, "")
    answer["reset"] = reset_reason and disclosure.without_paths(reset_reason, _private(context))
    content = to_record(reply if rejection is None else Payload(scalars=reply.scalars), answer, bool(metadata["zstd"]))
    within(str(metadata["cap"]), content, site.info.id)
    if rejection is None:
        loss = reply.scalars.get("train_loss")
        line = f"round {metadata['round']} of {site.rounds}: trained"
        line += f", loss {loss:.3f}" if isinstance(loss, float) else ""
        sent = sum(len(array.data) for array in content["payload"].values())
        _say(site, f"{line}; received {human(_size(message))}, sent {human(sent)}, {seconds:.1f} s")
    else:
        _say(site, f"round {metadata['round']} of {site.rounds}: not sent, {rejection}")
    return content


def evaluate(message: Message, context: Context) -> RecordDict:
    """Score the delivered model on the client's test data."""
    payload, metadata, (site, _, work) = _opened(message, context)
    for key in [key for key in work.state.params if key.startswith(LOST)]:
        del work.state.params[key]
    disclosed_answer, answer = tested(site.client, payload, work, site.privacy)
    if site.folder is not None:
        description = {key: metadata[key] for key in ("experiment", "heads", "round")} | {
            "score": answer.scalars["score"]
        }
        scalars = {**payload.scalars, **{f"engine/{key}": value for key, value in description.items()}}
        groups = dict(payload.groups)
        if site.info.architecture or not payload.group("params"):
            groups[OWN] = work.state.params
            scalars |= {f"{OWN}/{key}": value for key, value in work.state.scalars.items()}
        write_atomic(site.folder.parent / DELIVERED, codec.encode(Payload(groups, scalars)))
        score = answer.scalars["score"]
        line = (
            f"round {metadata['round']} of {site.rounds}: the delivered model scores {score:.3f} on the test data here"
        )
        if site.simple:
            line += f" ({site.simple['name']}, trained on this site's data alone: {site.simple['score']:.3f})"
        _say(site, f"{line}; received {human(_size(message))}")
        if int(metadata["round"]) >= site.rounds:
            _say(site, f"the run is done: `consilium export {site.folder.parent} --out DIR` takes the model away")
    return to_record(disclosed_answer, {"rejected": ""})


def name(message: Message, context: Context) -> RecordDict:
    """Return the identity of this node: a partition's number, or the site's name."""
    if "site" in context.node_config:
        identity = {"name": site_name(Path(str(context.node_config["site"])))}
    else:
        identity = {"partition": int(context.node_config["partition-id"])}
    return RecordDict({"engine": ConfigRecord(identity)})


def package(message: Message, context: Context) -> RecordDict:
    """Return one piece of the file that this site offers; nothing else of the site is read."""
    metadata = message.content.config_records.get("engine", {})
    if "site" not in context.node_config:
        raise PayloadError("a simulation offers no package")
    return RecordDict({"engine": ConfigRecord(piece(Path(str(context.node_config["site"])), metadata.get("offset")))})


def describe(message: Message, context: Context) -> RecordDict:
    """Return what the server may know about a site.

    The description has its sizes, task, labels and memory, the architecture of its small model, the shape of its
    examples, and its number of torch threads. It has no rows and no counts of labels. The digest of the data is keyed
    with a secret of the site.
    """
    site = _site_of(checked(dict(message.content.config_records.get("engine", {})), SAID), context)
    _say(site, f"connected; a run of {site.rounds} rounds asks who is here")
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
                    "architecture": disclosure.without_paths(site.info.architecture),
                    "shape": list(site.data.train.shape),
                    "fingerprint": site.fingerprint,
                    "threads": torch.get_num_threads(),
                }
            )
        }
    )


def _opened(
    message: Message, context: Context
) -> tuple[Payload, dict[str, Scalar], tuple[Site, ClientStore, ClientContext]]:
    """Return the payload, the message's metadata, and the site, store and context that work on it.

    Nothing is decoded that a site's limits do not allow.
    """
    blobs, scalars, metadata = blobs_of(message.content)
    session = _begin(checked(metadata, TOLD), context)
    if limits := session[0].limits:
        limits.check_bytes(sum(map(len, blobs.values())) + size_of(scalars))
        metadata = {**metadata, "cap": limits.cap(str(metadata["cap"]))}
    return payload_of(blobs, scalars, bytes_of(str(metadata["cap"]))), metadata, session


def _begin(told: dict[str, Scalar], context: Context) -> tuple[Site, ClientStore, ClientContext]:
    """Return the site, its store at the version that counts, and the context to work in."""
    site, number, version = _site_of(told, context), int(told["round"]), int(told["version"])
    client = site.info.id
    if told["client"] != client:
        raise ConfigError(one_line(f"a message for {told['client']} reached {client}"))
    if site.limits:
        site.limits.check_round(number)
    store = ClientStore(site.folder or Path(str(told["folder"])), {client: version} if version else {})
    deadline = float(told["deadline"])
    if not 0 < deadline < math.inf:
        raise PayloadError(f"the server says deadline {deadline}; it must be a number of seconds greater than 0")
    budget = Work(deadline=deadline)
    if site.folder is not None and site.limits:  # the server prunes a simulation's states
        remove_unfinished(site.folder)
        store.drop(client, version, number)
        store.prune(oldest=number - KEEP)
        prune_runs(site.folder.parent, site.folder.name, site.limits.days, bytes_of(site.limits.state))
        budget = site.limits.work(deadline, site.info.memory_bytes, site.device)
    work = ClientContext(
        info=site.info,
        data=site.data,
        device=site.device,
        seed=derive_seed(int(told["seed"]), "client", number, client),
        state=store.load(client) if site.folder is None else store.load_or_reset(client),
        work=budget,
        round=number,
    )
    return site, store, work


def _say(site: Site, text: str) -> None:
    """Log a line of progress at a site; clients of a simulation log none."""
    if site.folder is not None:
        log.info("%s: %s", site.info.id, one_line(text, 500))


def _size(message: Message) -> int:
    return sum(len(array.data) for array in message.content["payload"].values())


def _answering(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Wrap a handler so that it answers an error in one whole line, in place of Flower's report of a crash."""

    @functools.wraps(work)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = work(message, context)
        except Exception as error:  # Flower would send its whole text
            log.warning("this site could not do what the server asked", exc_info=True)
            reason = one_line(disclosure.reason(error, _private(context)))
            content = RecordDict({"failed": ConfigRecord({"reason": reason})})
        return Message(content, reply_to=message)

    return answer


def _private(context: Context) -> list[object]:
    """Return the paths that a site's settings name."""
    if "site" not in context.node_config:
        return []
    settings = Path(str(context.node_config["site"]))
    with contextlib.suppress(ConsiliumError, OSError, ValueError, KeyError, TypeError):
        experiment = from_json(json.loads(settings.read_text())["experiment"])
        model = [experiment.model.path] if Path(experiment.model.path).exists() else []
        return [settings.parent, getattr(experiment.data, "path", None), *model]
    return [settings.parent]


start_from_environment()
started()  # everything is imported: the next client process of this site may start
client_app = ClientApp()
client_app.train()(_answering(train))
client_app.evaluate()(_answering(evaluate))
client_app.query("name")(_answering(name))
client_app.query("package")(_answering(package))
client_app.query("describe")(_answering(describe))
