"""What settings declare that they cost a client, and the budget that counts it."""

import dataclasses
import typing

import pytest
import torch
from annotated_types import Gt
from test_constraints import bounds

from consilium import core
from consilium.constraints import Share
from consilium.core import Algorithm
from consilium.errors import BudgetError
from consilium.experiment import Experiment, Wire
from consilium.fit import Fit
from consilium.kinds import DataSource, Model
from consilium.moe.lora import Lora
from consilium.work import COMPARED, COSTS, Work, setting, tokens_in

SENT = [
    *(cls for cls in Algorithm.registry.values() if cls.__module__.startswith("consilium.")),
    Fit, Lora, Wire, Experiment,
]  # fmt: skip


def undeclared(kind: type) -> list[str]:
    """Fields that do not say what they cost, or are numbers that only their range could bound and have none.

    Fields that are dataclasses themselves are left to their own class.
    """
    hints, bad = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        parts = typing.get_args(hints[field.name]) or (hints[field.name],)
        if any(dataclasses.is_dataclass(part) or part in (Algorithm, DataSource, Model) for part in parts):
            continue
        cost, ranges = field.metadata.get("cost"), bounds(kind, field.name)
        closed = [low is not None and high is not None for _, (low, high) in ranges]
        unbounded = (
            {int, float} & set(parts) and not (closed and all(closed)) and cost != "server" and field.name != "seed"
        )
        if cost not in COSTS or unbounded:
            bad.append(field.name)
    return bad


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_every_setting_that_a_server_sends_declares_its_cost(kind):
    assert undeclared(kind) == []


def test_a_setting_without_a_declaration_is_found():
    @dataclasses.dataclass(frozen=True)
    class Method:
        a: int = 1
        b: float = setting(1.0, "factor")
        c: Share = setting(1.0, "factor")
        d: str = dataclasses.field(default="", metadata={"cost": "nothing"})
        half: typing.Annotated[float, Gt(0)] = setting(1.0, "factor")
        e: Fit = dataclasses.field(default_factory=Fit)

    assert undeclared(Method) == ["a", "b", "d", "half"]


def test_a_cost_that_is_none():
    with pytest.raises(ValueError, match="cost is 'much'; it must be one of"):
        setting(1, "much")


# --- the budget -------------------------------------------------------------------------------------------------------


def test_steps_end_at_the_limit_and_not_before():
    work = Work(steps=3)
    work.plan(3)
    with pytest.raises(BudgetError, match=r"the work takes 4 steps, this site allows 3 \(--max-steps\)"):
        work.plan(4)
    for _ in range(3):
        work.step()
    with pytest.raises(BudgetError, match="the work takes 4 steps"):
        work.step()
    assert work.done == 3


def test_tokens_seconds_deadline_and_memory(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    work = Work(tokens=5, seconds=2, memory=100, deadline=3)
    work.read(5)
    with pytest.raises(BudgetError, match=r"6 tokens or more, this site allows 5 \(--max-tokens\)"):
        work.read(1)
    work.hold(100, "it")
    with pytest.raises(BudgetError, match=r"it takes 1,000 bytes, this site allows 100 \(--max-memory\)"):
        work.hold(1000, "it")
    now[0] = 12.0
    work.check_time()
    now[0] = 12.5
    for spend in (work.check_time, work.step, lambda: Work.read(work, -6)):
        with pytest.raises(BudgetError, match=r"more than 2 s, this site allows 2 \(--max-seconds\)"):
            spend()
    now[0] = 13.5
    with pytest.raises(BudgetError, match="the round's deadline of 3 s has passed after 2 of 2 steps"):
        work.step()


def test_without_limits_nothing_is_refused():
    work = Work()
    for spend in (lambda: work.plan(10**18), work.step, lambda: work.read(10**18), lambda: work.hold(10**18, "it")):
        spend()


def test_tokens_of_a_batch():
    def of(**batch):
        return tokens_in({key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in batch.items()})

    whole, number = torch.int64, torch.float32
    assert of(input_ids=((2, 5), whole), labels=((2,), whole)) == 10
    assert of(input_ids=((2, 5), whole), labels=((2, 5), whole)) == 10
    assert of(input_ids=((2, 5), whole), labels=((2, 3), whole)) == 16
    assert of(x=((4, 1, 8, 8), number), labels=((4,), whole)) == 4
    assert of(x=((4, 7), whole), labels=((4,), whole)) == 28


def test_core_has_what_a_method_needs():
    assert core.setting is setting and core.Work is Work and set(COMPARED) < COSTS
