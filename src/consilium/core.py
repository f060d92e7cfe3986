"""The interface of every method: a Server half and a Client half that communicate only through a Payload.

    Algorithm      frozen dataclass with the paper's hyper-parameters; builds the two halves; registered by class name
    Server         configure(round, clients) -> {client: Payload};  aggregate(round, replies) -> metrics
    Client         train(payload, context) -> Payload;  evaluate(payload, context) -> Payload
    Payload        groups of named tensors and plain scalars: all that ever travels
    ClientInfo     what the server may know about a client;  ClientContext: what the client owns
    Sampling       who takes part in a round

This module does not depend on any engine, model family or checkpoint format.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from consilium.constraints import PositiveInt, Share, check_settings, forbid
from consilium.errors import ConfigError, PayloadError, shown
from consilium.params import Like, Params, nbytes
from consilium.work import Work, setting

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
    """Derive a 63-bit seed from the parts' texts; it does not depend on machine, engine or order of clients."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Payload:
    """A message between server and client: groups of named tensors, and scalars.

    Scalars are numbers, texts, flags, or lists of one of these.

    Groups are for instance "params", "control", "usage"; names inside a group are flat.

    Raises:
        PayloadError: for values that cannot be sent: a tensor that is not dense or not on the CPU, a dtype outside the
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
        """Return the tensors of a group; an absent group is empty."""
        return dict(self.groups.get(name, {}))

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensor elements, as the meter counts them."""
        return sum(nbytes(params.values()) for params in self.groups.values())


@dataclass(frozen=True)
class ClientInfo:
    """The server's description of a client.

    Args:
        id: the partition's or site's name, never an engine's node id; `[A-Za-z0-9._-]`, at most 64 characters.
        num_examples: training examples, >= 1.
        task: name of the client's task.
        memory_bytes: memory available on the client's device during training; None: no limit.
        architecture: name of the client's small model, in a cohort; "": all clients have the same model.
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
    """A client's state that persists between rounds; the engine keeps it on disk."""

    params: Params = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Return True if there is nothing to keep."""
        return not (self.params or self.scalars)


@dataclass
class ClientContext:
    """The local resources of a client while it works.

    Args:
        info: the server's description of the client.
        data: the client's data, `consilium.data.task.ClientData` for the methods of this package.
        device: where to train.
        seed: derived from the run's seed, the round and the client's id; the only source of randomness.
        state: persists between rounds; mutate it in place.
        best: with `fit.personal`, the client's best model so far by its validation data; empty: none yet.
        private: parts of the model that are trained here and never sent, whatever the method (`fit.lora.rule`).
        progress: called with (done, total) steps during training.
        work: the client's limits and how much of them is spent; the code that spends also counts. No limits in a
            simulation.
        round: the number of the round, from 1; 0: not known.
        meet: joins the work of other clients on the same device, see `Meet`; None: the client works alone.
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
"""A function (work, job) -> this job's answer of `work(jobs)`; `work` is called once for all clients at that point."""


def counts_of(held: ExpertSet) -> dict[str, int]:
    """Return the number of experts per block."""
    return {block: len(ids) for block, ids in held.items()}


def experts_to_scalars(held: ExpertSet) -> dict[str, Scalar]:
    """Encode an expert set as scalars of a payload: one list of ids per block."""
    return {f"experts/{block}": list(ids) for block, ids in held.items()}


def experts_from_scalars(scalars: Mapping[str, Scalar]) -> dict[str, tuple[int, ...]] | None:
    """Decode the expert set in a payload's scalars; return None if it names no experts, which means the whole model."""
    prefix = "experts/"
    experts = {k[len(prefix) :]: tuple(v) for k, v in scalars.items() if k.startswith(prefix) and isinstance(v, list)}
    return experts or None


class Server(ABC):
    """The server half; it owns `params`, the deployable state, and everything else that `state` returns."""

    params: Params
    stage: str = ""
    """The phase of the method to which the next round belongs, for the record."""

    def unable(self, client: ClientInfo) -> str | None:
        """Return the reason why this client cannot hold what the method would send it, or None if it can."""
        return None

    @abstractmethod
    def configure(self, round: int, clients: Sequence[ClientInfo]) -> dict[ClientId, Payload]:
        """Choose who takes part in round `round` (from 1) among the able clients, and what each is sent."""

    @abstractmethod
    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        """Merge the replies, consumed one by one in client-id order; any subset of the clients may have replied."""

    @abstractmethod
    def deliver(self, client: ClientInfo) -> Payload:
        """Return the model that this client would deploy now; `Client.evaluate` receives it."""

    def expects(self, client: ClientInfo, sent: Payload) -> dict[str, dict[str, Like]]:
        """Return the expected tensors of a reply to `sent`, group -> name -> Like; other tensors cause a rejection.

        By default these are the params that were sent. Two kinds of them are optional. A client returns only the head
        rows of its own labels. If the scalar "halves" was sent, it returns only the half of the adapters that it
        trained.
        """
        params = sent.group("params").items()
        half_suffixes = (".lora_A", ".lora_B") if sent.scalars.get("halves") else ()
        return {
            "params": {
                key: Like.of(t, needed=not key.startswith("head.") and not key.endswith(half_suffixes))
                for key, t in params
            }
        }

    def objection(self, client: ClientInfo, sent: Payload, reply: Payload) -> str | None:
        """Return a further reason to reject a reply after its tensors have been checked, or None to accept it."""
        return None

    def state(self) -> Payload:
        """Return everything that a checkpoint needs; `restore` continues from it bit for bit.

        Later merging must not write into these tensors, because they also undo an abandoned round.
        """
        return Payload({"params": self.params})

    def restore(self, state: Payload) -> None:
        """Restore the state that `state` returned."""
        self.params = state.group("params")

    def structure(self) -> ExpertMap | None:
        """Return which client holds which experts, for the record; None if the method has no such map."""
        return None

    def usage(self) -> dict[ClientId, dict[str, list[float]]]:
        """Return the latest demand probabilities, client -> block -> expert, for the record."""
        return {}

    def trained(self) -> dict[ClientId, dict[str, list[float]]]:
        """Return the share of batches that trained each expert, client -> block -> expert, for the record.

        The shares are of the round in which the client last took part. {} if a batch trains every expert that its
        tokens reach.
        """
        return {}

    def events(self) -> list[dict[str, Any]]:
        """Return what happened since the last call (growing, shrinking, ...), for the record."""
        return []


@dataclass(frozen=True)
class Reveal:
    """A declaration of what a group or scalar of a reply reveals of a client's data, and how exactly it is needed.

    Args:
        kind: "update", models and what is computed for them; "size", numbers of examples and tokens; "cost", seconds,
            steps and bytes; "score", losses and scores of the client's data; "labels", values by label; "label scores",
            scores by label; "usage", which experts the client's data asks for.
        need: "exact", the value as computed; "less", the value may also be reduced as the site's `privacy` says;
            "nothing", the value is for the record alone. A site that does not disclose what is needed refuses the
            method.
    """

    kind: Literal["update", "size", "cost", "score", "labels", "label scores", "usage"]
    need: Literal["exact", "less", "nothing"] = "nothing"

    def __post_init__(self) -> None:
        check_settings(self, "Reveal.")


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
"""The declarations for the replies of `training.local_round`, `trained`, `local_test` and `tested`."""


class Client(ABC):
    """The client half; it keeps nothing between calls except `context.state`.

    Attributes:
        reveals: group or scalar -> what it says about the client's data, for everything in a reply that is not in
            `COMMON_REVEALS`; it may also override entries of these. A name that ends in "*" matches every name with
            that prefix. Undeclared values do not leave the client: see `disclosure`.
    """

    reveals: Mapping[str, Reveal] = {}

    @abstractmethod
    def train(self, payload: Payload, context: ClientContext) -> Payload:
        """Do one round's work; the reply's scalars hold `num_examples` and whatever metrics the client reports."""

    @abstractmethod
    def evaluate(self, payload: Payload, context: ClientContext) -> Payload:
        """Score the delivered model on the client's test data, without training.

        The reply's scalars are `score` and `examples`.
        """


class Algorithm(ABC):
    """A method: hyper-parameters under the paper's symbols, and the two halves built from a `setup.Setup`.

    Subclasses are frozen dataclasses and are registered under their class name as soon as they are defined. Each field
    is a `setting`, which declares what it costs a client and its range. A server sends the settings, and a site refuses
    values that it does not allow. A subclass that checks more calls `super().__post_init__()` first.
    """

    registry: ClassVar[dict[str, type["Algorithm"]]] = {}
    worlds: ClassVar[tuple[str, ...]] = ("moe", "cohort")
    """The worlds that the method can train.

    "moe" is one mixture-of-experts model for all, "cohort" one small model for all, and "mixed" small models with a
    separate architecture per client.
    """
    dense: ClassVar[bool] = False
    """True if the model of world "moe" may have no experts."""
    merges: ClassVar[bool] = True
    """True if replies change the server's model through `Setup.mean` alone, so that merging rules can replace it."""
    exchanges: ClassVar[bool] = True
    """True if parameters travel at all."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Algorithm.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_settings(self)

    def reads(self) -> frozenset[str]:
        """Return, in words, which values of single clients' replies the server uses besides those that it merges.

        Noise does not cover these values, except for "usage", which has its own mode.
        """
        return frozenset()

    def chooses_by_memory(self) -> bool:
        """Return True if the method gives a client the experts that fit its memory; without a limit it gives all."""
        return False

    @abstractmethod
    def server(self, setup: Any) -> Server: ...

    @abstractmethod
    def client(self, setup: Any) -> Client: ...


@dataclass(frozen=True)
class Sampling:
    """The rule that chooses a round's clients, and the quorum of replies that the round needs.

    Args:
        clients_per_round: clients chosen per round, >= 1; all of them if there are fewer.
        distinct_tasks: choose that many different tasks first, then one client of each (FedMoE's "Enforced").
        min_clients: accepted replies that a round needs, 1..clients_per_round; with fewer the round is abandoned, the
            model stays as it was, and the round is retried.
        min_fraction: share of the chosen clients that must have accepted replies, in [0, 1], likewise.
    """

    clients_per_round: PositiveInt = 5
    distinct_tasks: bool = False
    min_clients: PositiveInt = 1
    min_fraction: Share = 0.0

    def __post_init__(self) -> None:
        check_settings(self, "sampling.")
        forbid(
            self.min_clients > self.clients_per_round,
            f"sampling.min_clients is {self.min_clients}; it must be within 1..{self.clients_per_round}, the "
            "clients_per_round",
        )

    def quorum(self, selected: int) -> int:
        """Return the number of accepted replies that a round with `selected` chosen clients needs to count."""
        return max(self.min_clients, math.ceil(self.min_fraction * selected - 1e-9))

    def choose(self, clients: Sequence[ClientInfo], round: int, seed: int) -> list[ClientInfo]:
        """Return the chosen clients in id order; they depend on ids, tasks, round and seed, not on the given order."""
        rng = torch.Generator().manual_seed(derive_seed(seed, "sampling", round))
        candidates = sorted(clients, key=lambda c: c.id)
        if not self.distinct_tasks:
            picks = torch.randperm(len(candidates), generator=rng)[: self.clients_per_round].tolist()
            return [candidates[i] for i in sorted(picks)]
        tasks = sorted({c.task for c in candidates})
        selection = []
        for i in torch.randperm(len(tasks), generator=rng)[: self.clients_per_round].tolist():
            group = [c for c in candidates if c.task == tasks[i]]
            selection.append(group[int(torch.randint(len(group), (1,), generator=rng))])
        return sorted(selection, key=lambda c: c.id)
