"""Pages and pictures in a real browser, where one is installed: every figure shows, nothing is empty, lies on top of
another or hangs out, on a desk and on a phone."""

import base64
import html
import json
import re

import browser
import matplotlib
import pictures
import pytest
import runs
import tiny
from browser import FRAME, findings
from report_runs import make_run

from consilium.cli.views.display import save_picture
from consilium.cli.views.images import preview_images
from consilium.cli.views.preview import preview
from consilium.report import write_report

pytestmark = pytest.mark.skipif(browser.BROWSER is None, reason=browser.WITHOUT)

PROBE = """<script>addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const seen = e => { const b = e.getBoundingClientRect(); return b.width > 2 && b.height > 2 };
  const long = e => { const b = e.getBoundingClientRect(); return Math.max(b.width, b.height) > 20 };
  const result = [];
  for (const figure of document.querySelectorAll(".figure")) {
    const panels = [...figure.querySelectorAll(".panel > svg")];
    const images = panels.flatMap(p => [...p.querySelectorAll("image")]);
    const loads = await Promise.all(images.map(i => new Promise(done => {
      const copy = new Image();
      copy.onload = () => done(copy.naturalWidth > 0); copy.onerror = () => done(false);
      copy.src = i.getAttribute("xlink:href"); })));
    const ends = panels.flatMap(p => { const box = p.getBoundingClientRect();
      return [...p.querySelectorAll("text")].filter(t => { const b = t.getBoundingClientRect();
        return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 3 || b.bottom > box.bottom + 3; })
        .map(t => t.textContent); });
    const sizes = panels.flatMap(p => [...p.querySelectorAll("text")].map(t =>
      parseFloat(getComputedStyle(t).fontSize) * p.getBoundingClientRect().width / p.viewBox.baseVal.width));
    result.push({name: figure.dataset.name, drawn: figure.dataset.drawn, panels: panels.length,
      visible: panels.every(p => seen(p) && [...p.querySelectorAll("path, image")].some(long)) && loads.every(Boolean),
      cut: ends,
      text: figure.innerText.trim().length, smallest: Math.min(99, ...sizes)});
  }
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({figures: result, inner: innerWidth, wide: root.scrollWidth}), "*");
})</script>"""


def inline(page):
    """The page with its SVG images as elements, whose texts can be measured."""

    def element(match):
        svg = base64.b64decode(match[1]).decode()
        return re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg[svg.index("<svg") :])

    style = "<style>.panel svg{display:block;width:100%;max-width:470px;height:auto}</style></head>"
    images = r'<picture>.*?<img src="data:image/svg\+xml;base64,([^"]*)".*?</picture>'
    return re.sub(images, element, page.replace("</head>", style), flags=re.S)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    three = [make_run(folder / name.lower(), name) for name in ("FedMoE", "FedAvg", "RandomMoE")]
    big = make_run(folder / "big", clients=30, blocks=12, experts=32)
    seeds = [
        make_run(folder / f"{name}-seed{s}", name, clients=6, seed=s, partition_seed=s)
        for name in ("FedMoE", "Standalone")
        for s in (0, 1)
    ]
    half = make_run(folder / "half", finished=False)
    made = {"one": three[:1], "half": [half], "three": three, "big": [big], "seeds": seeds}
    for name, paths in made.items():
        page = write_report(paths, folder / f"{name}.html").read_text()
        # The page forbids scripts; the copy that is probed carries one, and so not the ban.
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        (folder / f"{name}-inline.html").write_text(inline(page))
        (folder / f"{name}-probe.html").write_text(inline(page).replace("</body>", f"{PROBE}</body>"))
    return folder


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["one", "three", "big", "seeds"])
def test_page_at_a_width(pages, tmp_path, name, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=(pages / f"{name}-probe.html").as_uri(), width=width, height=2000))
    found = re.search(r'data-probe="([^"]*)"', browser.shot(frame, 1400, 2000, "--dump-dom"))
    assert found, "the probe said nothing"
    probe = json.loads(html.unescape(found[1]))
    assert probe["inner"] == width
    assert probe["wide"] <= width, "the page is wider than the window"
    assert len(probe["figures"]) >= 9
    for figure in probe["figures"]:
        where = f"{figure['name']} at {width}"
        if figure["drawn"] == "no":
            assert figure["panels"] == 0 and figure["text"] > 20, where
            continue
        assert figure["panels"] > 0 and figure["visible"], where
        assert figure["cut"] == [], where
        assert figure["smallest"] >= 8.5, where


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["one", "half", "big", "seeds"])
def test_a_report_has_no_faults(pages, name, width):
    assert findings(pages / f"{name}.html", width) == {}
    assert findings(pages / f"{name}-inline.html", width) == {}


def test_every_fault_is_found(tmp_path):
    """Of each kind one, on purpose; what is beside it is left alone."""
    page = """<!doctype html><html><body style="margin:0;font:16px sans-serif">{}
      <figure>a caption<svg width="90" height="40"><path d="M0 0L90 40" stroke="red"/></svg></figure>
      <div style="overflow-x:auto"><div style="width:3000px">wide, and can be scrolled to</div></div>
      <svg width="120" height="120"><text x="20" y="100" transform="rotate(-45 20 100)">turned text</text>
      <text x="45" y="115" transform="rotate(-45 45 115)">beside it</text></svg></body></html>"""
    faults = """<div style="position:relative">below<span style="position:absolute;left:4px;top:3px">above</span></div>
      <svg width="120" height="120"><text x="20" y="100" transform="rotate(-45 20 100)">turned</text>
      <text x="24" y="102" transform="rotate(-45 24 102)">upon it</text></svg>
      <div style="width:1500px">too wide</div><div class="card"></div><img src="nowhere.png" width="30" height="30">
      <svg width="90" height="40"><path d="M0 0L90 0"/></svg>"""
    bad, good = tmp_path / "bad.html", tmp_path / "good.html"
    bad.write_text(page.format(faults))
    good.write_text(page.format(""))
    assert findings(good, 1280) == {} and sorted(path.name for path in tmp_path.iterdir()) == ["bad.html", "good.html"]
    found = findings(bad, 1280)
    assert found["overlap"] == ["below | above", "upon it | turned"]
    assert found["wide"] == ["div to 1500", "the page: 1500"]
    assert found["empty"] == ["div.card", "svg"] and found["broken"] == ["img nowhere.png"]


@pytest.mark.parametrize(
    ("what", "broken", "fault"),
    [
        (r"<picture>.*?</picture>", lambda _: '<svg width="300" height="200"></svg>', "empty"),
        (r'src="data:image/svg[^"]*"', lambda _: 'src="data:image/svg+xml,nothing"', "broken"),
        (r"</style>", lambda end: ".panel{width:1400px}" + end, "wide"),
        (r"</style>", lambda end: "figcaption{margin-bottom:-25px}" + end, "overlap"),
        (r"</style>", lambda end: ".card *{display:none!important}" + end, "empty"),
    ],
)
def test_a_report_that_is_broken_on_purpose(pages, tmp_path, what, broken, fault):
    text = (pages / "one.html").read_text()
    panels = text.index('class="panel')
    head, tail = (text[:panels], text[panels:]) if "svg" in what or "picture" in what else ("", text)
    page = tmp_path / "page.html"
    page.write_text(head + re.sub(what, lambda found: broken(found[0]), tail, count=1, flags=re.S))
    assert fault in findings(page, 400)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _texts(folder):
    return runs.table(folder), {"text": "text", "label": "label", "client": "site"}


def _many_texts(folder):
    """40 hospitals with long names, 30 labels."""
    rows = [f"note {i},a rather long label {i % 30},hospital number {i % 40} of the region" for i in range(3600)]
    (folder / "many.csv").write_text("\n".join(["text,label,client", *rows]) + "\n")
    return folder / "many.csv", {}


def _images(folder):
    for seed, site in enumerate(("north", "south")):
        pictures.folder(folder / "pets" / site, 24, seed=seed)
    return folder / "pets", {}


@pytest.mark.parametrize("made", [_texts, _many_texts, _images])
def test_a_picture_of_a_split_has_no_faults(tmp_path, made):
    """As `consilium data` draws it; text stays text here, so that it can be measured."""
    path, given = made(tmp_path)
    if path.is_dir():
        found = preview_images(path, given, {}, 0, 0)
    else:
        found = preview(path, given, tiny.source().tokenizer(), {}, 0)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = save_picture(found, tmp_path / "split.svg").read_text()
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 style="max-width:100%;height:auto"', drawn[drawn.index("<svg") :])
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><html><body style="margin:0"><figure style="margin:0">{svg}</figure></body></html>'
    )
    assert findings(page, 1280) == {}
