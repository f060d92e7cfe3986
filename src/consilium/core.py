"""What every method is made of: a Server half and a Client half that meet only through a Payload.

    Algorithm      frozen dataclass with the paper's hyper-parameters; builds the two halves; registered by class name
    Server         configure(round, clients) -> {client: Payload};  aggregate(round, replies) -> metrics
    Client         train(payload, context) -> Payload;  evaluate(payload, context) -> Payload
    Payload        groups of named tensors and plain scalars: all that ever travels
    ClientInfo     what the server may know about a client;  ClientContext: what the client owns
    Sampling       who takes part in a round

Nothing here knows an engine, a model family or a checkpoint format.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch

from consilium.errors import ConfigError, PayloadError, shown
from consilium.params import Like, Params, nbytes
from consilium.work import Work, check_settings, setting

__all__ = [
    "COMMON_REVEALS",
    "Algorithm",
    "Client",
    "ClientContext",
    "ClientId",
    "ClientInfo",
    "ClientState",
    "ExpertMap",
    "ExpertSet",
    "Meet",
    "Payload",
    "Reveal",
    "Sampling",
    "Scalar",
    "Server",
    "Work",
    "counts_of",
    "derive_seed",
    "experts_from_scalars",
    "experts_to_scalars",
    "setting",
]

ClientId = str
ExpertSet = Mapping[str, tuple[int, ...]]
"""Block name -> ids of the experts held there, ascending."""
ExpertMap = dict[ClientId, ExpertSet]
Scalar = int | float | str | bool | list[int] | list[float] | list[str] | list[bool]

CLIENT_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' texts: the same on every machine, engine and order of clients."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Payload:
    """What travels: groups of named tensors, and scalars (numbers, texts, flags and lists of one of these).

    Groups are for instance "params", "control", "usage"; names inside a group are flat names.

    Raises:
        PayloadError: for what no wire could carry: a tensor that is not dense and on the CPU, a dtype outside the
            closed set, a scalar that is None, a dict, a nested or mixed list, or a numpy number.
    """

    groups: Mapping[str, Params] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, params in self.groups.items():
            if not group or "/" in group:
                raise PayloadError(f"group name {shown(group)} must be a text without '/'")
            for key, tensor in params.items():
                if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                    raise PayloadError(f"{shown(f'{group}/{key}')} is not a dense tensor")
                if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
                    raise PayloadError(
                        f"{shown(f'{group}/{key}')} is {tensor.dtype} on {tensor.device}: send a plain CPU dtype"
                    )
        for key, value in self.scalars.items():
            items = value if isinstance(value, list) else [value]
            kinds = {type(item) for item in items}
            if len(kinds) > 1 or not kinds <= {int, float, str, bool}:
                raise PayloadError(
                    f"scalar {shown(key)} = {shown(value)} is not an int, float, str, bool or a list of one of them"
                )

    def group(self, name: str) -> Params:
        """The tensors of a group; an absent group is empty."""
        return dict(self.groups.get(name, {}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor elements, as the meter counts them."""
        return sum(nbytes(params.values()) for params in self.groups.values())


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows about a client.

    Args:
        id: the partition's or site's name, never an engine's node id; `[A-Za-z0-9._-]`, at most 64 characters.
        num_examples: training examples, >= 1.
        task: name of the client's task.
        memory_bytes: what the client's device can hold during training; None: no limit.
        architecture: name of the small model that the client runs, in a cohort; "": the model that all have.
    """

    id: ClientId
    num_examples: int
    task: str
    memory_bytes: int | None = None
    architecture: str = ""

    def __post_init__(self) -> None:
        if not CLIENT_ID.fullmatch(self.id):
            raise ConfigError(f"client id {self.id!r} must match [A-Za-z0-9._-]{{1,64}} without a leading dot")
        if self.num_examples < 1:
            raise ConfigError(f"client {self.id} has {self.num_examples} training examples; leave empty clients out")


@dataclass
class ClientState:
    """What survives a round on the client; the engine keeps it on disk."""

    params: Params = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not (self.params or self.scalars)


@dataclass
class ClientContext:
    """What a client owns while it works.

    Args:
        info: as the server knows it.
        data: the client's data, `consilium.data.task.ClientData` for the methods of this package.
        device: where to train.
        seed: derived from the run's seed, the round and the client's id; the only source of randomness.
        state: what survives; mutate it in place.
        best: with `fit.personal`, the client's best model so far by its validation data; empty: none yet.
        private: parts of the model that are trained here and never sent, whatever the method (`fit.lora.rule`).
        progress: called with (done, total) steps during training.
        work: what the client may spend, counted by whoever spends it; without limits in a simulation.
        round: the number of the round, from 1; 0: not known.
        meet: with other clients at work on the same device: see `Meet`; None: it is alone.
    """

    info: ClientInfo
    data: Any
    device: torch.device
    seed: int
    state: ClientState
    progress: Any = lambda done, total: None
    work: Work = field(default_factory=Work)
    meet: "Meet | None" = None
    best: ClientState = field(default_factory=ClientState)
    private: ClientState = field(default_factory=ClientState)
    round: int = 0


Meet = Callable[[Callable[[Sequence[Any]], Sequence[Any]], Any], Any]
"""(work, job) -> this job's answer of `work(jobs)`, which is done once for all clients that come to the same point."""


def counts_of(held: ExpertSet) -> dict[str, int]:
    """Experts per block."""
    return {block: len(ids) for block, ids in held.items()}


def experts_to_scalars(held: ExpertSet) -> dict[str, Scalar]:
    """An expert set as scalars of a payload: one list of ids per block."""
    return {f"experts/{block}": list(ids) for block, ids in held.items()}


def experts_from_scalars(scalars: Mapping[str, Scalar]) -> dict[str, tuple[int, ...]] | None:
    """The expert set in a payload's scalars; None where it names none: the whole model."""
    prefix = "experts/"
    held = {k[len(prefix) :]: tuple(v) for k, v in scalars.items() if k.startswith(prefix) and isinstance(v, list)}
    return held or None


class Server(ABC):
    """The server half. Owns `params`, the deployable state, and whatever else `state` returns."""

    params: Params
    stage: str = ""
    """Which phase of the method the next round belongs to, for the record."""

    def unable(self, client: ClientInfo) -> str | None:
        """Why this client cannot hold what the method would send it; None if it can."""
        return None

    @abstractmethod
    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        """Choose who takes part in round `round` (from 1) among the able clients, and what each is sent."""

    @abstractmethod
    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        """Merge the replies, consumed one by one in client-id order; works with whoever answered."""

    @abstractmethod
    def deliver(self, client: ClientInfo) -> Payload:
        """The model this client would deploy now: what `Client.evaluate` is given."""

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        """What the tensors of a reply to `sent` must look like, group -> name; a reply with any other is rejected.

        By default the params that were sent; of head rows, a client has those of its own labels, and where the scalar
        "halves" was sent, of adapters the half that it has trained.
        """
        params = sent.group("params").items()
        halves = (".lora_A", ".lora_B") if sent.scalars.get("halves") else ()
        return {
            "params": {
                key: Like.of(t, needed=not key.startswith("head.") and not key.endswith(halves)) for key, t in params
            }
        }

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        """What else keeps a reply, whose tensors are as expected, from being merged; None: nothing."""
        return None

    def state(self) -> Payload:
        """Everything a checkpoint needs; `restore` continues from it to the same bits. Later merging writes into none
        of its tensors: a round that too few answered is undone by it."""
        return Payload({"params": self.params})

    def restore(self, state: Payload) -> None:
        """Take up what `state` returned."""
        self.params = state.group("params")

    def structure(self) -> ExpertMap | None:
        """Who holds which experts, for the record; None where the method has no such map."""
        return None

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        """Latest demand probabilities, client -> block -> expert, for the record."""
        return {}

    def trained(self) -> dict[ClientId, dict[str, list[float]]]:
        """Share of a client's batches that trained each expert when it last took part, client -> block -> expert, for
        the record; {} where a batch trains every expert that its tokens reach."""
        return {}

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call (growing, shrinking, ...), for the record."""
        return []


@dataclass(frozen=True)
class Reveal:
    """What a group or scalar of a reply says about a client's data, and what the server half needs of it.

    Args:
        kind: "update", models and what is computed for them; "size", numbers of examples and tokens; "cost", seconds,
            steps and bytes; "score", losses and scores of the client's data; "labels", values by label; "label
            scores", scores by label; "usage", which experts the client's data asks for.
        need: "exact", as it was computed; "less", also lowered as the site's `privacy` says; "nothing", for the record
            alone. A site that does not tell what is needed refuses the method.
    """

    kind: Literal["update", "size", "cost", "score", "labels", "label scores", "usage"]
    need: Literal["exact", "less", "nothing"] = "nothing"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if getattr(self, name) not in get_args(hint):
                allowed = ", ".join(get_args(hint))
                raise ConfigError(f"{name} of a Reveal is {getattr(self, name)!r}; it must be one of {allowed}")


COMMON_REVEALS: Mapping[str, Reveal] = {
    "params": Reveal("update", "exact"),
    "num_examples": Reveal("size", "exact"),
    "examples": Reveal("size"),
    "cut": Reveal("size"),
    "steps": Reveal("cost"),
    "experts": Reveal("cost"),
    "footprint": Reveal("cost"),
    "seconds_evaluate": Reveal("cost"),
    "train_loss": Reveal("score"),
    "validation": Reveal("score"),
    "perplexity": Reveal("score"),
    "bits_per_byte": Reveal("score"),
    "personal": Reveal("score"),
    "personal_bits_per_byte": Reveal("score"),
    "personal_validation": Reveal("score"),
    "score": Reveal("score"),
    "balanced": Reveal("score"),
    "recall *": Reveal("label scores"),
    "report/test before aggregation": Reveal("score"),
}
"""What the replies of `training.local_round`, `trained`, `local_test` and `tested` say."""


class Client(ABC):
    """The client half; it keeps nothing between calls except `context.state`.

    Attributes:
        reveals: group or scalar -> what it says about the client's data, for all that a reply holds beside
            `COMMON_REVEALS`, which it may change. A name that ends in "*" stands for all that begin so. What is not
            declared does not leave the client: see `disclosure`.
    """

    reveals: Mapping[str, Reveal] = {}

    @abstractmethod
    def train(self, payload: Payload, context: ClientContext) -> Payload:
        """One round's work. The reply's scalars hold `num_examples` and whatever metrics the client reports."""

    @abstractmethod
    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        """Score the delivered model on the client's test data, without training: scalars `score`, `examples`."""


class Algorithm(ABC):
    """A method: hyper-parameters under the paper's symbols, and the two halves built from a `setup.Setup`.

    Subclasses are frozen dataclasses and are registered under their class name as soon as they are defined. A field is
    a `setting`, which says what it costs a client and its range: a server sends it, and a site refuses what it does not
    allow. A subclass that checks more calls `super().__post_init__()` first.
    """

    registry: ClassVar[dict[str, type["Algorithm"]]] = {}
    worlds: ClassVar[tuple[str, ...]] = ("moe", "cohort")
    """What it can train. "moe" is one mixture-of-experts model for all, "cohort" one small model for all, "mixed" small
    models of which every client has its own architecture."""
    dense: ClassVar[bool] = False
    """True if the model of world "moe" may have no experts."""
    merges: ClassVar[bool] = True
    """Whether replies change the server's model through `Setup.mean` alone, so that its rules can take their place."""
    exchanges: ClassVar[bool] = True
    """True if parameters travel at all."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Algorithm.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_settings(self)

    def reads(self) -> frozenset[str]:
        """What the server goes by of single clients' replies beside what it merges, in words: no noise covers that,
        unless it is "usage", which has a mode of its own."""
        return frozenset()

    def chooses_by_memory(self) -> bool:
        """Return whether it gives a client the experts that fit its memory, so that without a limit it gives all."""
        return False

    @abstractmethod
    def server(self, setup: Any) -> Server: ...

    @abstractmethod
    def client(self, setup: Any) -> Client: ...


@dataclass(frozen=True)
class Sampling:
    """Who takes part in a round, and how many replies it takes for the round to count.

    Args:
        clients_per_round: how many clients, >= 1; all of them if there are fewer.
        distinct_tasks: choose that many different tasks first, then one client of each (FedMoE's "Enforced").
        min_clients: replies that must have been accepted, 1..clients_per_round; with fewer the round is abandoned,
            the model stays as it was, and the round is tried again.
        min_fraction: share of the chosen clients whose replies must have been accepted, in [0, 1], likewise.
    """

    clients_per_round: int = 5
    distinct_tasks: bool = False
    min_clients: int = 1
    min_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.clients_per_round < 1:
            raise ConfigError(f"clients_per_round is {self.clients_per_round}; it must be at least 1")
        if not 1 <= self.min_clients <= self.clients_per_round:
            raise ConfigError(
                f"sampling.min_clients is {self.min_clients}; it must be within 1..{self.clients_per_round}, the "
                "clients_per_round"
            )
        if not 0 <= self.min_fraction <= 1:
            raise ConfigError(f"sampling.min_fraction is {self.min_fraction}; it must be within 0..1")

    def quorum(self, selected: int) -> int:
        """Replies without which a round of so many chosen clients does not count."""
        return max(self.min_clients, math.ceil(self.min_fraction * selected - 1e-9))

    def choose(self, clients: Sequence[ClientInfo], round: int, seed: int) -> list[ClientInfo]:
        """The chosen clients in id order; depends on ids, tasks, round and seed alone, not on the order given."""
        rng = torch.Generator().manual_seed(derive_seed(seed, "sampling", round))
        ordered = sorted(clients, key=lambda c: c.id)
        if not self.distinct_tasks:
            picks = torch.randperm(len(ordered), generator=rng)[: self.clients_per_round].tolist()
            return [ordered[i] for i in sorted(picks)]
        tasks = sorted({c.task for c in ordered})
        chosen = []
        for i in torch.randperm(len(tasks), generator=rng)[: self.clients_per_round].tolist():
            group = [c for c in ordered if c.task == tasks[i]]
            chosen.append(group[int(torch.randint(len(group), (1,), generator=rng))])
        return sorted(chosen, key=lambda c: c.id)
