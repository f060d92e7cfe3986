"""A simple baseline for the federated models: a classical model of each client's own rows, trained alone.

A federation must beat its score to be worth the effort. All models are scikit-learn's:

- Texts: a bag of words, which is TF-IDF of words and pairs of words, and logistic regression.
- Tables and images: logistic regression on standardised columns or pixels. Images are averaged down to 16 x 16 pixels.

Each client trains its model on its own training rows. In a simulation, the data of all clients is in one place. There,
the model is also trained on the rows of all clients of a task ("pooled"), which shows the score that would be possible
if the data were brought together. At a site, only the first score exists, and it stays at the site.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from consilium.data.task import ClientData, Federation, Split, balanced, recalls, score
from consilium.data.tensor import TensorSplit

__all__ = ["BAG_OF_WORDS", "LINEAR", "simple_name", "simple_score", "simple_scores"]

BAG_OF_WORDS, LINEAR = "bag of words", "logistic regression"
"""Names of the models, for texts and for tables and images."""
ROWS = 20_000
"""Maximum number of training rows of a model. Rows are dealt in random order, so the first ones are a sample."""
CLIENTS = 500
"""Maximum number of clients for which the baseline is computed, so that it takes only seconds."""
FEATURES = 100_000
VALUES = 20_000_000
"""Maximum number of values (rows times columns) on which the models of tables or images of a run are trained."""
SIDE = 16
"""Height and width, in pixels, to which larger images are averaged down."""


def simple_name(data: ClientData) -> str | None:
    """Return the name of the simple model of a client's data, or None if there is none for its task."""
    if data.task.form != "classification":
        return None
    if isinstance(data.train, Split):
        return BAG_OF_WORDS
    return LINEAR if data.train.x.dtype in (torch.uint8, torch.float32) else None


def simple_score(data: ClientData) -> dict[str, Any] | None:
    """Return the score of the simple model of one client, trained alone; None if there is none for its task.

    Returns:
        "name" of the model, and its "score" (accuracy) and "balanced" (mean recall of the labels) in [0, 1] on the
        client's test data.
    """
    if (name := simple_name(data)) is None:
        return None
    return {"name": name, **_scores(_alone(data, VALUES), data)}


def simple_scores(federation: Federation) -> dict[str, Any] | None:
    """Return the scores of simple models on each client's test data.

    Returns:
        "name" of the model; "alone" and "pooled", each client -> "score" (accuracy) and "balanced" (mean recall of the
        labels), in [0, 1]. Only clients with a task of classification are included. None if there are no such clients,
        or too many.
    """
    members = {client: data for client, data in federation.clients.items() if simple_name(data)}
    if not members or len(members) > CLIENTS:
        return None
    limit = VALUES // (2 * len(members))
    alone_scores = {client: _scores(_alone(data, limit), data) for client, data in members.items()}
    pooled_scores: dict[str, dict[str, float]] = {}
    for task in {data.task.name for data in members.values()}:
        task_members = {client: data for client, data in members.items() if data.task.name == task}
        model = _pooled(list(task_members.values()), limit)
        pooled_scores |= {client: _scores(model, data) for client, data in task_members.items()}
    return {
        "name": simple_name(next(iter(members.values()))),
        "alone": alone_scores,
        "pooled": {client: pooled_scores[client] for client in alone_scores},
    }


def _alone(data: ClientData, limit: int) -> Any:
    """Return the model of a client's own rows, of tables and images of at most `limit` values."""
    return _fitted(data.train.texts, data.train.targets) if isinstance(data.train, Split) else _linear([data], limit)


def _pooled(members: Sequence[ClientData], limit: int) -> Any:
    """Return the model of the rows of several clients, of tables and images of at most `limit` values per client."""
    if not isinstance(members[0].train, Split):
        return _linear(members, limit)
    share = max(ROWS // len(members), 1)
    texts = [text for data in members for text in data.train.texts[:share]]
    return _fitted(texts, [target for data in members for target in data.train.targets[:share]])


def _columns(split: Split | TensorSplit, limit: int | None = None) -> np.ndarray:
    """Return the rows of a table, or the pixels of images, float32 [n, columns]; at most `limit` values, or all."""
    assert isinstance(split, TensorSplit)
    x = split.x[split.index[:1]].float()
    width = x.numel() if x.ndim != 4 else x[0, :, :SIDE, :SIDE].numel()
    count = len(split) if limit is None else min(ROWS, max(limit // width, 1))
    x = split.x[split.index[:count]].float()
    if x.ndim == 4:
        x = adaptive_avg_pool2d(x, (min(x.shape[2], SIDE), min(x.shape[3], SIDE)))
    return x.flatten(1).numpy()


def _linear(members: Sequence[ClientData], limit: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = [_columns(data.train, limit) for data in members]
    targets = [t for data, rows in zip(members, columns, strict=True) for t in data.train.targets[: len(rows)]]
    if len(set(targets)) == 1:
        return targets[0]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(np.concatenate(columns), targets)


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
    targets = list(data.test.targets)
    if isinstance(model, str):
        predictions = [model] * len(targets)
    else:
        x = list(data.test.texts) if isinstance(data.test, Split) else _columns(data.test)
        predictions = [str(label) for label in model.predict(x)]
    return {"score": score("accuracy", predictions, targets), "balanced": balanced(recalls(predictions, targets))}
