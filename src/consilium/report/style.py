"""The look of figures: two palettes, one style sheet for each, and helpers for axes, ticks and names.

Figures are drawn within `drawing_style`, once for each theme. `color` and `color_map` then give the theme's colours.

The categorical colours are Okabe and Ito's, adjusted to keep 3:1 contrast on the page. No figure relies on colour
alone: dashes, marks or positions repeat the information.
"""

from __future__ import annotations

import os.path
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "DARK",
    "DASHES",
    "LIGHT",
    "MARKERS",
    "RAMP",
    "SERIES",
    "Drawing",
    "Key",
    "NothingToDraw",
    "Panel",
    "any_glyph",
    "clean_axes",
    "color",
    "color_map",
    "drawing_style",
    "new_figure",
    "round_ticks",
    "run_styles",
    "series",
    "shorten",
    "shorten_all",
    "style_sheet",
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

RAMP = {  # low to high; each starts at the page's own background so that "hardly used" recedes in both themes
    "light": ("#f1f4f6", "#a9d3dc", "#3d93bd", "#1f4f91", "#1b1d4d"),
    "dark": ("#22282f", "#1f4f7a", "#2b8fae", "#7fd1b0", "#f6f3b5"),
}
_THEMES = {"light": LIGHT, "dark": DARK}
_theme: ContextVar[str] = ContextVar("theme", default="light")
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
    """Return the colour of a role such as "ink" or "c0" in the theme that is being drawn."""
    return _THEMES[_theme.get()][role]


def color_map() -> Colormap:
    """Return the colours of a heat map, from low to high, in the theme that is being drawn."""
    return LinearSegmentedColormap.from_list("ramp", RAMP[_theme.get()]).with_extremes(bad=(0, 0, 0, 0))


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


def style_sheet(theme: str) -> dict[str, Any]:
    """Return the settings of matplotlib for figures of a theme, "light" or "dark"."""
    palette = _THEMES[theme]
    sheet = {
        "svg.fonttype": "none",  # the reader's browser has more glyphs than any font of matplotlib
        "svg.hashsalt": "consilium",  # the same figure gives the same file
        "text.parse_math": False,  # a "$" in a client's or task's name is a "$"
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # wider than nearly every system font, so what fits here fits on the page
        "font.size": 11,
        "text.color": palette["ink"],
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": palette["muted"],
        "axes.labelcolor": palette["muted"],
        "axes.axisbelow": True,
        "grid.color": palette["grid"],
        "grid.linewidth": 1,
        "xtick.bottom": False,
        "ytick.left": False,
    }
    sheet |= {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}
    for axis in ("xtick", "ytick"):
        sheet |= {f"{axis}.labelcolor": palette["muted"], f"{axis}.major.size": 0, f"{axis}.major.pad": 4}
    return sheet


@contextmanager
def drawing_style(theme: str = "light") -> Iterator[None]:
    """Draw and save the figures inside the block in a theme; the caller's settings are restored afterwards."""
    token = _theme.set(theme)
    try:
        with matplotlib.rc_context(style_sheet(theme)):
            yield
    finally:
        _theme.reset(token)


def new_figure(width: float, height: float, left: float, bottom: float, right: float = 8, top: float = 8) -> Figure:
    """Create a figure with a natural size of `width` x `height` CSS pixels, and one axes inside fixed pixel margins."""
    figure = Figure(figsize=(width / _UNIT, height / _UNIT), dpi=_UNIT)
    FigureCanvasSVG(figure)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    figure.add_axes(box)
    return figure


def clean_axes(axes: Axes, grid: str = "y", size: float = 10.5) -> None:
    """Set the size of all labels, and draw a light grid behind the data along `grid` ("x", "y" or "")."""
    axes.spines["bottom"].set_visible(grid == "y")
    axes.tick_params(labelsize=size)
    if grid:
        axes.grid(True, axis=grid)  # type: ignore[arg-type]
    for axis in (axes.xaxis, axes.yaxis):
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
