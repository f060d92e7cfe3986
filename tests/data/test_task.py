"""The types and the scores. Numbers in the score tests are derived by hand in the docstrings."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.task import ClientData, Federation, Split, Task, pooled, score, token_f1
from consilium.errors import ConfigError, DataError

KIND = Task("kind", "classification", ("a", "b"), "accuracy")


def split(*pairs: tuple[str, str], start: int = 0) -> Split:
    rows = [str(start + i) for i in range(len(pairs))]
    return Split([t for t, _ in pairs], [t for _, t in pairs], rows)


def client(task: Task = KIND, word: str = "w") -> ClientData:
    parts = [split((f"{word} {i}", "a"), (f"{word} {i} x", "b"), start=2 * i) for i in range(3)]
    return ClientData(task, *parts)


def test_accuracy_is_the_share_of_exact_matches():
    """Two of four agree: 0.5; case counts."""
    assert score("accuracy", ["a", "b", "A", "b"], ["a", "b", "a", "a"]) == 0.5


def test_token_f1_is_squads():
    """Words get, item, list against get, item: precision 2/3, recall 1, F = 2 * 2/3 / (5/3) = 0.8."""
    assert token_f1("Get the item, list!", "get item") == pytest.approx(0.8)
    assert token_f1("The a an", "") == 1.0
    assert token_f1("", "get") == 0.0
    assert token_f1("set item", "get value") == 0.0


def test_token_f1_counts_a_repeated_word_as_often_as_both_have_it():
    """Words x, x, y against x, z: common 1, precision 1/3, recall 1/2, F = 2 * 1/6 / (5/6) = 0.4."""
    assert token_f1("x x y", "x z") == pytest.approx(0.4)


def test_rouge2_is_the_overlap_of_bigrams():
    """Target bigrams: return-the, the-sorted, sorted-list; prediction: return-the, the-list: common 1, P 1/2, R 1/3.

    F = 2 * 1/6 / (5/6) = 0.4. The second pair is equal: 1.0. Mean 0.7.
    """
    predictions = ["return the list", "add two numbers"]
    targets = ["return the sorted list", "add two numbers"]
    assert score("rouge2", predictions, targets) == pytest.approx(0.7)


def test_rouge2_stems_words():
    assert score("rouge2", ["returns sorted lists"], ["return sort list"]) == pytest.approx(1.0)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_every_metric_gives_one_for_equal_answers_and_stays_in_its_range(texts):
    assert score("accuracy", texts, texts) == 1.0
    assert score("token_f1", texts, texts) == 1.0
    for metric in ("accuracy", "token_f1", "rouge2"):
        assert 0.0 <= score(metric, texts, texts[::-1]) <= 1.0


def test_score_refuses_what_it_cannot_score():
    with pytest.raises(DataError, match="1 predictions for 2 targets"):
        score("accuracy", ["a"], ["a", "b"])
    with pytest.raises(DataError, match="0 examples"):
        score("accuracy", [], [])
    with pytest.raises(ConfigError, match="'bleu' is unknown"):
        score("bleu", ["a"], ["a"])


def test_a_task_checks_its_labels():
    with pytest.raises(DataError, match="twice"):
        Task("t", "classification", ("a", "a"), "accuracy")
    with pytest.raises(DataError, match="at least 2"):
        Task("t", "classification", ("a",), "accuracy")
    with pytest.raises(DataError, match="takes no labels"):
        Task("t", "text-to-text", ("a",), "token_f1")


def test_client_data_refuses_a_label_outside_its_label_set():
    with pytest.raises(DataError, match=r"\['c'\] are not among \['a', 'b'\]"):
        ClientData(KIND, split(("x", "a")), split(("y", "c")), split(("z", "b")))


def test_a_split_must_match_in_length():
    with pytest.raises(DataError, match="2 texts, 1 targets"):
        Split(["a", "b"], ["a"])


def test_a_federation_sorts_its_clients_and_refuses_bad_ids_and_emptiness():
    federation = Federation({"b": client(), "a": client()})
    assert list(federation.clients) == ["a", "b"]
    with pytest.raises(DataError, match="'a b' is not allowed"):
        Federation({"a b": client()})
    with pytest.raises(DataError, match="no client has usable data"):
        Federation({}, {"a": "no rows"})


def test_the_partition_is_json_and_says_who_holds_what():
    federation = Federation({"kind-00": client()}, {"kind-01": "no rows"})
    found = json.loads(json.dumps(federation.partition()))
    assert found["skipped"] == {"kind-01": "no rows"}
    assert found["fingerprint"] == federation.fingerprint
    assert found["clients"]["kind-00"] == {
        "task": "kind",
        "labels": ["a", "b"],
        "sizes": {"train": 2, "validation": 2, "test": 2},
        "label_counts": {"a": 3, "b": 3},
        "rows": {"train": ["0", "1"], "validation": ["2", "3"], "test": ["4", "5"]},
    }


def test_the_fingerprint_tells_any_difference_in_data():
    base = Federation({"k": client()}).fingerprint
    assert base == Federation({"k": client()}).fingerprint
    assert base != Federation({"j": client()}).fingerprint
    assert base != Federation({"k": client(word="v")}).fingerprint
    assert base != Federation({"k": client(Task("kind", "classification", ("b", "a"), "accuracy"))}).fingerprint
    moved = ClientData(KIND, split(("ab", "a")), split(("c", "a")), split(("d", "b")))
    other = ClientData(KIND, split(("a", "a")), split(("bc", "a")), split(("d", "b")))
    assert Federation({"k": moved}).fingerprint != Federation({"k": other}).fingerprint


def test_pooling_joins_a_tasks_clients_and_their_labels():
    other = Task("kind", "classification", ("b", "c"), "accuracy")
    second = ClientData(other, split(("p", "c")), split(("q", "b")), split(("r", "c")))
    joined = pooled(Federation({"k-0": client(), "k-1": second}), "kind")
    assert joined.task.labels == ("a", "b", "c")
    assert joined.train.targets == ["a", "b", "c"]
    with pytest.raises(DataError, match="no client has task 'topic'; tasks here: kind"):
        pooled(Federation({"k": client()}), "topic")
