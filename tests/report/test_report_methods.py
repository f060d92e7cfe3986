"""Methods over seeds: means, deviations and the paired test, by hand; CSV and LaTeX; what counts as one method."""

import csv
import io
import json
import math
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import images, make_run
from rich.console import Console

from consilium.report import print_table, read_runs, render, write_report
from consilium.report.export import latex, to_csv, to_latex
from consilium.report.methods import Spread, _holm, _t_test, format_p, has_seeds, methods
from consilium.report.results import client_scores

SMALL = {"clients": 6, "blocks": 1, "experts": 4, "rounds": 6}


def edit(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two methods, three seeds, data that differs by seed."""
    root = tmp_path_factory.mktemp("seeds")
    return [
        make_run(root / f"{name}-seed{seed}", name, seed=seed, partition_seed=seed, **SMALL)
        for name in ("FedMoE", "RandomMoE")
        for seed in range(3)
    ]


def test_the_paired_test_by_hand():
    """Gaps 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3) = 3.464 with 2 degrees of freedom, p = 0.0742; the
    interval is 2 +- 4.303 / sqrt 3. With 2 degrees p = 1 - t / sqrt(t^2 + 2) exactly."""
    low, high, p = _t_test([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert p == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)


@pytest.mark.parametrize("gaps", [[], [0.3], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_nothing_is_tested_with_one_pair_or_no_spread(gaps):
    assert _t_test(gaps) == (None, None, None)


def test_holm_by_hand():
    """0.01 x 3, 0.02 x 2, 0.5 x 1; a later one is never below an earlier one."""
    assert _holm([0.5, 0.01, 0.02]) == [0.5, 0.03, 0.04]
    assert _holm([0.02, 0.011, 0.5]) == [0.04, 0.033, 0.5]
    assert _holm([0.03, 0.02]) == [0.04, 0.04] and _holm([0.9, 0.8]) == [1.0, 1.0] and _holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_never_lowers(ps):
    adjusted = _holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=ps.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_means_and_pairs_are_those_of_the_runs(seeds):
    runs = read_runs(seeds)
    moe, random = methods(runs)
    means = [json.loads((path / "summary.json").read_text())["mean"] for path in seeds]
    assert (moe.label, moe.runs, moe.against) == ("FedMoE", 3, None)
    assert moe.mean == Spread(pytest.approx(statistics.fmean(means[:3])), pytest.approx(statistics.stdev(means[:3])), 3)
    assert moe.shared is None  # everybody scores everybody
    gaps = [b - a for a, b in zip(means[:3], means[3:], strict=True)]
    against = random.against
    assert (against.reference, against.pairs, against.of) == ("FedMoE", 3, 18)
    assert against.difference == pytest.approx(statistics.fmean(gaps))
    assert against.p == pytest.approx(_t_test(gaps)[2])
    scores = [client_scores(run) for run in runs]
    assert against.ahead == sum(scores[3 + s][c] > scores[s][c] for s in range(3) for c in scores[s])
    assert against.ahead + against.behind <= 18


def test_seeds_are_paired_only_on_the_same_data(seeds, tmp_path):
    other = make_run(tmp_path / "RandomMoE-seed1", "RandomMoE", seed=1, partition_seed=7, **SMALL)
    _, random = methods(read_runs([*seeds[:4], other, seeds[5]]))
    assert (random.runs, random.against.pairs) == (3, 2)
    _, none = methods(read_runs([*seeds[:3], other]))
    assert none.against is None


def test_clients_that_not_all_score_count_for_nobody(tmp_path):
    """FedAvg cannot run on every device; both means of a pair are then over the clients that it scored."""
    paths = [
        make_run(tmp_path / f"{n}-{s}", n, seed=s, partition_seed=s, **{**SMALL, "clients": 12})
        for n in ("FedMoE", "FedAvg")
        for s in (0, 1)
    ]
    runs = read_runs(paths)
    moe, avg = methods(runs)
    assert avg.served.mean < avg.clients and avg.against.of == 2 * avg.served.mean
    assert avg.shared.mean == pytest.approx(avg.mean.mean) and moe.shared.mean != pytest.approx(moe.mean.mean)
    assert avg.against.difference == pytest.approx(avg.shared.mean - moe.shared.mean)


def test_unfinished_runs_are_left_out(seeds, tmp_path):
    half = make_run(tmp_path / "Standalone-seed0", "Standalone", seed=0, finished=False, **SMALL)
    assert [m.label for m in methods(read_runs([*seeds, half]))] == ["FedMoE", "RandomMoE"]
    assert methods(read_runs([half])) == []


def test_settings_make_methods(tmp_path):
    """Two settings of one algorithm are two methods, named by their directories; seeds are not settings."""
    paths = [make_run(tmp_path / f"{n}-seed{s}", seed=s, **SMALL) for n in ("FedMoE", "FedMoE-wide") for s in (0, 1)]
    for path in paths[2:]:
        edit(path, "config.json", lambda config: config["experiment"]["algorithm"].update(k=9))
    runs = read_runs(paths)
    assert [run.method for run in runs] == ["FedMoE", "FedMoE", "FedMoE-wide", "FedMoE-wide"]
    assert [run.label for run in runs] == [f"{m} seed {s}" for m in ("FedMoE", "FedMoE-wide") for s in (0, 1)]
    assert has_seeds(runs) and not has_seeds(runs[1:3])
    assert [m.runs for m in methods(runs)] == [2, 2]


def test_the_page_shows_bands_and_both_tables(seeds):
    page = render(read_runs(seeds))
    assert "Over seeds" in page and "Against FedMoE, pair by pair" in page and "Each of the 6 runs" in page
    assert "p (paired t)" in page and "With 3 pairs it reaches 0.05 only for a difference of at least 2.5 times" in page
    assert "± standard deviation over the method’s runs" in page
    assert "did not use the same data" not in page  # seeds deal anew, within a seed the data is the same
    for name in ("scores_over_seconds", "score_for_cost"):
        assert f'data-name="{name}" data-drawn="yes"' in page
    rounds = page[page.index('data-name="scores_over_rounds"') : page.index('data-name="scores_over_bytes"')]
    assert (
        "".join(images(rounds)).count("fill-opacity: 0.16") == 2 * 4
    )  # a band a method and panel: three tasks and their mean
    assert page.count("Shown for the first run of each method: FedMoE seed 0, RandomMoE seed 0.") > 3


def test_data_that_differs_within_a_seed_is_warned_about(seeds, tmp_path):
    other = make_run(tmp_path / "Standalone-seed1", "Standalone", seed=1, partition_seed=9, **SMALL)
    assert "did not use the same data" in render(read_runs([*seeds, other]))


def test_the_terminal_has_the_test_in_eighty_columns(seeds, capsys):
    print_table(seeds, Console(width=80, force_terminal=False))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "minus FedMoE" in said and "two-sided paired t-test on the means of each seed" in said


def test_tables_lie_beside_the_page(seeds, tmp_path):
    page = write_report(seeds, tmp_path / "deep" / "report.html")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.csv", "report.html", "report.tex"]
    write_report(seeds[:1], tmp_path / "one" / "report.html")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["report.html"]


def test_csv_has_the_numbers_in_full(seeds):
    found = methods(read_runs(seeds))
    moe, random = csv.DictReader(io.StringIO(to_csv(found)))
    assert (moe["method"], moe["seeds"], moe["p"], moe["reference"]) == ("FedMoE", "3", "", "")
    assert float(moe["mean"]) == found[0].mean.mean and float(moe["topic_sd"]) == found[0].tasks["topic"].sd
    assert random["test"] == "paired t-test over seeds" and int(random["pairs"]) == 3
    assert float(random["p"]) == found[1].against.p and float(random["bytes"]) == found[1].bytes_total.mean


def test_latex_has_the_best_in_bold(seeds):
    found = methods(read_runs(seeds))
    made = to_latex(found)
    body = made[made.index(r"\midrule") : made.index(r"\bottomrule")]
    rows = [line.split(" & ") for line in body.splitlines()[1:] if line]
    heads = next(line for line in made.splitlines() if line.startswith("Method")).split(" & ")
    assert all(len(row) == len(heads) for row in rows) and len(rows) == 2
    column = heads.index("Mean")
    assert re.fullmatch(r"\\textbf\{[\d.]+\} \{\\scriptsize \$\\pm\$ [\d.]+\}", rows[0][column])
    assert "textbf" not in rows[1][column] and rows[1][heads.index("Minus FedMoE")].startswith("$-$")
    assert made.startswith("% \\usepackage{booktabs}\n") and "paired t-test over 3 seeds" in made
    assert made.count("{") == made.count("}")


def test_latex_characters():
    assert latex("50 % of_a {b} & #1 – ±2 < $x^~\\") == (
        r"50 \% of\_a \{b\} \& \#1 -- $\pm$2 $<$ \$x\textasciicircum{}\textasciitilde{}\textbackslash{}"
    )
    assert [format_p(p) for p in (None, 0.0004, 0.0312, 0.25, 1.0)] == ["–", "< 0.001", "0.031", "0.25", "1.00"]
