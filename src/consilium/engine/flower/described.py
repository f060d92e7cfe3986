"""Checks of a site's description of itself, before anything is made of it.

A site's name, task, labels, sizes and the rest go into the server's model, records, screen and model card. One table
holds them to the rules for local data, and an error says what was given and what is allowed.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from consilium.core import CLIENT_ID
from consilium.data.task import TASK_NAME, Form, Metric, Task, check_labels
from consilium.engine.judge import number
from consilium.errors import DataError, PayloadError, shown

__all__ = ["checked_description", "checked_name"]

_FINGERPRINT = re.compile(r"[A-Za-z0-9:_-]{1,128}")
_SIDE, _NUMBERS = 2**20, 2**26
"""The longest side of an example, and the largest count of numbers in it."""


def _whole_numbers(value: Any, least: int, most: int) -> bool:
    return isinstance(value, list) and all(number(item, least, most, int) for item in value)


def _is_shape(value: Any) -> bool:
    return _whole_numbers(value, 1, _SIDE) and len(value) <= 8 and math.prod(value) <= _NUMBERS


_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": (
        lambda v: isinstance(v, str) and CLIENT_ID.fullmatch(v),
        "1 to 64 of A-Z a-z 0-9 . _ - without a leading dot",
    ),
    "task": (lambda v: isinstance(v, str) and TASK_NAME.fullmatch(v), "1 to 58 of A-Z a-z 0-9 _ -"),
    "form": (lambda v: v in get_args(Form), f"one of {', '.join(get_args(Form))}"),
    "metric": (lambda v: v in get_args(Metric), f"one of {', '.join(get_args(Metric))}"),
    "labels": (lambda v: isinstance(v, list), "a list of texts"),
    "sizes": (
        lambda v: _whole_numbers(v, 1, 2**53) and len(v) == 3,
        "three whole numbers of at least 1: examples of train, validation and test",
    ),
    "memory_bytes": (lambda v: number(v, 0, 2**62, int), "a whole number of bytes, 0 for no limit"),
    "architecture": (
        lambda v: isinstance(v, str) and len(v) <= 1000 and v.isprintable(),
        "up to 1,000 printable characters",
    ),
    "shape": (_is_shape, f"up to 8 whole numbers within 1..{_SIDE}, {_NUMBERS} numbers in all"),
    "fingerprint": (lambda v: isinstance(v, str) and _FINGERPRINT.fullmatch(v), "1 to 128 letters and digits"),
    "threads": (lambda v: number(v, 1, 2**16, int), "a whole number within 1..65536"),
}
"""Key -> a check of its value, and a text that says which values are allowed."""


def checked_description(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a site's description of itself, without any other keys.

    Raises:
        PayloadError: naming the first key with a value that is not allowed, and the values that are.
    """
    description = {key: _checked(key, told.get(key)) for key in _RULES}
    try:
        check_labels(description["labels"])
        Task(description["task"], description["form"], tuple(description["labels"]), description["metric"])
    except DataError as error:
        raise PayloadError(str(error)) from error
    return description


def checked_name(value: Any) -> str:
    """Return a site's name.

    Raises:
        PayloadError: if it is not one.
    """
    return str(_checked("name", value))


def _checked(key: str, value: Any) -> Any:
    check, rule = _RULES[key]
    if not check(value):
        raise PayloadError(f"{key} is {shown(value)}; it must be {rule}")
    return value
