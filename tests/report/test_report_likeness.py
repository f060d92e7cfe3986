"""The figure of which clients are alike: cosines derived by hand, and the order that clustering gives."""

import numpy as np
import pytest
from report_runs import make_run

from consilium.report import read_runs
from consilium.report.likeness import likeness, likeness_map
from consilium.report.style import NothingToDraw


def test_cosines_of_centred_usage():
    """Two experts, three clients with shares (1, 0), (0.8, 0.2) and (0, 1): the mean is (0.6, 0.4).

    Less the mean: (0.4, -0.4), (0.2, -0.2), (-0.6, 0.6). The first two point the same way: cosine 1. The third points
    the other way: cosine -1, which counts as 0.
    """
    usage = {"a": {"block": [1.0, 0.0]}, "c": {"block": [0.0, 1.0]}, "b": {"block": [0.8, 0.2]}}
    names, cosines = likeness(usage)
    place = {name: names.index(name) for name in names}
    assert cosines[place["a"], place["b"]] == pytest.approx(1.0)
    assert cosines[place["a"], place["c"]] == cosines[place["b"], place["c"]] == 0.0
    assert abs(place["a"] - place["b"]) == 1  # neighbours


def test_layers_are_joined_and_missing_shares_count_as_zero():
    """Shares less their mean: a (0.5, 0 | 0.5), b (-0.5, 0 | 0.5), c (0, 0 | -1); a.b = 0 by the layers together."""
    usage = {
        "a": {"one": [1.0, 0.0], "two": [1.0]},
        "b": {"one": [0.0], "two": [1.0]},
        "c": {"one": [0.5, None], "two": [-0.5]},
    }
    names, cosines = likeness(usage)
    place = {name: names.index(name) for name in names}
    assert cosines[place["a"], place["b"]] == pytest.approx(0.0, abs=1e-12)
    assert np.allclose(np.diag(cosines), 1.0)


def test_groups_stand_together():
    rng = np.random.default_rng(0)
    centres = np.eye(3) * 0.5
    usage = {f"{i % 3}-{i}": {"b": list(centres[i % 3] + 0.01 * rng.random(3))} for i in range(9)}
    names, cosines = likeness(usage)
    assert [name[0] for name in names[::3]] == [name[0] for name in names[2::3]]  # three in a row of each
    assert cosines[0, 1] > 0.9 and cosines[0, -1] < 0.1


def test_the_figure_names_the_nearest_client_and_needs_three(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run", "FedMoE")])
    drawing = likeness_map(run)
    assert "Most like " in drawing.panels[0].alt
    run.structure["usage"] = dict(list(run.structure["usage"].items())[:2])
    with pytest.raises(NothingToDraw, match="has not recorded how its clients use"):
        likeness_map(run)
