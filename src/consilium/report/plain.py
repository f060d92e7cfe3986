"""The lines below the table at the end of a run: each client's score, a simple model's score, and the next command."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from consilium.escape import one_line
from consilium.report.read import RunRecord, read_runs
from consilium.report.results import client_scores, format_score, measured, number

__all__ = [
    "balanced_scores",
    "class_recalls",
    "print_clients",
    "rising",
    "simple_head",
    "simple_name",
    "simple_sentence",
    "simple_values",
]

BAG_OF_WORDS = "bag of words"
"""As in `data.simple`, which imports torch; reports do without it."""
SHOWN = 20
"""The most clients that get a line of their own on the screen."""
RISE = 0.005
"""A mean score is still rising if it grew by more than this in the last tested round."""


def simple_values(run: RunRecord, kind: str, value: str = "score") -> dict[str, float]:
    """Return the score of each client's simple model, for the clients that the run has scored; {} if there are none.

    Args:
        kind: "alone" or "pooled".
        value: "score" or "balanced".
    """
    simple_models = (run.summary or {}).get("simple")
    records = simple_models.get(kind) if isinstance(simple_models, Mapping) else None
    if not isinstance(records, Mapping):
        return {}
    scores = client_scores(run)
    values = {c: number(v.get(value)) for c, v in records.items() if c in scores and isinstance(v, Mapping)}
    return {c: v for c, v in values.items() if v is not None}


def simple_name(run: RunRecord) -> str:
    """Return the name of the run's simple model; runs of earlier versions have only bags of words."""
    simple_models = (run.summary or {}).get("simple")
    name = simple_models.get("name") if isinstance(simple_models, Mapping) else None
    return one_line(name, 40) if isinstance(name, str) and name else BAG_OF_WORDS


def simple_head(run: RunRecord) -> str:
    """Return the head of a column or card with the scores of the simple model that clients trained alone."""
    name = simple_name(run)
    return f"{name[:1].upper()}{name[1:]}, alone"


def simple_sentence(runs: Sequence[RunRecord]) -> str:
    """Return a sentence that compares a simple model with the first finished run that has one; "" if none has."""
    for run in runs:
        alone_scores, pooled_scores = simple_values(run, "alone"), simple_values(run, "pooled")
        if run.finished and alone_scores:
            run_mean = statistics.fmean(client_scores(run)[c] for c in alone_scores)
            mean, gap = (
                statistics.fmean(alone_scores.values()),
                100 * (run_mean - statistics.fmean(alone_scores.values())),
            )
            name = simple_name(run)
            name += " (TF-IDF and logistic regression)" if name == BAG_OF_WORDS else ""
            sentence = f"{name}, each client alone: {100 * mean:.1f}"
            sentence += f"; {run.label} is {_apart(gap)} it"
            if pooled_scores:
                best = statistics.fmean(pooled_scores.values())
                sentence += f". Trained on the rows of all clients together it reaches {100 * best:.1f}, "
                sentence += f"{_apart(100 * (best - run_mean))} {run.label}"
            return f"{sentence}."
    return ""


def _apart(points: float) -> str:
    """Return a difference as words that can stand before a name."""
    if abs(points) < 0.05:
        return "level with"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def balanced_scores(run: RunRecord) -> dict[str, float]:
    """Return the balanced accuracy of each client in the last tested round."""
    return measured(run, "balanced")


def class_recalls(run: RunRecord) -> dict[str, tuple[float, int]]:
    """Return label -> (mean recall, number of clients) over the clients that have test examples of the label."""
    recalls: dict[str, list[float]] = {}
    for line in reversed(run.rounds):
        if isinstance(line.get("recall"), Mapping):
            for client, values in line["recall"].items():
                for label, value in values.items() if client in run.clients and isinstance(values, Mapping) else ():
                    if (recall := number(value)) is not None:
                        recalls.setdefault(str(label), []).append(recall)
            break
    return {label: (statistics.fmean(values), len(values)) for label, values in sorted(recalls.items())}


def rising(run: RunRecord) -> str:
    """Return a note if the mean score still rose in the last tested round; "" otherwise."""
    means = [
        mean
        for line in run.rounds
        if isinstance(line.get("scores"), Mapping) and (mean := number(line["scores"].get("mean"))) is not None
    ]
    if len(means) < 2 or means[-1] < max(means) or means[-1] - means[-2] <= RISE:
        return ""
    return (
        f"the mean score still rose in the last round that was tested, from {100 * means[-2]:.1f} to "
        f"{100 * means[-1]:.1f}: more --rounds may give more"
    )


def print_clients(folder: object, console: Console) -> None:
    """Print the scores of a finished run's clients and of a simple model, and the command that exports one client."""
    (run,) = read_runs([folder])
    scores = client_scores(run)
    if not run.finished or not scores:
        return
    clients = list(scores)[:SHOWN]
    width = min(max(len(one_line(c)) for c in clients), 40)
    balanced, alone_scores = balanced_scores(run), simple_values(run, "alone")
    alone_balanced = simple_values(run, "alone", "balanced")
    tests = {c: run.clients[c].sizes.get("test") for c in clients}
    heads = [("test", True), ("balanced", bool(balanced)), (f"{simple_name(run)} alone", bool(alone_scores))]
    head_text = "  ".join(f"{head:>8}" for head, is_there in heads if is_there)
    console.print(Text(f"{'client':{width}}  {head_text}", "dim"))
    for c in clients:
        parts = [f"{one_line(c)[:width]:{width}}", f"{format_score(scores[c]):>8}"]
        if balanced:
            parts.append(f"{format_score(balanced.get(c)):>8}")
        if alone_scores:
            balanced_text = f" (balanced {format_score(alone_balanced.get(c))})" if balanced else ""
            parts.append(f"{format_score(alone_scores.get(c)):>8}{balanced_text}")
        parts.append(f"{tests[c]} test examples" if tests[c] is not None else "")
        console.print(Text("  ".join(parts).rstrip()), soft_wrap=True)
    if len(scores) > SHOWN:
        console.print(Text(f"and {len(scores) - SHOWN} more clients: see the report", "dim"))
    for sentence in (simple_sentence([run]), f"note: {note}" if (note := rising(run)) else ""):
        if sentence:
            console.print(Text(one_line(sentence, 1000)))
    if run.is_deployment:
        console.print(Text("next: at each site, consilium export SITE-STATE-FOLDER --out DIR"), soft_wrap=True)
        return
    worst = min(scores, key=lambda c: scores[c])
    command = shlex.join(["consilium", "export", str(folder), "--client", worst, "--out", "DIR"])
    console.print(Text(one_line(f"next: {command}", 1000)), soft_wrap=True)
