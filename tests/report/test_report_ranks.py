"""The figure of the rank of merged adapters."""

import dataclasses

import pytest
import report_runs

from consilium.report.curves import adapter_ranks
from consilium.report.read import read_run
from consilium.report.style import NothingToDraw


def test_ranks_are_drawn_round_by_round(tmp_path):
    """Two panels: the effective rank as it is, the energy in percent; rounds without numbers are left out."""
    run = read_run(report_runs.make_run(tmp_path / "run"))
    with pytest.raises(NothingToDraw, match="No run merges adapters"):
        adapter_ranks([run])
    told = [{"effective_rank": 4.0 - i, "energy_beyond": 0.5 / (i + 1)} for i in range(2)]
    rounds = [{**line, "server": server} for line, server in zip(run.rounds, [*told, {}], strict=False)]
    drawing = adapter_ranks([dataclasses.replace(run, rounds=rounds)])
    lines = [panel.figure.axes[0].get_lines()[0].get_xydata() for panel in drawing.panels]
    assert [y for _, y in lines[0]] == [4.0, 3.0] and [y for _, y in lines[1]] == [50.0, 25.0]
    assert "At the end" in drawing.panels[0].alt
