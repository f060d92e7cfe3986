"""The report of a run, or of several runs compared.

It is one HTML page, with a CSV and a LaTeX table next to it, and a table for the terminal.
"""

from consilium.report.export import table_files
from consilium.report.html import render, write_report
from consilium.report.methods import Method, methods, rows
from consilium.report.plain import print_clients
from consilium.report.read import ClientRecord, RunRecord, read_run, read_runs
from consilium.report.table import print_table

__all__ = [
    "ClientRecord",
    "Method",
    "RunRecord",
    "methods",
    "print_clients",
    "print_table",
    "read_run",
    "read_runs",
    "render",
    "rows",
    "table_files",
    "write_report",
]
