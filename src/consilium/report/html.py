"""One self-contained HTML page about one run, or about several runs compared.

The page has no external resource and no script, so it can be mailed, archived, and opened offline in ten years.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from consilium.engine.checkpoint import write_atomic
from consilium.errors import CheckpointError, ConfigError
from consilium.report.export import table_files, to_csv, to_latex
from consilium.report.image import fit
from consilium.report.methods import Method, Spread, first_runs, has_seeds, methods
from consilium.report.page import fill
from consilium.report.parts import Card, Figure, Fold, Group, Part, Text, one_figure
from consilium.report.plain import balanced_scores, simple_head, simple_values
from consilium.report.plots import FIGURES, FigureKind
from consilium.report.read import RunRecord, read_runs
from consilium.report.results import (
    METRICS,
    Result,
    client_scores,
    differ_in_clients,
    format_bytes,
    format_score,
    format_seconds,
    result,
    shared_mean,
    unable_clients,
)
from consilium.report.style import any_glyph
from consilium.report.tables import (
    client_tables,
    comparison,
    configuration,
    event_tables,
    glossary,
    left_out,
    over_seeds,
    versions,
)
from consilium.report.written import written

__all__ = ["render", "write_report"]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs to `out` and return its path.

    Parent directories are created. The table of several runs is written next to the page, see `table_files`.

    Raises:
        ConfigError: if a directory is not a run, if none is given, or if `out` cannot be written.
    """
    runs, out = read_runs(run_dirs), Path(out)
    with any_glyph():
        contents = {out: render(runs)}
    if len(runs) > 1 and (method_summaries := methods(runs)):
        csv, latex = table_files(out)
        contents |= {csv: to_csv(method_summaries), latex: to_latex(method_summaries)}
    try:
        for path, content in contents.items():
            write_atomic(path, content.encode("utf-8", "replace"))  # a reader never sees half a page
    except CheckpointError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigError(f"the report cannot be written to {out} ({reason}); choose another place") from None
    return out


def render(runs: Sequence[RunRecord]) -> str:
    """Return the whole page as text."""
    rows = [result(run) for run in runs]
    figures = [(kind.section, figure) for kind in FIGURES if (figure := _figure(kind, runs))]
    sections = {name: [figure for section, figure in figures if section == name] for name in _sections()}
    fit([picture for _, figure in figures for picture in figure.pictures])
    details: dict[str, list[Part]] = {}
    firsts, note = first_runs(runs), _of_firsts(runs)
    if texts := written(firsts):
        details["Completions"] = [*note, *texts]
    details["Clients"] = [client_tables(runs), left_out(runs)]
    details["Events"] = [*note, *event_tables(firsts)]
    details["Set-up"] = [*note, configuration(firsts), versions(runs), glossary()]
    comparisons = [*over_seeds(runs), comparison(runs)] if len(runs) > 1 else []
    return fill(
        "page.html",
        title=_title(runs),
        subtitle=_subtitle(runs),
        status=runs[0].status if len(runs) == 1 else "",
        contents=[*(["Comparison"] if comparisons else []), *sections, *details],
        warnings=_warnings(runs),
        cards=_cards_of_one(runs[0], rows[0]) if len(runs) == 1 else _cards_of_many(runs, rows),
        comparison=comparisons,
        sections=sections,
        details=details,
    )


def _sections() -> list[str]:
    return list(dict.fromkeys(kind.section for kind in FIGURES))


def _of_firsts(runs: Sequence[RunRecord]) -> list[Text]:
    """Return a note for parts that show only the first run of each method; [] if no method has several runs."""
    if not has_seeds(runs):
        return []
    names = ", ".join(run.label for run in first_runs(runs))
    return [Text(f"Shown for the first run of each method: {names}.", "note")]


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return f"{runs[0].algorithm}: {runs[0].path.resolve().name}"
    names = list(dict.fromkeys(run.method for run in runs))
    names_text = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{names_text} compared" if len(names) > 1 else f"{len(runs)} runs of {names_text} compared"


def _subtitle(runs: Sequence[RunRecord]) -> str:
    first = runs[0]
    tasks = ", ".join(f"{task} ({sum(c.task == task for c in first.clients.values())})" for task in first.tasks)
    clients_text = f"{len(first.clients)} clients; tasks and their clients: {tasks}"
    if len(runs) == 1:
        rounds = f"{len(first.rounds)} round{'s' if len(first.rounds) != 1 else ''}"
        return f"{rounds}, {clients_text}"
    seeds = f" of {len({run.method for run in runs})} methods" if has_seeds(runs) else ""
    return f"{len(runs)} runs{seeds}. {clients_text}"


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Return the warnings that a reader needs before the numbers of the page."""
    messages = []
    for run in runs:
        if not run.finished:
            planned_rounds = run.config.get("rounds")
            total_text = f" of {planned_rounds}" if isinstance(planned_rounds, int) else ""
            messages.append(
                f"{run.label} is not finished (status: {run.status}, {len(run.rounds)}{total_text} rounds on record). "
                "Its numbers are those of the rounds so far."
            )
        messages += [f"{run.label}: {note}." for note in run.notes]
    seeds = {run.seed for run in runs} if has_seeds(runs) else {None}  # another seed partitions the data differently
    fingerprints_by_seed = [{run.fingerprint for run in runs if seed in (None, run.seed)} for seed in seeds]
    if any(len(fingerprints) > 1 for fingerprints in fingerprints_by_seed):
        messages.append(
            "These runs did not use the same data (their partition fingerprints differ). Differences between their "
            "scores may come from the data alone."
        )
    if len({len(run.rounds) for run in runs}) > 1 and all(run.finished for run in runs):
        counts = ", ".join(f"{run.label} {len(run.rounds)}" for run in runs)
        messages.append(f"These runs went for different numbers of rounds: {counts}.")
    if len(runs) > 1 and differ_in_clients([run for run in runs if client_scores(run)]):
        messages.append(
            "These runs did not score the same clients, so their means are not over the same clients. The column "
            "“shared clients” compares them on the clients that all of them scored."
        )
    return messages


def _cards_of_one(run: RunRecord, row: Result) -> list[Card]:
    cards = []
    if len(row.tasks) != 1:
        cards.append(Card("Mean score", format_score(row.mean), "mean over the tasks"))
    for task, score in row.tasks.items():
        deviation_text = f"± {100 * score.sd:.1f} over " if score.sd is not None else ""
        clients = f"{deviation_text}{score.clients} client{'s' if score.clients != 1 else ''}"
        cards.append(
            Card(task, format_score(score.mean), f"{METRICS.get(run.metric(task), run.metric(task))}, {clients}")
        )
    for head, scores, explanation in (
        ("Balanced accuracy", balanced_scores(run), "every label counts alike"),
        (simple_head(run), simple_values(run, "alone"), "a simple model of each client’s own rows"),
    ):
        if scores:
            cards.append(
                Card(head, format_score(statistics.fmean(scores.values())), f"{explanation}, mean over clients")
            )
    unable_count = len(unable_clients(run))
    cards.append(
        Card("Clients served", row.coverage, f"{unable_count} cannot run it" if unable_count else "all can run it")
    )
    note = f"{format_bytes(row.bytes_down)} down, {format_bytes(row.bytes_up)} up" if row.bytes_total else ""
    cards.append(Card("Traffic", format_bytes(row.bytes_total), note))
    cards.append(Card("Peak memory", format_bytes(row.peak_bytes), "largest client, estimated"))
    cards.append(
        Card(
            "Time",
            format_seconds(row.seconds),
            f"{row.rounds} rounds, {format_seconds(row.seconds / row.rounds)} each"
            if row.seconds and row.rounds
            else "",
        )
    )
    if row.experts_start is not None and row.experts_end is not None:
        change = f"{row.experts_start:.1f} → {row.experts_end:.1f}"
        cards.append(Card("Experts a client", change, "mean at start and end"))
    return cards


def _cards_of_many(runs: Sequence[RunRecord], rows: Sequence[Result]) -> list[Card]:
    """Return one card per column with the winner and the next value, among the finished runs if there are any."""
    if has_seeds(runs) and (method_summaries := methods(runs)):
        return _cards_over_seeds(method_summaries)
    pool = [row for row in rows if row.finished] or list(rows)
    means = {row.label: row.mean for row in rows}
    score = "Best mean score"
    if differ_in_clients(runs):
        means = {row.label: mean for row, mean in zip(rows, shared_mean(runs), strict=True)}
        score = "Best mean, shared clients"
    cards = [
        _winner(score, pool, lambda r: means[r.label], format_score, high=True),
        _winner("Serves most clients", pool, lambda r: r.served, lambda n: str(int(n)), high=True),
        _winner("Least traffic", pool, lambda r: r.bytes_total, format_bytes),
        _winner("Least peak memory", pool, lambda r: r.peak_bytes, format_bytes),
        _winner("Least time", pool, lambda r: r.seconds, format_seconds),
    ]
    return cards


def _cards_over_seeds(pool: Sequence[Method]) -> list[Card]:
    """Return the same cards for the means over each method's runs."""

    def known(get: Callable[[Method], Spread | None]) -> Callable[[Method], float | None]:
        return lambda m: spread.mean if (spread := get(m)) else None

    has_shared = any(m.shared for m in pool)
    score = known(lambda m: m.shared if has_shared else m.mean)
    cards = [
        _winner("Best mean, shared clients" if has_shared else "Best mean score", pool, score, format_score, high=True),
        _winner("Serves most clients", pool, lambda m: m.served.mean, lambda n: f"{n:.3g}", high=True),
        _winner("Least traffic", pool, known(lambda m: m.bytes_total), format_bytes),
        _winner("Least peak memory", pool, known(lambda m: m.peak_bytes), format_bytes),
        _winner("Least time", pool, known(lambda m: m.seconds), format_seconds),
    ]
    return cards


def _winner(what, pool, value, show, high=False) -> Card:
    candidates = sorted((row for row in pool if value(row) is not None), key=value, reverse=high)
    if not candidates:
        return Card(what, "–", "not recorded")
    best_text = show(value(candidates[0]))
    ties = [row for row in candidates if show(value(row)) == best_text]
    if len(ties) == len(candidates) > 1:
        return Card(what, best_text, "the same for all")
    runner_up = next((row for row in candidates if row not in ties), None)
    runner_up_text = f"; next: {runner_up.label}, {show(value(runner_up))}" if runner_up else ""
    if len(ties) == 1:
        return Card(what, candidates[0].label, f"{best_text}{runner_up_text}")
    names = ", ".join(row.label for row in ties) + ": " if len(ties) <= 3 else ""
    return Card(what, f"{len(ties)} tie", f"{names}{best_text}{runner_up_text}")


def _figure(kind: FigureKind, runs: Sequence[RunRecord]) -> Figure | Group | None:
    """Return one figure for all runs, or a group with one figure per run if the figure is about a single run.

    Return None if the figure is to be left out.
    """
    if not kind.each_run or len(runs) == 1:
        figure = one_figure(kind, runs[0] if kind.each_run else runs)
        return figure if figure.panels or not kind.only_if_drawn else None
    firsts = first_runs(runs)
    figures = [one_figure(kind, run, of=run.label) for run in firsts]
    if kind.only_if_drawn and not any(figure.panels for figure in figures):
        return None
    figures.sort(key=lambda figure: not figure.panels)  # runs that have nothing to show come last
    folds = [
        Fold(figure.run, [figure], is_open=len(firsts) <= 3 or not figure.panels or i == 0)
        for i, figure in enumerate(figures)
    ]
    return Group(kind, [*_of_firsts(runs), *folds], [picture for figure in figures for picture in figure.panels])
