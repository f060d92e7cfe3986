"""Completions of clients' texts: the true continuation, that of the public model, and that of each run's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consilium.report.parts import Box, Code, Heading, Part, Text
from consilium.report.read import RunRecord

__all__ = ["written"]


def written(runs: Sequence[RunRecord]) -> list[Box]:
    """Return one box for each client with completions in some run."""
    by_run = {run.label: {str(row.get("client")): row for row in run.completions} for run in runs}
    rows = {client: row for rows_by_client in reversed(by_run.values()) for client, row in rows_by_client.items()}
    return [_box(client, row, by_run) for client, row in sorted(rows.items())]


def _box(client: str, row: Mapping[str, Any], by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Box:
    texts = {
        "a test text begins with": row.get("prompt"),
        "goes on with": row.get("text"),
        "public model": row.get("before"),
    }
    texts |= {label: rows[client].get("after") for label, rows in by_run.items() if client in rows}
    content: list[Part] = [Heading(client)]
    for name, text in texts.items():
        content += [Text(name, "muted"), Code(text or "")]
    return Box(content)
