"""A hub as one page of HTML that needs no network: sites, their parts, domains and licences, and scores.

Text in the sites' cards comes from outside and is shown as plain text.
"""

import math
from collections.abc import Mapping
from typing import Any

from consilium.errors import PackageError
from consilium.escape import html
from consilium.moe.budget import human
from consilium.oneshot.hub import Hub
from consilium.oneshot.package import Package, file_digest
from consilium.report.page import STYLE
from consilium.report.parts import Cell, card, cell, table

__all__ = ["page"]


def page(hub: Hub, scores: Mapping[str, Any]) -> str:
    """Return the HTML page.

    Args:
        scores: what `consilium hub evaluate` wrote; {}: none.

    Raises:
        PackageError: for scores of another form.
    """
    packages = hub.packages()
    parts = [_head(hub, packages), _section("Who brought what", _sites(hub, packages))]
    if scores:
        try:
            parts.append(_section("Scores by domain", _matrix(scores)))
            parts.append(_section("What each site is worth", _worth(scores)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PackageError("the scores are not what `consilium hub evaluate` writes: write them again") from error
    body = "".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Hub</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _head(hub: Hub, packages: Mapping[str, Package]) -> str:
    examples = sum(package.examples for package in packages.values())
    size = human(sum(package.nbytes for package in packages.values()))
    cards = (
        card("sites", str(len(packages)), "each can be withdrawn by itself")
        + card("examples", f"{examples:,}", "in training, as the sites say")
        + card("bytes received", size, "once, in one direction")
    )
    return (
        f"<header><h1>A hub of {len(packages)} sites</h1><p class='sub'>Public model {html(hub.told['model'])}, "
        f"tensors {html(hub.layout.frozen[:16])}</p><div class='cards'>{cards}</div></header>"
    )


def _section(title: str, body: str) -> str:
    return f"<main><h2>{html(title)}</h2><div class='box'>{body}</div></main>"


def _sites(hub: Hub, packages: Mapping[str, Package]) -> str:
    heads = [(n, "") for n in ("site", "domain", "licence", "contact", "part", "router part")]
    heads += [("examples", "num"), ("size", "num"), ("validation", "num"), ("privacy", ""), ("file, sha256", "")]
    rows = []
    for site, package in packages.items():
        card_texts = {name: str(package.card.get(name, "not said")) for name in ("about", "licence", "contact")}
        rows.append(
            [
                cell(site, tag="th"),
                *(cell(text[:400], "wrap") for text in card_texts.values()),
                cell(package.kind),
                cell(package.router),
                cell(f"{package.examples:,}", "num"),
                cell(human(package.nbytes), "num"),
                cell(_validation(package.card), "num"),
                cell(_privacy(package.card), "wrap"),
                cell(file_digest(hub.path(site))[:16]),
            ]
        )
    return table(heads, rows) if rows else "<p class='none'>No site has a package here.</p>"


def _validation(told: Mapping[str, Any]) -> str:
    """Return the site's own scores, before and after; other contents of this entry are not shown."""
    scores = told.get("validation")
    values = [scores.get(name) for name in ("public", "own")] if isinstance(scores, dict) else []
    if not values or any(not isinstance(value, int | float) for value in values):
        return "not said"
    return f"{values[0]:.3f} to {values[1]:.3f}"


def _privacy(told: Mapping[str, Any]) -> str:
    promise = told.get("privacy")
    if not isinstance(promise, dict) or not isinstance(promise.get("epsilon"), int | float):
        return "no promise"
    return f"epsilon {promise['epsilon']:.2f}, delta {promise.get('delta')}, {promise.get('unit')}"[:200]


def _matrix(scores: Mapping[str, Any]) -> str:
    domains = list(next(iter(scores["matrix"].values())))
    heads = [("model", ""), *((domain, "num") for domain in domains), ("mean", "num")]
    table_of = {name: [*(float(row[d]) for d in domains)] for name, row in scores["matrix"].items()}
    best_values = [min(values[i] for values in table_of.values()) for i in range(len(domains))]
    rows: list[list[Cell]] = []
    for name, values in table_of.items():
        marks = [
            "num best" if value == best_value else "num" for value, best_value in zip(values, best_values, strict=True)
        ]
        score_cells = [cell(f"{value:.3f}", mark) for value, mark in zip(values, marks, strict=True)]
        rows.append([cell(name, tag="th"), *score_cells, cell(f"{math.fsum(values) / len(values):.3f}", "num")])
    note = f"<p class='note'>{html(scores['unit'])}; lower is better. Marked: the best of a domain.</p>"
    return note + table(heads, rows, starred=True)


def _worth(scores: Mapping[str, Any]) -> str:
    domains = list(next(iter(scores["matrix"].values())))
    heads = [("without", ""), *((domain, "num") for domain in domains)]
    rows = [
        [cell(site, tag="th"), *(cell(f"{float(gains[d]):+.3f}", "num") for d in domains)]
        for site, gains in scores["contributions"].items()
    ]
    note = f"How much the score rises on each domain if a site leaves, with router {scores['router']}."
    return f"<p class='note'>{html(note)}</p>{table(heads, rows)}"
