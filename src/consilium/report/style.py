"""The look of figures, and their conversion to inline SVG that follows the page's light or dark theme.

Figures are drawn in the light theme's colours. `to_svg` replaces each of those colours with a CSS variable of the same
role, so one drawing serves both themes. Heat maps are images, which CSS cannot recolour. They are drawn twice, and the
page shows the one that fits.

The categorical colours are Okabe and Ito's, adjusted to keep 3:1 contrast on the page. No figure relies on colour
alone: dashes, marks or positions repeat the information.
"""

from __future__ import annotations

import hashlib
import io
import os.path
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from consilium.escape import html

__all__ = [
    "DARK",
    "DASHES",
    "LIGHT",
    "MARKERS",
    "SERIES",
    "Drawing",
    "Key",
    "NothingToDraw",
    "Panel",
    "any_glyph",
    "clean_axes",
    "color",
    "drawing_style",
    "new_figure",
    "round_ticks",
    "run_styles",
    "series",
    "shorten",
    "shorten_all",
    "to_svg",
]

LIGHT = {
    "ink": "#1c2127",
    "muted": "#5b6570",
    "grid": "#dde2e7",
    "panel": "#fdfdfc",
    "kept": "#9aa4ae",
    "c0": "#0072b2",
    "c1": "#cc5500",
    "c2": "#008a64",
    "c3": "#aa4499",
    "c4": "#9a6a00",
    "c5": "#3a93c9",
    "c6": "#6b7480",
    "c7": "#882255",
}
DARK = {
    "ink": "#e8ebee", "muted": "#a3adb8", "grid": "#343b43", "panel": "#1a1e23", "kept": "#6c7681",
    "c0": "#56b4e9", "c1": "#ff8f45", "c2": "#35cfa0", "c3": "#e093d2", "c4": "#e5b53c", "c5": "#a5d8f5",
    "c6": "#aeb6bf", "c7": "#ee8fae",
}  # fmt: skip
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5", "c7", "c6")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))

_RC = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and set in the page's font
    "image.composite_image": False,  # the light and the dark image must stay two images
    "text.parse_math": False,  # a "$" in a client's or task's name is a "$"
    "font.family": "DejaVu Sans",  # wider than nearly every system font, so what fits here fits on the page
    "font.size": 11,
    "text.color": LIGHT["ink"],
}
_UNIT = 72  # at 72 dpi a matplotlib point is a CSS pixel


class NothingToDraw(Exception):
    """An error for a figure without data in the run; the message gives the reader the reason."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Args:
        mark: "run 2" (line and marker of the run with index 2), "line", "thin", "faint", "dots", "square", "hatch",
            "plus", "minus", "band", "bar", "right", "up", "down", "cross", "hollow", or "ramp"; the text of a ramp is
            "what|low|middle|high".
    """

    text: str
    role: str
    mark: str = "line"

    @property
    def is_line(self) -> bool:
        return self.mark.startswith("run ") or self.mark in ("line", "thin", "faint", "dots")

    @property
    def ink(self) -> str:
        """Return the role of its colour; a run has the colour of its series."""
        return self.role if self._run is None else SERIES[self._run % len(SERIES)]

    @property
    def marker(self) -> str:
        """Return the marker of a run as matplotlib names it; "" for other marks."""
        return "" if self._run is None else MARKERS[self._run % len(MARKERS)]

    @property
    def dash(self) -> str:
        """Return the lengths of dashes and gaps in the legend, in pixels; "" for a solid line."""
        if self._run is None:
            return "1.5 3" if self.mark == "dots" else ""
        style = DASHES[(self._run // len(SERIES)) % len(DASHES)]
        return "" if style == "-" else " ".join(f"{1.2 * part:.1f}" for part in style[1])

    @property
    def _run(self) -> int | None:
        return int(self.mark.split()[1]) if self.mark.startswith("run ") else None


@dataclass(frozen=True)
class Panel:
    """One small plot with its heading.

    Args:
        alt: description in words, for readers who cannot see the plot.
    """

    title: str
    figure: Figure
    alt: str = ""


@dataclass(frozen=True)
class Drawing:
    """The panels of one figure and their common legend."""

    panels: Sequence[Panel]
    keys: Sequence[Key] = ()
    note: str = ""


def color(role: str) -> str:
    """Return the colour of a role such as "ink" or "c0" in the light theme."""
    return LIGHT[role]


def series(index: int) -> dict[str, Any]:
    """Return colour, marker and dash of the index-th run; after eight runs the colours repeat with another dash."""
    return {
        "color": color(SERIES[index % len(SERIES)]),
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[(index // len(SERIES)) % len(DASHES)],
    }


def run_styles(methods: Sequence[str]) -> list[int]:
    """Return an index into `series` for each run.

    Each method has one colour. If a method ran several times (seeds), the dash tells its runs apart, because fifteen
    colours would hide the comparison. If there is only one method, or more methods than colours, each run has its own
    colour.
    """
    kinds = list(dict.fromkeys(methods))
    if 2 <= len(kinds) <= len(SERIES):
        return [kinds.index(m) + len(SERIES) * list(methods[:i]).count(m) for i, m in enumerate(methods)]
    return list(range(len(methods)))


def drawing_style() -> AbstractContextManager[None]:
    """Return a context with the settings for making and saving figures.

    It restores the caller's settings afterwards.
    """
    return matplotlib.rc_context(_RC)


def new_figure(width: float, height: float, left: float, bottom: float, right: float = 8, top: float = 8) -> Figure:
    """Create a figure with a natural size of `width` x `height` CSS pixels, and one axes inside fixed pixel margins."""
    figure = Figure(figsize=(width / _UNIT, height / _UNIT), dpi=_UNIT)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    axes.patch.set_alpha(0)
    return figure


def clean_axes(axes: Axes, grid: str = "y", size: float = 10.5) -> None:
    """Remove the box, mute the ticks, and draw a light grid behind the data along `grid` ("x", "y" or "")."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    if grid == "y":
        axes.spines["bottom"].set_visible(True)
        axes.spines["bottom"].set_color(color("muted"))
    axes.tick_params(length=0, pad=4, labelsize=size, labelcolor=color("muted"))
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=color("grid"), linewidth=1)  # type: ignore[arg-type]
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(color("muted"))
        axis.label.set_size(size)


def round_ticks(most: int, integer: bool = False) -> MaxNLocator:
    """Return a locator with at most `most` intervals between ticks, at steps of 1, 2, 2.5, 5 or 10.

    A step of 2.5 is left out if `integer` is true.
    """
    steps = [1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10]
    return MaxNLocator(most, steps=steps, integer=integer, min_n_ticks=1 if integer else 2)


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of a long name, because its beginning and end tell it apart from others."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def shorten_all(texts: Sequence[str], limit: int) -> list[str]:
    """Shorten names that stand side by side so that they remain distinct.

    If names would become equal, their common prefix is cut first. If they are still equal, they are numbered.
    """
    short_texts = [shorten(text, limit) for text in texts]
    if len(set(short_texts)) == len(set(texts)):
        return short_texts
    prefix_length = len(os.path.commonprefix(list(texts)))  # noqa: RUF071 - a common prefix of letters is intended
    suffix_texts = [shorten("…" + text[prefix_length:], limit) for text in texts]
    if len(set(suffix_texts)) == len(set(texts)):
        return suffix_texts
    return [f"{i + 1}·{shorten(text, limit - len(str(len(texts))) - 1)}" for i, text in enumerate(texts)]


@contextmanager
def any_glyph() -> Iterator[None]:
    """Draw names in any script without warnings.

    The font of matplotlib lacks many glyphs, but the reader's browser does not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        yield


def to_svg(figure: Figure, salt: str, alt: str = "") -> str:
    """Return inline SVG of a figure, without ids that could clash with those of another figure.

    Args:
        salt: any text that is unique on the page; the ids that must stay (clip paths, markers) are derived from it.
    """
    buffer = io.StringIO()
    digest = hashlib.sha256(salt.encode()).hexdigest()[:12]
    with matplotlib.rc_context({**_RC, "svg.hashsalt": digest}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = _unique_ids(svg, digest)
    for role, hexcode in LIGHT.items():
        svg = svg.replace(hexcode, f"var(--{role})")
    return re.sub(r"^<svg[^>]*>", lambda m: _head(m.group(), alt), _smaller(svg))


def _smaller(svg: str) -> str:
    """Remove elements that draw nothing, which are more than half of the output of matplotlib."""
    svg = re.sub(r"font-family: 'DejaVu Sans'(; )?", "", svg)  # the page's own font
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").replace("base64, ", "base64,")
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = re.sub(r'<path [^>]*style="fill: none; opacity: 0"/>', "", svg)
    svg = re.sub(r'(?<=[ "(])(-?\d+\.\d{2})\d+(?=[ ")])', r"\1", svg)
    while (smaller_svg := re.sub(r"<g/>|<g></g>|<defs></defs>|<defs/>", "", svg)) != svg:
        svg = smaller_svg
    return svg


def _unique_ids(svg: str, digest: str) -> str:
    """Drop unused ids, mark the light and dark images by class, and prefix the ids that remain."""
    svg = re.sub(r'id="(light|dark)-\d+"', r'class="only-\1"', svg)
    used_ids = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))

    def keep(match: re.Match[str]) -> str:
        return f' id="{digest}{match.group(1)}"' if match.group(1) in used_ids else ""

    svg = re.sub(r'\s+id="([^"]+)"', keep, svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{digest}\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{digest}\1"', svg)


def _head(tag: str, alt: str) -> str:
    box = re.search(r'viewBox="([^"]+)"', tag)
    size = box.group(1) if box else "0 0 100 100"
    width = float(size.split()[2])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size}" '
        f'style="--natural:{width:.0f}px" role="img" aria-label="{html(alt)}">'
    )
