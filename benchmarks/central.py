"""Is the shipped model worth starting from? All clients' data pooled in one place, against bags of words.

    python benchmarks/central.py [--model docstring-switch] [--seeds 0 1 2] [--tasks topic kind verb]

Per classification task the clients' training examples are pooled (IID partition: one label space, ten packages for
`topic`) and these are scored on the pooled test examples:

- words: a bag of words, TF-IDF, with a logistic regression or a linear SVM;
- n-grams: the same with word pairs, and with characters, the best of all;
- n-grams + public: word pairs, trained on the labelled public documents as well, which the shipped model has seen;
- model: the shipped model fine-tuned with a linear head on the mean-pooled hidden state.

Every choice (representation, regularisation, learning rate, epoch) is made on the validation examples.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from consilium.core import ClientContext, ClientInfo, ClientState, Sampling
from consilium.data.docstrings import DocstringData, answer
from consilium.data.task import ClientData, Split, pooled, score
from consilium.fit import Fit
from consilium.moe.build import ModelSource
from consilium.recipes.pretrain_model import sort_experts
from consilium.scoring import evaluate
from consilium.setup import MixtureSetup
from consilium.training import fit

WORDS = dict(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def linear(data: ClientData, n_grams: bool, extra: Split | None = None) -> tuple[float, float, str]:
    """Validation and test accuracy of the linear model that is best on validation, and which one it was."""
    texts, targets = list(data.train.texts), list(data.train.targets)
    if extra is not None:
        texts, targets = texts + extra.texts, targets + extra.targets
    words, pairs = TfidfVectorizer(**WORDS), TfidfVectorizer(ngram_range=(1, 2), **WORDS)
    vectorisers = {"pairs": pairs} if n_grams else {"words": words}
    if n_grams and extra is None:  # with the public documents it is minutes of work for no gain
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        vectorisers["pairs+characters"] = make_union(pairs, characters)
    best = (-1.0, -1.0, "")
    for name, vectoriser in vectorisers.items():
        train = vectoriser.fit_transform(texts)
        validation, test = vectoriser.transform(data.validation.texts), vectoriser.transform(data.test.texts)
        candidates = [LinearSVC(C=c, class_weight=w) for c in (0.1, 0.3, 1.0, 3.0) for w in (None, "balanced")]
        if extra is None and "characters" not in name:
            candidates += [LogisticRegression(C=c, max_iter=500) for c in (3.0, 10.0, 30.0, 100.0)]
        for candidate in candidates:
            candidate.fit(train, targets)
            valid = score("accuracy", list(candidate.predict(validation)), data.validation.targets)
            if valid > best[0]:
                found = score("accuracy", list(candidate.predict(test)), data.test.targets)
                best = (valid, found, f"{name}, {candidate}")
    return best


def fine_tune(data: ClientData, path: str, rates: list[float], epochs: int, seed: int) -> tuple[float, float, str]:
    """Validation and test accuracy of the shipped model, learning rate and epoch chosen on validation."""
    best = (-1.0, -1.0, "")
    for rate in rates:
        config = Fit(lr=rate, head_lr=10 * rate, epochs=1, batch_size=32, max_length=96)
        setup = MixtureSetup(ModelSource(path), config, Sampling(), seed, {data.task.name: data.task.labels})
        info = ClientInfo("central", len(data.train), data.task.name)
        context = ClientContext(info, data, torch.device("cpu"), seed, ClientState())
        model = setup.build(setup.initial_params(), context)
        sort_experts(model.backbone)  # the same numbers in half the time
        train, validation, test = (setup.encode(context, s) for _, s in data.splits())
        for epoch in range(epochs):
            falling = 1 - epoch / epochs
            context = replace(context, seed=1000 * seed + epoch)
            fit(model, train, replace(config, lr=rate * falling, head_lr=10 * rate * falling), context)
            valid = evaluate(model, validation, context, setup)
            if valid > best[0]:
                best = (valid, evaluate(model, test, context, setup), f"lr {rate:g}, epoch {epoch + 1}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="docstring-switch", help="a shipped model's name or a directory")
    parser.add_argument("--tasks", nargs="+", default=["topic", "kind", "verb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--public", action="store_true", help="also n-grams that have seen the public shard")
    parser.add_argument("--skip-words", action="store_true", help="the model only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, list[float]]] = {}
    for task in options.tasks:
        for seed in options.seeds:
            settings = DocstringData(tasks=(task,), clients=4, partition="iid")
            data = pooled(settings.load(seed), task)
            lines = table.setdefault(task, {})
            if not options.skip_words:
                report(lines, "words", task, seed, data, linear(data, n_grams=False))
                report(lines, "n-grams", task, seed, data, linear(data, n_grams=True))
            if options.public:
                known = [(d.text, t) for d in settings.public() if (t := answer(task, d)) in data.task.labels]
                extra = Split([text for text, _ in known], [target for _, target in known])
                report(lines, "n-grams + public", task, seed, data, linear(data, True, extra))
            started = time.perf_counter()
            found = fine_tune(data, options.model, options.rates, options.epochs, seed)
            report(lines, "model", task, seed, data, found, time.perf_counter() - started)
    means = {
        task: {line: round(statistics.mean(values), 4) for line, values in lines.items()}
        for task, lines in table.items()
    }
    print(json.dumps(means))


def report(
    lines: dict[str, list[float]],
    line: str,
    task: str,
    seed: int,
    data: ClientData,
    found: tuple[float, float, str],
    seconds: float = 0.0,
) -> None:
    """Keep one test accuracy and print it with what was chosen."""
    lines.setdefault(line, []).append(found[1])
    sizes = f"{len(data.train)}/{len(data.validation)}/{len(data.test)}"
    chosen = f"validation {found[0]:.3f}, chosen: {found[2]}"
    print(f"{task:6} seed {seed} {sizes:12} {line:16} test {found[1]:.3f} ({chosen}) {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
