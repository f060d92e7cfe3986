"""Completions of clients' texts: the true continuation, that of the public model, and that of each run's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consilium.escape import html
from consilium.report.read import RunRecord

__all__ = ["written"]


def written(runs: Sequence[RunRecord]) -> str:
    """Return one box for each client with completions in some run; "" if there are none."""
    by_run = {run.label: {str(row.get("client")): row for row in run.completions} for run in runs}
    rows = {client: row for rows_by_client in reversed(by_run.values()) for client, row in rows_by_client.items()}
    return "".join(_box(client, row, by_run) for client, row in sorted(rows.items()))


def _box(client: str, row: Mapping[str, Any], by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    completions = {
        label: rows_by_client[client].get("after")
        for label, rows_by_client in by_run.items()
        if client in rows_by_client
    }
    texts = {"goes on with": row.get("text"), "public model": row.get("before"), **completions}
    prompt = f"<h3>{html(client)}</h3>{_text('a test text begins with', row.get('prompt'))}"
    return f'<div class="box">{prompt}{"".join(_text(name, text) for name, text in texts.items())}</div>'


def _text(name: str, text: Any) -> str:
    return f'<p class="muted">{html(name)}</p><pre>{html(text or "")}</pre>'
