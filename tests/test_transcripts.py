"""docs/own-texts.md, own-images.md and one-shot.md, executed: from a user's own files to models that are loaded without
this package, in at most five commands and a look at the model. `pytest tests/test_transcripts.py --rewrite` writes what
is printed now into the pages."""

import ast
import csv
from pathlib import Path

import pytest
import transcripts
from PIL import Image
from transcripts import Step, differences, ran, rewritten, same, steps

DOCS = Path(__file__).parent.parent / "docs"
HOSPITALS = ("north", "south", "coast")


def notes(folder: Path) -> None:
    """notes.csv: first sentences of scipy's documentation; label: the part of scipy, dealt to three hospitals."""
    import scipy

    with (folder / "notes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "hospital"])
        for area in ("linalg", "signal", "stats"):
            found = set()
            for source in sorted((Path(scipy.__file__).parent / area).glob("*.py")):
                for node in ast.walk(ast.parse(source.read_text())):
                    if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                        found.add(" ".join(text.split("\n\n")[0].split()))
            texts = sorted(text for text in found if 30 < len(text) < 200)[:90]
            rows.writerows([text, area, HOSPITALS[i % 3]] for i, text in enumerate(texts))


def scans(folder: Path) -> None:
    """scans/<hospital>/<class>/*.png: scikit-learn's digits, of which every hospital sees six."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    for i, (pixels, digit) in enumerate(zip(images[:1200], digits[:1200], strict=True)):
        sees = [place for place in range(3) if (digit - 3 * place) % 10 < 6]
        path = folder / f"scans/{HOSPITALS[sees[i % len(sees)]]}/digit-{digit}/{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15.9).astype("uint8")).save(path)


def questions(folder: Path) -> None:
    """north.csv and south.csv: what 60 functions of scipy's linear algebra, and of its statistics, do."""
    import scipy

    for site, area in (("north", "linalg"), ("south", "stats")):
        answers = {}
        for source in sorted((Path(scipy.__file__).parent / area).glob("*.py")):
            for node in ast.parse(source.read_text()).body:
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    answers[node.name] = " ".join(text.split("\n\n")[0].split())
        rows = [[f"What does {name} do?", text] for name, text in sorted(answers.items()) if 20 < len(text) < 120]
        with (folder / f"{site}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["question", "answer"], *rows[:60]])


PAGES = {"own-texts": notes, "own-images": scans, "one-shot": questions}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_a_terminal_shows(name, tmp_path, request):
    page = DOCS / f"{name}.md"
    PAGES[name](tmp_path)
    shown = steps(page.read_text())
    assert 3 <= len(shown) <= 6
    assert any(transcripts.python_alone(step.command) for step in shown)
    printed = [ran(step.command, tmp_path) for step in shown]
    if request.config.getoption("--rewrite"):
        page.write_text(rewritten(page.read_text(), printed))
        return
    for step, lines in zip(shown, printed, strict=True):
        assert not differences(step, lines), step.command


def test_what_differs_is_seen():
    """Words, whole numbers and lines must be equal; seconds are elided; scores may be near."""
    assert same("round 1: 3 clients  ... s", "round 1: 3 clients  12.3 s")
    assert not same("round 1: 3 clients  ... s", "round 1: 2 clients  12.3 s")
    assert same("test 0.879  ... s", "test 0.812  2.0 s") and not same("test 0.879  ... s", "test 0.512  2.0 s")
    assert same(" all  90   ±6.9", "all 90 ±6.1") and not same("a b", "a c")
    step = Step("a", ("x", "y"))
    assert not differences(step, ("x", "y")) and differences(step, ("x",)) and differences(step, ("x", "y", "z"))
    page = "# T\n\n```console\n$ python - <<'E'\n> print(1)\n> E\n2\n$ b\ny  0.5\n```\n\nend\n"
    assert steps(page) == [Step("python - <<'E'\nprint(1)\nE", ("2",)), Step("b", ("y  0.5",))]
    assert rewritten(page, [("2",), ("y  0.45",)]) == page
    assert rewritten(page, [("1", "3.4 s"), ("z",)]) == page.replace("\n2\n", "\n1\n... s\n").replace("y  0.5", "z")


def test_a_command_that_fails_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match=r"notes\.csv is not a file"):
        ran("consilium data notes.csv", tmp_path)
