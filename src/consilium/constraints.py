"""Constraints of settings: a field declares them in its annotation, and pydantic checks them.

    mu: Annotated[float, Interval(ge=0, le=1e4)] = setting(0.01, "factor")
    kl: Literal["paper", "bernoulli"] = setting("paper", "free")

The vocabulary is that of `annotated_types`; the aliases below are the ranges that many fields share. Types are checked
strictly: a number is neither a text nor a truth value, and a whole number counts as a float.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from annotated_types import Ge, Interval

from consilium.errors import ConfigError, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

__all__ = [
    "Count", "Factor", "Few", "Fraction", "NonNegativeFloat", "NonNegativeInt",
    "OpenShare", "PositiveFloat", "PositiveInt", "PositiveShare", "Rate", "Scale",
    "Share", "Width", "check_settings", "check_values", "forbid", "nearest",
]  # fmt: skip

INF = float("inf")
Count = Annotated[int, Interval(ge=1, le=1e12)]
"""A number of things, at least one."""
Factor = Annotated[float, Interval(ge=0, le=1e4)]
"""A factor of a loss or a gradient; 0 leaves it out."""
Rate = Annotated[float, Interval(gt=0, le=1e38)]
"""A learning rate that a float32 can hold."""
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
"""A share below the whole, e.g. a momentum."""
Scale = Annotated[float, Interval(gt=0, le=1e6)]
"""A factor of an update, e.g. a server's step size."""
Width = Annotated[int, Interval(ge=1, le=1e6)]
"""A rank, or a number of rows at a time; it takes memory."""
Few = Annotated[int, Interval(ge=1, le=1e4)]
"""A number of experts or other parts of a model; each takes memory."""
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Interval(gt=0, lt=INF)]
NonNegativeFloat = Annotated[float, Interval(ge=0, lt=INF)]

_WORDS = {
    "boolean": "True or False",
    "integer": "a whole number",
    "null": "None",
    "number": "a number",
    "path": "a Path",
    "string": "a text",
}


def check_settings(owner: Any, prefix: str = "") -> None:
    """Check the values of a dataclass against the annotations of its fields.

    Args:
        prefix: prefix of the fields' names in messages, e.g. "fit."; "--" writes them as flags.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    check_values(type(owner), {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner)}, prefix)


def check_values(kind: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check values by name against the annotations of a dataclass's fields; see `check_settings`."""
    from pydantic import ValidationError

    checks = _checks(kind)
    for name, value in values.items():
        hint, check = checks.get(name, (Any, None))
        try:
            if check:
                check.validate_python(value)
        except ValidationError as error:
            label = f"{prefix}{name}".replace("_", "-") if prefix.startswith("--") else f"{prefix}{name}"
            allowed = _allowed(hint, value, error.errors()[0]["loc"])
            raise ConfigError(f"{label} is {shown(value)}; it must be {allowed}") from None


def forbid(condition: Any, message: str) -> None:
    """Raise ConfigError with the message if the condition is true: for rules that relate several settings."""
    if condition:
        raise ConfigError(message)


def nearest(name: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """Return "did you mean 'x'?", between `before` and `after`, for the known name that is most like the given one.

    The result is "" if no name is like it.
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"{before}did you mean {matches[0]!r}?{after}" if matches else ""


@cache
def _checks(kind: type) -> dict[str, tuple[Any, "TypeAdapter[Any] | SchemaValidator"]]:
    """Return field -> (annotation, check) of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: (hints[field.name], _check_of(hints[field.name])) for field in dataclasses.fields(kind)}


def _check_of(hint: Any) -> "TypeAdapter[Any] | SchemaValidator":
    """Return the check of an annotation; a dataclass has checked its own fields, so its type suffices."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic_core import SchemaValidator, core_schema

    if _is_class(hint):
        return SchemaValidator(core_schema.is_instance_schema(hint))
    return TypeAdapter(hint, config=ConfigDict(strict=True))


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type) and hint not in (int, float, str, bool)


def _allowed(hint: Any, value: Any, path: tuple[int | str, ...]) -> str:
    """Describe what an annotation allows at the place of the error."""
    from pydantic import TypeAdapter

    if _is_class(hint):
        return f"of type {hint.__name__}"
    schema = TypeAdapter(hint).json_schema()
    if path and isinstance(path[0], int):  # the index of an item in a tuple
        item, schema = value[path[0]], schema["items"]
        return _bounds(schema, item) or f"a list, each item {_described(schema, item)}"
    return _described(schema, value)


def _described(schema: Mapping[str, Any], value: Any) -> str:
    """Describe a JSON schema in words; of a number in the wrong range, the range alone."""
    if "anyOf" in schema:
        texts = [_described(part, value) for part in schema["anyOf"]]
        ranges = [text for text, part in zip(texts, schema["anyOf"], strict=True) if _bounds(part, value)]
        return " or ".join(ranges or texts)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        suggestion = nearest(value, map(str, choices), "; ") if isinstance(value, str) else ""
        names = ", ".join(str(choice) or "''" for choice in choices)
        return f"one of {names}{suggestion}"
    if bounds := _bounds(schema, value):
        return bounds
    if schema.get("type") == "array":
        kind = "tuple" if isinstance(value, list) else "list"  # a tuple is a list in JSON
        return f"a {kind}, each item {_described(schema['items'], None)}"
    return _WORDS.get(schema.get("format", schema["type"]), schema["type"])


def _bounds(schema: Mapping[str, Any], value: Any) -> str:
    """Describe the range of a number: only the lower end if the value violates it and the upper end is far away."""
    kinds = {"integer": (int,), "number": (int, float)}.get(schema.get("type", ""), ())
    if not isinstance(value, kinds) or isinstance(value, bool):
        return ""
    low, high = (schema.get(f"exclusive{end}", schema.get(end.lower())) for end in ("Minimum", "Maximum"))
    if low is None and high is None:
        return ""
    if high is None or (low is not None and value <= low and high >= 1e4):
        finite = "" if abs(value) < INF else "finite and "
        return f"{finite}{'greater than' if 'exclusiveMinimum' in schema else 'at least'} {_number(low)}"
    if low is None:
        return f"{'less than' if 'exclusiveMaximum' in schema else 'at most'} {_number(high)}"
    ends = "[("["exclusiveMinimum" in schema], "])"["exclusiveMaximum" in schema]
    return f"within {ends[0]}{_number(low)}, {_number(high)}{ends[1]}"


def _number(value: float) -> str:
    return f"{value:g}".replace("e+", "e")
