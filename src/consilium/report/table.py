"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from consilium.escape import one_line
from consilium.report.methods import Method, has_seeds, method_columns, methods, paired_columns
from consilium.report.plain import simple_sentence
from consilium.report.read import RunRecord, label_runs, read_runs
from consilium.report.results import Column, best, columns
from consilium.report.style import shorten
from consilium.report.verdict import verdict

__all__ = ["print_table"]


def print_table(runs: Sequence[RunRecord | Path | str], console: Console | None = None) -> None:
    """Print one row per run, in at most 80 columns for up to three tasks.

    Standard deviations over clients stand below the means, so that the row stays short. The best finished run of a
    column is marked by an asterisk as well as by weight, for terminals and logs without colour.

    Args:
        runs: records or run directories.
    """
    console = console or Console()
    records = label_runs([r if isinstance(r, RunRecord) else read_runs([r])[0] for r in runs])
    table_columns = columns(records)
    finished_flags = [run.finished for run in records]
    marks = {c.head: best(c, finished_flags if any(finished_flags) else [True] * len(records)) for c in table_columns}
    wide_table, narrow_table = (_table(records, table_columns, marks, gap) for gap in (1, 0))
    tasks = {task for run in records for task in run.tasks}
    if _width(wide_table, console) <= console.width:
        console.print(wide_table)
    elif _width(narrow_table, console) <= console.width or len(tasks) <= 3:
        console.print(narrow_table)  # long run names fold
    else:  # many tasks get a table of their own, with one row per task
        console.print(_table(records, [c for c in table_columns if c.head not in tasks], marks, 1))
        console.print(_task_table(records, [c for c in table_columns if c.head in tasks], marks))
    if len(records) > 1:
        console.print(Text("* best of its column, finished runs only; ± standard deviation over clients", "dim"))
    if has_seeds(records):
        _print_methods(methods(records), console)
    for sentence in [*verdict(records), *([simple_sentence(records)] if len(records) > 1 else [])]:
        console.print(Text(one_line(sentence)))
    if any(column.head == "shared" for column in table_columns):
        console.print(Text("shared: mean over the clients that every run scored; compare this one", "dim"))


def _print_methods(found: Sequence[Method], console: Console) -> None:
    """Print the mean over each method's seeds, and the paired test against the first method, in 80 columns."""
    columns_by_head = {c.head: c for c in method_columns(found)}
    heads = [
        "method",
        "seeds",
        "mean" if "mean" in columns_by_head else list(columns_by_head)[2],
        *(["shared"] if "shared" in columns_by_head else []),
    ]
    if reference := next((m.against.reference for m in found if m.against), ""):
        difference, _, p, pairs = paired_columns(found)[1:5]
        columns_by_head |= {f"minus {reference}": difference, "p": p, "pairs": pairs}
        heads += [f"minus {reference}", "p", "pairs"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in heads:
        table.add_column(_text(shorten(head, 16)), justify="left" if head == "method" else "right", overflow="fold")
    for i in range(len(found)):
        table.add_row(*(_text(columns_by_head[head].texts[i]) for head in heads))
    console.print(table)
    if "p" in heads:
        test_name = "two-sided paired t-test on the means of each seed"
        console.print(Text(f"minus: points; p: {test_name}{', after Holm' if len(found) > 2 else ''}", "dim"))


def _table(records: Sequence[RunRecord], shown: Sequence[Column], marks: Mapping[str, set[int]], gap: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    for column in shown:
        is_name_column = column.head == "run"
        table.add_column(
            _text(shorten(column.head, 10)),
            justify="left" if is_name_column else "right",
            overflow="fold",
            no_wrap=not is_name_column,
            min_width=6 if is_name_column else None,
        )
    for i, run in enumerate(records):
        name = _text(shown[0].texts[i] if run.finished else f"{shown[0].texts[i]} (unfinished)")
        cells = [_cell(column.texts[i], i in marks[column.head], bool(marks[column.head])) for column in shown[1:]]
        table.add_row(name, *cells)
    return table


def _task_table(records: Sequence[RunRecord], shown: Sequence[Column], marks: Mapping[str, set[int]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("task", overflow="fold")
    for run in records:
        table.add_column(_text(run.label), justify="right", overflow="fold", min_width=6)
    for column in shown:
        cells = [_cell(t, i in marks[column.head], bool(marks[column.head])) for i, t in enumerate(column.texts)]
        table.add_row(_text(column.head), *cells)
    return table


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _cell(value: str, is_best: bool, marked_column: bool) -> Text:
    head, _, deviation = value.partition(" ± ")
    room = " " if marked_column else ""
    text = Text(one_line(f"{head}*") if is_best else f"{one_line(head)}{room}", "bold" if is_best else "")
    if deviation:
        text.append(f"\n±{one_line(deviation)}{room}", "dim")
    return text


def _text(value: str) -> Text:
    """Return a name as a cell, without interpreting markup."""
    return Text(one_line(value))
