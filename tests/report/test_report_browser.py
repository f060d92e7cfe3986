"""The page in a real browser, where one is installed: every figure shows, nothing hangs out at either width."""

import json
import re
import shutil
import subprocess

import pytest
from report_runs import make_run

from consilium.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

PROBE = """<script>addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const seen = e => { const b = e.getBoundingClientRect(); return b.width > 2 && b.height > 2 };
  const long = e => { const b = e.getBoundingClientRect(); return Math.max(b.width, b.height) > 20 };
  const shown = i => getComputedStyle(i).display !== "none";
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
      images: images.length, images_shown: images.filter(shown).length, cut: ends,
      text: figure.innerText.trim().length, smallest: Math.min(99, ...sizes)});
  }
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({figures: result, inner: innerWidth, wide: root.scrollWidth}), "*");
})</script>"""


# A headless window cannot be narrower than 500 pixels, a frame can.
FRAME = """<!doctype html><body><iframe src="{page}" style="width:{width}px;height:2000px;border:0"></iframe>
<script>addEventListener("message", event => {{ document.body.dataset.probe = event.data; }})</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    runs = [make_run(folder / name.lower(), name) for name in ("FedMoE", "FedAvg", "RandomMoE")]
    big = make_run(folder / "big", clients=30, blocks=12, experts=32)
    seeds = [
        make_run(folder / f"{name}-seed{s}", name, clients=6, seed=s, partition_seed=s)
        for name in ("FedMoE", "Standalone")
        for s in (0, 1)
    ]
    made = {"one": runs[:1], "three": runs, "big": [big], "seeds": seeds}
    for name, paths in made.items():
        page = write_report(paths, folder / f"{name}.html").read_text()
        # The page forbids scripts; the copy that is probed carries one, and so not the ban.
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        (folder / f"{name}-probe.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    return folder


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["one", "three", "big", "seeds"])
def test_page_at_a_width(pages, tmp_path, name, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=(pages / f"{name}-probe.html").as_uri(), width=width))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--hide-scrollbars",
         "--window-size=1400,2000", "--virtual-time-budget=10000", "--dump-dom",
         frame.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    probe = json.loads(found.group(1).replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    assert probe["inner"] == width
    assert probe["wide"] <= width, "the page is wider than the window"
    assert len(probe["figures"]) >= 9
    for figure in probe["figures"]:
        where = f"{figure['name']} at {width}"
        if figure["drawn"] == "no":
            assert figure["panels"] == 0 and figure["text"] > 20, where
            continue
        assert figure["panels"] > 0 and figure["visible"], where
        assert figure["images_shown"] * 2 == figure["images"], where  # one of each light and dark pair
        assert figure["cut"] == [], where
        assert figure["smallest"] >= 8.5, where
