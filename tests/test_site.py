"""The site of the documentation: built as scripts/docs does, without a warning, and complete."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import browser
import pytest

import consilium
from consilium.core import Algorithm
from consilium.recipes import find

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["--conf-dir", "docs", "--fail-on-warning", "--keep-going", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *options, ".", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_viewing_it_takes_no_network(site):
    """Links may lead elsewhere; nothing that a browser loads by itself does."""
    tags = r'<(?:script|img|iframe|source)\b[^>]*\bsrc="|<link\b[^>]*\bhref="'
    loaded = rf"""(?:{tags}|@import *["']|url\(["']?)(?:https?:)?//"""
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 40 and re.search(loaded, '<link rel="stylesheet" href="https://fonts.example/a.css">')
    assert [path.name for path in pages if re.search(loaded, path.read_text())] == []


def test_the_front_page_is_found(site):
    target = re.search(r'url=([^"]+)"', (site / "index.html").read_text()).group(1)
    assert (site / target).is_file()


@pytest.mark.parametrize("name", sorted(Algorithm.registry))
def test_every_algorithm_has_its_page(site, name):
    """All options with their defaults, and comparisons of methods that their recipe knows."""
    text = re.sub(r"<[^>]+>", "", (site / f"docs/algorithms/{name}.html").read_text())
    algorithm = Algorithm.registry[name]
    for field in (field.name for field in dataclasses.fields(algorithm)):
        assert re.search(rf"\b{field}: ", text) and re.search(rf"\b{field} (--|–)", text), field
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("consilium compare ")]
    assert len(commands) == len(algorithm.worlds)
    for command in commands:
        methods = command[command.index("--algorithms") + 1].split(",")
        assert methods[0] == name and "Standalone" in methods
        assert all(find(command[2]).algorithm(method) for method in methods)


def test_the_reference_has_every_public_name(site):
    page = (site / "docs/api.html").read_text()
    assert [n for n in consilium.__all__ if n not in Algorithm.registry and f'id="consilium.{n}' not in page] == []


def test_every_picture_says_what_it_shows(site):
    pictures = [p for page in site.rglob("*.html") for p in re.findall(r"<img\b[^>]*_images[^>]*>", page.read_text())]
    assert len(pictures) >= 3 and all(len(re.search(r'alt="([^"]*)"', p).group(1)) > 40 for p in pictures)


@pytest.mark.skipif(browser.BROWSER is None, reason=browser.WITHOUT)
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", ["index", "systems", "own-images", "results", "algorithms/FedMoE"])
def test_a_page_has_no_faults(site, page, width):
    """Nothing is empty, lies on top of another, is too wide or does not load."""
    assert browser.findings(site / f"docs/{page}.html", width) == {}
