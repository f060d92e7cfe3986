"""The parts of a page as data: tables, texts, folds, cards and figures. `templates/pieces.html` turns them into HTML.

The class attribute `form` tells the template which part it has. All texts are plain: the template escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from consilium.report.image import Picture, picture
from consilium.report.plots import FigureKind
from consilium.report.style import Key, NothingToDraw, drawing_style

__all__ = ["Box", "Card", "Cell", "Code", "Figure", "Fold", "Group", "Heading", "Part", "Table", "Text", "Words",
           "one_figure"]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One table cell.

    Args:
        kind: CSS classes such as "num" or "wrap".
        is_head: whether it names its row.
        below: second line, in small print.
        dot: role of the colour of a dot before the text, e.g. "c0"; "" for no dot.
    """

    text: Any
    kind: str = ""
    is_head: bool = False
    below: str = ""
    dot: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls inside its own box.

    Args:
        heads: (text, class) of each column.
        kinds: class of each row; () for none.
        tall: show many rows in a box of limited height.
        starred: leave room for the mark of the best.
    """

    form: ClassVar[str] = "table"
    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    kinds: Sequence[str] = ()
    tall: bool = False
    starred: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph with CSS classes such as "note below"."""

    form: ClassVar[str] = "text"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading within a box."""

    form: ClassVar[str] = "heading"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Code:
    """A text in which spaces and line ends count."""

    form: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Words:
    """A list of words, each with its meaning."""

    form: ClassVar[str] = "words"
    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Fold:
    """A part of the page that the reader can open and close; it works without JavaScript."""

    form: ClassVar[str] = "fold"
    summary: str
    content: Sequence[Part]
    is_open: bool = False


@dataclass(frozen=True)
class Box:
    """A framed part of the page."""

    form: ClassVar[str] = "box"
    content: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """One summary card."""

    what: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure, with its panels or the reason why there are none.

    Args:
        run: label of the run, if the caption stands elsewhere; "" otherwise.
    """

    form: ClassVar[str] = "figure"
    kind: FigureKind
    run: str = ""
    panels: Sequence[Picture] = ()
    keys: Sequence[Key] = field(default_factory=tuple)
    note: str = ""
    reason: str = ""

    @property
    def pictures(self) -> Sequence[Picture]:
        return self.panels


@dataclass(frozen=True)
class Group:
    """The figures of one kind for several runs, below one caption."""

    form: ClassVar[str] = "group"
    kind: FigureKind
    content: Sequence[Part]
    pictures: Sequence[Picture]


Part = Table | Text | Heading | Code | Words | Fold | Box | Figure


def one_figure(kind: FigureKind, runs: Any, of: str = "") -> Figure:
    """Draw a figure in both themes; if there is nothing to draw, the figure has the reason instead of panels.

    Args:
        runs: argument of `kind.draw`.
        of: label of the run, if the caption stands elsewhere; "" otherwise.
    """
    try:
        with drawing_style("light"):
            light = kind.draw(runs)
    except NothingToDraw as error:
        return Figure(kind, of, reason=str(error))
    with drawing_style("dark"):
        dark = kind.draw(runs)
    panels = [picture(*pair) for pair in zip(light.panels, dark.panels, strict=True)]
    return Figure(kind, of, panels, light.keys, light.note)
