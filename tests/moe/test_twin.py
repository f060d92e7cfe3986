"""Tiny twins of configurations keep to the sizes that depend on each other."""

import pytest
from transformers import OlmoeConfig

from consilium.moe.twin import WIDTH, shrink


@pytest.mark.parametrize(("heads", "keys", "kept"), [(3, 3, (2, 2)), (3, 1, (2, 1)), (6, 2, (4, 2)), (1, 1, (1, 1))])
def test_the_heads_of_a_twin_divide_its_width(heads, keys, kept):
    """A width of 48 becomes 32: three heads would leave two columns over, so there are two."""
    small = shrink(OlmoeConfig(hidden_size=48, num_attention_heads=heads, num_key_value_heads=keys))
    assert small.hidden_size == WIDTH
    assert (small.num_attention_heads, small.num_key_value_heads) == kept
