"""The simple model next to a run: scores by hand, and what it does with odd texts, with tables and with images."""

import pytest
import torch

from consilium.data.simple import VALUES, _columns, simple_score, simple_scores
from consilium.data.task import ClientData, Federation, Split, Task, balanced, recalls
from consilium.data.tensor import TensorSplit


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


def tensors(x, y, labels=("cat", "dog")):
    """A client whose three splits are the same rows."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    split = TensorSplit(x, y, torch.arange(len(x)), labels)
    return ClientData(Task("animal", "classification", labels, "accuracy"), split, split, split)


def test_a_table_alone_and_pooled():
    """The first column decides, the second is a thousand times larger and says nothing. b has seen cats alone."""
    a = tensors([[float(i % 2), 1000.0 * (i % 3)] for i in range(24)], [i % 2 for i in range(24)])
    b = tensors([[0.0, 1000.0 * (i % 3)] for i in range(24)], [0] * 24)
    found = simple_scores(Federation({"a": a, "b": b}))
    assert found["name"] == "logistic regression"
    assert found["alone"]["a"] == found["pooled"]["a"] == {"score": 1.0, "balanced": 1.0}
    test = TensorSplit(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 0, 0]),
                       torch.arange(4), ("cat", "dog"))  # fmt: skip
    b = ClientData(b.task, b.train, b.validation, test)
    found = simple_scores(Federation({"a": a, "b": b}))
    assert found["alone"]["b"] == {"score": 0.75, "balanced": 0.5}
    assert found["pooled"]["b"] == {"score": 1.0, "balanced": 1.0}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_averaged_down(dtype):
    """Left half bright or right half: 3 x 40 x 20 pixels become 3 x 16 x 16 columns."""
    x, y = torch.zeros(20, 3, 40, 20), torch.arange(20) % 2
    x[y == 0, :, :, :10], x[y == 1, :, :, 10:] = 200, 200
    data = tensors(x.to(dtype), y)
    columns = _columns(data.train)
    assert columns.shape == (20, 3 * 16 * 16) and columns[0].max() == 200 and columns[0].min() == 0
    assert simple_score(data) == {"name": "logistic regression", "score": 1.0, "balanced": 1.0}


def test_small_images_stay_as_they_are_and_rows_are_bounded():
    x = torch.arange(2 * 8 * 8.0).reshape(2, 1, 8, 8)
    assert torch.equal(torch.from_numpy(_columns(tensors(x, [0, 1]).train)), x.flatten(1))
    wide = tensors(torch.zeros(7, 100), [0, 1, 0, 1, 0, 1, 0])
    assert len(_columns(wide.train, 350)) == 3 and len(_columns(wide.train, 5)) == 1
    assert len(_columns(wide.train, VALUES)) == len(_columns(wide.train)) == 7


def test_token_ids_have_none():
    assert simple_score(tensors(torch.ones(4, 6, dtype=torch.int64), [0, 1, 0, 1])) is None


def test_one_site_by_itself():
    assert simple_score(client([CAT, DOG] * 4, [CAT, CAT, DOG])) == {
        "name": "bag of words", "score": 1.0, "balanced": 1.0,
    }  # fmt: skip
