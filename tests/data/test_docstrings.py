"""The docstring tasks on a small made-up installation, and once on packages that are really installed."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.data import docstrings, source
from consilium.data.docstrings import TASKS, DocstringData, answer, is_public
from consilium.data.source import Doc
from consilium.errors import ConfigError, DataError

PACKAGES = ("numpy", "pandas", "rich", "scipy", "sklearn", "yaml")
KINDS = ("class", "function", "method", "module", "property")
WORDS = [f"word{i}" for i in range(400)]


def made_up(package: str) -> list[Doc]:
    """300 documents of a package over 30 modules; every seventh text also stands in another package."""
    rng = random.Random(package)
    docs = []
    for i in range(300):
        verb = docstrings.VERBS[i % len(docstrings.VERBS)]
        text = f"copied text {i}" if i % 7 == 0 else " ".join(rng.sample(WORDS, 8))
        kind = KINDS[i % len(KINDS)]
        body = f"    value = {text!r}\n    return value.strip() or {i}"
        docs.append(Doc(package, f"{package}.m{i % 30}", f"{verb}_thing{i}", kind, text, f"Do the {text}.", body))
    return docs


@pytest.fixture
def installation(monkeypatch):
    """Six packages, and torch as the one that is public whole."""
    docs = {package: made_up(package) for package in (*PACKAGES, "torch")}
    monkeypatch.setattr(docstrings, "PACKAGES", PACKAGES)
    monkeypatch.setattr(docstrings, "PUBLIC", ("torch",))
    monkeypatch.setattr(source, "read", lambda package: docs[package])
    monkeypatch.setattr(source, "digests", lambda package: [doc.key for doc in docs[package]])


def small(**changes) -> DocstringData:
    values = {"packages": PACKAGES, "clients": 6, "train": 40, "validation": 12, "test": 20, "labels": 3, "topics": 4}
    return DocstringData(**{**values, "smallest": 2, **changes})


def test_the_halves_of_a_package_depend_on_names_only():
    """By `printf numpy.linalg | sha256sum`: the first byte is even for a public module, odd for a client's."""
    assert {m: is_public("numpy", m) for m in ("numpy.linalg", "numpy.random")} == {
        "numpy.linalg": False,
        "numpy.random": True,
    }
    assert is_public("torch", "anything") and is_public("transformers", "x") and is_public("sympy", "x")
    shares = [is_public("scipy", f"scipy.m{i}") for i in range(1000)]
    assert 0.45 < sum(shares) / 1000 < 0.55


@pytest.mark.parametrize(
    ("name", "kind", "answers"),
    [
        ("A.get_item", "method", {"topic": "numpy", "kind": "method", "verb": "get", "name": "get item"}),
        ("get", "function", {"topic": "numpy", "kind": "function"}),
        ("__len__", "method", {"topic": "numpy", "kind": "method"}),
        ("draw_line", "function", {"topic": "numpy", "kind": "function", "name": "draw line"}),
        ("from_file", "classmethod", {"topic": "numpy", "verb": "from", "name": "from file"}),
        ("ShopKeeper", "class", {"topic": "numpy", "kind": "class"}),
    ],
)
def test_what_a_document_asks(name, kind, answers):
    doc = Doc("numpy", "numpy.m", name, kind, "Some text of four words", "Some text of words", "")
    assert {task: a for task in TASKS if (a := answer(task, doc)) is not None} == answers


def test_summary_needs_a_body():
    doc = Doc("numpy", "m", "f", "function", "Some text of words", "Some text of words", "x = 1\n" * 10)
    assert answer("summary", doc) == "Some text of words"
    assert answer("summary", Doc("numpy", "m", "f", "function", "t", "Some text of words", "return 1")) is None


@pytest.mark.parametrize("partition", ["packages", "iid", "dirichlet", "pathological"])
def test_clients_are_dealt_evenly_and_hold_what_they_may(installation, partition):
    data = small(partition=partition, alpha=1.0)
    federation = data.load(3)
    asked = {f"{task}-{i:02d}" for task in ("topic", "kind", "verb") for i in range(2)}
    assert set(federation.clients) | set(federation.skipped) == asked
    public = {doc.text for doc in data.public()}
    part_of: dict[str, str] = {}
    taken: set[tuple[str, str]] = set()
    for client in federation.clients.values():
        for (name, split), most in zip(client.splits(), (40, 12, 20), strict=True):
            assert 0 < len(split) <= most
            assert set(split.targets) <= set(client.task.labels)
            assert not public & set(split.texts)
            assert all(part_of.setdefault(text, name) == name for text in split.texts)
            rows = {(client.task.name, text) for text in split.texts}
            assert len(rows) == len(split) and not rows & taken
            taken |= rows
        assert set(client.train.targets) == set(client.task.labels)


def test_no_module_is_both_public_and_a_clients(installation):
    data = small()
    modules = {doc.module for doc in data.public()}
    assert not modules & {doc.module for doc in data.private()}
    rows = [row for client in data.load(0).clients.values() for _, split in client.splits() for row in split.rows]
    assert rows and not modules & {row.split(":")[0] for row in rows}


def test_a_team_owns_its_packages(installation):
    clients = small(partition="packages", tasks=("topic",), clients=2).load(0).clients
    assert [len(client.task.labels) for client in clients.values()] == [3, 3]
    assert not set(clients["topic-00"].task.labels) & set(clients["topic-01"].task.labels)


def test_packages_get_second_owners_only_when_all_have_one(installation):
    clients = small(partition="packages", tasks=("topic",), clients=4).load(0).clients
    owners = Counter(label for client in clients.values() for label in client.task.labels)
    assert sum(owners.values()) == 12 and set(owners.values()) == {2}


def test_loading_is_a_function_of_the_seed(installation):
    assert small().load(1).fingerprint == small().load(1).fingerprint != small().load(2).fingerprint


def test_text_to_text_tasks(installation):
    clients = small(tasks=("name", "summary"), clients=4).load(0).clients
    assert set(clients) == {"name-00", "name-01", "summary-00", "summary-01"}
    client = clients["name-00"]
    assert client.task.labels == () and client.task.metric == "token_f1"
    assert all(" thing" in target for target in client.train.targets)
    assert all(text.lstrip().startswith("value = ") for text in clients["summary-00"].train.texts)


def test_a_client_without_enough_is_skipped_with_the_reason(installation):
    federation = small(partition="dirichlet", alpha=0.02, tasks=("topic",), clients=20).load(0)
    assert len(federation.clients) + len(federation.skipped) == 20
    assert federation.skipped and all("rows" in reason for reason in federation.skipped.values())


def test_no_usable_client_is_an_error(installation):
    with pytest.raises(DataError, match="no client got usable documentation"):
        small(smallest=1000).load(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("topik",)}, "of topic, kind, verb, name, summary"),
        ({"tasks": ()}, "give each at most once"),
        ({"tasks": ("kind", "kind")}, "give each at most once"),
        ({"tasks": ("topic", "name")}, "mix classification and text-to-text"),
        ({"partition": "random"}, "one of iid, dirichlet, pathological, packages"),
        ({"train": 0}, "train is 0; it must be at least 1"),
        ({"labels": 1}, "labels is 1; it must be at least 2"),
        ({"clients": 2}, "2 clients for 3 tasks"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be greater than 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"packages": ("numpi",)}, r"packages \['numpi'\] are unknown"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        DocstringData(**changes)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1),
    st.integers(0, 120),
    st.integers(0, 9),
)
def test_tempering_takes_what_there_is_and_no_more(sizes, size, seed):
    doc = Doc("numpy", "m", "f", "function", "t", "s", "")
    held = {label: [(doc, f"{label}{i}") for i in range(n)] for label, n in sizes.items()}
    found = dict(docstrings._tempered(held, size, random.Random(seed)))
    assert sum(map(len, found.values())) == min(size, sum(sizes.values()))
    for label, rows in found.items():
        assert len({target for _, target in rows}) == len(rows) <= sizes[label]


def test_tempering_follows_the_square_root():
    """Weights sqrt(400) : sqrt(100) : sqrt(25) = 20 : 10 : 5 of 70 rows: 40, 20, 10."""
    doc = Doc("numpy", "m", "f", "function", "t", "s", "")
    held = {label: [(doc, "")] * n for label, n in (("a", 400), ("b", 100), ("c", 25))}
    found = dict(docstrings._tempered(held, 70, random.Random(0)))
    assert {label: len(rows) for label, rows in found.items()} == {"a": 40, "b": 20, "c": 10}


def test_installed_packages_make_a_federation(tmp_path, monkeypatch):
    """The real thing, on a few packages of the dependencies, read without a cache."""
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path))
    installed = tuple(p for p in ("httpx", "tyro", "joblib", "click") if source.version(p))
    monkeypatch.setattr(docstrings, "PACKAGES", installed)
    monkeypatch.setattr(docstrings, "PUBLIC", ())
    data = DocstringData(tasks=("kind",), clients=2, packages=installed, train=40, validation=12, test=20)
    federation = data.load(0)
    assert set(federation.clients) == {"kind-00", "kind-01"}
    assert set(federation.source["versions"]) == set(installed)
    assert federation.fingerprint == data.load(0).fingerprint
