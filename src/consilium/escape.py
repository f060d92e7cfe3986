"""Escaping of text from outside, with one function for each kind of output.

A task, a label, a client's name, a column, a cell, a generated text or another library's message may contain anything.
Every such text passes through one of these functions before it reaches a screen or a file that people open:

    terminal         a terminal or a log (of rich: in a `Text`, never in markup)
    one_line         the same in one line, of bounded length        print_line    prints it on a console of rich
    html             between tags or in a quoted attribute
    markdown         a sentence, heading or table cell of Markdown        markdown_code   a code span of it
    python_literal   a string in Python source
    csv_cell         a cell that a spreadsheet opens
    latex            LaTeX
"""

import html as _html
import re
import unicodedata
from typing import Any

__all__ = [
    "csv_cell",
    "html",
    "latex",
    "markdown",
    "markdown_code",
    "one_line",
    "print_line",
    "python_literal",
    "terminal",
]

_JOINERS = "\u200c\u200d"
"""Zero-width joiners: Persian, Hindi and emoji need them, and terminals ignore them."""
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$",
          "±": r"$\pm$", "<": "$<$", ">": "$>$"} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip
_MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: f"\\{c}" for c in "\\`*_[]|~$@"}
_LINKS = re.compile(r"(?<=[A-Za-z])(?=://)|(?<=[Ww]{3})(?=\.)")
"""Positions at which a bare address is broken up, because GitHub would turn it into a link."""
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def terminal(text: object, keep: str = "") -> str:
    """Return a text without anything that a terminal would interpret.

    Control characters (including those of 7-bit and 8-bit escape sequences), marks that override the writing direction,
    and lone surrogates become "?"; each blank becomes a space.

    Args:
        keep: further characters that stay, e.g. newlines and tabs.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS or c in keep else " " if c.isspace() else "?" for c in text)


def one_line(text: object, limit: int = 1000) -> str:
    """Return a text as one line of at most `limit` characters, for a record, a log or a terminal."""
    return terminal(" ".join(str(text)[: 4 * limit].split())[:limit])


def print_line(console: Any, text: object, limit: int = 4000) -> None:
    """Print a text as one line of a rich console, without markup, colours or wrapping."""
    console.print(one_line(text, limit), markup=False, highlight=False, soft_wrap=True)


def html(text: object) -> str:
    """Return a text for use between HTML tags or in a quoted attribute."""
    return _html.escape(terminal(text, keep="\n\t"), quote=True)


def markdown(text: object) -> str:
    """Return a text as one line of Markdown that renders as the text itself.

    The result contains no link, HTML, emphasis or new cell. It must not start a line, where numbers and dashes have a
    meaning.
    """
    line = "".join(_MARKDOWN.get(c, c) for c in one_line(text))
    return _LINKS.sub(r"\\", line)


def markdown_code(text: object) -> str:
    """Return a text as a Markdown code span, for use outside tables."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def python_literal(text: object) -> str:
    """Return Python source for a string, on one line, without backquotes that could end a Markdown block."""
    return repr(str(text)).replace("`", r"\x60")


def csv_cell(value: Any) -> Any:
    """Return a value for a CSV cell; put an apostrophe before a text that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    text = terminal(value)
    starts = value.startswith(_FORMULA) or unicodedata.normalize("NFKC", text).lstrip().startswith(_FORMULA)
    return f"'{text}" if starts else text


def latex(text: object) -> str:
    """Return a text as one line of LaTeX that renders as the text itself."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))
