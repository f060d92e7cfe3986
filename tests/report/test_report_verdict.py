"""The two sentences under a comparison, by hand."""

import dataclasses

import pytest

from consilium.report import verdict as subject
from consilium.report.verdict import verdict


@dataclasses.dataclass
class Run:
    """What the verdict looks at of a run."""

    method: str
    seed: int
    scores: dict
    finished: bool = True


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(subject, "measured", lambda run, name: run.scores if name == "personal_bits_per_byte" else {})
    monkeypatch.setattr(subject, "client_scores", lambda run: run.scores)


def test_one_seed_is_over_clients():
    """Differences 0.1 and 0.3: mean 0.2, standard error 0.1, t(1) at 97.5 % 12.706."""
    runs = [Run("Ours", 0, {"a": 1.0, "b": 2.0}), Run("alone", 0, {"a": 1.1, "b": 2.3})]
    one, two = verdict(runs)
    assert one == (
        "Ours: its clients' own best models reach 1.500 bits per byte on average (lower is better); difference of the "
        "other: alone +0.200 ± 1.271."
    )
    assert "over the 2 clients of one seed" in two


def test_several_seeds_are_the_unit():
    """Per seed 0.2 and 0.4: mean 0.3, standard error 0.1."""
    runs = [Run(m, s, {"a": v}) for m, s, v in [("Ours", 0, 1.0), ("Ours", 1, 1.0), ("x", 0, 1.2), ("x", 1, 1.4)]]
    one, two = verdict(runs)
    assert "x +0.300 ± 1.271" in one and "95 % interval over 2 seeds" in two


def test_scores_are_in_points_and_higher_is_better(monkeypatch):
    monkeypatch.setattr(subject, "measured", lambda run, name: {})
    runs = [Run("Ours", 0, {"a": 0.5}), Run("x", 0, {"a": 0.45})]
    assert (
        verdict(runs)[0]
        == "Ours: it reaches 50.0 points on average (higher is better); difference of the other: x -5.0."
    )


def test_nothing_to_compare():
    assert verdict([Run("Ours", 0, {"a": 0.5})]) == []
    assert verdict([Run("Ours", 0, {"a": 0.5}), Run("x", 0, {"a": 0.4}, finished=False)]) == []
    assert verdict([Run("Ours", 0, {"a": 0.5}), Run("x", 1, {"a": 0.4})]) == []
