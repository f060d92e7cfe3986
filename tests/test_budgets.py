"""Two budgets from a device's bytes: what is held, and what is trained in a batch; exact at their limits."""

import re

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.core import ClientInfo
from consilium.errors import BudgetError
from consilium.moe.budget import MemoryModel


def device(memory):
    return ClientInfo("site", 5, "animal", memory)


def large(model_type="olmoe", **fit):
    """A model whose experts weigh something: 8 experts of 36,864 parameters in two layers."""
    wide = {"d_ff": 384} if model_type == "switch_transformers" else {"intermediate_size": 384}
    return tiny.setup(tiny.source(model_type, **wide), **fit)


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_without_a_limit_all_are_held_and_trained(model_type):
    setup = tiny.setup(tiny.source(model_type))
    total = sum(setup.model.counts.values())
    assert setup.budgets(device(None)) == setup.budgets(device(10**12)) == (total, total)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_the_smallest_device_and_one_byte_less(model_type, mode):
    """With just enough there is a budget; below it an error with the bytes missing, as `lacks` has it."""
    setup = tiny.setup(tiny.source(model_type))
    least, blocks = sum(setup.least.values()), len(setup.model.counts)
    assert least == tiny.FAMILIES[model_type].least * blocks
    need = setup.footprint(setup.least, mode, trained=blocks).total
    forward, backward = setup.budgets(device(need), mode=mode)
    assert forward >= least and backward >= blocks
    with pytest.raises(BudgetError) as caught:
        setup.budgets(device(need - 2_000_000), mode=mode)
    assert str(caught.value) == (
        f"site cannot train even {least} experts in {blocks} layers: "
        f"{setup.lacks(device(need - 2_000_000), setup.least, mode, trained=blocks)}"
    )
    assert re.search(r"needs .*, has .*, lacks 2\.0 MB$", str(caught.value))


@settings(max_examples=40)
@given(data=st.data())
def test_budgets_are_the_largest_that_fit(data):
    setup = large(
        data.draw(st.sampled_from(["olmoe", "switch_transformers"])),
        optimizer=data.draw(st.sampled_from(["adamw", "sgd"])),
    )
    references = data.draw(st.integers(0, 1))
    counts = setup.model.counts
    low = setup.footprint(setup.least, references=references, trained=len(counts)).total
    high = setup.footprint(counts, references=references, trained=sum(counts.values())).total
    memory = data.draw(st.integers(low, high))
    forward, backward = setup.budgets(device(memory), references)

    def need(held, trained):
        return setup.footprint(setup.spread(held), references=references, trained=trained).total

    assert len(counts) <= backward <= forward <= 16
    assert need(forward, backward) <= memory
    assert forward == 16 or need(forward + 1, len(counts)) > memory
    assert backward == forward or need(forward, backward + 1) > memory


@given(experts=st.integers(2, 20))
def test_experts_are_spread_evenly(experts):
    setup = large()
    counts = setup.spread(experts)
    assert sum(counts.values()) == min(experts, 16) and max(counts.values()) - min(counts.values()) <= 1


def test_too_few_to_spread():
    with pytest.raises(BudgetError, match="3 experts are too few: the layers need 4 between them"):
        tiny.setup(tiny.source("deepseek_v3")).spread(3)


def test_only_what_is_trained_has_gradients_and_moments():
    """Of 16 experts 3 are trained: 13 experts of weights less in gradients, 26 less in moments."""
    memory = MemoryModel.of(large().model)
    counts, expert = memory.counts, 4 * 3 * 32 * 384

    def need(trained):
        shape = {"batch_size": 4, "max_length": 12, "target_length": 5, "optimizer": "adamw"}
        return memory.footprint(counts, mode="full", trained=trained, **shape)

    assert need(16).weights == need(3).weights == need(None).weights
    assert need(16).gradients - need(3).gradients == 13 * expert
    assert need(16).optimizer - need(3).optimizer == 26 * expert
    assert need(16).gradients == need(None).gradients and need(16).optimizer == need(None).optimizer
    assert need(99) == need(16)
