"""Any HTML page in a headless Chromium, at any width: what is empty, what overlaps, what is too wide.

`findings` measures boxes in the page itself, by a script put into a copy of it, and pixels on a screenshot:

    wide      the page, or an element that no box scrolls or clips, ends beyond the window
    overlap   two pieces of text lie on each other; turned text is measured as it is turned
    empty     a figure, picture, card or panel has no size, shows nothing, or is of one colour on the screenshot
    broken    a picture that does not load
"""

import html
import io
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT = "no Chromium or Chrome is installed"

# A headless window cannot be narrower than 500 pixels, a frame can.
FRAME = """<!doctype html><style>body{{margin:0}}iframe{{border:0;display:block}}</style>
<iframe src="{page}" style="width:{width}px;height:{height}px"></iframe>
<script>addEventListener("message", event => {{ document.body.dataset.probe = event.data; }})</script>"""

OPEN = """<script>addEventListener("load", () =>
  document.querySelectorAll("details").forEach(d => d.open = true));</script>"""

PROBE = """<script>addEventListener("load", async () => {
  const round = b => [b.left, b.top, b.width, b.height].map(n => Math.round(n));
  const name = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") +
    (e.getAttribute("class") ? "." + e.getAttribute("class").trim().replace(/ +/g, ".") : "");
  const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  // What the boxes around an element leave of it to be seen; an element that scrolls keeps what is inside its window.
  const clip = e => {
    let [left, top, right, bottom] = [-1e9, -1e9, 1e9, 1e9];
    for (let p = e; p && p !== document.body && p !== document.documentElement; p = p.parentElement) {
      const style = getComputedStyle(p), b = p.getBoundingClientRect();
      if (style.overflowX !== "visible" && !(p instanceof SVGElement && p.ownerSVGElement))
        [left, right] = [Math.max(left, b.left), Math.min(right, b.right)];
      if (style.overflowY !== "visible" && !(p instanceof SVGElement && p.ownerSVGElement))
        [top, bottom] = [Math.max(top, b.top), Math.min(bottom, b.bottom)];
      if (style.position === "fixed") break;
    }
    return {left, top, right, bottom};
  };
  const fixed = e => e && (getComputedStyle(e).position === "fixed" || fixed(e.parentElement));
  const texts = [], wide = [], empty = [], broken = [], boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || !shown(e) || e.closest("script, style, noscript, svg text, svg title, svg desc")) continue;
    const range = document.createRange(), seen = clip(e);
    range.selectNodeContents(node);
    for (const b of range.getClientRects()) {
      const [l, r] = [Math.max(b.left, seen.left), Math.min(b.right, seen.right)];
      const [t, d] = [Math.max(b.top, seen.top), Math.min(b.bottom, seen.bottom)];
      if (r - l < 2 || d - t < 0.6 * b.height || r <= 0 || d <= 0) continue;
      const [h, w] = [0.22 * (d - t), Math.min(1, 0.1 * (r - l))];  // above and below letters there is room
      texts.push({text: node.data.trim().slice(0, 40), node,
        quad: [[l + w, t + h], [r - w, t + h], [r - w, d - h], [l + w, d - h]]});
    }
  }
  for (const e of document.querySelectorAll("svg text")) {
    if (!e.textContent.trim() || !shown(e)) continue;
    const b = e.getBBox(), m = e.getScreenCTM(), h = 0.25 * b.height;
    const at = (x, y) => [m.a * x + m.c * y + m.e, m.b * x + m.d * y + m.f];
    texts.push({text: e.textContent.trim().slice(0, 40), node: e, quad: [at(b.x, b.y + h), at(b.x + b.width, b.y + h),
      at(b.x + b.width, b.y + b.height - h), at(b.x, b.y + b.height - h)]});
  }
  const along = (quad, [x, y]) => {
    const p = quad.map(q => q[0] * x + q[1] * y);
    return [Math.min(...p), Math.max(...p)]; };
  const meet = (a, b) => [a, b].every(quad => [0, 1].every(side => {
    const [p, q] = [quad[side], quad[side + 1]], n = Math.hypot(q[0] - p[0], q[1] - p[1]) || 1;
    return [[(q[0] - p[0]) / n, (q[1] - p[1]) / n], [(p[1] - q[1]) / n, (q[0] - p[0]) / n]].every(axis => {
      const [i, j] = [along(a, axis), along(b, axis)];
      return Math.min(i[1], j[1]) - Math.max(i[0], j[0]) > 1; });
  }));
  const overlap = [], top = t => Math.min(...t.quad.map(q => q[1])), low = t => Math.max(...t.quad.map(q => q[1]));
  texts.sort((a, b) => top(a) - top(b));
  texts.forEach((a, i) => {
    for (let j = i + 1; j < texts.length && top(texts[j]) < low(a); j++)
      if (a.node !== texts[j].node && meet(a.quad, texts[j].quad)) overlap.push(`${a.text} | ${texts[j].text}`);
  });
  for (const e of document.body.querySelectorAll("*")) {
    const b = e.getBoundingClientRect();
    if (!shown(e) || b.width < 1 || (e instanceof SVGElement && e.ownerSVGElement)) continue;
    if (b.left >= innerWidth && fixed(e)) continue;  // a drawer that is shut: nobody can scroll to it
    const right = Math.round(Math.min(b.right, clip(e.parentElement).right));
    if (right > innerWidth + 1) wide.push(`${name(e)} to ${right}`);
  }
  const kinds = "figure, svg, img, canvas, picture, .figure, .card, .panel, .box, article, section, table, pre";
  const marks = "svg[aria-hidden], .legend svg, nav svg, header svg, a svg, button svg, label svg, summary svg";
  for (const e of document.querySelectorAll(kinds)) {
    if (e.ownerSVGElement || !shown(e) || e.matches(marks)) continue;
    const b = e.getBoundingClientRect(), drawn = e.matches("svg, img, canvas");
    if (e.matches("svg") && !b.width && !b.height) continue;  // holds definitions for others
    if (e.matches("img") && !(e.complete && e.naturalWidth)) broken.push(`${name(e)} ${e.getAttribute("src")}`);
    else if (b.width < 2 || b.height < 2 || !(drawn || e.innerText.trim() || e.querySelector("svg, img, canvas")))
      empty.push(name(e));
    else boxes.push({name: name(e), box: round(b)});
  }
  const images = [...document.querySelectorAll("svg image")].filter(shown);
  await Promise.all(images.map(i => new Promise(done => { const copy = new Image();
    copy.onload = done; copy.onerror = () => { broken.push("svg image"); done(); };
    copy.src = i.getAttribute("href") || i.getAttribute("xlink:href"); })));
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) wide.push(`the page: ${root.scrollWidth}`);
  parent.postMessage(JSON.stringify({inner: innerWidth, height: Math.max(root.scrollHeight, document.body.scrollHeight),
    texts: texts.length, wide, overlap, empty, broken, boxes}), "*");
})</script>"""


def shot(frame: Path, width: int, height: int, *flags: str) -> str:
    """Run the browser on a file; returns what it printed."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--hide-scrollbars",
             "--force-device-scale-factor=1", f"--window-size={max(width, 500)},{height}",
             "--virtual-time-budget=10000", "--allow-file-access-from-files", *flags, frame.as_uri()],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def findings(page: Path, width: int) -> dict:
    """What is wrong with a page at a width: name of the fault -> where; {} if nothing is.

    A copy with the probe is written beside the page, where its own pictures and styles are found, and removed again.
    """
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it forbids scripts, the probe's too
    with tempfile.NamedTemporaryFile("w", dir=page.parent, prefix=".probe-", suffix=".html", encoding="utf-8") as copy:
        head, end, rest = text.rpartition("</body>")
        copy.write(f"{head}{OPEN}{PROBE}{end}{rest}" if end else f"{text}{OPEN}{PROBE}")
        copy.flush()
        frame = Path(copy.name).with_suffix(".frame.html")
        picture = frame.with_suffix(".png")
        try:
            frame.write_text(FRAME.format(page=Path(copy.name).name, width=width, height=2000))
            found = re.search(r'data-probe="([^"]*)"', shot(frame, width, 2000, "--dump-dom"))
            assert found, f"{page.name}: the probe said nothing"
            told = json.loads(html.unescape(found[1]))
            assert told["inner"] == width
            height = min(told["height"], 16000)  # of a taller page the first part
            frame.write_text(FRAME.format(page=Path(copy.name).name, width=width, height=height))
            shot(frame, width, height, f"--screenshot={picture}")
            pixels = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("L"), np.int16)[:, :width]
        finally:
            frame.unlink(missing_ok=True)
            picture.unlink(missing_ok=True)
    told["empty"] += [box["name"] for box in told["boxes"] if blank(pixels, box)]
    if not told["texts"] and not told["boxes"]:
        told["empty"].append("the page")
    return {fault: told[fault] for fault in ("wide", "overlap", "empty", "broken") if told[fault]}


def blank(pixels: np.ndarray, box: dict) -> bool:
    """Whether a box of the page [H, W] is of one colour: fewer than one in 2,000 pixels inside its border differ."""
    left, top, width, height = box["box"]
    seen = pixels[max(top, 0) + 3 : top + height - 3, max(left, 0) + 3 : left + width - 3]
    if seen.size < 400:  # below the picture, or as small as a mark in a legend
        return False
    return np.count_nonzero(np.abs(seen - np.median(seen)) > 12) < seen.size / 2000
