"""The figure of how similar clients are: the cosines between their usage of the experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from consilium.report.maps import known_clients, paint, row_height
from consilium.report.read import RunRecord
from consilium.report.results import number
from consilium.report.style import (
    Drawing,
    Key,
    NothingToDraw,
    Panel,
    clean_axes,
    color_map,
    new_figure,
    shorten_all,
)

__all__ = ["likeness", "likeness_map"]

_WIDTH, _RIGHT, _TOP, _BOTTOM = 340, 8, 4, 22
LEAST = 3
"""The fewest clients that can be compared."""


def likeness(usage: Mapping[str, Mapping[str, object]]) -> tuple[list[str], np.ndarray]:
    """Return the clients, ordered so that neighbours are similar, and the cosines between their usage of the experts.

    The usage of a client is its shares of all layers, concatenated, minus the mean over the clients. Clients are
    ordered by average-linkage clustering. Shares that are missing or not numbers count as 0.

    Args:
        usage: client -> block -> shares, a list of numbers in [0, 1]; at least two clients.

    Returns:
        The n names, and the cosines [n, n] in that order, in [0, 1]; negative cosines count as 0.
    """
    names = sorted(usage)
    columns: list[np.ndarray] = []
    for block in sorted({block for blocks in usage.values() for block in blocks}):
        shares = {name: list(usage[name].get(block) or ()) for name in names}
        table = np.zeros((len(names), max(map(len, shares.values()))))
        for row, name in enumerate(names):
            for place, share in enumerate(shares[name]):
                table[row, place] = number(share) or 0.0
        columns.append(table)
    rows = np.concatenate(columns, axis=1) if columns else np.zeros((len(names), 1))
    rows = rows - rows.mean(axis=0)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = np.clip(rows @ rows.T, 0.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    order = leaves_list(linkage(squareform(1.0 - cosines, checks=False), "average"))
    return [names[place] for place in order], cosines[np.ix_(order, order)]


def likeness_map(run: RunRecord) -> Drawing:
    """Draw the cosine between the expert usage of every pair of clients.

    Raises:
        NothingToDraw: if the usage of fewer than three clients is known.
    """
    usage = known_clients((run.structure or {}).get("usage"), run)
    if len(usage) < LEAST:
        raise NothingToDraw(f"{run.label} has not recorded how its clients use the experts.")
    names, cosines = likeness(usage)
    height = row_height(len(names))
    texts = shorten_all(names, 16)
    margin = 10 + 6 * max(map(len, texts))
    figure = new_figure(_WIDTH, _TOP + _BOTTOM + height * len(names), margin, _BOTTOM, _RIGHT, _TOP)
    axes = figure.axes[0]
    clean_axes(axes, grid="", size=10)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), texts, fontsize=min(10.0, height - 2.5))
    axes.set_xticks([])
    axes.set_xlabel("the same clients, in the same order", labelpad=3)
    paint(axes, color_map()(cosines))
    nearest = cosines - 2 * np.eye(len(names))
    pairs = {names[row]: names[int(nearest[row].argmax())] for row in range(len(names))}
    first = names[0]
    alt = f"Clients by how alike they use the experts. Most like {first} is {pairs[first]}."
    key = Key("cosine of the clients’ usage of the experts|0|0.5|1", "ink", "ramp")
    return Drawing([Panel("all layers together", figure, alt)], [key])
