"""What the end of a run says: scores of clients, a simple model next to them, and what to do next; by hand."""

import dataclasses
import io
import json

import pytest
import runs
from rich.console import Console

from consilium.report.plain import class_recalls, print_clients, rising, simple_sentence, simple_values
from consilium.report.read import read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from consilium.loop import run

    folder = tmp_path_factory.mktemp("plain")
    run(runs.experiment(runs.table(folder), rounds=1, name="short"), folder / "short")
    return folder / "short"


def changed(run, scores, alone=None, pooled=None, means=None):
    """The record of a run, with these test scores of its clients, of simple models, and mean scores of its rounds."""

    def told(values):
        return {client: {"score": value, "balanced": value} for client, value in values.items()}

    rounds = [{**run.rounds[0], "test": scores, "scores": {"mean": mean}} for mean in means or [0.5]]
    summary = {**run.summary, "clients": {c: {**v, "test": scores.get(c)} for c, v in run.summary["clients"].items()}}
    summary["simple"] = {"alone": told(alone or {}), "pooled": told(pooled or {})}
    return dataclasses.replace(run, rounds=tuple(rounds), summary=summary)


def said(folder, width=120):
    out = io.StringIO()
    print_clients(folder, Console(file=out, width=width))
    return out.getvalue()


def test_a_run_records_both_and_the_screen_shows_them(finished):
    summary = json.loads((finished / "summary.json").read_text())
    clients = set(summary["clients"])
    assert set(summary["simple"]["alone"]) == set(summary["simple"]["pooled"]) == clients
    (record,) = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    for client in clients:
        recalls = record["recall"][client]
        assert set(recalls) <= {"cat", "dog", "fish"}
        assert record["balanced"][client] == pytest.approx(sum(recalls.values()) / len(recalls))
    shown = said(finished).splitlines()
    assert [line.split()[0] for line in shown[1:4]] == sorted(clients)
    assert shown[0].split() == ["client", "test", "balanced", "bag", "of", "words", "alone"]
    assert shown[4].startswith("bag of words (TF-IDF and logistic regression), each client alone: ")
    worst = min(clients, key=lambda c: (summary["clients"][c]["test"], c))
    assert shown[-1] == f"next: consilium export {finished} --client {worst} --out DIR"
    page = finished / "report.html"
    from consilium.report import write_report

    text = write_report([finished], page).read_text()
    for words in ("Balanced accuracy", "Bag of words, alone", "Recall of each label", "each client alone"):
        assert words in text


def test_how_far_a_bag_of_words_is_by_hand(finished):
    """Scores 0.6, 0.8, 0.7; alone 0.5, 0.7, 0.3: mean 0.5, 20 points below 0.7; pooled 0.9 is 20 above it."""
    names = ["site-0", "site-1", "site-2"]
    scores, alone = (dict(zip(names, values, strict=True)) for values in ((0.6, 0.8, 0.7), (0.5, 0.7, 0.3)))
    run = changed(read_run(finished), scores, alone, dict.fromkeys(names, 0.9))
    assert simple_values(run, "alone", "balanced") == alone
    assert simple_sentence([run]) == (
        "bag of words (TF-IDF and logistic regression), each client alone: 50.0; FedAvg is 20.0 points above it. "
        "Trained on the rows of all clients together it reaches 90.0, 20.0 points above FedAvg."
    )
    run = changed(read_run(finished), scores, dict.fromkeys(names, 0.8))
    assert simple_sentence([run]).endswith("each client alone: 80.0; FedAvg is 10.0 points below it.")
    assert "level with it" in simple_sentence([changed(read_run(finished), scores, scores)])
    assert simple_sentence([changed(read_run(finished), scores)]) == ""


@pytest.mark.parametrize(
    ("means", "note"),
    [
        ([0.5], ""),
        ([0.5, 0.6], "from 50.0 to 60.0: more --rounds may give more"),
        ([0.5, 0.502], ""),
        ([0.7, 0.5, 0.6], ""),
    ],
    ids=["one round", "rising", "level", "not yet back"],
)
def test_scores_that_still_rise(finished, means, note):
    assert (
        note in rising(changed(read_run(finished), {}, means=means))
        if note
        else not rising(changed(read_run(finished), {}, means=means))
    )


def test_recall_of_a_label_is_the_mean_over_those_who_have_it(finished):
    run = read_run(finished)
    rounds = (
        {**run.rounds[0], "recall": {"site-0": {"cat": 1.0, "dog": 0.5}, "site-1": {"cat": 0.0}, "x": {"cat": 9}}},
    )
    assert class_recalls(dataclasses.replace(run, rounds=rounds)) == {"cat": (0.5, 2), "dog": (0.5, 1)}


def test_names_are_padded_to_the_longest_and_markup_is_text(finished, tmp_path, monkeypatch):
    run = read_run(finished)
    renamed = {"site-0": "St. Mary's Hospital", "site-1": "[red]x[/red]", "site-2": "b"}
    scores = dict(zip(renamed.values(), (0.5, 0.6, 0.7), strict=True))
    clients = {renamed[c]: record for c, record in run.clients.items()}
    made = dataclasses.replace(changed(run, {}), clients=clients, rounds=({**run.rounds[0], "test": scores},))
    made = dataclasses.replace(made, summary={**made.summary, "clients": {c: {"test": s} for c, s in scores.items()}})
    monkeypatch.setattr("consilium.report.plain.read_runs", lambda _: [made])
    lines = said(finished).splitlines()
    assert len({line.index(f"{100 * s:.1f}") for line, s in zip(lines[1:4], scores.values(), strict=True)}) == 1
    assert "[red]x[/red]" in lines[2] and "--client 'St. Mary'\"'\"'s Hospital'" in lines[-1]
