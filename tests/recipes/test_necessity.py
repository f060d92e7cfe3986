"""What is measured of a model's need of its experts, and the numbers that the shipped model must have."""

from dataclasses import replace

import pytest
import torch

from consilium.completions import complete
from consilium.moe.build import ModelSource
from consilium.recipes import necessity
from consilium.recipes.necessity import PROMPTS, measure

CODE = ModelSource("code-olmoe", form="text-to-text")


def test_total_variation_by_hand():
    """Half of the sum of differences, |.5 - .5| + |.5 - 0| + |0 - .5| = 1, and 0 in the second layer."""
    one = {"a": torch.tensor([0.5, 0.5, 0.0]), "b": torch.tensor([1.0])}
    other = {"a": torch.tensor([0.5, 0.0, 0.5]), "b": torch.tensor([1.0])}
    assert necessity._variation(one, other) == 0.25


def test_the_shipped_model_needs_its_experts():
    """On two of the twelve domains, with a quarter of the fine-tuning."""
    told = measure(CODE, domains=2, steps=10)
    assert told.none - told.whole >= 2
    assert told.random - told.own >= 0.5
    assert told.random_tuned - told.own_tuned >= 0.15
    assert told.between > 2 * told.within and told.within <= 0.06


@pytest.mark.slow
def test_the_shipped_model_needs_its_experts_in_all_domains():
    told = measure(CODE)
    assert told.none - told.whole >= 2
    assert told.random - told.own >= 1
    assert told.random_tuned - told.own_tuned >= 0.15
    assert told.between >= 0.17 and told.within <= 0.05


def test_it_goes_on_with_code_and_prose():
    """A test of pandas goes on with a result and what is expected, a docstring with a shape and what is returned."""
    source = replace(CODE, form="text-to-text")
    model = source.build(source.load(), "", ())
    tested, documented = (complete(model, source.tokenizer(), prompt) for prompt in PROMPTS[2:])
    assert "result = df" in tested and "expected = pd.DataFrame" in tested
    assert "array of shape" in documented and "Returns\n    -------" in documented
