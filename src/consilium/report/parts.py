"""Building blocks of the page: escaped text, tables, legends, figures.

Every string from data passes through `html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consilium.escape import html
from consilium.report.plots import FigureKind
from consilium.report.style import DASHES, MARKERS, SERIES, Drawing, Key, NothingToDraw, Panel, to_svg

__all__ = ["Cell", "caption", "card", "cell", "fold", "legend", "one_figure", "table"]

Cell = str  # a finished <td> or <th>


def cell(value: Any, kind: str = "", tag: str = "td") -> Cell:
    """Return one table cell.

    Args:
        kind: CSS classes such as "num" or "wrap".
    """
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{scope}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html(value)}</{tag}>"


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], row_kinds: Sequence[str] = (),
          tall: bool = False, starred: bool = False) -> str:  # fmt: skip
    """Return a table that scrolls inside its own box.

    Args:
        heads: (text, class) of each column.
        rows: finished cells.
        tall: show many rows in a box of limited height.
        starred: leave room for the mark of the best.
    """
    head = "".join(f'<th scope="col" class="{kind}">{html(name)}</th>' for name, kind in heads)
    kinds = row_kinds or [""] * len(rows)
    body = "".join(
        f'<tr class="{kind}">{"".join(row)}</tr>' if kind else f"<tr>{''.join(row)}</tr>"
        for row, kind in zip(rows, kinds, strict=True)
    )
    box = f"scroll{' tall' if tall else ''}{' starred' if starred else ''}"
    return f'<div class="{box}" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def card(what: str, value: str, note: str = "") -> str:
    """Return one summary card."""
    return (
        f'<div class="card"><span class="what">{html(what)}</span><b>{html(value)}</b><span>{html(note)}</span></div>'
    )


def fold(summary: str, body: str, is_open: bool = False) -> str:
    """Return a part of the page that the reader can open and close; it works without JavaScript."""
    return f"<details{' open' if is_open else ''}><summary>{html(summary)}</summary>{body}</details>"


def caption(kind: FigureKind) -> str:
    """Return the caption of a figure: how to read it, and what to look for in it."""
    return (
        f"<h3>{html(kind.title)}</h3><figcaption><p>{html(kind.read)}</p>"
        f"<p><b>Look for:</b> {html(kind.look)}</p></figcaption>"
    )


def one_figure(kind: FigureKind, runs: Any, salt: str, of: str = "") -> tuple[str, bool]:
    """Return a `<figure class="figure">`, and whether it was drawn.

    The attribute `data-drawn` is "yes", or "no" with the reason shown.

    Args:
        runs: argument of `kind.draw`.
        salt: text that is unique on the page.
        of: label of the run, if the caption stands elsewhere; "" otherwise.
    """
    title = "" if of else caption(kind)
    name = f'class="figure" data-name="{html(kind.name)}"' + (f' data-run="{html(of)}"' if of else "")
    try:
        drawing = kind.draw(runs)
    except NothingToDraw as error:
        return f'<figure {name} data-drawn="no">{title}<p class="none">{html(error)}</p></figure>', False
    return f'<figure {name} data-drawn="yes">{title}{_body(drawing, f"{salt} {kind.name}")}</figure>', True


def _panel(panel: Panel, salt: str) -> str:
    svg = to_svg(panel.figure, salt, panel.alt or panel.title)
    return f'<div class="panel"><h4>{html(panel.title)}</h4>{svg}</div>'


def _body(drawing: Drawing, salt: str) -> str:
    panels = "".join(_panel(panel, f"{salt} {i}") for i, panel in enumerate(drawing.panels))
    width_class = " two" if len(drawing.panels) in (1, 2, 4) else ""
    note = f'<p class="note">{html(drawing.note)}</p>' if drawing.note else ""
    return f'{legend(drawing.keys)}{note}<div class="panels{width_class}">{panels}</div>'


def legend(keys: Sequence[Key]) -> str:
    """Return the legend as text next to small drawings of each mark, so that it never covers data."""
    if not keys:
        return ""
    return f'<ul class="legend">{"".join(f"<li>{_swatch(key)}</li>" for key in keys)}</ul>'


def _swatch(key: Key) -> str:
    if key.mark == "ramp":
        title, low, middle, high = (html(part) for part in key.text.split("|"))
        scale = f'<span class="scale"><span>{low}</span><span>{middle}</span><span>{high}</span></span>'
        return f'<span>{title}<br><span class="ramp"></span>{scale}</span>'
    ink = f"var(--{key.role})"
    is_wide = key.mark.startswith("run ") or key.mark in ("line", "thin", "faint", "dots")
    symbol = _line(key.mark, ink) if is_wide else _mark(key.mark, ink)
    width = 30 if is_wide else 14
    return (
        f'<svg width="{width}" height="14" viewBox="0 0 {width} 14" aria-hidden="true">{symbol}</svg>{html(key.text)}'
    )


def _line(mark: str, ink: str) -> str:
    width, opacity, dash, marker = {"thin": 1.2, "faint": 1.2, "dots": 1.4}.get(mark, 2.4), "", "", ""
    if mark == "faint":
        opacity = ' stroke-opacity=".35"'
    if mark == "dots":
        dash = ' stroke-dasharray="1.5 3"'
    if mark.startswith("run "):
        index = int(mark.split()[1])
        ink = f"var(--{SERIES[index % len(SERIES)]})"
        style = DASHES[(index // len(SERIES)) % len(DASHES)]
        dash = f' stroke-dasharray="{" ".join(f"{1.2 * part:.1f}" for part in style[1])}"' if style != "-" else ""
        marker = f'<path d="{_SHAPES[MARKERS[index % len(MARKERS)]]}" fill="{ink}"/>'
    return f'<path d="M1 7H29" stroke="{ink}" stroke-width="{width}"{dash}{opacity} fill="none"/>{marker}'


_SHAPES = {
    "o": "M11.5 7a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "s": "M11.6 3.6h6.8v6.8h-6.8z",
    "D": "M15 2.2l4.8 4.8l-4.8 4.8l-4.8-4.8z",
    "^": "M15 2.8l4.2 7.8h-8.4z",
    "v": "M15 11.2l4.2-7.8h-8.4z",
    "P": "M13.4 2.6h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "X": "M12 2.6l3 2.4 3-2.4 1.6 1.6-2.6 2.8 2.6 2.8-1.6 1.6-3-2.4-3 2.4-1.6-1.6 2.6-2.8-2.6-2.8z",
    "*": "M15 1.8l1.5 3.6 3.9.3-3 2.5 1 3.8-3.4-2.1-3.4 2.1 1-3.8-3-2.5 3.9-.3z",
}


def _mark(mark: str, ink: str) -> str:
    box = f'<rect x="1" y="1" width="12" height="12" rx="1.5" fill="{ink}"'
    stroke = f'stroke="{ink}" stroke-width="1.6" fill="none"'
    return {
        "square": f"{box}/>",
        "plus": f'{box}/><path d="M4 7h6M7 4v6" stroke="var(--panel)" stroke-width="1.8"/>',
        "minus": f'{box} fill-opacity=".32"/><path d="M4 7h6" stroke="{ink}" stroke-width="1.8"/>',
        "hatch": f'<rect x="1.5" y="1.5" width="11" height="11" {stroke}/><path d="M2 8l6-6M5 12l7-7M2 12L12 2" '
        f'stroke="{ink}"/>',
        "band": f'<rect x="0" y="2" width="14" height="10" fill="{ink}" fill-opacity=".25"/>',
        "bar": f'<path d="M7 1v12" stroke="{ink}" stroke-width="2.4"/>',
        "up": f'<path d="M7 3l4 8h-8z" fill="{ink}"/>',
        "right": f'<path d="M11 7l-8 4v-8z" fill="{ink}"/>',
        "down": f'<path d="M7 11l4-8h-8z" fill="{ink}"/>',
        "cross": f'<path d="M3.5 3.5l7 7M10.5 3.5l-7 7" {stroke}/>',
        "hollow": f'<circle cx="7" cy="7" r="3.6" {stroke}/>',
    }[mark]
