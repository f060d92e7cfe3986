"""Recipes for large language models train adapters, and bfloat16 mixtures of a whole model by float32 masters."""

import pytest

from consilium.recipes import find


@pytest.mark.parametrize("name", ["fedmoe-instructions", "fedmoe-plaintext"])
def test_large_models_train_adapters(name):
    made = find(name).make()
    assert made.fit.lora.rank > 0 and made.model.dtype == "bfloat16"
