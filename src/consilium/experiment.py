"""The description of an experiment: one frozen dataclass, with conversion to and from JSON."""

import dataclasses
import os
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from consilium import algorithms
from consilium.constraints import Count, Scale, check_settings, check_values, nearest
from consilium.core import Algorithm, ClientInfo, Sampling
from consilium.data.arrays import ImageData, TableData
from consilium.data.causal import check_rows
from consilium.data.code import CodeData
from consilium.data.docstrings import DocstringData
from consilium.data.language import LanguageData
from consilium.data.textfile import TextFileData
from consilium.errors import ConfigError
from consilium.fit import Fit
from consilium.kinds import DataSource, Model
from consilium.machine import cores
from consilium.moe.budget import bytes_of
from consilium.moe.build import ModelSource
from consilium.moe.lora import Lora
from consilium.moe.merging import Merging
from consilium.moe.rules import PAIRWISE
from consilium.plugins import import_plugins
from consilium.privacy import Privacy
from consilium.setup import SETUPS, Setup, setup_for
from consilium.work import MISSING, setting

__all__ = ["Experiment", "Wire", "differences", "from_json", "to_json"]

IN_STEP = 64
"""Small models that a GPU trains at a time, unless `workers` says otherwise."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
algorithms.register_all()
DATA: dict[str, type[DataSource]] = {
    cls.__name__: cls for cls in (CodeData, DocstringData, TextFileData, LanguageData, ImageData, TableData)
}
"""Sources of data by the names of their classes, as saved runs have them; see `register_data`."""
WORLDS = {
    "moe": "one mixture-of-experts model for all",
    "cohort": "one small model for all (--model.architectures with one name)",
    "mixed": "small models that differ",
}


@dataclass(frozen=True)
class Wire:
    """How payloads travel between processes and machines, with the engine "flower".

    Args:
        deadline: seconds that a round's training, and its scoring, may take, > 0; clients that have not answered by
            then are left out.
        enough: replies to a round's training, 1 or more, after which the round stops waiting; 0: wait for all, until
            the deadline. Ask more clients than that (sampling.clients_per_round), and stragglers delay no one; they
            count as missing, and the bits of the result depend on which clients were fast. Not with privacy.noise.
        cap: largest payload that is sent or returned, before compression, e.g. "512MB".
        send: how weights are sent for training: "exact", or the change since the client last received weights, as
            "bf16" or "int8"; the rounding error is added to the next change. The client then trains from the rounded
            weights.
        reply: how trained weights return: "exact", or the change since they were sent, as "bf16" or "int8", with the
            rounding error added to the client's next reply.
        zstd: compress payloads; pays for "int8", hardly for weights.
    """

    deadline: Annotated[float, Interval(gt=0, le=1e8)] = setting(3600.0, "seconds")
    enough: Annotated[int, Interval(ge=0, le=1e12)] = setting(0, "server")
    cap: str = setting("512MB", "bytes")
    send: Literal["exact", "bf16", "int8"] = setting("exact", "free")
    reply: Literal["exact", "bf16", "int8"] = setting("exact", "free")
    zstd: bool = setting(False, "free")

    def __post_init__(self) -> None:
        check_settings(self, "wire.")
        bytes_of(self.cap)


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run.

    Args:
        name: name of the run directory, `[A-Za-z0-9._-]{1,64}` without a leading dot.
        algorithm: the method and its hyper-parameters.
        data: where clients' data comes from.
        model: the mixture-of-experts model; for images and tables (and texts to classify), a cohort of small models.
        fit: local training.
        sampling: who takes part in a round.
        rounds: communication rounds, >= 1; a first stage counts.
        memory: device memory of the clients in id order, cycled ("60MB", "12GiB"); (): no limit.
        layers: weights of the layers with experts when a device's room is divided among them: 2 1 1 1 gives the first
            of four layers twice as many experts as each of the others; (): the same number in every layer.
        evaluate_every: rounds between evaluations of all clients on their test data; the last round is always
            evaluated.
        completions: number of clients for which a simulation keeps completions of a test text, by the models before and
            after the run, for the report. For language models.
        seed: seed of everything random.
        strict: serialize and deserialize every payload, as between machines.
        threads: torch threads.
        workers: clients that train at a time, with the engine "local"; their models must fit into memory together. On
            the CPU each trains in a process with one torch thread; the weights are the same to the bit. On a GPU the
            clients of a cohort train in step, those of one architecture as one computation (see `batched`). 0: for a
            cohort on the CPU the number of cores, or OMP_NUM_THREADS if set, on a GPU 64; otherwise 1.
        device: "cpu", "cuda", "cuda:0".
        engine: "local" runs the clients on this machine, "flower" in processes of Flower's simulation (needs the extra
            "simulation"), which may be spread over machines; the weights are the same to the bit.
        wire: how the engine "flower" sends payloads.
        merging: how the server merges updates: the method's own mean, or rules that tolerate some lying clients.
        privacy: differential privacy of the weights, and how clients disclose their usage of experts.
    """

    name: str = setting(MISSING, "free")
    algorithm: Algorithm
    data: DataSource
    model: Model = field(default_factory=ModelSource)
    fit: Fit = field(default_factory=Fit)
    sampling: Sampling = field(default_factory=Sampling)
    rounds: Count = setting(20, "rounds")
    memory: tuple[str, ...] = setting((), "server")
    layers: tuple[Scale, ...] = setting((), "server")
    evaluate_every: Count = setting(1, "free")
    completions: Annotated[int, Interval(ge=0, le=1e6)] = setting(0, "server")
    seed: int = setting(0, "free")
    strict: bool = setting(False, "server")
    threads: Count = setting(1, "server")
    workers: Annotated[int, Interval(ge=0, le=1e12)] = setting(0, "server")
    device: str = setting("cpu", "server")
    engine: Literal["local", "flower"] = setting("local", "server")
    wire: Wire = field(default_factory=Wire)
    merging: Merging = field(default_factory=Merging)
    privacy: Privacy = field(default_factory=Privacy)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot")
        check_settings(self)
        if self.workers > 1 and self.device == "cpu" and self.threads > 1:
            raise ConfigError(
                f"workers is {self.workers}, which is for one torch thread on the CPU each; threads is {self.threads}"
            )
        if self.workers > 1 and self.device != "cpu" and self.model.shared:
            raise ConfigError(f"workers is {self.workers}: on {self.device} only small models work side by side")
        for text in self.memory:
            bytes_of(text)
        if self.data.gives not in self.model.reads:
            raise ConfigError(
                f"{type(self.data).__name__} cannot feed a {type(self.model).__name__}: texts go to a ModelSource, "
                "images and tables to a Cohort, as do texts to classify if all its architectures are text encoders"
            )
        if self.fit.precision != "float32" and self.model.shared:
            raise ConfigError(f"fit.precision {self.fit.precision} is for small models; use model.dtype bfloat16")
        if self.memory and not self.model.shared:
            raise ConfigError("memory is given, but there is no memory model of small models; leave it at ()")
        if self.layers and len(self.layers) != (blocks := len(self.model.counts)):
            raise ConfigError(
                f"layers is {self.layers}; {self.model.path} has {blocks} layers with experts: give a weight for each"
            )
        if self.model.world not in self.algorithm.worlds:
            raise ConfigError(
                f"{type(self.algorithm).__name__} cannot train {self.model.path}: it is for "
                f"{' and '.join(WORLDS[world] for world in self.algorithm.worlds)}"
            )
        if self.model.dense and not self.algorithm.dense:
            raise ConfigError(
                f"{type(self.algorithm).__name__} cannot train {self.model.path}: it needs a mixture of experts, and "
                "this model has none; consilium upcycle makes one of it"
            )
        form = self.data.form or self.model.form
        if form != self.model.form:
            raise ConfigError(f"the data asks for {form}, the model is set up for {self.model.form}")
        if self.data.gives == "language":
            check_rows(self.fit.rows, plain=self.data.plain)
        if self.wire.enough and self.wire.enough < (quorum := self.sampling.quorum(self.sampling.clients_per_round)):
            raise ConfigError(f"wire.enough is {self.wire.enough}, a round counts with {quorum} answers and more")
        self._check_merging()

    def _check_merging(self) -> None:
        """Raise ConfigError for merging rules and noise that do not work with the method."""
        merging, privacy, method = self.merging, self.privacy, type(self.algorithm).__name__
        rule, lora = self.fit.lora.rule, bool(self.fit.lora.rank)
        if merging.needs > self.sampling.clients_per_round:
            raise ConfigError(
                f"merging.rule {merging.rule} with {merging.attackers} attackers needs {merging.needs} contributors, "
                f"sampling.clients_per_round is {self.sampling.clients_per_round}: nothing would ever change"
            )
        if (privacy.noise or not merging.plain) and not self.algorithm.merges:
            raise ConfigError(
                f"{method}'s server does not merge models alone; merging and privacy.noise are not for it"
            )
        if lora and rule in PAIRWISE and (privacy.noise or merging.rule != "mean"):
            raise ConfigError(
                f"fit.lora.rule {rule!r} is a mean of its own; with merging and privacy take mean, ffa or share_a"
            )
        if lora and rule == "alternate" and privacy.noise:  # alternate would move the half that no client trained
            raise ConfigError("fit.lora.rule 'alternate' is not for privacy.noise; take mean, ffa or share_a")
        if lora and self.fit.lora.ranks == "memory" and not merging.plain:
            raise ConfigError("fit.lora.ranks 'memory' is not for merging, which compares updates of one shape")
        if lora and rule in PAIRWISE and self.algorithm.exchanges and not self.algorithm.merges:
            raise ConfigError(
                f"{method}'s server merges by itself; fit.lora.rule {rule!r} is not for it: take mean, ffa, alternate "
                "or share_a"
            )
        if privacy.noise and self.wire.enough:  # a client's reply may displace another's, which moves the sum twice
            raise ConfigError("wire.enough lets one client take another's place, which privacy.noise does not cover")
        if privacy.noise and not merging.plain:
            raise ConfigError("privacy.noise has its own clipping and mean; leave merging as it is")
        if privacy.noise:
            privacy.check_reads(self.algorithm)
            privacy.sampled(self.sampling, 1)

    @property
    def at_once(self) -> int:
        """Return the number of clients that train at a time, see `workers`; at most those of a round."""
        is_small = not self.model.shared
        if self.device != "cpu":
            default_workers = IN_STEP if is_small else 1
        else:
            thread_setting = os.environ.get("OMP_NUM_THREADS", "")
            core_count = max(int(thread_setting), 1) if thread_setting.isdecimal() else cores()
            default_workers = core_count if is_small and self.threads == 1 else 1
        return min(self.workers or default_workers, self.sampling.clients_per_round)

    def setup(
        self,
        labels: Iterable[tuple[str, Iterable[str]]],
        clients: tuple[ClientInfo, ...] = (),
        shape: tuple[int, ...] = (),
    ) -> Setup:
        """Return the Setup from which both halves of the method are built.

        Args:
            labels: (task, labels), repeated for every client that has them; tasks without labels have no head.
            clients: all of them, on the server's side.
            shape: shape of an image or of a row of a table.
        """
        heads: dict[str, set[str]] = {}
        for task, names in labels:
            if names:
                heads.setdefault(task, set()).update(names)
        sorted_heads = {task: tuple(sorted(names)) for task, names in sorted(heads.items())}
        sampling = self.privacy.sampled(self.sampling, len(clients))
        return setup_for(
            self.model,
            self.fit,
            sampling,
            self.seed,
            sorted_heads,
            clients,
            shape,
            self.merging,
            self.privacy,
            self.rounds,
            self.layers,
        )


def register_data(source: type[DataSource]) -> type[DataSource]:
    """Make a source of data of your own known to saved runs; a decorator.

    Args:
        source: a frozen dataclass, a subclass of `kinds.DataSource`.

    Raises:
        ConfigError: if it lacks something, or has the name of another source.
    """
    missing = [name for name in ("gives", "load") if getattr(source, name, None) in (None, DataSource.load)]
    if missing or not dataclasses.is_dataclass(source):
        raise ConfigError(
            f"data source {source.__name__} lacks {', '.join(missing) or '@dataclass(frozen=True)'}; see "
            "consilium.kinds.DataSource"
        )
    if DATA.get(source.__name__, source).__module__ != source.__module__:
        raise ConfigError(f"there is a data source {source.__name__} already; give yours another name")
    DATA[source.__name__] = source
    return source


def to_json(value: Any) -> Any:
    """Convert a dataclass to JSON, with its class name under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(saved: Mapping[str, Any]) -> Experiment:
    """Load the experiment that `to_json` saved.

    Raises:
        ConfigError: for an unknown type or field, or a value of the wrong type.
    """
    core_classes = (Experiment, Fit, Lora, Sampling, Wire, Merging, Privacy, *SETUPS)
    classes = {c.__name__: c for c in core_classes} | DATA | Algorithm.registry

    def load(value: Any, hint: Any) -> Any:
        if isinstance(value, list):
            return tuple(load(item, None) for item in value)
        if not isinstance(value, Mapping):
            return Path(value) if hint is Path and isinstance(value, str) else value
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in classes:
            if kind is None:
                raise ConfigError(
                    'saved experiment has unknown type None: each part needs a "type", e.g. "type": "Fit"'
                )
            suggestion = nearest(str(kind), classes) or f"known are {', '.join(sorted(classes))}"
            raise ConfigError(
                f"saved experiment has unknown type {kind!r}; {suggestion}; if it is of your own, --import its file"
            )
        hints = typing.get_type_hints(classes[kind])
        names = [field.name for field in dataclasses.fields(classes[kind])]
        for key in value:
            if key not in (*names, "type") and (kind, key) != ("Wire", "quorum"):
                suggestion = nearest(key, names) or f"known are {', '.join(names)}"
                raise ConfigError(f"saved {kind} does not fit this version: it has no field {key!r}; {suggestion}")
        fields = {key: load(item, hints.get(key)) for key, item in value.items() if key != "type"}
        if kind == "Wire" and fields.get("quorum") == 1:  # now sampling.min_clients, with the same default
            del fields["quorum"]
        check_values(classes[kind], fields, f"saved {kind}.")
        try:
            return classes[kind](**fields)
        except TypeError as error:
            raise ConfigError(f"saved {kind} does not fit this version: {error}") from error

    experiment = load(saved, None)
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"saved is {type(experiment).__name__}; give an Experiment, e.g. a run's config.json")
    return experiment


def differences(before: Experiment, now: Experiment, ignored: Collection[str] = ()) -> str:
    """Return the differences between two experiments in one line, "" if there are none.

    Example: "fit.lr was 0.001, is 0.01".

    Args:
        ignored: fields that may differ, e.g. "wire.deadline".
    """
    old_fields, new_fields = flat_fields(to_json(before)), flat_fields(to_json(now))
    changes = [
        f"{name} was {old_fields.get(name, 'absent')!r}, is {new_fields.get(name, 'absent')!r}"
        for name in dict.fromkeys([*old_fields, *new_fields])
        if name not in ignored
        and (name in old_fields, old_fields.get(name)) != (name in new_fields, new_fields.get(name))
    ]
    return "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")


def flat_fields(saved: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a saved experiment into dotted names -> values.

    The names are those of the command's flags ("fit.lr"); a dataclass's own name ("algorithm") stands for its type.
    """
    values_by_name: dict[str, Any] = {}
    for key, value in saved.items():
        name = prefix[:-1] if key == "type" else f"{prefix}{key}"
        values_by_name |= (
            flat_fields(value, f"{name}.") if isinstance(value, Mapping) else {name: value} if name else {}
        )
    return values_by_name


import_plugins()  # This comes last, because the user's own methods use what is defined above.
