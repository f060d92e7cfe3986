"""Every mixture of experts of the installed transformers against docs/families.md: a sample, or all with -m families.

`python tests/mixtures.py` writes the page.
"""

import mixtures
import pytest

EVERY = [pytest.param(kind, marks=() if kind in mixtures.SAMPLE else pytest.mark.families) for kind in mixtures.types()]


def test_the_page_speaks_of_every_mixture():
    """And says of at least 55 that they pass everything."""
    told = mixtures.read_page()
    assert set(told) == set(mixtures.types())
    assert (
        sum(all(found[name] == "" for name in mixtures.CHECKS) for found in told.values() if "refused" not in found)
        >= 55
    )


@pytest.mark.parametrize("kind", EVERY)
def test_a_mixture_is_what_the_page_says(kind):
    assert mixtures.said(mixtures.results(kind)) == mixtures.read_page()[kind]
