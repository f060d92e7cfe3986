"""The types that every data source returns, and the scores of predictions.

    Task         the form, the labels and the metric of a task
    Split        examples: texts, targets, and the row each of them came from (`tensor.TensorSplit`: of tensors)
    ClientData   one client's task and its three splits
    Federation   all clients, those that had to be skipped, and the origin of the data

Clients with the same task name may have different labels, because a client answers in its own label space.
"""

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from consilium.core import CLIENT_ID
from consilium.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from consilium.data.tensor import TensorSplit

__all__ = [
    "TASK_NAME",
    "ClientData",
    "Federation",
    "Form",
    "Metric",
    "Split",
    "Task",
    "check_labels",
    "pooled",
    "score",
    "token_f1",
]

TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,58}")
"""The allowed names of a task, which become parts of tensor names (head.<task>.<label>) and file names."""
LABELS, LABEL_LENGTH = 65_536, 256
"""Maximum number of labels of a task, and of characters of a label, in a federation."""

Form = Literal["classification", "text-to-text", "language"]
"""The output of a task: a label; a text for a text; or, for a causal language model, the next token ("language").

The data of a "language" task is instructions or plain text. For instructions, the texts are conversations in JSON
(lists of {"role", "content"}) and the targets are the answers that follow. For plain text, the texts are empty and the
targets are the documents."""
Metric = Literal["accuracy", "token_f1", "rouge2", "token_accuracy"]


@dataclass(frozen=True)
class Task:
    """The task of a client. `labels` is empty except for classification; `metric` is in [0, 1], higher is better."""

    name: str
    form: Form
    labels: tuple[str, ...]
    metric: Metric

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise DataError(f"task name {shown(self.name)} must be 1 to 58 of A-Z a-z 0-9 _ -")
        if self.form == "classification" and len(set(self.labels)) != len(self.labels):
            raise DataError(f"task {self.name!r} names a label twice: {list(self.labels)}")
        if self.form == "classification" and len(self.labels) < 2:
            raise DataError(f"task {self.name!r} has {len(self.labels)} label(s); classification needs at least 2")
        if self.form != "classification" and self.labels:
            raise DataError(f"task {self.name!r} is {self.form} and takes no labels, got {list(self.labels)}")

    @property
    def model_form(self) -> str:
        """Return the form of a model that does this task."""
        return "text-to-text" if self.form == "language" else self.form


@dataclass(frozen=True)
class Split:
    """Examples: `targets[i]` (a label, or a text) is the answer to `texts[i]`, from row `rows[i]` of the source."""

    texts: list[str]
    targets: list[str]
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.targets) or (self.rows and len(self.rows) != len(self.texts)):
            raise DataError(f"{len(self.texts)} texts, {len(self.targets)} targets, {len(self.rows)} rows: must match")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example, which is () for a text."""
        return ()

    def examples(self) -> Iterable[tuple[str, str]]:
        """Return the source and the target of every example, for the fingerprint."""
        return zip(self.texts, self.targets, strict=True)


@dataclass(frozen=True)
class ClientData:
    """One client's data. The three splits share no text, and all classification targets are in `task.labels`."""

    task: Task
    train: "Split | TensorSplit"
    validation: "Split | TensorSplit"
    test: "Split | TensorSplit"

    def __post_init__(self) -> None:
        empty_splits = [name for name, split in self.splits() if not len(split)]
        if empty_splits:
            raise DataError(f"no examples for {', '.join(empty_splits)}; a client needs some in every split")
        if self.task.form == "classification":
            unknown_labels = {t for _, split in self.splits() for t in split.targets} - set(self.task.labels)
            if unknown_labels:
                raise DataError(f"labels {sorted(unknown_labels)} are not among {list(self.task.labels)}")

    def splits(self) -> "list[tuple[str, Split | TensorSplit]]":
        """Return the three splits with their names, in the order train, validation, test."""
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


@dataclass(frozen=True)
class Federation:
    """All clients of a federation.

    Args:
        clients: id -> data, sorted by id.
        skipped: id -> reason why the client takes no part.
        source: origin of the data.
        names: id -> name, for the clients with a name that differs from their id.
        notes: facts that a user must know about the data: rows that were left out and why, names that look alike.
    """

    clients: dict[str, ClientData]
    skipped: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.clients:
            raise DataError(f"no client has usable data; skipped: {self.skipped or 'none'}")
        for name in self.clients:
            if not CLIENT_ID.fullmatch(name):
                raise DataError(f"client id {name!r} is not allowed: use 1 to 64 of letters, digits, '.', '_', '-'")
        object.__setattr__(self, "clients", dict(sorted(self.clients.items())))

    def partition(self) -> dict[str, Any]:
        """Return the partition as JSON.

        It holds per client the task, labels, sizes, counts of labels, and the rows of each split; the skipped clients;
        the names of clients with a different id; the notes; and the fingerprint.
        """
        clients = {}
        for name, data in self.clients.items():
            targets = [t for _, split in data.splits() for t in split.targets]
            counts = Counter(targets) if data.task.form == "classification" else Counter()
            clients[name] = {
                "task": data.task.name,
                "labels": list(data.task.labels),
                "sizes": {key: len(split) for key, split in data.splits()},
                "label_counts": {label: counts[label] for label in data.task.labels},
                "rows": {key: list(split.rows) for key, split in data.splits()},
            }
        return {
            "clients": clients,
            "skipped": dict(self.skipped),
            "names": dict(self.names),
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example, which is the same for all clients; () for texts."""
        return next(iter(self.clients.values())).train.shape

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of every client's task, texts and targets; it is equal if and only if the data is."""
        digest = hashlib.sha256()
        for name, data in self.clients.items():
            for part in (name, data.task.name, *data.task.labels):
                _feed(digest, part)
            for key, split in data.splits():
                _feed(digest, f"{key}:{len(split)}")
                for text, target in split.examples():
                    _feed(digest, text)
                    _feed(digest, target)
        return digest.hexdigest()


def _feed(digest: "hashlib._Hash", text: str) -> None:
    # The length prefix distinguishes ("ab", "c") from ("a", "bc").
    data = text.encode("utf-8", "surrogatepass")
    digest.update(f"{len(data)}:".encode())
    digest.update(data)


def check_labels(labels: Sequence[Any]) -> None:
    """Raise DataError unless labels are safe to show and to write: unique, short, without control characters."""
    if len(labels) > LABELS:
        raise DataError(f"the task has {len(labels)} labels; at most {LABELS} are allowed")
    for label in labels:
        if not isinstance(label, str) or not 0 < len(label) <= LABEL_LENGTH or any(map(_controls, label)):
            raise DataError(
                f"label {shown(label)} must be a text of 1 to {LABEL_LENGTH} characters without control characters"
            )
    if len(set(labels)) < len(labels):
        raise DataError(f"the task names a label twice: {shown(list(labels))}")


def _controls(char: str) -> bool:
    """Return whether a character controls the display of text: a line break, an escape, a change of direction."""
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _TURNS


_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def pooled(federation: Federation, task: str) -> ClientData:
    """Pool all clients of one task as if they were one site, for a central comparison that no real federation can make.

    The labels are the union in sorted order.

    Raises:
        DataError: if no client has the task.
    """
    members = [data for data in federation.clients.values() if data.task.name == task]
    if not members:
        task_names = sorted({data.task.name for data in federation.clients.values()})
        raise DataError(f"no client has task {task!r}; tasks here: {', '.join(task_names)}")
    first_task = members[0].task
    labels = tuple(sorted({label for data in members for label in data.task.labels}))
    splits = []
    for key in ("train", "validation", "test"):
        parts = [getattr(data, key) for data in members]
        splits.append(
            Split(
                [t for part in parts for t in part.texts],
                [t for part in parts for t in part.targets],
                [r for part in parts for r in part.rows],
            )
        )
    return ClientData(Task(first_task.name, first_task.form, labels, first_task.metric), *splits)


def score(metric: Metric, predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return the mean score over examples, in [0, 1].

    accuracy: share of exact matches. token_f1: the F1 of SQuAD (words without case, articles and punctuation).
    rouge2: F-measure of bigram overlap, stemmed, by the rouge_score package.

    Raises:
        DataError: if the lengths are unequal, or there is no example.
        ConfigError: if the metric is unknown.
    """
    if len(predictions) != len(targets):
        raise DataError(f"{len(predictions)} predictions for {len(targets)} targets: give one prediction per target")
    if not targets:
        raise DataError("nothing to score: 0 examples")
    pairs = list(zip(predictions, targets, strict=True))
    if metric == "accuracy":
        values = [float(p == t) for p, t in pairs]
    elif metric == "token_f1":
        values = [token_f1(p, t) for p, t in pairs]
    elif metric == "rouge2":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge2"], use_stemmer=True)
        values = [scorer.score(t, p)["rouge2"].fmeasure for p, t in pairs]
    else:
        raise ConfigError(f"metric {metric!r} is unknown; use accuracy, token_f1 or rouge2")
    return sum(values) / len(values)


def recalls(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return the recall of each label in `targets`: the share of its examples with a correct prediction, in [0, 1]."""
    hits: dict[str, list[float]] = {}
    for prediction, target in zip(predictions, targets, strict=True):
        hits.setdefault(target, []).append(float(prediction == target))
    return {label: sum(hits[label]) / len(hits[label]) for label in sorted(hits)}


def balanced(found: Mapping[str, float]) -> float:
    """Return the balanced accuracy, the mean of `recalls`; every label has the same weight, even a rare one."""
    return sum(found.values()) / len(found)


def token_f1(prediction: str, target: str) -> float:
    """Return SQuAD's F1 of one answer: the harmonic mean of word precision and recall after normalisation, in [0, 1].

    Two answers that are both empty after normalisation agree (1.0), as in SQuAD v2.
    """
    p, t = _words(prediction), _words(target)
    if not p or not t:
        return float(p == t)
    overlap = sum((Counter(p) & Counter(t)).values())
    if overlap == 0:
        return 0.0
    precision, recall = overlap / len(p), overlap / len(t)
    return 2 * precision * recall / (precision + recall)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
