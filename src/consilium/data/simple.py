"""A simple baseline for the federated models: a bag of words for the texts of each client, trained alone.

A federation must beat its score to be worth the effort. The model is TF-IDF of words and pairs of words, and logistic
regression, both by scikit-learn. Each client trains it on its own training rows. In a simulation, the data of all
clients is in one place. There, the model is also trained on the rows of all clients of a task ("pooled"), which shows
the score that would be possible if the data were brought together.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from consilium.data.task import ClientData, Federation, Split, balanced, recalls, score

__all__ = ["NAME", "simple_scores"]

NAME = "bag of words"
ROWS = 20_000
"""Maximum number of training rows of a model. Rows are dealt in random order, so the first ones are a sample."""
CLIENTS = 500
"""Maximum number of clients for which the baseline is computed, so that it takes only seconds."""
FEATURES = 100_000


def simple_scores(federation: Federation) -> dict[str, dict[str, Any]] | None:
    """Return the scores of bags of words on each client's test data.

    Returns:
        "alone" and "pooled", each client -> "score" (accuracy) and "balanced" (mean recall of the labels), in [0, 1].
        Only clients with a task of text classification are included. None if there are no such clients, or too many.
    """
    text_clients = {
        client: data
        for client, data in federation.clients.items()
        if data.task.form == "classification" and isinstance(data.train, Split) and len(data.train) and len(data.test)
    }
    if not text_clients or len(text_clients) > CLIENTS:
        return None
    alone_scores = {
        client: _scores(_fitted(data.train.texts, data.train.targets), data) for client, data in text_clients.items()
    }
    pooled_scores: dict[str, dict[str, float]] = {}
    for task in {data.task.name for data in text_clients.values()}:
        members = {client: data for client, data in text_clients.items() if data.task.name == task}
        share = max(ROWS // len(members), 1)
        texts = [text for data in members.values() for text in data.train.texts[:share]]
        targets = [target for data in members.values() for target in data.train.targets[:share]]
        model = _fitted(texts, targets)
        pooled_scores |= {client: _scores(model, data) for client, data in members.items()}
    return {"alone": alone_scores, "pooled": {client: pooled_scores[client] for client in alone_scores}}


def _fitted(texts: Sequence[str], targets: Sequence[str]) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, targets = texts[:ROWS], targets[:ROWS]
    if len(set(targets)) == 1:
        return targets[0]
    settings: Mapping[str, Any] = {"sublinear_tf": True, "max_features": FEATURES}
    for word_options in ({"ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (1, 3)}):
        model = make_pipeline(TfidfVectorizer(**settings, **word_options), LogisticRegression(C=10.0, max_iter=500))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                return model.fit(list(texts), list(targets))
        except ValueError:  # There are no words: the texts are in another script, or consist of signs only.
            continue
    return max(sorted(set(targets)), key=list(targets).count)


def _scores(model: Any, data: ClientData) -> dict[str, float]:
    texts, targets = list(data.test.texts), list(data.test.targets)
    predictions = [model] * len(texts) if isinstance(model, str) else [str(label) for label in model.predict(texts)]
    return {"score": score("accuracy", predictions, targets), "balanced": balanced(recalls(predictions, targets))}
