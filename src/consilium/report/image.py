"""Figures as images of the page: two for each panel, for the light and the dark theme, as `data:` URIs.

An image is SVG as matplotlib writes it. If all images together are too large for a page, the largest become PNG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Plot
from PIL import Image

from consilium.report.style import Panel, drawing_style

__all__ = ["Picture", "fit", "picture"]

LIMIT = 2_500_000
"""The most bytes of all images of a page, whose texts need room as well below 3 MB."""
_COLORS = 32
_PIXELS = (1.5, 1.0)  # resolutions of PNG images, in pixels per CSS pixel, that are tried one after the other


@dataclass
class Picture:
    """One drawn panel.

    Args:
        alt: description in words, for readers who cannot see it.
        plots: theme -> figure of matplotlib.
        uris: theme -> image.
    """

    title: str
    alt: str
    plots: dict[str, Plot]
    uris: dict[str, str]

    @property
    def size(self) -> tuple[int, int]:
        """Return the natural width and height in CSS pixels."""
        width, height = self.plots["light"].get_size_inches() * self.plots["light"].dpi
        return round(width), round(height)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.uris.values()))

    def shrink(self, pixels: float) -> None:
        """Make the images PNG of that resolution where this is smaller."""
        for theme, plot in self.plots.items():
            self.uris[theme] = min(self.uris[theme], data_uri(plot, theme, pixels), key=len)


def picture(light: Panel, dark: Panel) -> Picture:
    """Return the images of a panel that was drawn in both themes."""
    plots = {"light": light.figure, "dark": dark.figure}
    uris = {theme: data_uri(plot, theme) for theme, plot in plots.items()}
    return Picture(light.title, light.alt or light.title, plots, uris)


def fit(pictures: Sequence[Picture], limit: int = LIMIT) -> None:
    """Shrink the largest pictures until all of them together have at most `limit` bytes, if PNG makes that possible."""
    total = sum(entry.nbytes for entry in pictures)
    for pixels in _PIXELS:
        for entry in sorted(pictures, key=lambda entry: entry.nbytes, reverse=True):
            if total <= limit:
                return
            total -= entry.nbytes
            entry.shrink(pixels)
            total += entry.nbytes


def data_uri(plot: Plot, theme: str, pixels: float = 0) -> str:
    """Return a figure as an image in a `data:` URI.

    Args:
        pixels: resolution of a PNG image, in pixels per CSS pixel; 0: SVG.
    """
    buffer = io.BytesIO()
    with drawing_style(theme):
        if pixels:
            plot.savefig(buffer, format="png", dpi=plot.dpi * pixels, metadata={"Software": None})
            colors = Image.open(buffer).quantize(_COLORS)
            buffer = io.BytesIO()
            colors.save(buffer, format="png", optimize=True)
        else:
            plot.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    kind = "png" if pixels else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
