"""The table of a comparison for other programs: CSV with plain numbers, LaTeX for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from consilium.escape import csv_cell, latex, one_line
from consilium.report.methods import Method, format_p, method_columns, paired_columns, rows
from consilium.report.results import Column, best

__all__ = ["table_files", "to_csv", "to_latex"]

_COST = ("traffic", "memory", "time")


def table_files(page: Path) -> tuple[Path, Path]:
    """Return the paths of a page's tables: report.csv and report.tex next to report.html."""
    return page.with_suffix(".csv"), page.with_suffix(".tex")


def to_csv(found: Sequence[Method]) -> str:
    """Return the table as CSV with one row per method.

    Numbers are written in full: scores in [0, 1], bytes, seconds. A cell is empty if its value is unknown.
    """
    records = [{csv_cell(head): csv_cell(value) for head, value in row.items()} for row in rows(found)]
    frame = pd.DataFrame(records, dtype=object)  # counts stay whole next to unknown values
    return frame.to_csv(index=False, lineterminator="\n")


def to_latex(found: Sequence[Method]) -> str:
    """Return the table as a `tabular` for booktabs.

    It holds the mean ± deviation over seeds, the best of each column in bold, and the paired test.
    """
    columns = method_columns(found)
    heads = [c.head[:1].upper() + c.head[1:] for c in columns]
    if reference := next((m.against.reference for m in found if m.against), ""):
        difference, p = (c for c in paired_columns(found) if c.head in ("difference", "p"))  # comments hold the rest
        columns, heads = [*columns, difference, p], [*heads, f"Minus {reference}", "p"]
    frame = pd.DataFrame({i: _latex_cells(column) for i, column in enumerate(columns)})  # heads may be equal
    header = [latex(head).replace("{", "{{").replace("}", "}}") for head in heads]  # pandas formats each as a template
    table = frame.to_latex(index=False, escape=False, header=header, column_format="l" + "r" * (len(columns) - 1))
    return "".join(f"% {line}\n" for line in _comment(found)) + table


def _latex_cells(column: Column) -> list[str]:
    marked, cells = best(column, [True] * len(column.texts)), []
    for i, text in enumerate(column.texts):
        value, _, deviation = text.partition(" ± ")
        cell = rf"\textbf{{{latex(value)}}}" if i in marked else latex(value)
        if deviation and column.head not in _COST:
            cell += rf" {{\scriptsize $\pm$ {latex(deviation)}}}"
        cells.append(cell)
    return cells


def _comment(found: Sequence[Method]) -> list[str]:
    """Return comment lines that explain the numbers to the author of the caption.

    The table needs \\usepackage{booktabs}.
    """
    has_several_runs = any(m.runs > 1 for m in found)
    lines = [
        r"\usepackage{booktabs}",
        "scores in percent" + (", mean and standard deviation over seeds" if has_several_runs else ""),
    ]
    for m in found:
        if m.against and m.against.p is not None:
            lines.append(
                f"{m.label} against {m.against.reference}: two-sided paired t-test over {m.against.pairs} seeds, "
                f"p {format_p(m.against.p)} (Holm); ahead on {m.against.ahead} of {m.against.of} client-seed pairs"
            )
    return [one_line(line) for line in lines]
