"""The tables of the page: comparison, clients, clients left out, events, configuration, versions, words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from consilium.escape import html
from consilium.report.maps import block_names
from consilium.report.methods import Paired, has_seeds, method_columns, methods, paired_columns
from consilium.report.parts import cell, fold, table
from consilium.report.plain import balanced_scores, class_recalls, rising, simple_sentence, simple_values
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


def comparison(runs: Sequence[RunRecord]) -> str:
    """Return one row per run with the best of each column marked, and notes on everything that is easily misread."""
    shown = columns(runs)
    able = [run.finished for run in runs]
    marks = {c.head: best(c, able if any(able) else [True] * len(runs)) for c in shown}
    rows, styles = [], run_styles([run.method for run in runs])
    for i in range(len(runs)):
        dot = f'<span class="dot" style="background:var(--{SERIES[styles[i] % len(SERIES)]})"></span>'
        row = [f'<th scope="row">{dot}{html(shown[0].texts[i])}</th>']
        for column in shown[1:]:
            score, _, spread = column.texts[i].partition(" ± ")
            below = f"<small>± {html(spread)}</small>" if spread else ""
            row.append(f'<td class="num{" best" if i in marks[column.head] else ""}">{html(score)}{below}</td>')
        rows.append(row)
    heads = [(_HEADS.get(c.head, c.head), "" if c.head == "run" else "num") for c in shown]
    words = (
        "★ marks the best finished run of a column, unless all are alike. Task columns: mean ± standard deviation "
        "over the clients of the task, in percent, on test examples; the deviation is about how unequally clients "
        "are served, not about chance between seeds. Mean: over the tasks. Clients: how many could run the method "
        "within their memory; those that could not have no score. Peak memory: the largest client, estimated."
    )
    if any(c.head == "shared" for c in shown):
        shared = set.intersection(*(set(client_scores(run)) for run in runs))
        words += f" Shared clients: the mean over only the {len(shared)} that every run scored."
    if any(c.head == "own best" for c in shown):
        words += " Own best: bits per byte of each client's best model by its own validation data."
    said = [sentence for sentence in (*verdict(runs), simple_sentence(runs)) if sentence]
    told = "".join(f'<p style="margin:12px 0 0">{html(sentence)}</p>' for sentence in said)
    note = f'{told}<p class="note" style="margin:12px 0 0">{words}</p>'
    body = f"{table(heads, rows, starred=True)}{note}"
    return f'<div class="box">{fold(f"Each of the {len(runs)} runs", body) if has_seeds(runs) else body}</div>'


def over_seeds(runs: Sequence[RunRecord]) -> str:
    """Return the methods over their seeds, if any has several, and a test of whether a lead is more than luck."""
    found = methods(runs)
    if not has_seeds(runs) or not found:
        return ""
    names = list(dict.fromkeys(run.method for run in runs))
    dots = [SERIES[names.index(m.label) % len(SERIES)] for m in found]
    words = "Mean ± standard deviation over finished runs, one a seed; scores in percent, ★ marks the best of a column."
    made = f'<h3>Over seeds</h3>{_method_table(method_columns(found), dots)}<p class="note below">{words}</p>'
    others = [m for m in found if m.against]
    against = [m.against for m in others if m.against]
    if against:
        dots = [dot for dot, m in zip(dots, found, strict=True) if m.against]
        made += f'<h3 class="next">Against {html(against[0].reference)}, pair by pair</h3>'
        made += f'{_method_table(paired_columns(others), dots)}<p class="note below">{html(_test_words(against))}</p>'
    return f'<div class="box">{made}</div>'


def _method_table(shown: Sequence[Column], dots: Sequence[str]) -> str:
    marks = {c.head: best(c, [True] * len(dots)) for c in shown}
    rows = []
    for i, shade in enumerate(dots):
        row = [
            f'<th scope="row"><span class="dot" style="background:var(--{shade})"></span>{html(shown[0].texts[i])}</th>'
        ]
        for column in shown[1:]:
            value, _, spread = column.texts[i].partition(" ± ")
            below = f"<small>± {html(spread)}</small>" if spread else ""
            row.append(f'<td class="num{" best" if i in marks[column.head] else ""}">{html(value)}{below}</td>')
        rows.append(row)
    heads = [(_HEADS.get(c.head, c.head), "" if c.head == "method" else "num") for c in shown]
    return table(heads, rows, starred=any(marks.values()))


def _test_words(against: Sequence[Paired]) -> str:
    """Return an explanation of the test, its conclusions and its limits."""
    words = (
        f"Difference: the method’s mean score less that of {against[0].reference}, in points, on the same seeds, data "
        "and clients. "
    )
    fewest = min(a.pairs for a in against)
    if fewest < 2:
        return f"{words}With a single pair there is nothing to test: run more seeds."
    words += "p: two-sided paired t-test on the means of each seed"
    words += ", adjusted after Holm for the number of methods. " if len(against) > 1 else ". "
    if fewest < 6:
        words += (
            f"With {fewest} pairs it reaches 0.05 only for a difference of at least {_least(fewest):.1f} times the "
            "standard deviation of the differences"
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


def client_tables(runs: Sequence[RunRecord]) -> str:
    """Return one row per client; several runs share the rows and differ in the score columns."""
    if len(runs) == 1:
        return f'<div class="box">{_one_run_clients(runs[0])}</div>'
    groups = [[run for run in runs if run.method == name] for name in dict.fromkeys(run.method for run in runs)]
    groups = groups if has_seeds(runs) else [[run] for run in runs]
    scores, unable = [_mean_scores(group) for group in groups], [unable_clients(group[0]) for group in groups]
    clients = {c: run.clients[c] for run in reversed(runs) for c in run.order}
    ids = list(dict.fromkeys(c for run in runs for c in run.order))
    rows = []
    for client in ids:
        values = [score.get(client) for score in scores]
        known = [round(v, 3) for v in values if v is not None]
        row = [cell(client, tag="th"), cell(clients[client].task, "wrap")]
        for value, out in zip(values, unable, strict=True):
            top = value is not None and round(value, 3) == max(known) and len(set(known)) > 1
            shown = "cannot run" if client in out and value is None else format_score(value)
            row.append(cell(shown, "num best" if top else "num"))
        rows.append(row)
    over = has_seeds(runs)
    heads = [("Client", ""), ("Task", ""), *((g[0].method if over else g[0].label, "num") for g in groups)]
    made = table(heads, rows, tall=len(rows) > 16, starred=True)
    title = "Test score of each client" + (", mean over the method’s runs" if over else "")
    return f'<div class="box"><h3>{title}</h3>{made}</div>'


def _mean_scores(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Return the test score per client, as the mean over the runs that scored it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for client, score in client_scores(run).items():
            found.setdefault(client, []).append(score)
    return {client: statistics.fmean(values) for client, values in found.items()}


def _one_run_clients(run: RunRecord) -> str:
    scores, unable = client_scores(run), unable_clients(run)
    told = (run.summary or {}).get("clients") or {}
    beside = {"Balanced": balanced_scores(run), "Bag of words, alone": simple_values(run, "alone")}
    beside = {head: values for head, values in beside.items() if values}
    rows = []
    for client in run.order:
        record, end = run.clients[client], told.get(client) or {}
        part = sum(client in (line.get("clients") or {}) for line in run.rounds)
        experts = end.get("experts")
        held = sum(experts) if isinstance(experts, list) else experts
        peak = number(end.get("peak_bytes_model"))
        rows.append([
            cell(client, tag="th"), cell(record.task, "wrap"),
            cell("cannot run" if client in unable else format_score(scores.get(client)), "num"),
            *(cell(format_score(values.get(client)), "num") for values in beside.values()),
            cell(" / ".join(str(record.sizes.get(s, "–")) for s in ("train", "validation", "test")), "num"),
            cell(part, "num"), cell("–" if held is None else held, "num"),
            cell(format_bytes(peak), "num"), cell(format_bytes(record.memory_bytes), "num"),
        ])  # fmt: skip
    names = ("Test score", *beside, "Train / val. / test", "Rounds", "Experts", "Peak memory", "Device")
    made = table([("Client", ""), ("Task", ""), *((n, "num") for n in names)], rows, tall=len(rows) > 16)
    notes = (simple_sentence([run]), rising(run))
    words = "".join(f'<p class="note below">{html(one[:1].upper() + one[1:])}</p>' for one in notes if one)
    return f"{made}{words}{_recalls(run)}"


def _recalls(run: RunRecord) -> str:
    """Return a table of the share of test examples of each label that are recognised; "" if the task has no labels."""
    found = class_recalls(run)
    if not found:
        return ""
    rows = [
        [cell(label, "wrap", tag="th"), cell(format_score(mean), "num"), cell(clients, "num")]
        for label, (mean, clients) in found.items()
    ]
    made = table([("Label", ""), ("Recall", "num"), ("Clients", "num")], rows, tall=len(rows) > 16)
    words = (
        "Recall: the share of the test examples of a label that the model recognises, mean over the clients that have "
        "some."
    )
    return f'<h3 class="next">Recall of each label</h3>{made}<p class="note below">{words}</p>'


def left_out(runs: Sequence[RunRecord]) -> str:
    """Return the clients that never took part, with the reason: no data, or not enough memory."""
    rows = []
    for run in runs:
        for client, why in unable_clients(run).items():
            rows.append([cell(client, tag="th"), cell(run.label), cell("cannot run"), cell(why, "wrap long")])
    for client in dict.fromkeys(c for run in runs for c in run.skipped):
        holders = [run for run in runs if client in run.skipped]
        name = "all runs" if len(holders) == len(runs) > 1 else ", ".join(run.label for run in holders)
        rows.append(
            [cell(client, tag="th"), cell(name), cell("skipped"), cell(holders[0].skipped[client], "wrap long")]
        )
    title = "<h3>Clients left out</h3>"
    if not rows:
        return f'<div class="box">{title}<p class="muted">None: every client took part in every run.</p></div>'
    heads = [("Client", ""), ("Run", ""), ("What", ""), ("Why", "")]
    return f'<div class="box">{title}{table(heads, rows, tall=len(rows) > 16)}</div>'


def event_tables(runs: Sequence[RunRecord]) -> str:
    """Return the changes that the server made, in order, with a count of each kind above the rows."""
    made, without = [], []
    for run in runs:
        if not run.events:
            without.append(run.label)
            continue
        names = block_names(list((run.structure or {}).get("blocks") or ()))
        rows = [
            [cell(e.get("round", "–"), "num"), cell(e.get("client") or "all", "id"),
             cell(_EVENTS.get(str(e.get("event")), e.get("event", "–")), "long"), cell(_details(e, names), "wrap long")]
            for e in run.events
        ]  # fmt: skip
        counts = Counter(str(e.get("event", "–")) for e in run.events)
        said = ", ".join(f"{n} × {name.replace('_', ' ')}" for name, n in counts.items())
        heads = [("Round", "num"), ("Client", ""), ("What", ""), ("Details", "")]
        made.append(fold(f"{run.label}: {said}", table(heads, rows, tall=len(rows) > 12), is_open=len(runs) <= 3))
    if without:
        one = len(without) == 1
        made.append(f'<p class="muted">{html(", ".join(without))} recorded no {"event" if one else "events"}: '
                    "nothing changed a client’s structure.</p>")  # fmt: skip
    return "".join(f'<div class="box">{part}</div>' for part in made)


def _details(event: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the event's other fields as "name value", with the readable names of layers."""
    said = []
    for key, value in event.items():
        if key not in ("round", "client", "event") and value not in (None, [], {}):
            said.append(f"{str(key).replace('_', ' ')} {_plain(value, names)}")
    return " · ".join(said) or "–"


def _plain(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        shown = [" ".join(_plain(v, names) for v in x) if isinstance(x, list) else _plain(x, names) for x in value]
        return ", ".join(shown[:24]) + (f", … ({len(shown)} in all)" if len(shown) > 24 else "")
    if isinstance(value, Mapping):
        return "; ".join(f"{names.get(str(k), str(k))}: {_plain(v, names)}" for k, v in value.items())
    return names.get(str(value), str(value))


def configuration(runs: Sequence[RunRecord]) -> str:
    """Return every setting with one column per run; settings that differ between runs come first."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differ = [k for k in keys if len({str(one.get(k)) for one in flat}) > 1]
    keys = differ + [k for k in keys if k not in differ]
    rows = [[cell(k, tag="th"), *(cell(one.get(k, "–"), "wrap") for one in flat)] for k in keys]
    kinds = ["differs" if k in differ else "same" if len(runs) > 1 else "" for k in keys]
    heads = [("Setting", ""), *((run.label if len(runs) > 1 else "Value", "") for run in runs)]
    extra = f", {len(differ)} of {len(keys)} differ" if len(runs) > 1 else f", {len(keys)} settings"
    return f'<div class="box">{fold(f"Configuration{extra}", table(heads, rows, kinds))}</div>'


def versions(runs: Sequence[RunRecord]) -> str:
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
    keys = list(dict.fromkeys(key for one in facts for key in one))
    rows = [[cell(k, tag="th"), *(cell(one.get(k, "–"), "wrap") for one in facts)] for k in keys]
    heads = [("", ""), *((run.label if len(runs) > 1 else "", "") for run in runs)]
    return f'<div class="box">{fold("Versions and origin", table(heads, rows))}</div>'


def glossary() -> str:
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
    said = "".join(f"<dt>{html(word)}</dt><dd>{html(meaning)}</dd>" for word, meaning in words.items())
    return f'<div class="box">{fold("Words used on this page", f"<dl>{said}</dl>")}</div>'


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for k, v in value.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(v) for v in value) or "–")]
    return [(prefix, "–" if value is None else str(value))]
