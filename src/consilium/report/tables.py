"""The tables of the page: comparison, clients, clients left out, events, configuration, versions, words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from consilium.report.maps import block_names
from consilium.report.methods import Paired, has_seeds, method_columns, methods, paired_columns
from consilium.report.parts import Box, Cell, Fold, Heading, Part, Table, Text, Words
from consilium.report.plain import balanced_scores, class_recalls, rising, simple_head, simple_sentence, simple_values
from consilium.report.read import RunRecord
from consilium.report.results import (
    Column,
    best,
    client_scores,
    columns,
    format_bytes,
    format_score,
    number,
    unable_clients,
)
from consilium.report.style import SERIES, run_styles
from consilium.report.verdict import verdict

__all__ = [
    "client_tables",
    "comparison",
    "configuration",
    "event_tables",
    "glossary",
    "left_out",
    "over_seeds",
    "versions",
]

_HEADS = {
    "run": "Run",
    "mean": "Mean",
    "shared": "Shared clients",
    "bits/byte": "Bits per byte",
    "own best": "Own best",
    "clients": "Clients",
    "traffic": "Traffic",
    "memory": "Peak memory",
    "time": "Time",
    "method": "Method",
    "seeds": "Seeds",
    "p": "p (paired t)",
    "difference": "Difference",
    "95 % interval": "95 % interval",
    "pairs": "Pairs (seeds)",
    "clients ahead": "Clients ahead",
}
_EVENTS = {
    "structure": "Experts chosen after stage one",
    "stage_one": "Stage one ended: first choice of experts",
    "grow": "Got more experts",
    "shrink": "Gave up experts",
    "rollback": "Change taken back: it did not help",
    "freeze": "Structure frozen for the rest of the run",
}


def comparison(runs: Sequence[RunRecord]) -> Box:
    """Return one row per run with the best of each column marked, and notes on everything that is easily misread."""
    table_columns = columns(runs)
    finished_flags = [run.finished for run in runs]
    marks = {c.head: best(c, finished_flags if any(finished_flags) else [True] * len(runs)) for c in table_columns}
    dots = [SERIES[style % len(SERIES)] for style in run_styles([run.method for run in runs])]
    words = (
        "★ marks the best finished run of a column, unless all are alike. Task columns: mean ± standard deviation "
        "over the clients of the task, in percent, on test examples; the deviation is about how unequally clients "
        "are served, not about chance between seeds. Mean: over the tasks. Clients: how many could run the method "
        "within their memory; those that could not have no score. Peak memory: the largest client, estimated."
    )
    if any(c.head == "shared" for c in table_columns):
        common_clients = set.intersection(*(set(client_scores(run)) for run in runs))
        words += f" Shared clients: the mean over only the {len(common_clients)} that every run scored."
    if any(c.head == "own best" for c in table_columns):
        words += " Own best: bits per byte of each client's best model by its own validation data."
    sentences = [sentence for sentence in (*verdict(runs), simple_sentence(runs)) if sentence]
    content: list[Part] = [_table(table_columns, marks, dots)]
    content += [Text(sentence, "below") for sentence in sentences]
    content.append(Text(words, "note below"))
    return Box([Fold(f"Each of the {len(runs)} runs", content)] if has_seeds(runs) else content)


def over_seeds(runs: Sequence[RunRecord]) -> list[Box]:
    """Return the methods over their seeds, if any has several, and a test of whether a lead is more than luck."""
    method_summaries = methods(runs)
    if not has_seeds(runs) or not method_summaries:
        return []
    names = list(dict.fromkeys(run.method for run in runs))
    dots = [SERIES[names.index(m.label) % len(SERIES)] for m in method_summaries]
    words = "Mean ± standard deviation over finished runs, one a seed; scores in percent, ★ marks the best of a column."
    content: list[Part] = [
        Heading("Over seeds"),
        _method_table(method_columns(method_summaries), dots),
        Text(words, "note below"),
    ]
    rivals = [m for m in method_summaries if m.against]
    comparisons = [m.against for m in rivals if m.against]
    if comparisons:
        dots = [dot for dot, m in zip(dots, method_summaries, strict=True) if m.against]
        content += [
            Heading(f"Against {comparisons[0].reference}, pair by pair", "next"),
            _method_table(paired_columns(rivals), dots),
            Text(_test_words(comparisons), "note below"),
        ]
    return [Box(content)]


def _method_table(shown: Sequence[Column], dots: Sequence[str]) -> Table:
    return _table(shown, {c.head: best(c, [True] * len(dots)) for c in shown}, dots)


def _table(shown: Sequence[Column], marks: Mapping[str, set[int]], dots: Sequence[str]) -> Table:
    """Return columns as a table: the first names the rows, each with a dot of its colour; deviations stand below."""
    rows = []
    for i, dot in enumerate(dots):
        row = [Cell(shown[0].texts[i], is_head=True, dot=dot)]
        for column in shown[1:]:
            value, _, deviation = column.texts[i].partition(" ± ")
            kind = "num best" if i in marks[column.head] else "num"
            row.append(Cell(value, kind, below=f"± {deviation}" if deviation else ""))
        rows.append(row)
    heads = [(_HEADS.get(c.head, c.head), "num" if i else "") for i, c in enumerate(shown)]
    return Table(heads, rows, starred=any(marks.values()))


def _test_words(against: Sequence[Paired]) -> str:
    """Return an explanation of the test, its conclusions and its limits."""
    words = (
        f"Difference: the method’s mean score less that of {against[0].reference}, in points, on the same seeds, data "
        "and clients. "
    )
    min_pairs = min(a.pairs for a in against)
    if min_pairs < 2:
        return f"{words}With a single pair there is nothing to test: run more seeds."
    words += "p: two-sided paired t-test on the means of each seed"
    words += ", adjusted after Holm for the number of methods. " if len(against) > 1 else ". "
    if min_pairs < 6:
        words += (
            f"With {min_pairs} pairs it reaches 0.05 only for a difference of at least {_least(min_pairs):.1f} times "
            "the standard deviation of the differences"
            + (", before the adjustment" if len(against) > 1 else "")
            + ": a large p says that nothing was shown, not that the methods are equal. "
        )
    return (
        f"{words}Clients ahead: of all pairs of client and seed, those in which the method scores higher. They are "
        "counted, not tested: clients of one seed share a model and are no independent trials."
    )


def _least(pairs: int) -> float:
    """Return the mean difference at which the paired t-test has p = 0.05.

    It is given in standard deviations of the differences.
    """
    from scipy.stats import t

    return float(t.ppf(0.975, pairs - 1)) / pairs**0.5


def client_tables(runs: Sequence[RunRecord]) -> Box:
    """Return one row per client; several runs share the rows and differ in the score columns."""
    if len(runs) == 1:
        return Box(_one_run_clients(runs[0]))
    groups = [[run for run in runs if run.method == name] for name in dict.fromkeys(run.method for run in runs)]
    groups = groups if has_seeds(runs) else [[run] for run in runs]
    scores, reasons_by_group = [_mean_scores(group) for group in groups], [unable_clients(group[0]) for group in groups]
    clients = {c: run.clients[c] for run in reversed(runs) for c in run.order}
    ids = list(dict.fromkeys(c for run in runs for c in run.order))
    rows = []
    for client in ids:
        values = [score.get(client) for score in scores]
        rounded_scores = [round(v, 3) for v in values if v is not None]
        row = [Cell(client, is_head=True), Cell(clients[client].task, "wrap")]
        for value, reasons in zip(values, reasons_by_group, strict=True):
            is_top = value is not None and round(value, 3) == max(rounded_scores) and len(set(rounded_scores)) > 1
            text = "cannot run" if client in reasons and value is None else format_score(value)
            row.append(Cell(text, "num best" if is_top else "num"))
        rows.append(row)
    by_method = has_seeds(runs)
    heads = [("Client", ""), ("Task", ""), *((g[0].method if by_method else g[0].label, "num") for g in groups)]
    title = "Test score of each client" + (", mean over the method’s runs" if by_method else "")
    return Box([Heading(title), Table(heads, rows, tall=len(rows) > 16, starred=True)])


def _mean_scores(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Return the test score per client, as the mean over the runs that scored it."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        for client, score in client_scores(run).items():
            scores.setdefault(client, []).append(score)
    return {client: statistics.fmean(values) for client, values in scores.items()}


def _one_run_clients(run: RunRecord) -> list[Part]:
    scores, unable_reasons = client_scores(run), unable_clients(run)
    summaries = (run.summary or {}).get("clients") or {}
    extra_scores = {"Balanced": balanced_scores(run), simple_head(run): simple_values(run, "alone")}
    extra_scores = {head: values for head, values in extra_scores.items() if values}
    rows = []
    for client in run.order:
        record, summary = run.clients[client], summaries.get(client) or {}
        round_count = sum(client in (line.get("clients") or {}) for line in run.rounds)
        experts = summary.get("experts")
        expert_count = sum(experts) if isinstance(experts, list) else experts
        peak = number(summary.get("peak_bytes_model"))
        rows.append([
            Cell(client, is_head=True), Cell(record.task, "wrap"),
            Cell("cannot run" if client in unable_reasons else format_score(scores.get(client)), "num"),
            *(Cell(format_score(values.get(client)), "num") for values in extra_scores.values()),
            Cell(" / ".join(str(record.sizes.get(s, "–")) for s in ("train", "validation", "test")), "num"),
            Cell(round_count, "num"), Cell("–" if expert_count is None else expert_count, "num"),
            Cell(format_bytes(peak), "num"), Cell(format_bytes(record.memory_bytes), "num"),
        ])  # fmt: skip
    names = ("Test score", *extra_scores, "Train / val. / test", "Rounds", "Experts", "Peak memory", "Device")
    heads = [("Client", ""), ("Task", ""), *((n, "num") for n in names)]
    notes = (simple_sentence([run]), rising(run))
    sentences = [Text(note[:1].upper() + note[1:], "note below") for note in notes if note]
    return [Table(heads, rows, tall=len(rows) > 16), *sentences, *_recalls(run)]


def _recalls(run: RunRecord) -> list[Part]:
    """Return a table of the share of test examples of each label that are recognised; [] if the task has no labels."""
    recalls = class_recalls(run)
    if not recalls:
        return []
    rows = [
        [Cell(label, "wrap", is_head=True), Cell(format_score(mean), "num"), Cell(clients, "num")]
        for label, (mean, clients) in recalls.items()
    ]
    heads = [("Label", ""), ("Recall", "num"), ("Clients", "num")]
    words = (
        "Recall: the share of the test examples of a label that the model recognises, mean over the clients that have "
        "some."
    )
    return [Heading("Recall of each label", "next"), Table(heads, rows, tall=len(rows) > 16), Text(words, "note below")]


def left_out(runs: Sequence[RunRecord]) -> Box:
    """Return the clients that never took part, with the reason: no data, or not enough memory."""
    rows = []
    for run in runs:
        for client, reason in unable_clients(run).items():
            rows.append([Cell(client, is_head=True), Cell(run.label), Cell("cannot run"), Cell(reason, "wrap long")])
    for client in dict.fromkeys(c for run in runs for c in run.skipped):
        holders = [run for run in runs if client in run.skipped]
        name = "all runs" if len(holders) == len(runs) > 1 else ", ".join(run.label for run in holders)
        rows.append(
            [Cell(client, is_head=True), Cell(name), Cell("skipped"), Cell(holders[0].skipped[client], "wrap long")]
        )
    title = Heading("Clients left out")
    if not rows:
        return Box([title, Text("None: every client took part in every run.", "muted")])
    heads = [("Client", ""), ("Run", ""), ("What", ""), ("Why", "")]
    return Box([title, Table(heads, rows, tall=len(rows) > 16)])


def event_tables(runs: Sequence[RunRecord]) -> list[Box]:
    """Return the changes that the server made, in order, with a count of each kind above the rows."""
    boxes: list[Box] = []
    labels = []
    for run in runs:
        if not run.events:
            labels.append(run.label)
            continue
        names = block_names(list((run.structure or {}).get("blocks") or ()))
        rows = [
            [Cell(e.get("round", "–"), "num"), Cell(e.get("client") or "all", "id"),
             Cell(_EVENTS.get(str(e.get("event")), e.get("event", "–")), "long"), Cell(_details(e, names), "wrap long")]
            for e in run.events
        ]  # fmt: skip
        counts = Counter(str(e.get("event", "–")) for e in run.events)
        counts_text = ", ".join(f"{n} × {name.replace('_', ' ')}" for name, n in counts.items())
        heads = [("Round", "num"), ("Client", ""), ("What", ""), ("Details", "")]
        content = [Table(heads, rows, tall=len(rows) > 12)]
        boxes.append(Box([Fold(f"{run.label}: {counts_text}", content, is_open=len(runs) <= 3)]))
    if labels:
        events = "event" if len(labels) == 1 else "events"
        text = f"{', '.join(labels)} recorded no {events}: nothing changed a client’s structure."
        boxes.append(Box([Text(text, "muted")]))
    return boxes


def _details(event: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the event's other fields as "name value", with the readable names of layers."""
    parts = []
    for key, value in event.items():
        if key not in ("round", "client", "event") and value not in (None, [], {}):
            parts.append(f"{str(key).replace('_', ' ')} {_plain(value, names)}")
    return " · ".join(parts) or "–"


def _plain(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        texts = [" ".join(_plain(v, names) for v in x) if isinstance(x, list) else _plain(x, names) for x in value]
        return ", ".join(texts[:24]) + (f", … ({len(texts)} in all)" if len(texts) > 24 else "")
    if isinstance(value, Mapping):
        return "; ".join(f"{names.get(str(k), str(k))}: {_plain(v, names)}" for k, v in value.items())
    return names.get(str(value), str(value))


def configuration(runs: Sequence[RunRecord]) -> Box:
    """Return every setting with one column per run; settings that differ between runs come first."""
    flat_configs = [dict(_flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in flat_configs for key in config))
    differing_keys = [k for k in keys if len({str(config.get(k)) for config in flat_configs}) > 1]
    keys = differing_keys + [k for k in keys if k not in differing_keys]
    rows = [[Cell(k, is_head=True), *(Cell(config.get(k, "–"), "wrap") for config in flat_configs)] for k in keys]
    kinds = ["differs" if k in differing_keys else "same" if len(runs) > 1 else "" for k in keys]
    heads = [("Setting", ""), *((run.label if len(runs) > 1 else "Value", "") for run in runs)]
    count_text = f", {len(differing_keys)} of {len(keys)} differ" if len(runs) > 1 else f", {len(keys)} settings"
    return Box([Fold(f"Configuration{count_text}", [Table(heads, rows, kinds)])])


def versions(runs: Sequence[RunRecord]) -> Box:
    """Return the directories of the runs, and the code and packages that made them."""
    facts = [
        {
            "directory": run.path.name,
            "git": run.git or "–",
            "data fingerprint": run.fingerprint or "–",
            "status": run.status,
        }
        | {str(k): v for k, v in run.versions.items()}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for entry in facts for key in entry))
    rows = [[Cell(k, is_head=True), *(Cell(entry.get(k, "–"), "wrap") for entry in facts)] for k in keys]
    heads = [("", ""), *((run.label if len(runs) > 1 else "", "") for run in runs)]
    return Box([Fold("Versions and origin", [Table(heads, rows)])])


def glossary() -> Box:
    """Return the words that the captions use, with definitions for a reader who is new to the field."""
    words = {
        "Client": "One site with its own data, which never leaves it: a hospital, a bank, a team.",
        "Round": "The server sends models out, some clients train, and the server merges what comes back.",
        "Expert": "One of several interchangeable parts of a sparse layer. A small router picks, token by token, which "
        "expert works; the others rest.",
        "Sparse layer": "A layer made of experts. A client may hold only some of them and so save memory and traffic.",
        "Stage one, stage two": "FedMoE first measures which experts a client asks for and picks a set that fits its "
        "memory; then it trains, and lets the set grow or shrink where the score has stopped rising.",
        "Validation and test": "Validation examples steer the method, for instance the choice of experts. Test "
        "examples steer nothing; only their scores are compared.",
        "Accuracy, token F1, ROUGE-2": "Share of right answers; overlap in words with the right answer; overlap in "
        "pairs of neighbouring words. All from 0 to 100 %.",
    }
    return Box([Fold("Words used on this page", [Words(words)])])


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for k, v in value.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(v) for v in value) or "–")]
    return [(prefix, "–" if value is None else str(value))]
