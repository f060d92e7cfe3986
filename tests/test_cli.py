"""The command line as a user meets it: what it prints, what it writes, and one line for everything that is wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pictures
import pytest
import runs
import tiny
from PIL import Image

from consilium.__main__ import main
from consilium.cli import catalogue
from consilium.core import Algorithm, ClientInfo
from consilium.experiment import to_json
from consilium.moe.budget import human
from consilium.recipes import RECIPES
from consilium.rundir import RunDirectory


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """80 columns, no terminal, in an empty directory."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"))


def flags(data, **changes):
    """Flags of `fedmoe-text` on the table and the tiny model; one-round FedMoE without its LoRA stage."""
    values = {
        "data.path": data, "data.client": "site", "model.path": tiny.directory("switch_transformers", num_experts=4),
        "fit.batch-size": 4, "fit.max-length": 12, "rounds": 1, "algorithm.stage1": "forward",
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def call(capsys, *args):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\r" not in said.out + said.err
    return code, said.out, said.err


def refused(capsys, *args):
    """The one line on stderr of a command that exits with 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    code, out, err = call(capsys, *args)
    assert code == 2 and out == ""
    assert err.startswith("consilium: ") and err.endswith("\n") and err.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return err


# --- help -------------------------------------------------------------------------------------------------------------

COMMANDS = ("run", "compare", "resume", "report", "list", "inspect", "data", "certificates", "server", "client")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, args):
    code, out, _ = call(capsys, *args)
    assert code == 0
    assert all(f"consilium {command}" in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("args", "expected"),
    [(["run"], "--out"), (["compare"], "--seeds"), (["resume"], "run directory"), (["report"], "--out"),
     (["list"], "consilium list"), (["inspect"], "--memory"), (["run", "fedmoe-text"], "--data.path"),
     (["run", "fedmoe-text"], "--out folder of the run directories (default: runs)"), (["certificates"], "--hosts"),
     (["server"], "--sites"),
     (["client"], "--name"), (["client", "fedmoe-text"], "--server host:port of the server"),
     (["compare", "fedmoe-docstrings"], "--algorithm.alpha"),
     (["run", "fedmoe-instructions"], "--data.prompt"), (["run", "fedmoe-instructions"], "--data.messages"),
     (["run", "fedmoe-plaintext", "--help-all"], "{examples,documents,blocks,packed}"),
     (["compare", "fedmoe-text"], "from --seed on (default: 1)")],
)  # fmt: skip
def test_help_of_a_command(capsys, args, expected):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert not stop.value.code
    assert expected in " ".join(capsys.readouterr().out.split())
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code"),
    [(["--help"], 0), (["rum"], 2), ([], 0), (["list"], 0), (["run", "--help"], 0), (["run", "fedmoe-txt"], 2),
     (["run", "fedmoe-text", "--help"], 0), (["compare", "fedmoe-text", "--rouds", "3"], 2)],
)  # fmt: skip
def test_help_and_mistypes_do_not_wait_for_torch(args, code):
    program = (
        "import sys; from consilium.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_the_catalogue_is_that_of_the_code():
    """`python -m consilium.cli.catalogue` writes it again."""
    assert catalogue.make_catalogue() == catalogue.read_catalogue()


def test_help_shows_frequent_flags_and_help_all_every_one(capsys):
    flags = catalogue.flags_of_recipe("fedmoe-text")
    for everything in (False, True):
        with pytest.raises(SystemExit):
            main(["run", "fedmoe-text", "--help-all" if everything else "--help"])
        out = capsys.readouterr().out
        assert [flag.name for flag in flags if f"  {flag.name} " in out] == [
            flag.name for flag in flags if everything or flag.frequent
        ]
        assert everything == ("more flags: --help-all" not in out)
    assert 20 < sum(flag.frequent for flag in flags) < len(flags) / 1.5


def test_a_mistyped_flag_is_answered_as_by_the_experiment_itself(capsys):
    """What the catalogue takes, the parser takes; what it refuses, the parser refuses, with the same words."""
    for flag in catalogue.flags_of_recipe("fedmoe-text"):
        catalogue.refuse_mistyped("fedmoe-text", [flag.name, "x"], {}, "run")
    catalogue.refuse_mistyped(
        "fedmoe-text", ["--no-strict", "--fit.no-gradient-checkpointing", "--fit.lr=1"], {}, "run"
    )
    for wrong in ("--fit.lrr", "--fit.lrr=3", "--rouds"):
        assert "did you mean" in refused(capsys, "run", "fedmoe-text", wrong)


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys; from consilium.__main__ import *; sys.exit(main(['run', 'fedmoe-text', '--help']))"
    command = f'{sys.executable} -c "{program}" | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


# --- what is wrong, in one line ---------------------------------------------------------------------------------------


def test_unknown_commands_and_recipes_get_a_suggestion(capsys):
    assert "unknown command 'rum'; allowed are run, compare" in refused(capsys, "rum")
    assert "did you mean 'run'?" in refused(capsys, "rum")
    err = refused(capsys, "run", "fedmoe-txt")
    assert "unknown recipe 'fedmoe-txt'; allowed are " in err and "did you mean 'fedmoe-text'?" in err
    assert "needs a recipe; see `consilium list`" in refused(capsys, "run")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--roundz", "3"], r"unknown argument '--roundz'; did you mean --rounds\?"),
        (["--data.pth=x"], r"unknown argument '--data\.pth=x'; did you mean --data\.path\?"),
        (["--ouut", "x"], r"did you mean --out\?"),
        (["stray"], r"unknown argument 'stray'"),
        (["--out"], r"--out needs a value, e\.g\. --out runs"),
        (["--rounds", "x"], r"--rounds: it must be a whole number, not 'x'; see `consilium run fedmoe-text --help`"),
        (["--fit.lr", "fast"], r"--fit\.lr: it must be a number, not 'fast'"),
        (["--rounds"], r"Missing value for argument '--rounds'"),
        (["--rounds", "0"], r"rounds is 0; it must be at least 1"),
        (["--fit.lr", "0"], r"fit\.lr is 0\.0; it must be greater than 0"),
        (["--sampling.clients-per-round", "0"], r"clients_per_round is 0"),
        (["--algorithm.alpha", "1.5"], r"alpha is 1\.5; it must be within \(0, 1\]"),
        (["--data.partition", "dirichle"], r"--data\.partition is 'dirichle'; allowed are iid, .*; did you mean"),
        (["--fit.optimizer", "adam"], r"--fit\.optimizer is 'adam'; allowed are adamw, sgd; did you mean 'adamw'\?"),
        (["--name", "../x"], r"name is '\.\./x'; use 1 to 64 of"),
        (["--name", "two words"], r"name is 'two words'"),
        (["--name", "x" * 100], r"name is 'x{100}'"),
        (["--memory", "60"], r"60"),
        (["--memory", "lots"], r"lots"),
        (["--model.path", "./nowhere"], r"model '\./nowhere' is neither a directory"),
        (["--data.path", "nowhere.csv"], r"nowhere\.csv is not a file"),
        (["--data.text", "txt"], r"no column 'txt' \(did you mean 'text'\?\); it has text \| label \| site"),
        (["--data.client", "sit"], r"no column 'sit'"),
        (["--data.label", "labl"], r"no column 'labl' \(did you mean 'label'\?\)"),
        (["--data.label=labl"], r"no column 'labl'"),
        (["--data.labels", "cat", "dog"], r"label 'fish' is not declared.*cat \| dog"),
        (["--data.form", "text-to-text"], r"asks for text-to-text, the model is set up for classification"),
        (["--memory", "1GB", "1MB"], r"site-1 cannot hold the smallest sub-MoE, one expert per layer: needs .*, has 1"),
        (["--device", "abacus"], r"device 'abacus' cannot be used"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(capsys, data, args, message):
    assert re.search(message, refused(capsys, "run", "fedmoe-text", *flags(data), *args))


def test_a_column_with_nulls(capsys, tmp_path):
    path = tmp_path / "nulls.jsonl"
    path.write_text('{"text": "a b", "label": "x"}\n{"text": null, "label": "y"}\n')
    err = refused(capsys, "run", "fedmoe-text", *flags(path, data__client=""))
    assert "only the label 'x'; classification needs two; left out: 1 row of 2 without a value of 'text'" in err


def test_methods_that_nobody_can_hold_are_refused_too(capsys, data, tmp_path):
    saved = to_json(runs.experiment(data, memory=("2MB",)))
    path = tmp_path / "fedavg.json"
    path.write_text(json.dumps(saved))
    assert "no client can hold the model: 3 are unable, e.g. site-0 needs" in refused(capsys, "run", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a saved experiment"), ("{", "is not a saved experiment"), ("[]", "is not a saved experiment"),
     ("{}", "unknown type None"), ('{"experiment": 3}', "saved is int"),
     ("[" * 10**4, "is not a saved experiment: RecursionError"), ("{}\udcff", "is not a saved experiment: Unicode")],
)  # fmt: skip
def test_a_file_that_is_no_experiment(capsys, tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert message in refused(capsys, "run", path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resume"], "Missing from consilium resume: PATH the run directory"),
        (["resume", "nowhere"], "nowhere is not a run directory: it does not exist"),
        (["resume", "a", "b"], "unknown argument 'b'"),
        (["report"], "no run named; give at least one run directory"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["list", "all"], "unknown argument 'all'"),
        (["inspect"], "Missing from consilium inspect: STR"),
        (["inspect", "./nowhere"], "neither a directory"),
        (["compare", "fedmoe-text", "--seeds", "0"], "--seeds is '0'; it must be a whole number >= 1"),
        (["compare", "fedmoe-text", "--jobs", "two"], "--jobs is 'two'"),
        (["compare", "fedmoe-text", "--algorithms", "FedMoE,FedAvgg"], "did you mean 'FedAvg'?"),
        (["compare", "fedmoe-text", "--algorithms", ""], "--algorithms is empty"),
        (["compare", "fedmoe-text"], "examples.csv is not a file"),
    ],
)
def test_what_other_commands_refuse(capsys, args, message):
    assert message in refused(capsys, *args)


def test_an_error_of_the_system_is_one_line(capsys, data):
    Path("runs").write_text("a file")
    assert "runs/fedmoe-text cannot be made: Not a directory" in refused(capsys, "run", "fedmoe-text", *flags(data))


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run of three rounds, made by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    command = ["run", "fedmoe-text", *flags(data, rounds=3, name="mine", seed=5), "--out", str(folder)]
    assert main(command) == 0
    return folder / "mine"


def test_a_run_prints_lines_that_fit_and_leaves_a_report(capsys, data):
    code, out, err = call(capsys, "run", "fedmoe-text", *flags(data, rounds=2, name="mine"), "--out", "here")
    assert code == 0
    folder = Path("here/mine")
    assert RunDirectory(folder).config()["status"] == "finished"
    assert out.startswith("mine: FedMoE, 2 rounds\n")
    assert "  3 clients, tasks task, " in out and "training all needs" in out
    assert re.search(r"^round 1 \(stage one\): 3 clients  \d+\.\d s$", out, re.M)
    assert re.search(r"^round 2 \(stage two\): 3 clients  test task \d\.\d{3}  mean \d\.\d{3}  \d+\.\d s", out, re.M)
    assert not re.search(r"^  site-\d", out, re.M)  # a line per client is for terminals
    assert out.endswith("report: here/mine/report.html\n")
    assert "<html" in (folder / "report.html").read_text()[:200]
    assert all(len(line) <= 80 or line.startswith(("  model /", "round")) for line in out.splitlines())
    assert "Traceback" not in err


def test_instructions_of_a_file(capsys, data):
    """Every prompt is longer than the 12 tokens allowed: said once of each client, and in every record."""
    model = tiny.directory("olmoe", "text-to-text")
    columns = {"data__prompt": "text", "data__response": "label", "model__path": model, "model__dtype": "float32"}
    args = ["run", "fedmoe-instructions", *flags(data, rounds=3, name="mine", fit__target_length=2, **columns)]
    code, out, err = call(capsys, *args)
    assert code == 0 and "Traceback" not in err
    said = re.findall(r"^round \d.*  (\d+) of \1 examples cut to fit\.max_length, fit\.target_length$", out, re.M)
    records = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert all(told["cut"] == told["examples"] for told in records[-1]["clients"].values())
    examples = {client: told["examples"] for record in records for client, told in record["clients"].items()}
    assert len(examples) == 3 and sum(map(int, said)) == sum(examples.values())
    assert "token accuracy" in Path("runs/mine/report.html").read_text()


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("instructions", {}, r"name the columns: .*--data\.messages.*; table\.jsonl has text \| label \| site"),
        ("instructions", {"data__prompt": "text"}, r"data\.response is empty; name the columns of both"),
        (
            "instructions",
            {"data__text": "text"},
            r"fit\.rows is 'examples', which plain text has not; allowed are docu",
        ),
        ("instructions", {"data__prompt": "txt", "data__response": "label"}, r"no column 'txt' \(did you mean 'text'"),
        ("instructions", {"data__messages": "text"}, r"column 'text' line 1 is no JSON"),
        ("plaintext", {"fit__rows": "packed", "model__path": "switch"}, r"is an encoder-decoder"),
        ("plaintext", {"fit__rows": "example"}, r"fit\.rows is 'example'; allowed are .*did you mean 'examples'"),
    ],
)
def test_what_instructions_and_plain_text_refuse(capsys, data, recipe, changes, message):
    if changes.get("model__path") == "switch":
        changes = changes | {"model__path": tiny.directory("switch_transformers", "text-to-text")}
    else:
        changes = {"model__path": tiny.directory("olmoe", "text-to-text")} | changes
    assert re.search(message, refused(capsys, "run", f"fedmoe-{recipe}", *flags(data, **changes)))


def test_a_saved_experiment_runs_again_to_the_same_bits(capsys, finished):
    code, _, _ = call(capsys, "run", finished / "config.json", "--name", "again", "--out", "here")
    assert code == 0
    a, b = (runs.outcome(folder) for folder in (finished, Path("here/again")))
    assert a["summary"]["name"] == "mine" and b["summary"].pop("name") == "again"
    a["summary"].pop("name")
    assert a == b


def test_a_directory_in_which_a_run_lies_is_refused(capsys, finished, data):
    path = str(finished / "config.json")
    err = refused(capsys, "run", path, "--out", str(finished.parent))
    assert "already holds a run: resume it, or choose another --name or --out" in err


def test_a_directory_that_holds_a_comparison_takes_no_run_and_is_no_run(capsys, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out/mine/FedMoE")
    err = refused(capsys, "run", str(finished / "config.json"), "--out", str(tmp_path / "out"))
    assert "holds a comparison of runs; choose another --name or --out" in err
    assert f"is a comparison; name one of its runs: {tmp_path}/out/mine/FedMoE" in refused(
        capsys, "resume", str(tmp_path / "out/mine")
    )


def test_a_flag_of_compare_is_named_as_such(capsys, finished):
    err = refused(capsys, "run", str(finished / "config.json"), "--algorithms", "FedProx")
    assert "unknown argument '--algorithms'; that is for `consilium compare`" in err


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("100GB", ["It can hold 64 of 64 experts, and train 64 of them in a batch.", "train 16 experts per layer"]),
        ("1kB", ["A device cannot train even 4 experts in 4 layers: needs", "train not even the fewest experts"]),
    ],
)
def test_inspect_says_how_many_experts_fit(capsys, memory, said):
    code, out, _ = call(capsys, "inspect", "docstring-switch", "--memory", memory)
    assert code == 0 and all(text in out for text in said)


def test_resuming_a_finished_run_shows_it_and_changes_nothing(capsys, finished):
    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*")}

    before = files()
    code, out, _ = call(capsys, "resume", finished)
    assert code == 0 and files() == before
    assert f"{finished} is finished" in out.replace("\n", "") and "FedMoE" in out


def cut(finished, target, round):
    """The run as Ctrl-C before `round` would have left it (no summary, no report, status interrupted)."""
    shutil.copytree(finished, target)
    config = RunDirectory(target).config()
    (target / "config.json").write_text(json.dumps({**config, "status": "interrupted"}))
    for path in (*target.glob("checkpoints/*"), target / "summary.json", target / "report.html"):
        if not re.search(r"round-(\d+)", path.name) or int(re.search(r"round-(\d+)", path.name)[1]) >= round:
            path.unlink()
    return target


def test_resume_goes_on(capsys, finished, tmp_path):
    folder = cut(finished, tmp_path / "mine", 3)
    code, out, _ = call(capsys, "resume", folder)
    assert code == 0 and "continuing with round 3" in out and (folder / "report.html").exists()
    assert runs.outcome(folder) == runs.outcome(finished)


@pytest.mark.filterwarnings("default")
def test_a_broken_checkpoint_is_one_line_of_warning(capsys, finished, tmp_path):
    folder = cut(finished, tmp_path / "mine", 9)
    (folder / "checkpoints/round-00003.safetensors").write_bytes(b"torn")
    code, _, err = call(capsys, "resume", folder)
    assert code == 0
    told = [line for line in err.splitlines() if line.startswith("consilium: ")]
    assert len(told) == 1
    assert re.search(r"warning: cannot read round-00003.*continuing from round-00002\.safetensors", told[0])
    assert runs.outcome(folder) == runs.outcome(finished)


def test_report_of_one_and_of_several(capsys, finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    code, out, _ = call(capsys, "report", other, "--out", tmp_path / "one.html")
    assert code == 0 and f"report: {tmp_path}/one.html" in out
    code, _, _ = call(capsys, "report", finished, other, "--out", tmp_path / "two.html")
    assert code == 0
    assert 0 < (tmp_path / "one.html").stat().st_size < (tmp_path / "two.html").stat().st_size


def test_list_names_recipes_algorithms_and_models(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for name in (*RECIPES, *Algorithm.registry):
        assert re.search(rf"^  {re.escape(name)} +\S", out, re.M), name


def test_data_shows_a_file_and_how_to_run_it(capsys, data):
    """Three sites of 16 rows; labels cat, dog and fish by turns: 6, 5, 5. The command it prints runs."""
    code, out, _ = call(capsys, "data", data, "--out", "split.png")
    assert code == 0 and out.startswith("48 rows\n")
    assert re.search(r"^ label +label +0 +3 +cat *$", out, re.M) and re.search(r"^ site +client +0 +3 ", out, re.M)
    assert re.search(r"^tokens of text: \d+ to \d+, median \d+, 95 % have at most \d+$", out, re.M)
    for name in ("site-0", "site-1", "site-2"):
        assert re.search(rf"^ {name} +6 +5 +5 +16 *$", out, re.M)
    assert re.search(r"^ all +18 +15 +15 +48 *$", out, re.M)
    assert Path("split.png").read_bytes().startswith(b"\x89PNG") and out.endswith("picture: split.png\n")
    assert re.search(r"^3 labels, from 15 rows \((dog|fish)\) to 18 \(cat\)$", out, re.M)
    assert (
        f"consilium run fedmoe-text --data.path {data} --data.text text --data.target label --data.client site\n" in out
    )


@pytest.mark.parametrize(
    ("named", "said"),
    [(["--text", "text"], "consilium run fedmoe-plaintext --model.path MODEL --data.path {} --data.text text "),
     (["--prompt", "text", "--response", "label"], "--data.prompt text --data.response label --data.client site"),
     (["--text", "text", "--label", "site", "--client", "label"], "--data.target site --data.client label")],
)  # fmt: skip
def test_columns_that_are_named_are_not_guessed(capsys, data, named, said):
    code, out, _ = call(capsys, "data", data, *named)
    assert code == 0 and said.format(data) in out.splitlines()[-2] and Path("table-split.png").exists()


NOTES = [
    "note text,ward,haus",
    *(f"patient number {i} was seen by the doctor,{'abc'[i % 3]},{'ns'[i % 2]}" for i in range(60)),
]


def test_data_finds_the_label_by_its_few_values_and_says_what_it_does_not_use(capsys):
    """The column of long texts, the one of three values; a client is asked for. Flags without use are named."""
    Path("a.csv").write_text("\n".join(NOTES) + "\n")
    code, out, _ = call(capsys, "data", "a.csv", "--alpha", 0.5)
    assert code == 0 and "\nfields between ',', quoted by \", utf-8\n" in out
    assert "--data.text 'note text' --data.target haus" in out.splitlines()[-2]
    assert "note: 'haus' has 2 different values and is taken for the label (else: --label COLUMN)" in out
    assert "'ward' has 3 different values: if one says whose a row is, name it: --client COLUMN" in out
    assert "note: --alpha is ignored: it is for --partition dirichlet" in out
    Path("b.csv").write_text(Path("a.csv").read_text().replace("note text,ward", "text,label"))
    code, out, _ = call(capsys, "data", "b.csv")
    assert code == 0 and "note: 'haus' has 2 different values: if one says whose a row is, name it: --client" in out
    code, out, _ = call(capsys, "data", "a.csv", "--client", "haus", "--clients", 9)
    assert code == 0 and "--data.target ward --data.client haus" in out.splitlines()[-2]
    assert "note: --clients is ignored: the column 'haus' says whose a row is" in out
    assert "add --memory SIZE" in out


def test_data_counts_what_is_missing_and_what_looks_alike(capsys):
    rows = [line.replace("haus", "site") for line in NOTES]
    rows[9], rows[12] = ",a,n", "a text,A,s"
    Path("a.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = call(capsys, "data", "a.csv", "--text", "note text", "--label", "ward")
    assert code == 0 and "left out: 1 row of 60 without a value of 'note text' (empty 1), first line 10" in out
    assert "left out: 1 row of 1 label(s) with fewer than 2 rows ('A')" in out


def test_data_makes_room_for_long_texts(capsys):
    """The command that is printed runs, with a length that 95 % of the texts fit into."""
    Path("a.csv").write_text(
        "\n".join(["text;label", *(f"{'long ' * 180}{i};{'ab'[i % 2]}" for i in range(40))]) + "\n"
    )
    code, out, _ = call(capsys, "data", "a.csv")
    assert code == 0 and re.search(r"run fedmoe-text --fit\.max-length \d+ .* --data\.clients 4$", out.splitlines()[-2])


def test_preference_pairs_are_refused_with_a_word(capsys):
    Path("a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 20)
    assert "preference pairs (chosen, rejected), which are not trained on" in refused(capsys, "data", "a.jsonl")


@pytest.mark.parametrize(
    ("form", "args", "line", "command"),
    [("folder", ["--classes", 3, "--clients", 2], "image folder: 8 x 8 pixels, 3 channels",
      "--model.kernel 3 --model.padding 1 --data.path pets --data.clients 2 --data.classes 3"),
     ("parquet", ["--client", "site", "--size", 16], "image: img, label: label, client: site",
      "--data.path pets.parquet --data.client site --data.size 16")],
)  # fmt: skip
def test_data_shows_images(capsys, form, args, line, command):
    """24 images of three classes, two clients; the picture is not one colour, and the command that is printed runs."""
    if form == "folder":
        path = pictures.folder(Path("pets"))
    else:
        path = Path("pets.parquet")
        pictures.table(clients=2).to_parquet(path)
    code, out, _ = call(capsys, "data", path, *args)
    assert code == 0 and out.startswith("24 rows\n") and f"\n{line}\n" in out and "\n3 labels, 8 rows each\n" in out
    assert re.search(r"^ all +8 +8 +8 +24 *$", out, re.M)
    assert f"\nconsilium run pfedmoe-images {command}\npicture: pets-split.png\n" in out
    colours = Image.open("pets-split.png").convert("L").getextrema()
    assert colours[0] < 60 and colours[1] == 255
    shown = shlex.split(next(text for text in out.splitlines() if text.startswith("consilium run")))
    assert call(capsys, *shown[1:], "--rounds", 1, "--name", "shown")[0] == 0


def test_data_shows_a_table_of_numbers(capsys):
    """Of a table the label is named, and the client guessed or named; all other columns are numbers."""
    rows = [f"{'ns'[i % 2]},{i % 7},{i % 5},{'ab'[i // 2 % 2]}" for i in range(40)]
    Path("t.csv").write_text("\n".join(["site,age,dose,ill", *rows]) + "\n")
    code, out, _ = call(capsys, "data", "t.csv", "--label", "ill")
    assert code == 0 and "\n2 labels, 20 rows each\n" in out and re.search(r"^ n +10 +10 +20 *$", out, re.M)
    command = "pfedmoe-table --data.no-positive --data.path t.csv --data.target ill --data.client site"
    assert f"\nconsilium run {command}\npicture: t-split.png\n" in out
    assert call(capsys, "run", *command.split(), "--rounds", 1)[0] == 0


def test_what_data_refuses_of_images(capsys):
    pictures.folder(Path("pets"), 6)
    assert "--text is a column of texts; pets holds images" in refused(capsys, "data", "pets", "--text", "a")
    assert "data.client names a column; pets is no table" in refused(capsys, "data", "pets", "--client", "a")
    Path("pets/dog/x.png").touch()
    assert re.search(r"pets/dog/x\.png is no image of the formats", refused(capsys, "data", "pets"))
    Path("a.csv").write_text("text,label\na,b\n")
    assert "--classes is for images; a.csv is a table" in refused(capsys, "data", "a.csv", "--classes", 2)


def test_what_data_refuses(capsys, data, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n3,4\n")
    assert "cannot tell what the columns of other.csv are for (a | b); name them: --text" in refused(
        capsys, "data", other
    )
    assert "no column 'txt' (did you mean 'text'?)" in refused(capsys, "data", data, "--text", "txt")
    assert "is not a file" in refused(capsys, "data", "nowhere.csv")


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_inspect_shows_every_family(capsys, model_type, form):
    """Layers, experts, router; then bytes by the memory model, held x trained, with those marked that fit."""
    source = tiny.source(model_type, form)
    family, setup = source.family, tiny.setup(source, batch_size=3, max_length=20)
    blocks, held = list(source.counts), dict.fromkeys(source.counts, 4)
    needs = [setup.footprint(held, trained=trained).total for trained in (None, 4 * len(blocks), 2 * len(blocks))]
    limit, shape = needs[2], ("--batch-size", 3, "--max-length", 20, "--target-length", 5)
    code, out, _ = call(capsys, "inspect", tiny.directory(model_type, form), "--memory", f"{limit}B", *shape)
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines() if str(tiny.root) not in line)
    assert f"{family.name}, {form}" in out and f"{blocks[0]} to " in out
    router = {"sigmoid": "by sigmoid with a correction bias", "softmax": "by softmax with a correction bias"}
    assert f"top-{2 if family.top_k else 1}, {router.get(family.correction and family.score, 'by logits')}" in out
    assert ("in 2 of 4 groups" in out or "in 1 of 4 groups" in out) == (model_type.startswith("deepseek"))
    rows = [words for line in out.splitlines() if (words := line.split())[:1] == ["4"]]  # "4 layers" is one, too
    row = next(words for words in rows if words[1].rstrip("*").endswith("B"))
    marked = [human(need).replace(" ", "") + "*" * (need <= limit) for need in needs]
    assert row[1:4] == marked and marked[2].endswith("*") and not marked[0].endswith("*")
    forward, backward = setup.budgets(ClientInfo("device", 1, "task", limit))
    assert f"It can hold {forward} of {8 * len(blocks)} experts, and train {backward} of them in a batch." in out


# --- Ctrl-C, in a process of its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_ctrl_c_ends_with_130_and_leaves_a_resumable_run(data, sent):
    command = [sys.executable, "-m", "consilium", "run", "fedmoe-text", *flags(data, rounds=5000, name="long")]
    with Path("log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
        )
    try:
        deadline = time.monotonic() + 120
        while not (metrics := Path("runs/long/metrics.jsonl")).exists() or metrics.read_text().count("\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline, Path("log").read_text()
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(timeout=60) == 130, Path("log").read_text()[-4000:]
    finally:
        process.kill()
        process.wait()
    assert RunDirectory(Path("runs/long")).config()["status"] == "interrupted"
    last = Path("log").read_text().splitlines()[-1]
    assert last == "consilium: interrupted; `consilium resume runs/long` continues the run"
    assert "Traceback" not in Path("log").read_text()
