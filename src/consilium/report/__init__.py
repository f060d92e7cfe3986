"""The report of a run, or of several runs compared: one HTML page, and a table for the terminal."""

from consilium.report.html import render, write_report
from consilium.report.read import ClientRecord, RunRecord, read_run, read_runs
from consilium.report.table import print_table

__all__ = ["ClientRecord", "RunRecord", "print_table", "read_run", "read_runs", "render", "write_report"]
