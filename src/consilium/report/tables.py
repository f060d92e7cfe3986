"""The tables of the page: comparison, clients, who was left out, events, configuration, versions, words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from consilium.report.maps import block_names
from consilium.report.parts import cell, fold, table, text
from consilium.report.read import RunRecord
from consilium.report.results import (
    best,
    client_scores,
    columns,
    format_bytes,
    format_score,
    number,
    over_runs,
    unable_clients,
)
from consilium.report.style import SERIES, run_styles

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
    "clients": "Clients",
    "traffic": "Traffic",
    "memory": "Peak memory",
    "time": "Time",
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
    """One row a run, the best of each column marked, and a sentence on each thing that is easily misread."""
    shown = columns(runs)
    able = [run.finished for run in runs]
    marks = {c.head: best(c, able if any(able) else [True] * len(runs)) for c in shown}
    rows, styles = [], run_styles([run.algorithm for run in runs])
    for i in range(len(runs)):
        dot = f'<span class="dot" style="background:var(--{SERIES[styles[i] % len(SERIES)]})"></span>'
        row = [f'<th scope="row">{dot}{text(shown[0].texts[i])}</th>']
        for column in shown[1:]:
            score, _, spread = column.texts[i].partition(" ± ")
            below = f"<small>± {text(spread)}</small>" if spread else ""
            row.append(f'<td class="num{" best" if i in marks[column.head] else ""}">{text(score)}{below}</td>')
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
    note = f'<p class="note" style="margin:12px 0 0">{words}</p>'
    return f'<div class="box">{table(heads, rows, starred=True)}{note}</div>'


def over_seeds(runs: Sequence[RunRecord]) -> str:
    """Algorithms over their runs, where any has several: the table that says whether a lead is more than luck."""
    found = over_runs(runs)
    if not found:
        return ""
    rows = [
        [cell(o.algorithm, tag="th"), cell(o.runs, "num"), cell(format_score(o.mean, o.sd), "num"),
         cell(f"{format_score(o.low)} to {format_score(o.high)}", "num")]
        for o in found
    ]  # fmt: skip
    heads = [("Algorithm", ""), ("Runs", "num"), ("Mean score", "num"), ("From lowest to highest", "num")]
    note = (
        "Mean of the runs’ mean scores ± standard deviation over runs, finished ones only, and only over the clients "
        "that all of them scored. Algorithms whose ranges overlap "
        "are not told apart by these runs."
    )
    return f'<div class="box"><h3>Over several runs</h3>{table(heads, rows)}<p class="note">{note}</p></div>'


def client_tables(runs: Sequence[RunRecord]) -> str:
    """One row a client; several runs side by side share the rows and differ in the score columns."""
    if len(runs) == 1:
        return f'<div class="box">{_one_run_clients(runs[0])}</div>'
    scores, unable = [client_scores(run) for run in runs], [unable_clients(run) for run in runs]
    clients = {c: run.clients[c] for run in reversed(runs) for c in run.order}
    ids = list(dict.fromkeys(c for run in runs for c in run.order))
    rows = []
    for client in ids:
        values = [score.get(client) for score in scores]
        known = [round(v, 3) for v in values if v is not None]
        row = [cell(client, tag="th"), cell(clients[client].task, "wrap")]
        for value, out in zip(values, unable, strict=True):
            top = value is not None and round(value, 3) == max(known) and len(set(known)) > 1
            shown = "cannot run" if client in out else format_score(value)
            row.append(cell(shown, "num best" if top else "num"))
        rows.append(row)
    heads = [("Client", ""), ("Task", ""), *((run.label, "num") for run in runs)]
    made = table(heads, rows, tall=len(rows) > 16, starred=True)
    return f'<div class="box"><h3>Test score of each client</h3>{made}</div>'


def _one_run_clients(run: RunRecord) -> str:
    scores, unable = client_scores(run), unable_clients(run)
    told = (run.summary or {}).get("clients") or {}
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
            cell(" / ".join(str(record.sizes.get(s, "–")) for s in ("train", "validation", "test")), "num"),
            cell(part, "num"), cell("–" if held is None else held, "num"),
            cell(format_bytes(peak), "num"), cell(format_bytes(record.memory_bytes), "num"),
        ])  # fmt: skip
    names = ("Test score", "Train / val. / test", "Rounds", "Experts", "Peak memory", "Device")
    return table([("Client", ""), ("Task", ""), *((n, "num") for n in names)], rows, tall=len(rows) > 16)


def left_out(runs: Sequence[RunRecord]) -> str:
    """Clients that never took part, with the reason: no data, or not enough memory."""
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
    """What the server changed, in order; a count of each kind stands above the rows."""
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
        made.append(f'<p class="muted">{text(", ".join(without))} recorded no {"event" if one else "events"}: '
                    "nothing changed a client’s structure.</p>")  # fmt: skip
    return "".join(f'<div class="box">{part}</div>' for part in made)


def _details(event: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The event's other fields as "name value", with layers by their readable names."""
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
    """Every setting, a column a run; settings that differ between runs come first."""
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
    """Where the runs lie, and the code and packages that made them."""
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
    """The dozen words that the captions use, for a reader who is new to the field."""
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
    said = "".join(f"<dt>{text(word)}</dt><dd>{text(meaning)}</dd>" for word, meaning in words.items())
    return f'<div class="box">{fold("Words used on this page", f"<dl>{said}</dl>")}</div>'


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for k, v in value.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(v) for v in value) or "–")]
    return [(prefix, "–" if value is None else str(value))]
