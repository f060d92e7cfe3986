"""Hostile texts are data: each function of `escape`, and everything that prints or writes what came from outside."""

import ast
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
import runs
import tiny
from markdown_it import MarkdownIt
from report.report_runs import make_run
from rich.console import Console

from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import ClientInfo, Sampling
from consilium.data.arrays import ImageData
from consilium.escape import csv_cell, html, latex, markdown, markdown_code, one_line, python_literal, terminal
from consilium.export import cohort
from consilium.export.deployed import Finished, of_run
from consilium.export.folder import write
from consilium.fit import Fit
from consilium.loop import run
from consilium.models.cohort import Cohort
from consilium.report import print_table, write_report
from consilium.watch import JsonLines, Terminal

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clear": "a\x1b[2Jb",
    "clipboard": "\x1b]52;c;ZWNobyBvd25lZA==\x1b\\",
    "8 bits": "a\x9b31mb\x9d0;owned\x9c",
    "lines": "a\r\nround 9: forged\x0b\x0c\x85\u2028b",
    "backspace": "safe\x08\x08\x08\x08evil\x00",
    "bidi": "a\u202egpj.exe\u2066b\u200f",
    "surrogate": "a\ud800b",
    "markup": "x[/nothing]",
    "half of a tag": "x[/bold",
    "other half": "[link=https://evil.example]y] z]",
    "python": '" if open("PWNED", "w") else "',
    "fence": '\n```\n\n# owned\n\n```python\nopen("PWNED", "w")\n',
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;",
    "attribute": '" onmouseover="alert(1)" \'',
    "link": "[a](javascript:alert) ![i](http://evil.example/i.png) https://evil.example www.evil.example a@b.example",
    "table": "a|b`c`*d*_e_~f~\\|g$h$",
    "formula": '=HYPERLINK("http://evil.example")',
    "tab formula": "\t=1+1",
    "wide formula": "＝1+1",
    "latex": "\\input{/etc/passwd}\n\\end{document}%",
    "mathtext": "$\\frac{",
}
ALL = list(HOSTILE.values())


def check(text, keep="\n"):
    """Nothing that a terminal obeys."""
    odd = [place for place, c in enumerate(text) if not (c.isprintable() or c in keep)]
    assert not odd, ascii(text[max(odd[0] - 60, 0) : odd[0] + 60])
    text.encode()


# --- one kind of output each ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ALL, ids=list(HOSTILE))
def test_each_function_by_itself(text):
    for function in (terminal, one_line, markdown, markdown_code, python_literal, latex, csv_cell):
        check(function(text), keep="")
    check(html(text), keep="\n\t")
    # The source is the text, the page and the sentence show what a terminal shows, and nothing else is made of it.
    assert ast.literal_eval(python_literal(text)) == text and "`" not in python_literal(text)
    events = []
    parser = HTMLParser()
    parser.handle_data = parser.handle_starttag = lambda *event: events.append(event)
    parser.feed(f'<p title="{html(text)}">{html(text)}</p>')
    seen = terminal(text, keep="\n\t")
    assert events == [("p", [("title", seen)]), (seen,)]
    inline = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(f"x {markdown(text)}")[1].children
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(token.content for token in inline) == f"x {one_line(text)}".rstrip()
    span = MarkdownIt().parse(f"x {markdown_code(text)}")[1].children
    assert {token.type for token in span} <= {"text", "code_inline"} and len(span) <= 2
    written = io.StringIO()
    csv.writer(written).writerow([csv_cell(text)])
    (cell,) = next(csv.reader(io.StringIO(written.getvalue())))
    assert cell.lstrip()[:1] not in tuple("=+-@＝")
    assert not re.search(r"(?<!\\)(?:\\\\)*[&%#_{}]|\\(?!text|[&%$#_{}])", re.sub(r"\\text\w+\{\}", "", latex(text)))


def test_no_bare_address_becomes_a_link():
    for text in (HOSTILE["link"], "HTTPS://EVIL.example/x", "see WWW.evil.example", "ftp://evil.example"):
        assert not re.search(r"\w://|www\.|\w@", markdown(text), re.I)


def test_ordinary_texts_stay():
    for text in ("Köln", "北京", "می‌خواهم", "👩‍⚕️", "a (b), c: 12 - 3"):
        assert terminal(text) == one_line(text) == text and markdown(text) == text
    assert csv_cell("minus") == "minus" and csv_cell(-0.5) == -0.5 and csv_cell(None) is None
    assert latex("50 % of A&B_c") == r"50 \% of A\&B\_c"
    assert len(one_line("x" * 10**7)) == 1000 and len(one_line("x" * 10**7, 60)) == 60


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", [False, True])
def test_a_run_on_the_terminal(screen):
    """Tasks, clients, reasons and events as a server may be sent them."""
    experiment = runs.experiment(tiny.root / "none.csv", FedAvg())
    infos = tuple(ClientInfo(f"site-{i}", 4, text) for i, text in enumerate(ALL))
    setup = dataclasses.replace(tiny.setup(), clients=infos)
    told = {"experts": 3, "train_loss": 0.5, "validation": 0.5, "bytes_down": 1, "bytes_up": 1, "cut": 2, "examples": 4}
    told["seconds"] = {"train": 1.0, "evaluate": 1.0}
    record = {
        "round": 1, "stage": "", "abandoned": "".join(ALL), "unable": dict.fromkeys(ALL, ALL[0]),
        "clients": {text: {**told, "rejected": text} for text in ALL}, "scores": dict.fromkeys(ALL, 0.5),
        "missing": {text: text for text in ALL}, "errors": {text: text for text in ALL}, "untested": {ALL[0]: ALL[1]},
        "late": {text: [1] for text in ALL}, "seconds": {"round": 1.0},
    }  # fmt: skip
    events = [{"event": kind, "client": text, "reason": text} for text in ALL for kind in ("benched", text)]
    file = io.StringIO()
    with Terminal(Console(file=file, width=80, force_terminal=screen, color_system=None)) as watch:
        watch.started(experiment, setup, None, 1)
        watch.step(ALL[0], "train", 1, 2)
        watch.rounded(record, events)
    own = r"\x1b\[(?:\?25[lh]|2K|1A|\d*[AG])|\r" if screen else "a^"  # rich's own: the cursor and the bars' lines
    said = re.sub(own, "", file.getvalue())
    check(said)
    assert "x[/nothing]" in said and "x[/bold" in said and "[link=https://evil.example]y] z]" in said
    assert not re.search(r"^(?:round 9|# owned)", said, re.M)
    lines = io.StringIO()
    JsonLines(lines).rounded(record, events)
    assert lines.getvalue().isascii() and lines.getvalue().count("\n") == 1


def test_an_error_is_one_line(capsys):
    for text in ALL:
        assert main(["run", text.replace("\x00", "") + "x"]) == 2
        said = capsys.readouterr().err
        check(said)
        assert said.count("\n") == 1


def test_looking_at_a_table(tmp_path, capsys, monkeypatch):
    """Cells, labels, clients and columns of a downloaded file."""
    monkeypatch.chdir(tmp_path)
    sayable = [text.replace("\x00", "").replace("\ud800", "") for text in ALL]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["text", "label", "x[/y]\x1b[2J"])
        for i in range(24):
            label = HOSTILE["clear"] if i % 2 else HOSTILE["mathtext"]
            writer.writerow([f"{sayable[0]} {i}", label, sayable[i % len(ALL)]])
    assert main(["data", "t.csv", "--clients", "2", "--partition", "iid"]) == 0
    said = capsys.readouterr().out
    check(said)
    assert "x[/y]?[2J" in said and (tmp_path / "t-split.png").exists()


# --- what is written --------------------------------------------------------------------------------------------------


def test_reports_and_their_tables(tmp_path):
    """Names, tasks, labels, reasons, notes, events and settings; the page's elements stay those of a harmless run."""

    def damaged(path, hostile):
        make_run(path, "FedMoE" if path.name == "a" else "FedAvg", clients=4, rounds=3, tasks={"topic": "accuracy"})
        for name in ("config.json", "partition.json", "metrics.jsonl", "events.jsonl", "summary.json"):
            text = (path / name).read_text()
            quoted = json.dumps(hostile)[1:-1]
            for old, new in (
                ('"topic"', f'"{quoted}"'),
                ('"type": "Fed', f'"type": "{quoted}Fed'),
                ("cddb22d", quoted),
                ('"empty client', f'"{quoted} client'),
                ('"labels": ["a"', f'"labels": ["{quoted}"'),
                ('"label_counts": {"a"', f'"label_counts": {{"{quoted}"'),
            ):
                text = text.replace(old, new)
            (path / name).write_text(text)
        return path

    def page(folder, hostile):
        paths = [damaged(folder / name, hostile) for name in ("a", "b")]
        out = write_report(paths, folder / "report.html")
        console = Console(file=io.StringIO(), width=120)
        print_table(paths, console)
        return out, console.file.getvalue()

    def elements(path):
        found = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append((tag, sorted(name for name, _ in attributes)))
        parser.feed(path.read_text())
        return [item for item in found if item[0] not in ("path", "g", "use", "defs", "clippath", "rect", "tspan")]

    plain, _ = page(tmp_path / "plain", "harmless")
    hostile, said = page(tmp_path / "hostile", "".join(ALL))
    check(said)
    check(hostile.read_text(), keep="\n\t")
    assert sorted(map(str, elements(hostile))) == sorted(map(str, elements(plain)))
    for row in csv.reader(io.StringIO(hostile.with_suffix(".csv").read_text())):
        assert all(cell[:1] not in tuple("=@\t\r\n＝") for cell in row)
    tex, plain_tex = (path.with_suffix(".tex").read_text() for path in (hostile, plain))
    check(tex)
    assert "\\input" not in tex and "\\end{document}" not in tex
    made, usual = ([line for line in text.splitlines() if line[:1] != "%"] for text in (tex, plain_tex))
    assert made[0].startswith("\\begin{tabular}") and len(made) == len(usual)


def as_the_card_says(folder, given, **names):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    exec(code.replace("DIR", str(folder)).replace('"..."', repr(given)), names)


def card_is_safe(folder):
    """The card has one block of code, no HTML, no link, and the headings that we wrote."""
    text = (folder / "README.md").read_text()
    check(text)
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text.split("---\n", 2)[2])
    kinds = [token.type for token in tokens]
    assert kinds.count("fence") == 1 and "html_block" not in kinds and "hr" not in kinds
    assert kinds.count("table_open") == 1 and kinds.count("heading_open") <= 2
    cells = [len(row.split(" | ")) for row in text.splitlines() if row.startswith("| ") and row != "| | |"]
    inline = {child.type for token in tokens for child in token.children or ()}
    assert inline <= {"text", "text_special", "code_inline", "softbreak"} and cells


@pytest.mark.parametrize("format", ["transformers", "consilium"])
def test_the_card_of_a_mixture(tmp_path, capsys, monkeypatch, format):
    """A task and labels as a site may have sent them: the card's code does what it says, and nothing else."""
    monkeypatch.chdir(tmp_path)
    run(runs.experiment(runs.table(tmp_path), FedAvg(), rounds=1), tmp_path / "run")
    deployed = of_run(Finished.of(tmp_path / "run"), "site-0")
    labels = next(iter(deployed.labels.values()))
    evil = HOSTILE["python"] + "".join(v for v in ALL if "." not in v and v != HOSTILE["surrogate"])
    names = {label: f"{HOSTILE['fence']}{HOSTILE['html']}{HOSTILE['link']}|{i}" for i, label in enumerate(labels)}
    params = {
        re.sub(r"^head\.\w+\.(\w+)\.", lambda m: f"head.{evil}.{names[m[1]]}.", key): value
        for key, value in deployed.params.items()
    }
    scores = {evil: ("accuracy", 0.5)}
    deployed = dataclasses.replace(
        deployed, labels={evil: tuple(names[label] for label in labels)}, params=params, scores=scores, client=ALL[0]
    )
    for line in write(tmp_path / "m", deployed, format):
        check(line)
    card_is_safe(tmp_path / "m")
    as_the_card_says(tmp_path / "m", "old cat")
    assert not (tmp_path / "PWNED").exists()
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "m"), "--text", "old cat\x1b[2J"]) == 2  # a name that no task may have
    said = capsys.readouterr().err
    check(said, keep="\n\t")
    assert said.count("\n") == 1 and "task name" in said


def test_the_card_of_a_small_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = runs.experiment(
        tmp_path,
        pFedMoE(),
        data=ImageData(clients=3, examples=60),
        model=Cohort(("mlp-3",), "mlp-3", width=6),
        fit=Fit(batch_size=4, optimizer="sgd"),
        sampling=Sampling(3),
        rounds=1,
    )
    client = sorted(run(experiment, tmp_path / "run")["clients"])[0]
    own = cohort.Own.of_run(Finished.of(tmp_path / "run"), client)
    evil = "".join(v for v in ALL if "." not in v and v != HOSTILE["surrogate"])
    labels = [f"{HOSTILE['fence']}{HOSTILE['html']}|{label}" for label in own.context.data.task.labels]
    made = cohort._card
    hostile = {"task": evil, "labels": labels, "architecture": evil}
    monkeypatch.setattr(cohort, "_card", lambda told, *rest: made(told | hostile, *rest))
    for line in cohort.write(tmp_path / "m", own):
        check(line)
    card_is_safe(tmp_path / "m")
    assert not (tmp_path / "PWNED").exists()
