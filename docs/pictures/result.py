"""The picture in README.md: benchmarks/results/fedmoe.json drawn by the report's own figure.

python docs/pictures/result.py
"""

import json
import statistics
from pathlib import Path

from matplotlib.lines import Line2D

from consilium.report.curves import scores_over_rounds
from consilium.report.read import ClientRecord, RunRecord
from consilium.report.style import drawing_style, series

HERE = Path(__file__).parent
METHODS = ("FedMoE", "randomMoE", "FedAvg", "FedProx", "SCAFFOLD", "Standalone")
SEEDS = range(3)
TASKS = ("topic", "kind", "verb")


def record(method: str, seed: int, cell: dict) -> RunRecord:
    """What was kept of a run, as if read from its directory."""
    return RunRecord(
        path=HERE, label=f"{method} {seed}", method=method, algorithm=method, status="finished",
        config={"seed": seed}, versions={}, git="", clients={t: ClientRecord(t, t) for t in TASKS}, skipped={},
        fingerprint="", events=(), structure=None, summary=None, notes=(),
        rounds=tuple({"round": number, "scores": {"mean": mean}} for number, _, mean in cell["tested"]),
    )  # fmt: skip


def main() -> None:
    cells = json.loads((HERE.parents[1] / "benchmarks/results/fedmoe.json").read_text())
    runs = [record(method, seed, cells[f"std-T-{method}-{seed}"]) for seed in SEEDS for method in METHODS]
    (panel,) = scores_over_rounds(runs).panels
    ends = {m: statistics.fmean(cells[f"std-T-{m}-{seed}"]["mean"] for seed in SEEDS) for m in METHODS}
    with drawing_style():
        figure, axes = panel.figure, panel.figure.axes[0]
        figure.set_size_inches(7.2, 5.2)
        axes.set_position((0.07, 0.27, 0.9, 0.65))
        axes.set_title("mean test accuracy of the three tasks, %", loc="left", fontsize=11)
        keys = [Line2D([], [], lw=2.2, label=f"{m}  {ends[m]:.1f}", **series(i)) for i, m in enumerate(METHODS)]
        axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
        figure.patch.set(facecolor="white", alpha=1)
        figure.savefig(HERE / "result.png", dpi=144, metadata={"Software": None})


if __name__ == "__main__":
    main()
