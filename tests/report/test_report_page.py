"""The HTML page and the terminal table: what stands in them, how large they are, that nothing slips through."""

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from PIL import Image
from report_runs import images, make_run
from rich.console import Console

from consilium.errors import ConfigError
from consilium.report import print_table, read_runs, render, write_report
from consilium.report.gains import gain_over_standalone
from consilium.report.image import fit
from consilium.report.maps import block_names
from consilium.report.parts import one_figure
from consilium.report.plots import FIGURES
from consilium.report.style import DARK, LIGHT, round_ticks, run_styles, shorten, shorten_all

THREE = ("FedMoE", "FedAvg", "RandomMoE")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / f"{name.lower()}-docstrings", name) for name in THREE]


@pytest.fixture(scope="module")
def one_page(three):
    return render(read_runs(three[:1]))


@pytest.fixture(scope="module")
def three_page(three):
    return render(read_runs(three))


def figures(page):
    """name -> [(run, drawn), ...]"""
    found = {}
    for tag in re.findall(r'<figure class="figure"[^>]*>', page):
        fields = dict(re.findall(r'data-(\w+)="([^"]*)"', tag))
        found.setdefault(fields["name"], []).append((fields.get("run"), fields["drawn"]))
    return found


def of_one_run():
    """What a run of a mixture of experts draws by itself: all but what compares, and what is of small models."""
    experts = ("usage_heat_map", "likeness_map", "training_heat_map", "expert_map")
    return {kind.name: [(None, "yes")] for kind in FIGURES if not kind.only_if_drawn or kind.name in experts}


def test_one_run_draws_every_figure(one_page):
    assert figures(one_page) == of_one_run()
    assert "Score for the cost" not in one_page  # a single run has nothing to be weighed against


def test_three_runs_draw_every_figure_or_say_why(three_page):
    found = figures(three_page)
    for kind in FIGURES:
        if kind.name in ("gate_weights", "gain_over_standalone", "adapter_ranks"):  # small models, Standalone, adapters
            assert kind.name not in found
        elif not kind.each_run:
            assert found[kind.name] == [(None, "yes")]
        elif kind.name in ("usage_heat_map", "likeness_map", "training_heat_map", "expert_map"):
            assert found[kind.name] == [("FedMoE", "yes"), ("RandomMoE", "yes"), ("FedAvg", "no")]
        else:
            assert [drawn for _, drawn in found[kind.name]] == ["yes"] * 3
    assert "FedAvg does not choose experts per client" in three_page


def test_page_is_self_contained(one_page, three_page):
    for page in (one_page, three_page):
        assert "<script" not in page and "@import" not in page
        for target in re.findall(r'(?:src|srcset|href)="([^"]*)"', page):
            assert target.startswith(("#", "data:")), target
        for target in re.findall(r"url\(([^)]*)\)", page):
            assert target.startswith("#"), target


def test_every_image_is_well_formed_and_drawn_for_both_themes(three_page):
    assert set(LIGHT) == set(DARK)
    light, dark = images(three_page), images(three_page, "dark")
    assert len(light) == len(dark) > 40
    assert three_page.count("<picture>") == len(light)
    for found, other in ((light, DARK), (dark, LIGHT)):
        for svg in found:
            ET.fromstring(svg)
        assert not [code for code in other.values() if code in "".join(found)]


def test_ids_are_unique_and_resolve(three_page):
    ids = re.findall(r'\sid="([^"]+)"', three_page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", three_page) + re.findall(r'href="#([^"]+)"', three_page)
    assert set(used) <= set(ids)


def test_tags_are_balanced(three_page):
    class Checker(html.parser.HTMLParser):
        void = frozenset({"meta", "link", "br", "img", "source"})

        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(three_page)
    assert checker.open == []


def test_same_runs_give_the_same_page(three, one_page):
    assert render(read_runs(three[:1])) == one_page


def test_the_callers_matplotlib_settings_survive(three):
    before = dict(matplotlib.rcParams)
    render(read_runs(three[:1]))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("runs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_size_at_thirty_clients_twelve_layers_thirtytwo_experts(tmp_path, runs):
    paths = [make_run(tmp_path / str(i), clients=30, blocks=12, experts=32, rounds=40, seed=i) for i in range(runs)]
    out = write_report(paths, tmp_path / "deep" / "report.html")
    assert out.stat().st_size < 3_000_000
    assert not list(out.parent.glob("*.part"))


def test_the_largest_pictures_become_png_where_a_page_would_be_too_large(tmp_path):
    """At the limit nothing changes; a byte below it the first picture shrinks; with no room at all every one does."""
    (run,) = read_runs([make_run(tmp_path / "a", clients=30, blocks=2, experts=32)])
    kind = next(kind for kind in FIGURES if kind.name == "usage_heat_map")
    pictures = one_figure(kind, run).panels
    total = sum(picture.nbytes for picture in pictures)
    fit(pictures, total)
    assert all(uri.startswith("data:image/svg+xml") for picture in pictures for uri in picture.uris.values())
    fit(pictures, total - 1)
    assert {picture.uris["light"][:15] for picture in pictures} == {"data:image/svg+", "data:image/png;"}
    fit(pictures, 0)
    assert sum(picture.nbytes for picture in pictures) < 0.7 * total
    for picture in pictures:
        for uri in picture.uris.values():
            image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
            assert image.width == picture.size[0]


def test_everything_from_data_is_escaped(tmp_path):
    bad = '<script>alert("1")</script>&\'"$x$'
    path = make_run(tmp_path / "<b>evil&run<b>", tasks={bad: "accuracy", "kind": "accuracy"}, clients=4, blocks=2)
    for name in ("config.json", "events.jsonl", "partition.json", "structure.json"):
        text = (path / name).read_text()
        text = text.replace("encoder.block.1.layer.1.mlp", json.dumps(f"encoder {bad}")[1:-1])
        (path / name).write_text(text)
    config = json.loads((path / "config.json").read_text())
    config["experiment"]["algorithm"] |= {"type": f"Fed{bad}", bad: [bad]}
    config |= {"status": bad, "git": bad, "versions": {bad: bad}}
    (path / "config.json").write_text(json.dumps(config))
    partition = json.loads((path / "partition.json").read_text())
    partition["skipped"] = {bad: bad}
    (path / "partition.json").write_text(json.dumps(partition))
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "event": bad, "client": bad, bad: {bad: [bad]}}) + "\n")
    for paths in ([path], [path, make_run(tmp_path / "b", clients=4, blocks=2)]):
        page = render(read_runs(paths))
        assert "<script" not in page and "<b>evil" not in page and "alert(&#34;" in page
        assert len(images(page)) > 10
        for svg in images(page) + images(page, "dark"):
            ET.fromstring(svg)


def test_unfinished_run_says_so(tmp_path):
    page = render(read_runs([make_run(tmp_path / "a", finished=False)]))
    assert "is not finished (status: interrupted, 10 of 20 rounds on record)" in page
    assert figures(page) == of_one_run()


def test_run_without_a_single_round_says_why_nothing_is_drawn(tmp_path):
    path = make_run(tmp_path / "a", finished=False)
    for name in ("structure.json", "metrics.jsonl", "events.jsonl"):
        (path / name).unlink()
    page = render(read_runs([path]))
    drawn = {name: entries[0][1] for name, entries in figures(page).items()}
    assert drawn.pop("memory") == "yes"  # the device limits are known before the first round
    assert set(drawn.values()) == {"no"}
    assert page.count('<p class="none">') == len(drawn)
    assert "metrics.jsonl is missing" in page


def test_fields_that_are_null_or_missing_do_not_stop_the_report(tmp_path):
    path = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    bare = [
        {"round": 0},
        {"round": 1, "clients": {"topic-00": {}}, "test": {"topic-00": None}, "scores": {"mean": None}},
    ]
    nan = lines[2] | {"scores": {"topic": float("nan")}, "seconds": None, "bytes_up": None}
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*bare, nan, *lines[3:]]))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({k: None for k in summary}))
    page = render(read_runs([path]))
    assert all(entries[0][1] == "yes" for entries in figures(page).values())
    print_table([path], Console(width=80, record=True))


def test_a_huge_device_does_not_flatten_the_others(tmp_path):
    path = make_run(tmp_path / "a", clients=3, blocks=1)
    partition = json.loads((path / "partition.json").read_text())
    partition["clients"]["verb-00"]["memory_bytes"] = 80_000_000_000
    (path / "partition.json").write_text(json.dumps(partition))
    page = render(read_runs([path]))
    images = b"".join(map(base64.b64decode, re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)))
    assert "limit beyond the scale" in page and b"of 80 GB" in images


def test_incomparable_runs_are_warned_about(tmp_path, three_page):
    assert "did not score the same clients" in three_page
    small = {"clients": 3, "blocks": 1}
    paths = [
        make_run(tmp_path / "a", **small),
        make_run(tmp_path / "b", "RandomMoE", partition_seed=1, rounds=8, **small),
    ]
    page = render(read_runs(paths))
    assert "did not use the same data" in page
    assert "different numbers of rounds: FedMoE 20, RandomMoE 8" in page


def test_clients_left_out_are_named_with_reasons(three_page):
    assert "cannot hold the model: needs 93.1 MB, has 60.0 MB" in three_page
    assert "empty client: no function of its packages has a documentation line" in three_page


def test_settings_that_differ_come_first(three_page):
    table = three_page[three_page.index("Configuration, ") :]
    heads = re.findall(r'<tr class="(differs|same)"><th scope="row">([^<]+)<', table)
    assert heads[0] == ("differs", "name") and ("differs", "algorithm.type") in heads
    assert [kind for kind, _ in heads] == sorted(kind for kind, _ in heads)


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([make_run(tmp_path / "a", clients=3, blocks=1)], tmp_path / "file" / "report.html")


def test_many_runs_stay_apart(tmp_path):
    paths = [make_run(tmp_path / str(i), clients=3, rounds=4, blocks=2, experts=4, seed=i) for i in range(10)]
    page = render(read_runs(paths))
    assert "FedMoE seed 9" in page and "stroke-dasharray" in page and "Over seeds" in page


@pytest.mark.parametrize("count", [1, 3])
def test_table_fits_eighty_columns(three, count, capsys):
    console = Console(width=80, force_terminal=False)
    print_table(three[:count], console)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for name in THREE[:count]:
        assert name in said  # unbroken
    assert ("*" in said) == (count > 1)
    assert "…" not in said and "12/12" in said


def test_table_with_many_long_tasks_fits_eighty_columns(tmp_path, capsys):
    tasks = {f"hospital-of-{town}-with-a-long-name": "accuracy" for town in "abcdefg"}
    paths = [make_run(tmp_path / name, name, clients=7, blocks=1, tasks=tasks) for name in THREE]
    print_table(paths, Console(width=80, force_terminal=False))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert all(task in said for task in tasks)


def test_names():
    blocks = ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp", "model.layers.3.mlp", "odd"]
    assert list(block_names(blocks).values()) == ["encoder layer 1", "decoder layer 1", "layer 3", "odd"]
    twins = ["a.layers.3.x", "b.layers.3.y"]
    assert list(block_names(twins).values()) == twins
    assert run_styles(["A", "A", "B", "B", "C"]) == [0, 8, 1, 9, 2]
    assert run_styles(["A", "B", "A"]) == [0, 1, 8] and run_styles("AAA") == [0, 1, 2]
    long = [f"hospital-of-{town}-in-the-north-0{i}" for town in "abc" for i in (1, 2)]
    assert len(set(shorten_all(long, 13))) == 6 and max(map(len, shorten_all(long, 13))) <= 13
    assert shorten_all(["a", "b"], 13) == ["a", "b"]
    assert shorten("hospital-of-the-north-07", 13) == "hospit…rth-07" and shorten("short", 13) == "short"


def test_every_clients_gain_over_training_alone(tmp_path):
    """Scores set by hand: the client's score less that of Standalone of the same seed and data, sorted; a run of
    another seed or other data has no partner, and without Standalone there is no figure."""

    def scored(name, algorithm, seed, scores):
        folder = make_run(tmp_path / name, algorithm, clients=3, blocks=1, rounds=2, seed=seed)
        summary = json.loads((folder / "summary.json").read_text())
        for client, value in zip(summary["clients"], scores, strict=True):
            summary["clients"][client]["test"] = value
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    alone = scored("alone", "Standalone", 0, (0.5, 0.5, 0.5))
    moe = scored("moe", "FedMoE", 0, (0.7, 0.4, 0.5))
    other = scored("other", "RandomMoE", 1, (0.9, 0.9, 0.9))
    drawing = gain_over_standalone(read_runs([alone, moe, other]))
    (panel,) = drawing.panels
    assert panel.title == "FedMoE · +3.3 points, 1 of 3 gain" and "from -10.0 to +20.0" in panel.alt
    widths = [bar.get_width() for bar in panel.figure.axes[0].patches]
    assert widths == pytest.approx([-10.0, 0.0, 20.0])
    assert [text.get_text() for text in panel.figure.axes[0].get_yticklabels()] == ["kind-00", "verb-00", "topic-00"]
    assert figures(render(read_runs([alone, moe])))["gain_over_standalone"] == [(None, "yes")]
    for runs in ([moe, other], [alone], [alone, other]):
        assert "gain_over_standalone" not in figures(render(read_runs(runs)))
    both = gain_over_standalone(
        read_runs([alone, moe, other, scored("alone1", "Standalone", 1, (0.8, 0.8, 0.8)),
                   scored("moe1", "FedMoE", 1, (0.9, 0.9, 0.9))])
    )  # fmt: skip
    assert [panel.title for panel in both.panels] == [
        "FedMoE · +6.7 points, 4 of 6 gain", "RandomMoE · +10.0 points, 3 of 3 gain",
    ]  # fmt: skip


def test_a_run_with_a_gate_draws_it(tmp_path):
    """Weights of the last round in which a client took part; a run beside it without one says so."""
    folder = make_run(tmp_path / "gated", "FedAvg", clients=6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for entry in line["clients"].values():
            entry["report"] = {"gate cat": 0.25, "gate dog": 0.75, "test before aggregation": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = make_run(tmp_path / "plain", "Standalone", clients=6)
    page = render(read_runs([folder, plain]))
    assert sorted(figures(page)["gate_weights"]) == [("FedAvg", "yes"), ("Standalone", "no")]
    assert "Standalone has no gate" in page and "25 to 75 %" in page
    assert figures(render(read_runs([folder])))["gate_weights"] == [(None, "yes")]


def test_rounds_are_whole_also_where_there_is_one():
    inside = [tick for tick in round_ticks(6, integer=True).tick_values(1.9, 2.1) if 1.9 <= tick <= 2.1]
    assert inside == [2.0]
    assert [tick for tick in round_ticks(6, integer=True).tick_values(0.5, 12.5) if 0 < tick < 13] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
