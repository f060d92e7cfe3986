"""A hub as one page of HTML that needs no network: sites, their parts, domains and licences, and scores.

Text in the sites' cards comes from outside and is shown as plain text.
"""

import math
from collections.abc import Mapping
from typing import Any

from consilium.errors import PackageError
from consilium.moe.budget import human
from consilium.oneshot.hub import Hub
from consilium.oneshot.package import Package, file_digest
from consilium.report.page import fill
from consilium.report.parts import Card, Cell, Part, Table, Text

__all__ = ["page"]


def page(hub: Hub, scores: Mapping[str, Any]) -> str:
    """Return the HTML page.

    Args:
        scores: what `consilium hub evaluate` wrote; {}: none.

    Raises:
        PackageError: for scores of another form.
    """
    packages = hub.packages()
    sections: dict[str, list[Part]] = {"Who brought what": [_sites(hub, packages)]}
    if scores:
        try:
            sections["Scores by domain"] = _matrix(scores)
            sections["What each site is worth"] = _worth(scores)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PackageError("the scores are not what `consilium hub evaluate` writes: write them again") from error
    return fill(
        "hub.html",
        title=f"A hub of {len(packages)} sites",
        subtitle=f"Public model {hub.told['model']}, tensors {hub.layout.frozen[:16]}",
        cards=_cards(packages),
        sections=sections,
    )


def _cards(packages: Mapping[str, Package]) -> list[Card]:
    examples = sum(package.examples for package in packages.values())
    size = human(sum(package.nbytes for package in packages.values()))
    return [
        Card("sites", str(len(packages)), "each can be withdrawn by itself"),
        Card("examples", f"{examples:,}", "in training, as the sites say"),
        Card("bytes received", size, "once, in one direction"),
    ]


def _sites(hub: Hub, packages: Mapping[str, Package]) -> Table | Text:
    heads = [(n, "") for n in ("site", "domain", "licence", "contact", "part", "router part")]
    heads += [("examples", "num"), ("size", "num"), ("validation", "num"), ("privacy", ""), ("file, sha256", "")]
    rows = []
    for site, package in packages.items():
        card_texts = {name: str(package.card.get(name, "not said")) for name in ("about", "licence", "contact")}
        rows.append(
            [
                Cell(site, is_head=True),
                *(Cell(text[:400], "wrap") for text in card_texts.values()),
                Cell(package.kind),
                Cell(package.router),
                Cell(f"{package.examples:,}", "num"),
                Cell(human(package.nbytes), "num"),
                Cell(_validation(package.card), "num"),
                Cell(_privacy(package.card), "wrap"),
                Cell(file_digest(hub.path(site))[:16]),
            ]
        )
    return Table(heads, rows) if rows else Text("No site has a package here.", "none")


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


def _matrix(scores: Mapping[str, Any]) -> list[Part]:
    domains = list(next(iter(scores["matrix"].values())))
    heads = [("model", ""), *((domain, "num") for domain in domains), ("mean", "num")]
    table_of = {name: [*(float(row[d]) for d in domains)] for name, row in scores["matrix"].items()}
    best_values = [min(values[i] for values in table_of.values()) for i in range(len(domains))]
    rows: list[list[Cell]] = []
    for name, values in table_of.items():
        marks = [
            "num best" if value == best_value else "num" for value, best_value in zip(values, best_values, strict=True)
        ]
        score_cells = [Cell(f"{value:.3f}", mark) for value, mark in zip(values, marks, strict=True)]
        rows.append([Cell(name, is_head=True), *score_cells, Cell(f"{math.fsum(values) / len(values):.3f}", "num")])
    note = f"{scores['unit']}; lower is better. Marked: the best of a domain."
    return [Text(note, "note"), Table(heads, rows, starred=True)]


def _worth(scores: Mapping[str, Any]) -> list[Part]:
    domains = list(next(iter(scores["matrix"].values())))
    heads = [("without", ""), *((domain, "num") for domain in domains)]
    rows = [
        [Cell(site, is_head=True), *(Cell(f"{float(gains[d]):+.3f}", "num") for d in domains)]
        for site, gains in scores["contributions"].items()
    ]
    note = f"How much the score rises on each domain if a site leaves, with router {scores['router']}."
    return [Text(note, "note"), Table(heads, rows)]
