"""The embedded default: real tasks made from the documentation of installed packages.

    topic    which package does this documentation describe?                    accuracy
    kind     is it a class, function, method, module or property?               accuracy
    verb     with which verb does the documented function's name begin?         accuracy
    name     the name of the function, split into words                         token F1 (text-to-text)
    summary  from the body of a function, the first line of its documentation   ROUGE-2  (text-to-text)

Documentation is either public (`public()`, on which the shipped model was pretrained) or may be held by a client, but
never both. All of torch, transformers and sympy is public. Of every other package, about half of the modules are
public, chosen by a hash of the module's name. A client's text that also occurs in the public shard is dropped. A hash
of the text decides the split, so no text is trained on by one client and tested on by another.
"""

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from consilium.constraints import PositiveFloat, PositiveInt, check_settings, forbid
from consilium.data import source
from consilium.data.source import PACKAGES, PUBLIC, Doc
from consilium.data.task import ClientData, Federation, Form, Metric, Split, Task
from consilium.errors import DataError
from consilium.kinds import DataSource, Gives

__all__ = ["KINDS", "TASKS", "VERBS", "DocstringData", "Partition", "is_public"]

Partition = Literal["iid", "dirichlet", "pathological", "packages"]

KINDS = ("class", "function", "method", "module", "property")
VERBS = (
    "add", "check", "create", "find", "from", "get", "is", "load", "parse", "read", "set", "to", "update",
    "write",
)  # fmt: skip
TASKS: dict[str, tuple[Form, Metric]] = {
    "topic": ("classification", "accuracy"),
    "kind": ("classification", "accuracy"),
    "verb": ("classification", "accuracy"),
    "name": ("text-to-text", "token_f1"),
    "summary": ("text-to-text", "rouge2"),
}
_SPLITS = ("train", "validation", "test")
_CALLABLES = ("function", "method", "classmethod", "staticmethod")


def is_public(package: str, module: str) -> bool:
    """Return whether a module's documentation belongs to the public shard; this depends only on the two names."""
    return package in PUBLIC or hashlib.sha256(module.encode()).digest()[0] % 2 == 0


def answer(task: str, doc: Doc) -> str | None:
    """Return the target of one document under a task, or None if the task does not apply to the document."""
    if task == "topic":
        return doc.package
    if task == "kind":
        return doc.kind if doc.kind in KINDS else None
    if doc.kind not in _CALLABLES or doc.name.rsplit(".", 1)[-1].startswith("__"):
        return None
    words = source.words(doc.name)
    if task == "verb":
        return words[0] if len(words) > 1 and words[0] in VERBS else None
    if task == "name":
        return " ".join(words) if len(words) > 1 else None
    return doc.summary if len(doc.body) >= 40 and len(doc.summary.split()) >= 3 else None


@dataclass(frozen=True)
class DocstringData(DataSource):
    """Clients whose data is documentation.

    Args:
        tasks: tasks, dealt to the clients in turn; all classification or all text-to-text.
        clients: number of clients, at least one per task.
        train: maximum number of training examples per client, >= 1; a client has fewer if its packages hold fewer.
        validation: maximum number of validation examples per client, >= 1.
        test: maximum number of test examples per client, >= 1.
        partition: "packages": a client is a team that owns a few packages (its labels in `topic`); "iid"; "dirichlet":
            label skew by `alpha`; "pathological": `labels` labels per client. the last three deal one label space
            per task (`topic`: the `topics` largest packages); for text-to-text their label is the package.
        alpha: concentration of the Dirichlet partition, > 0; smaller is more skewed.
        labels: packages of a `topic` client under "packages", labels of a client under "pathological"; >= 2.
        topics: size of the shared label space of `topic` under the other partitions; >= 2.
        packages: sources of the clients' documentation; packages that are not installed are absent.
        smallest: minimum number of training examples per label at a client, >= 1; a label with fewer is dropped there.
    """

    gives: ClassVar[Gives] = "labelled texts"

    tasks: tuple[str, ...] = ("topic", "kind", "verb")
    clients: PositiveInt = 12
    train: PositiveInt = 200
    validation: PositiveInt = 60
    test: PositiveInt = 100
    partition: Partition = "packages"
    alpha: PositiveFloat = 0.3
    labels: Annotated[int, Ge(2)] = 5
    topics: Annotated[int, Ge(2)] = 10
    packages: tuple[str, ...] = tuple(PACKAGES)
    smallest: PositiveInt = 5

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        unknown_tasks = [task for task in self.tasks if task not in TASKS]
        forbid(
            unknown_tasks or not self.tasks or len(set(self.tasks)) != len(self.tasks),
            f"tasks {list(self.tasks)}: give each at most once, of {', '.join(TASKS)}",
        )
        forbid(
            len({TASKS[task][0] for task in self.tasks}) > 1,
            f"tasks {list(self.tasks)} mix classification and text-to-text; run one form at a time",
        )
        forbid(
            self.clients < len(self.tasks),
            f"{self.clients} clients for {len(self.tasks)} tasks; give at least one client per task",
        )
        unknown_packages = sorted(set(self.packages) - set(PACKAGES))
        forbid(
            unknown_packages or not self.packages,
            f"packages {unknown_packages} are unknown; use some of: {', '.join(PACKAGES)}",
        )

    def public(self) -> list[Doc]:
        """Return the public shard: documentation that no client holds, each text once, in a fixed order."""
        docs, seen_keys = [], set()
        source.warm((*PUBLIC, *PACKAGES))
        for package in (*PUBLIC, *PACKAGES):
            for doc in source.read(package):
                if is_public(package, doc.module) and doc.key not in seen_keys:
                    seen_keys.add(doc.key)
                    docs.append(doc)
        return docs

    def private(self) -> list[Doc]:
        """Return the documentation that clients may hold, each text once and none public, in a fixed order."""
        source.warm((*PUBLIC, *PACKAGES))
        docs = {package: source.read(package) for package in PACKAGES}
        seen_keys = {key for package in PUBLIC for key in source.digests(package)}
        seen_keys |= {doc.key for documents in docs.values() for doc in documents if is_public(doc.package, doc.module)}
        documents = []
        for package in PACKAGES:
            for doc in docs[package]:
                if doc.key not in seen_keys:
                    seen_keys.add(doc.key)
                    if package in self.packages:
                        documents.append(doc)
        return documents

    def load(self, seed: int) -> Federation:
        """Deal the documentation to the clients. Equal seeds and installed versions give equal results.

        Raises:
            DataError: if no client gets usable data.
        """
        pool = self.private()
        clients: dict[str, ClientData] = {}
        skip_reasons: dict[str, str] = {}
        for index, task in enumerate(self.tasks):
            ids = [f"{task}-{i:02d}" for i in range(len(range(index, self.clients, len(self.tasks))))]
            rng = random.Random(f"{seed}:{task}")
            rows = [(doc, target) for doc in pool if (target := answer(task, doc)) is not None]
            rows_by_client = self._by_package(task, rows, ids, rng) if self.partition == "packages" else None
            for name, client_rows in (rows_by_client or self._by_label(task, rows, ids, rng)).items():
                outcome = self._client(task, client_rows, rng)
                if isinstance(outcome, ClientData):
                    clients[name] = outcome
                else:
                    skip_reasons[name] = outcome
        if not clients:
            raise DataError(
                f"no client got usable documentation ({skip_reasons}); ask for fewer clients or more packages"
            )
        return Federation(clients, skip_reasons, self.source())

    def source(self) -> dict:
        """Return the origin of the data for a run's records: these settings and the installed versions."""
        versions = {p: v for p in (*PUBLIC, *PACKAGES) if (v := source.version(p)) is not None}
        return {"type": "DocstringData", **asdict(self), "versions": versions}

    def _part(self, doc: Doc) -> str:
        total = self.train + self.validation + self.test
        bucket = int(doc.key[:12], 16) % total
        return _SPLITS[(bucket >= self.train) + (bucket >= self.train + self.validation)]

    def _by_package(self, task: str, rows: "Rows", ids: list[str], rng: random.Random) -> dict[str, "Rows"]:
        rows_by_package = defaultdict(list)
        for row in rows:
            rows_by_package[row[0].package].append(row)
        if task == "topic":  # A label must be able to fill its share of every split of one client.
            min_rows = (self.train + self.validation + self.test) / self.labels * 0.75
            rows_by_package = {
                package: package_rows
                for package, package_rows in rows_by_package.items()
                if len(package_rows) >= min_rows
            }
            owners = _deal(sorted(rows_by_package), self.labels, ids, rng)
        else:
            owners = _spread(
                {package: len(package_rows) for package, package_rows in rows_by_package.items()}, ids, rng
            )
        rows_by_client: dict[str, Rows] = {name: [] for name in ids}
        for package, names in owners.items():
            shuffled_rows = rng.sample(rows_by_package[package], len(rows_by_package[package]))
            for i, name in enumerate(names):
                rows_by_client[name] += shuffled_rows[i :: len(names)]
        return rows_by_client

    def _by_label(self, task: str, rows: "Rows", ids: list[str], rng: random.Random) -> dict[str, "Rows"]:
        from consilium.data.partition import divide

        rows_by_label = defaultdict(list)
        for row in rows:
            rows_by_label[row[0].package if TASKS[task][0] == "text-to-text" else row[1]].append(row)
        if task == "topic":
            largest_packages = sorted(rows_by_label, key=lambda package: (-len(rows_by_label[package]), package))[
                : self.topics
            ]
            rows_by_label = {package: rows_by_label[package] for package in largest_packages}
        size = 2 * len(ids) * (self.train + self.validation + self.test)
        pool, labels = [], []
        for label, label_rows in _tempered(rows_by_label, size, rng):
            pool += label_rows
            labels += [label] * len(label_rows)
        parts = divide(labels, len(ids), self.partition, self.alpha, self.labels, rng.randrange(2**31))
        return {name: [pool[i] for i in part] for name, part in zip(ids, parts, strict=True)}

    def _client(self, task: str, held: "Rows", rng: random.Random) -> ClientData | str:
        """Return one client's data, or a string with the reason why it has none."""
        form, metric = TASKS[task]
        quota = dict(zip(_SPLITS, (self.train, self.validation, self.test), strict=True))
        parts: dict[str, Rows] = {key: [] for key in _SPLITS}
        for row in held:
            parts[self._part(row[0])].append(row)
        labels: tuple[str, ...] = ()
        for key in _SPLITS:
            rows_by_label = defaultdict(list)
            for row in parts[key]:
                label = row[1] if form == "classification" else ""
                if key == "train" or form != "classification" or label in labels:
                    rows_by_label[label].append(row)
            if key == "train" and form == "classification":
                rows_by_label = {
                    label: label_rows for label, label_rows in rows_by_label.items() if len(label_rows) >= self.smallest
                }
                if len(rows_by_label) < 2:
                    return f"fewer than 2 labels with {self.smallest} training examples ({len(held)} rows)"
                labels = tuple(sorted(rows_by_label))
            parts[key] = [row for _, label_rows in _tempered(rows_by_label, quota[key], rng) for row in label_rows]
            rng.shuffle(parts[key])
        empty_splits = [key for key in _SPLITS if not parts[key]]
        if empty_splits:
            return f"no rows left for {', '.join(empty_splits)} ({len(held)} rows)"
        return ClientData(Task(task, form, labels, metric), *(_split(task, rows) for rows in parts.values()))


Rows = list[tuple[Doc, str]]


def _split(task: str, rows: Rows) -> Split:
    texts = [doc.body if task == "summary" else doc.text for doc, _ in rows]
    return Split(texts, [target for _, target in rows], [doc.row for doc, _ in rows])


def _deal(packages: list[str], each: int, ids: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Give every client `each` packages; return package -> owners.

    A package gets a second owner only when every package has one.
    """
    owners: dict[str, list[str]] = {package: [] for package in packages}
    order = rng.sample(packages, len(packages))
    for _ in range(min(each, len(packages))):
        for name in ids:
            candidates = [package for package in order if name not in owners[package]]
            owners[min(candidates, key=lambda package: len(owners[package]))].append(name)
    return owners


def _spread(sizes: Mapping[str, int], ids: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Give every package to one client such that clients hold about equally many rows; return package -> owners.

    A package that is too large for one share is held by several clients.
    """
    share = sum(sizes.values()) / len(ids)
    load = dict.fromkeys(rng.sample(ids, len(ids)), 0.0)
    owners: dict[str, list[str]] = {}
    for package in sorted(sizes, key=lambda package: (-sizes[package], package)):
        count = min(len(ids), max(1, round(sizes[package] / share)))
        owners[package] = sorted(load, key=load.__getitem__)[:count]
        for name in owners[package]:
            load[name] += sizes[package] / count
    return owners


def _tempered(held: Mapping[str, Rows], size: int, rng: random.Random) -> Iterable[tuple[str, Rows]]:
    """Sample at most `size` rows; yield each label with its rows.

    A label's share is proportional to the square root of its number of rows, which balances the labels without making
    them equal.
    """
    counts = dict.fromkeys(sorted(held), 0)
    remaining = min(size, sum(map(len, held.values())))
    while remaining > 0:
        open_labels = [label for label in counts if counts[label] < len(held[label])]
        total = sum(math.sqrt(len(held[label])) for label in open_labels)
        for label in sorted(open_labels, key=lambda label: (len(held[label]), label)):
            wanted_count = max(1, round(remaining * math.sqrt(len(held[label])) / total)) if total else 0
            take_count = min(wanted_count, len(held[label]) - counts[label], remaining)
            total -= math.sqrt(len(held[label]))
            counts[label] += take_count
            remaining -= take_count
    for label, count in counts.items():
        yield label, rng.sample(held[label], count)
