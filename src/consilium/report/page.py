"""The templates of the pages: every text passes through their autoescape, and every page carries one style sheet."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from consilium.escape import terminal
from consilium.report.style import DARK, LIGHT, RAMP

__all__ = ["anchor", "fill"]


def anchor(name: str) -> str:
    """Return the id of a section: the letters and digits of its name, e.g. "Set-up" -> "setup"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _cleaned(value: Any) -> Any:
    """Return a value without characters that control a terminal or the writing direction; markup is left alone."""
    return value if isinstance(value, Markup) else terminal(value, keep="\n\t")


_TEMPLATES = Environment(
    loader=PackageLoader("consilium.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_cleaned,
    trim_blocks=True,
    keep_trailing_newline=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["anchor"] = anchor
_TEMPLATES.globals |= {"light": LIGHT, "dark": DARK, "ramps": RAMP}


def fill(template: str, **content: Any) -> str:
    """Return a page: a template of `consilium.report.templates`, filled with content that is escaped."""
    return _TEMPLATES.get_template(template).render(content)
