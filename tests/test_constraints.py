"""Constraints in the annotations of settings: the texts of errors, and every range of every class of settings."""

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from consilium.constraints import (
    Count,
    Fraction,
    NonNegativeFloat,
    PositiveShare,
    Scale,
    check_settings,
    check_values,
)  # fmt: skip
from consilium.core import Algorithm, Sampling
from consilium.data.arrays import ImageData, TableData
from consilium.data.code import CodeData
from consilium.data.docstrings import DocstringData
from consilium.data.language import LanguageData
from consilium.data.textfile import TextFileData
from consilium.engine.flower.limits import Limits
from consilium.errors import ConfigError
from consilium.experiment import Wire
from consilium.fit import Fit
from consilium.models.cohort import Cohort
from consilium.moe.lora import Lora
from consilium.moe.merging import Merging
from consilium.moe.upcycle import Upcycling
from consilium.oneshot.build import Building
from consilium.oneshot.train import Training
from consilium.privacy import Privacy
from consilium.recipes.textfile import fedmoe_text

PATH = Path("a.csv")
SETTINGS = [
    *(cls() for cls in Algorithm.registry.values() if cls.__module__.startswith("consilium.")),
    Fit(), Lora(), Wire(), Sampling(), Merging(), Privacy(), Cohort(), Limits(), Upcycling(), Building(), Training(),
    CodeData(), DocstringData(), ImageData(), TableData(), LanguageData(PATH, text="t"), TextFileData(PATH),
    fedmoe_text(),
]  # fmt: skip


def intervals(hint: typing.Any) -> typing.Iterator[tuple[type, list]]:
    """Numbers and their constraints, anywhere in an annotation."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *metadata = typing.get_args(hint)
        if kind in (int, float):
            groups = ([*part] if isinstance(part, GroupedMetadata) else [part] for part in metadata)
            yield kind, [bound for group in groups for bound in group]
    else:
        for part in typing.get_args(hint):
            yield from intervals(part)


def bounds(kind: type, name: str) -> list[tuple[type, tuple[typing.Any, typing.Any]]]:
    """(int or float, (constraint of the lower end or None, of the upper end or None)) of a field's numbers."""
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    return [
        (number, tuple(next((b for b in found if isinstance(b, ends)), None) for ends in ((Ge, Gt), (Le, Lt))))
        for number, found in intervals(hint)
    ]


def ends_of(bound: typing.Any, number: type) -> tuple[float, float]:
    """The last value inside of a bound, and the first outside."""
    end, is_low = getattr(bound, type(bound).__name__.lower()), isinstance(bound, (Ge, Gt))
    inwards = 1 if is_low else -1
    near = int(end) + inwards if number is int else math.nextafter(end, inwards * math.inf)
    beyond = int(end) - inwards if number is int else math.nextafter(end, -inwards * math.inf)
    return (end, beyond) if isinstance(bound, (Ge, Le)) else (near, int(end) if number is int else end)


CASES = [
    pytest.param(owner, field.name, number, bound, id=f"{type(owner).__name__}.{field.name}-{type(bound).__name__}")
    for owner in SETTINGS
    for field in dataclasses.fields(owner)
    for number, both in bounds(type(owner), field.name)
    for bound in both
    if bound is not None
]


@pytest.mark.parametrize(("owner", "name", "number", "bound"), CASES)
def test_a_value_just_outside_is_refused_and_one_just_inside_is_not(owner, name, number, bound):
    inside, outside = ends_of(bound, number)
    hint = typing.get_type_hints(type(owner))[name]
    wrap = (lambda value: (value,)) if typing.get_origin(hint) is tuple else (lambda value: value)
    check_values(type(owner), {name: wrap(number(inside))})
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(owner, **{name: wrap(outside)})
    said = re.fullmatch(r"(\S+) is (.+?); it must be (.+)", str(caught.value))
    assert said[1].replace("-", "_").endswith(name.replace("-", "_")) and repr(outside) in said[2]
    limit = max(inside, outside) if isinstance(bound, Lt) else outside if isinstance(bound, Gt) else inside
    numbers = [float(text) for text in re.findall(r"-?[\d.]+(?:e-?\d+)?", said[3])]
    assert limit in numbers if math.isfinite(limit) else "finite" in said[3] or "greater than" in said[3]


def test_there_are_constraints_to_try():
    owners = {type(case.values[0]) for case in CASES}
    assert len(CASES) > 150 and {Fit, Sampling, Privacy, Merging, ImageData, TextFileData, Training, Limits} <= owners


@dataclasses.dataclass
class Some:
    share: PositiveShare | None = 0.5
    shares: tuple[Fraction, ...] = ()
    count: Count = 1
    rate: Scale = 1
    noise: NonNegativeFloat = 0
    way: typing.Literal["alpha", "beta"] = "alpha"
    number: int | typing.Literal["all", "fit"] = 1
    names: tuple[str, ...] = ()
    path: Path = PATH
    fit: Fit = dataclasses.field(default_factory=Fit)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"share": 0}, "x.share is 0; it must be within (0, 1]"),
        ({"share": 1.01}, "x.share is 1.01; it must be within (0, 1]"),
        ({"share": math.nan}, "x.share is nan; it must be within (0, 1]"),
        ({"share": -math.inf}, "x.share is -inf; it must be within (0, 1]"),
        ({"share": "much"}, "x.share is 'much'; it must be a number or None"),
        ({"shares": (0.5, 1.0)}, "x.shares is (0.5, 1.0); it must be within [0, 1)"),
        ({"count": 0}, "x.count is 0; it must be at least 1"),
        ({"count": 10**13}, "x.count is 10000000000000; it must be within [1, 1e12]"),
        ({"count": True}, "x.count is True; it must be a whole number"),
        ({"count": 2.0}, "x.count is 2.0; it must be a whole number"),
        ({"rate": 0}, "x.rate is 0; it must be greater than 0"),
        ({"noise": math.inf}, "x.noise is inf; it must be finite and at least 0"),
        ({"way": "alpa"}, "x.way is 'alpa'; it must be one of alpha, beta; did you mean 'alpha'?"),
        ({"way": ["alpha"]}, "x.way is ['alpha']; it must be one of alpha, beta"),
        ({"number": "al"}, "x.number is 'al'; it must be a whole number or one of all, fit; did you mean 'all'?"),
        ({"names": (60,)}, "x.names is (60,); it must be a list, each item a text"),
        ({"names": ["a"]}, "x.names is ['a']; it must be a tuple, each item a text"),
        ({"path": "a.csv"}, "x.path is 'a.csv'; it must be of type Path"),
        ({"fit": None}, "x.fit is None; it must be of type Fit"),
    ],
)
def test_an_error_names_the_value_and_what_is_allowed(values, said):
    with pytest.raises(ConfigError) as caught:
        check_settings(Some(**values), "x.")
    assert str(caught.value) == said


def test_values_inside_are_not_refused():
    for values in ({}, {"share": None}, {"share": 1}, {"share": 5e-324}, {"shares": (0, 0.999)}, {"way": "beta"}):
        check_settings(Some(**values))


def test_names_of_flags():
    with pytest.raises(ConfigError, match="--max-count is 0; it must be at least 1"):
        check_settings(Some(count=0), "--max-")
