"""The bag of words next to a run: scores by hand, and what it does with odd texts."""

import pytest

from consilium.data.simple import simple_scores
from consilium.data.task import ClientData, Federation, Split, Task, balanced, recalls


def client(train, test, labels=("cat", "dog"), task="animal"):
    def split(pairs):
        return Split([text for text, _ in pairs], [label for _, label in pairs], list(range(len(pairs))))

    labels = labels if task == "animal" else ("loud", "quiet")
    return ClientData(Task(task, "classification", labels, "accuracy"), split(train), split(test), split(test))


CAT, DOG = ("it purrs and meows", "cat"), ("it barks and growls", "dog")


def test_recalls_and_their_mean_by_hand():
    """Of 4 cats 3 are found, of 1 dog none; a label that is only predicted has no recall. (0.75 + 0) / 2."""
    found = recalls(["a", "a", "a", "b", "c"], ["a", "a", "a", "a", "b"])
    assert found == {"a": 0.75, "b": 0.0} and balanced(found) == 0.375


def test_alone_and_pooled():
    """a has seen both kinds, b only cats: alone, b takes a dog for a cat; pooled, both know both."""
    a = client([CAT, DOG] * 4, [CAT, CAT, CAT, DOG])
    b = client([CAT] * 4, [CAT, CAT, CAT, DOG])
    found = simple_scores(Federation({"a": a, "b": b}))
    assert found["alone"] == {"a": {"score": 1.0, "balanced": 1.0}, "b": {"score": 0.75, "balanced": 0.5}}
    assert found["pooled"] == {key: {"score": 1.0, "balanced": 1.0} for key in "ab"}


def test_pooled_is_within_a_task():
    a = client([CAT, DOG] * 4, [CAT, DOG])
    loud, quiet = (CAT[0], "loud"), (DOG[0], "quiet")
    b = client([loud, quiet] * 4, [loud], task="noise")
    found = simple_scores(Federation({"a": a, "b": b}))
    assert found["pooled"]["b"]["score"] == 1.0 == found["pooled"]["a"]["score"]


@pytest.mark.parametrize(
    ("texts", "least"),
    [(("猫が鳴く", "犬が吠える"), 1.0), (("+", "-"), 0.5), (("", " "), 0.5)],
    ids=["Japanese", "signs", "blank"],
)
def test_texts_without_words(texts, least):
    pairs = list(zip(texts, ("cat", "dog"), strict=True))
    found = simple_scores(Federation({"a": client(pairs * 4, pairs)}))
    assert found["alone"]["a"]["score"] >= least


def test_other_tasks_have_none():
    made = client([CAT], [CAT])
    task = Task("t", "text-to-text", (), "token_f1")
    assert simple_scores(Federation({"a": ClientData(task, made.train, made.validation, made.test)})) is None
