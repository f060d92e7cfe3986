"""The command line: `consilium run | compare | plan | resume | report | list | inspect | data`, to make a mixture of
experts of a dense model `upcycle`, to take a model away `export | predict | chat`, and for sites on machines of their
own `certificates | server | client`.

Flags and their help come from the dataclasses themselves, through tyro. Errors are one line, and exit with 2.
A command imports what it needs when it is called: torch and transformers take seconds, help and mistypes should not.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from consilium.addresses import Address, parse_address
from consilium.errors import ConfigError, ConsiliumError
from consilium.escape import one_line, print_line, terminal

if TYPE_CHECKING:
    from consilium.experiment import Experiment
    from consilium.loop import Watch
    from consilium.watch import JsonLines

__all__ = ["main"]

HELP = """[bold]consilium[/bold]: federated fine-tuning of mixture-of-experts models

  consilium run RECIPE|FILE.json \\[flags]   run an experiment; FILE.json is a saved one (a run's config.json)
  consilium compare RECIPE \\[flags]          run several methods on the same data and weights, and compare them
  consilium resume RUN                       continue an interrupted run, to the same bits
  consilium report RUN \\[RUN ...]             write report.html for one run, or one that compares several
  consilium list                             recipes, algorithms, shipped models
  consilium inspect MODEL \\[--memory 12GiB]  layers, experts and bytes of a model, and what fits a device

  consilium plan RECIPE|FILE.json \\[flags]  memory, bytes, steps and time of every client, before a run

  consilium upcycle MODEL --out DIR          a dense model as a mixture of experts: copies of its feed-forward networks
  consilium data PATH                        columns, labels and split of a file or of images, and the command to run
  consilium export RUN --client A --out DIR  a client's model for plain transformers; at a site: of its --state folder
  consilium predict DIR --text "..."         labels or texts of an exported model; --image, --table
  consilium chat DIR                         talk to an exported language model

  consilium expert train RECIPE --name A     a site's part of a federation of one exchange, as one signed file
  consilium hub init|add|withdraw|build HUB  put such parts together as one model, and take them out again

  consilium certificates DIR --sites A,B     keys for a server and its sites, on machines of their own
  consilium server RECIPE --sites A,B        run an experiment over sites, or go on with it
  consilium client RECIPE --name A           take part as a site, with its own data
  consilium server|client --one-shot ...     packages of sites over the network, into a hub, as sites come

  consilium COMMAND --help                   the flags of a command; with a recipe, those of its experiment
"""

out = Console()
err = Console(stderr=True, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 an error of the user's, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a process of its own: what `kill` or a job queue sends is taken as Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": run_command,
        "compare": compare_command,
        "resume": resume_command,
        "report": report_command,
        "list": list_command,
        "inspect": inspect_command,
        "plan": plan_command,
        "upcycle": upcycle_command,
        "data": data_command,
        "export": lambda args: _taken("Export", args),
        "predict": lambda args: _taken("Predict", args),
        "chat": lambda args: _taken("Chat", args),
        "expert": lambda args: _one_shot("expert", args),
        "hub": lambda args: _one_shot("hub", args),
        "certificates": certificates_command,
        "server": server_command,
        "client": client_command,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        out.print(HELP, highlight=False, soft_wrap=True)
        return 0
    if args[0] in ("--version", "-V", "version"):
        from importlib.metadata import version

        print(f"consilium {version('consilium')}")
        return 0
    try:
        if args[0] not in commands:
            near = difflib.get_close_matches(args[0], commands, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown command {args[0]!r}; allowed are {', '.join(commands)}{hint}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
            commands[args[0]](args[1:])
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConsiliumError, OSError) as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt as stop:
        _say(f"interrupted{stop}")
        return 130
    return 0


OWN = {
    "--out": "folder of the run directories",
    "--algorithms": "methods to compare, separated by commas",
    "--seeds": "runs per method, with seeds from --seed on",
    "--jobs": "runs at a time, each a process; 0: as many as cores and free memory allow",
    "--sites": "names of the sites, separated by commas",
    "--hosts": "names or addresses under which sites reach the server, separated by commas",
    "--address": "host:port to listen on",
    "--certificates": "folder of `consilium certificates`: its part for the server, or for this site",
    "--wait": "seconds until all sites must be connected",
    "--name": "of this site",
    "--server": "host:port of the server",
    "--state": "folder for what is kept at this site",
    "--track": "tools to track the run in, separated by commas: tensorboard, mlflow, wandb; each is an extra",
    "--quiet": "print errors and the last line only",
    "--json": "stdout gets a line of JSON per round and a last one with the summary; all else goes to stderr",
    "--port": "for Flower's processes on this machine, on 127.0.0.1 alone",
    "--max-lr": "largest learning rate that the server may ask of this site",
    "--max-epochs": "most passes over this site's data in a round",
    "--max-steps": "most updates of a model in a round; training ends with an error before one more",
    "--max-batch-size": "most examples in a batch",
    "--max-tokens": "most tokens (of images and tables: rows) that models read and write in a round",
    "--max-seconds": "longest time that training, or scoring, may take in a round",
    "--max-rounds": "most rounds of a run",
    "--max-bytes": "largest message that this site takes or returns, unfolded",
    "--max-memory": "most memory that a model may need here, e.g. 12GiB; default: --memory, or all of the device",
    "--max-state": "most room on disk for the states of former runs; the oldest go first",
    "--max-days": "days after which the state of a former run is removed",
}
"""What the commands' own flags mean; all others are fields of the experiment."""


def _say(text: str) -> None:
    """One line on stderr."""
    err.print(f"consilium: {one_line(text, 4000)}", markup=False, highlight=False)


def run_command(args: list[str]) -> None:
    """consilium run RECIPE|FILE.json [--out DIR] [--track TOOLS] [--quiet] [--json] [flags of the experiment]"""
    from consilium.loop import run

    default, rest = _experiment(args, "run")
    options, rest = _split(rest, {"--out": "runs", "--track": ""})
    quiet, as_json, rest = _voice(rest)
    own = {**options, "--quiet": None, "--json": None}
    experiment = _parse(type(default), rest, f"consilium run {args[0]}", default, own)
    folder = Path(options["--out"]) / experiment.name
    with _speaking(quiet, as_json) as lines:
        _followed(lambda watch: run(experiment, folder, watch), folder, options["--track"], lines)


def compare_command(args: list[str]) -> None:
    """consilium compare RECIPE [--algorithms A,B] [--seeds N] [--jobs N] [--out DIR] [--track TOOLS] [--quiet] [--json]
    [flags of the experiment]"""
    from consilium.api import by_default, plan, split_names
    from consilium.recipes import find
    from consilium.watch import Comparison, at_a_time

    default, rest = _experiment(args, "compare")
    recipe = find(args[0])
    names = by_default(recipe, default)
    options, rest = _split(rest, {"--out": "runs", "--algorithms": names, "--seeds": "1", "--jobs": "0", "--track": ""})
    quiet, as_json, rest = _voice(rest)
    own = {**options, "--quiet": None, "--json": None}
    experiment = _parse(type(default), rest, f"consilium compare {args[0]}", default, own)
    seeds, jobs = _whole(options, "--seeds", 1), _whole(options, "--jobs", 0)
    names = split_names(options["--algorithms"])
    if not names:
        raise ConfigError("--algorithms is empty; name methods, e.g. --algorithms FedMoE,FedAvg")
    root = Path(options["--out"]) / experiment.name
    planned = plan(recipe, experiment, names, seeds, root)
    track = _tracked(options["--track"])
    with _speaking(quiet, as_json) as lines:
        jobs = jobs or at_a_time(list(planned.values()))
        told = (lambda name, record: lines.line({"run": name, **record})) if lines else None
        try:
            Comparison(out, planned, jobs, track, told).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("; the same command continues the comparison") from None
        except ConfigError:  # before any run began
            raise
        except ConsiliumError:
            if finished := [folder for folder in planned if (folder / "summary.json").exists()]:
                _finish(finished, root / "report.html", lines)
            raise
        _finish(list(planned), root / "report.html", lines)


def resume_command(args: list[str]) -> None:
    """consilium resume RUN [--track TOOLS] [--quiet] [--json]"""
    from consilium.loop import resume
    from consilium.report.table import print_table
    from consilium.rundir import RunDirectory

    def parameters(run: Annotated[Path, tyro.conf.Positional]) -> Path:
        """Continue an interrupted run from its last checkpoint, to the same bits, and in the same tracked run.

        Args:
            run: the run directory.
        """
        return run

    options, rest = _split(args, {"--track": ""})
    quiet, as_json, rest = _voice(rest)
    folder = _parse(parameters, rest, "consilium resume")
    finished = RunDirectory(folder).config()["status"] == "finished"
    with _speaking(quiet, as_json) as lines:
        if finished:
            print_line(out, f"{folder} is finished")
            print_table([folder], out)
            if lines:
                summary = json.loads((folder / "summary.json").read_text())
                lines.line({"summary": summary, "report": str(folder / "report.html")})
        else:
            _followed(lambda watch: resume(folder, watch), folder, options["--track"], lines)


def report_command(args: list[str]) -> None:
    """consilium report RUN \\[RUN ...] [--out FILE]"""

    def parameters(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None
    ) -> tuple[tuple[Path, ...], Path | None]:
        """Write a self-contained HTML report of one run, or one that compares several.

        Args:
            runs: run directories.
            out: file to write; default: report.html in the run, or in the folder above several.
        """
        return runs, out

    folders, target = _parse(parameters, args, "consilium report")
    if not folders:
        raise ConfigError("no run named; give at least one run directory, e.g. `consilium report runs/*`")
    _finish(list(folders), target)


def list_command(args: list[str]) -> None:
    """consilium list"""
    from consilium.core import Algorithm
    from consilium.moe.budget import human
    from consilium.moe.build import shipped
    from consilium.recipes import RECIPES, find

    _parse(lambda: None, args, "consilium list")
    find(next(iter(RECIPES), "fedmoe-docstrings"))
    out.print("[bold]Recipes[/bold]")
    for name in sorted(RECIPES):
        out.print(f"  {name:24} {RECIPES[name].summary}", highlight=False, soft_wrap=True)
    out.print("[bold]Algorithms[/bold]")
    for name, algorithm in sorted(Algorithm.registry.items()):
        out.print(f"  {name:24} {(algorithm.__doc__ or '').splitlines()[0]}", highlight=False, soft_wrap=True)
    out.print("[bold]Shipped models[/bold]")
    for name, folder in shipped().items():
        out.print(f"  {name:24} {human((folder / 'model.safetensors').stat().st_size)}", highlight=False)


def inspect_command(args: list[str]) -> None:
    """consilium inspect MODEL \\[--memory 12GiB]"""
    from consilium.core import Sampling
    from consilium.moe.budget import bytes_of
    from consilium.moe.build import ModelSource
    from consilium.report.model import print_model
    from consilium.setup import Fit, Setup

    def parameters(
        model: Annotated[str, tyro.conf.Positional],
        gguf: str = "",
        memory: str | None = None,
        form: Literal["classification", "text-to-text"] | None = None,
        batch_size: int = 16,
        max_length: int = 64,
        target_length: int = 16,
        rank: int = 8,
        gradient_checkpointing: bool = False,
    ) -> tuple[Setup, int | None, int]:
        """Layers, experts, router and bytes of a model, and which budgets of experts fit a device.

        Args:
            model: a directory, a shipped model's name, or a hub name.
            gguf: a GGUF file in that directory.
            memory: a device's memory, e.g. 12GiB: says what fits.
            form: classification or text-to-text; default: what the checkpoint was made for.
            batch_size: examples per step.
            max_length: tokens per example.
            target_length: target tokens per example (text-to-text).
            rank: of LoRA adapters.
            gradient_checkpointing: recompute activations in the backward pass.
        """
        source = ModelSource(model, gguf=gguf)
        generates = any("LM" in name or "Generation" in name for name in source.config.architectures or ())
        generates = generates or source.dense
        source = ModelSource(model, gguf=gguf, form=form or ("text-to-text" if generates else "classification"))
        fit = Fit(
            batch_size=batch_size,
            max_length=max_length,
            target_length=target_length,
            gradient_checkpointing=gradient_checkpointing,
        )
        heads = {"task": ("label",)} if source.form == "classification" else {}
        return Setup(source, fit, Sampling(), 0, heads), bytes_of(memory) if memory else None, rank

    setup, limit, rank = _parse(parameters, args, "consilium inspect")
    print_model(setup, limit, rank, out)


def plan_command(args: list[str]) -> None:
    """consilium plan RECIPE|FILE.json [flags of the experiment]"""
    from consilium.report.forecast import print_plan

    default, rest = _experiment(args, "plan")
    print_plan(_parse(type(default), rest, f"consilium plan {args[0]}", default, {}), out)


def upcycle_command(args: list[str]) -> None:
    """consilium upcycle MODEL \\[--experts 8] \\[--top-k 2] --out DIR"""
    from consilium.export.folder import new_folder
    from consilium.moe.upcycle import Upcycling, upcycle

    def parameters(
        model: Annotated[str, tyro.conf.Positional],
        out: Path,
        how: Annotated[Upcycling, tyro.conf.arg(name="")],
        gguf: str = "",
    ) -> tuple[str, Path, Upcycling, str]:
        """Make a mixture of experts of a dense model (Komatsuzaki et al. 2023), with its tokenizer and chat template.

        Args:
            model: a directory or a hub name: llama, mistral, granite, qwen2, qwen3, olmo2 or t5.
            out: directory to write; it must be new or empty.
            how: the experts.
            gguf: a GGUF file in the directory.
        """
        return model, out, how, gguf

    model, folder, how, gguf = _parse(parameters, args, "consilium upcycle")
    with new_folder(folder) as new:
        told = upcycle(model, new, how, gguf)
    for line in (*told, f"see it: consilium inspect {folder}"):
        print_line(out, line)


def data_command(args: list[str]) -> None:
    """consilium data PATH [--text COLUMN] [--label COLUMN] [--client COLUMN] ... [--out split.png]"""
    from consilium.data.dialect import Dialect
    from consilium.moe.build import ModelSource
    from consilium.recipes import find
    from consilium.report.image_preview import holds_images, preview_images
    from consilium.report.preview import NAMES, preview, save_picture, show

    def parameters(
        file: Annotated[Path, tyro.conf.Positional],
        text: str = "",
        label: str = "",
        prompt: str = "",
        response: str = "",
        context: str = "",
        input: str = "",
        choices: str = "",
        messages: str = "",
        image: str = "",
        client: str = "",
        separator: str = "",
        quote: str = "",
        encoding: str = "",
        model: str = "docstring-switch",
        clients: int | None = None,
        partition: str | None = None,
        alpha: float | None = None,
        classes: int | None = None,
        size: int = 0,
        pages: str | None = None,
        axes: str | None = None,
        seed: int = 0,
        out: Path | None = None,
    ) -> dict[str, Any]:
        """Look at data before using it. Columns that are not named are guessed by their names.

        Args:
            file: a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file, a folder of them, a directory of `datasets`, or
                owner/name on the hub; of images: a folder per class, Parquet, .npz, CIFAR's *.bin, MNIST's files.
            text: column of the text.
            label: column of its label.
            prompt: column of what is asked.
            response: column of the answer.
            context: column of a text the prompt is about.
            input: column of what the prompt is to be applied to.
            choices: column of the answers to choose from.
            messages: column of conversations.
            image: column of encoded images.
            client: column that says whose a row is; "none": the rows are dealt.
            separator: between the fields of a text file, where it is not recognised: one character, or "tab".
            quote: around fields there: one character, or "none".
            encoding: of a text file, e.g. cp1252.
            model: whose tokenizer counts the tokens.
            clients: how many, without a client column.
            partition: iid, dirichlet or pathological, without a client column.
            alpha: of dirichlet.
            classes: per client, of images, pathological.
            size: of a side, to which images are scaled and cut; 0: as they are.
            pages: of image files with several pages or frames: first or all.
            axes: of one image in an .npz file: CHW or HWC.
            seed: of the split.
            out: where the picture of the split goes; default: NAME-split.png here.
        """
        return dict(locals())

    told = _parse(parameters, args, "consilium data")
    path, seed = told["file"], told["seed"]
    given = {role: told[role] for role in (*NAMES, "image") if told[role]}
    settings = {key: told[key] for key in ("clients", "partition", "alpha")}
    if holds_images(path):
        settings |= {key: told[key] for key in ("classes", "pages", "axes")}
        sheet = told["out"] or Path(f"{path.stem}-split.png")
        sheet = sheet.with_name(f"{sheet.stem}-images.png" if told["out"] else f"{path.stem}-images.png")
        found = preview_images(path, given, settings, told["size"], seed, sheet)
    elif odd := [name for name in ("image", "classes", "size", "pages", "axes") if told[name]]:
        raise ConfigError(f"--{odd[0]} is for images; {path} is a table without a column of encoded images")
    else:
        dialect = Dialect(told["separator"], told["quote"], told["encoding"])
        model = "" if told["model"] == "docstring-switch" else told["model"]
        found = preview(
            path,
            given,
            ModelSource(told["model"]).tokenizer(),
            settings,
            seed,
            dialect,
            model,
            lambda name: find(name).make().fit,
        )
    show(found, out)
    target = save_picture(found, told["out"] or Path(f"{path.stem}-split.png"))
    print_line(out, f"picture: {target}")


def _taken(command: str, args: list[str]) -> None:
    """consilium export | predict | chat"""
    from consilium.export import commands

    for line in _parse(getattr(commands, command), args, f"consilium {command.lower()}").lines():
        print(terminal(line, keep="\t\n"), flush=True)  # no line of rich's: tabs stay, and nothing is wrapped


def _one_shot(room: str, args: list[str]) -> None:
    """consilium expert | hub COMMAND [its flags] [RECIPE flags of an experiment]"""
    try:
        import consilium.certificates  # noqa: F401  signatures
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    from consilium.oneshot.commands import ROOMS, Rows

    commands = ROOMS[room]
    if not args or args[0] not in commands:
        if args and args[0] not in ("-h", "--help"):
            raise ConfigError(f"unknown command {room} {args[0]!r}; allowed are {', '.join(commands)}")
        for name, kind in commands.items():
            line = f"consilium {room} {name:10} {kind.__doc__.splitlines()[0]}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(0)
    kind, prog, rest = commands[args[0]], f"consilium {room} {args[0]}", args[1:]
    recipe, rest = _recipe_first(rest) if args[0] == "train" else ("", rest)
    options, rest = _split(rest, {"--rows": recipe})
    given = [arg for arg in rest if arg.startswith("--") and _is_of_experiment(arg)]
    own, flags = _divided(rest)
    if given and not options["--rows"]:
        raise ConfigError(f"{given[0]} is a flag of an experiment: name a recipe by --rows first")
    command = _parse(kind, own, prog)
    rows = Rows(_rows(options["--rows"], flags, prog) if options["--rows"] else None)
    for line in command.lines(rows):
        print_line(out, line)


_GROUPS = ("data", "model", "fit", "algorithm", "sampling", "wire", "merging", "privacy")
_SINGLE = ("--memory", "--device", "--seed", "--threads", "--rounds")


def _is_of_experiment(flag: str) -> bool:
    """Return whether a flag of a one-shot command belongs to the experiment, which says how rows are read."""
    name = flag.partition("=")[0]
    return name in _SINGLE or (name.removeprefix("--").removeprefix("no-").partition(".")[0] in _GROUPS and "." in name)


def _divided(args: list[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those of an experiment: each flag with the values after it."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    foreign = False
    for arg in args:
        if arg.startswith("--"):
            foreign = _is_of_experiment(arg)
        parts[foreign].append(arg)
    return parts[False], parts[True]


def _recipe_first(args: list[str]) -> tuple[str, list[str]]:
    """The recipe that stands first at a site, and the other arguments."""
    return (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)


def _rows(recipe: str, flags: list[str], prog: str) -> "Experiment":
    """The experiment that says how a site's rows, or a hub's, are read: those of one client unless flags say more."""
    from dataclasses import replace

    from consilium.algorithms.fedavg import FedAvg

    default, rest = _experiment([recipe, *flags], prog)
    default = replace(default, algorithm=FedAvg())  # which takes any model; no method is used
    experiment = _parse(type(default), rest, prog, default)
    return experiment if recipe.endswith(".json") else _of_one_client(experiment, {f.partition("=")[0] for f in flags})


def certificates_command(args: list[str]) -> None:
    """consilium certificates DIR --sites A,B [--hosts NAME,ADDRESS]"""
    if not args or args[0].startswith("-"):
        out.print(certificates_command.__doc__, markup=False, highlight=False)
        raise SystemExit(0) if args[:1] in (["-h"], ["--help"]) else ConfigError("name a folder for the keys")
    options, rest = _split(args[1:], {"--sites": "", "--hosts": ""})
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; allowed are --sites and --hosts")
    try:
        from consilium.certificates import certificates
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    folder, hosts = Path(args[0]), [host for host in re.split(r"[,;\s]+", options["--hosts"]) if host]
    crt = folder / "server/server.crt"
    before = crt.read_bytes() if crt.exists() else b""
    made_here = certificates(folder, hosts, _names(options["--sites"]))
    if before and crt.read_bytes() != before:
        _say(
            f"the list of hosts is another: {crt} is new, and only {folder / 'server/ca.crt'} trusts it; send it "
            "to every site in place of its ca.crt (keys stay as they are)"
        )
    for made in made_here:
        print_line(out, f"{made} is for that site alone: send it over a secure channel")
    print_line(out, f"{folder / 'server'} is for the server")


def server_command(args: list[str]) -> None:
    """consilium server RECIPE|FILE.json --sites A,B --certificates DIR [--address HOST:PORT] [--wait S] [--out DIR]
    [--insecure] [flags of the experiment]"""
    if any(arg.partition("=")[0] == "--one-shot" for arg in args):
        return _collect(args)
    default, rest = _experiment(args, "server")
    own = {"--sites": "", "--certificates": "", "--address": "0.0.0.0:8000", "--wait": "600", "--out": "runs"}
    options, rest = _split(rest, own)
    insecure, rest = _insecure(rest)
    experiment = _parse(type(default), rest, f"consilium server {args[0]}", default, options)
    deployment = _deployment()
    sites, wait = _names(options["--sites"]), _whole(options, "--wait", 1)
    if not sites:
        raise ConfigError("--sites is empty; name the sites, e.g. --sites north,south")
    keys = _keys(options, insecure, parse_address(options["--address"], "--address"), "server")
    folder = Path(options["--out"]) / experiment.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        deployment.server(experiment, folder, sites, options["--address"], keys, wait, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on with the run") from None
    _finish([folder])


def _collect(args: list[str]) -> None:
    """consilium server --one-shot HUB --sites A,B --certificates DIR [--address HOST:PORT] [--insecure]"""
    own = {"--one-shot": "", "--sites": "", "--certificates": "", "--address": "0.0.0.0:8000"}
    options, rest = _split(args, own)
    insecure, rest = _insecure(rest)
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; with --one-shot allowed are {', '.join(own)} and --insecure")
    sites = _names(options["--sites"])
    if not sites:
        raise ConfigError("--sites is empty; name the sites, e.g. --sites north,south")
    _deployment()  # or say what is missing
    from consilium.oneshot.network import collect

    keys = _keys(options, insecure, parse_address(options["--address"], "--address"), "server")
    try:
        collect(Path(options["--one-shot"]), sites, options["--address"], keys, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on collecting") from None


def _offer(args: list[str]) -> None:
    """consilium client --one-shot FILE --name A --server HOST:PORT --certificates DIR [--state DIR] [--port N]
    [--insecure]"""
    own = {"--one-shot": "", "--name": "", "--server": "", "--certificates": "", "--state": "", "--port": "9094"}
    options, rest = _split(args, own)
    insecure, rest = _insecure(rest)
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; with --one-shot allowed are {', '.join(own)} and --insecure")
    _deployment()
    from consilium.oneshot.network import offer

    keys = _keys(options, insecure, parse_address(options["--server"], "--server"), None)
    state = Path(options["--state"] or f"offer-{options['--name']}")
    port = _whole(options, "--port", 1)
    offer(Path(options["--one-shot"]), options["--name"], options["--server"], keys, state, port)


def client_command(args: list[str]) -> None:
    """consilium client RECIPE|FILE.json --name A --server HOST:PORT --certificates DIR [--state DIR] [--port N]
    [--insecure] [--max-lr X] [--max-epochs N] [--max-steps N] [--max-batch-size N] [--max-tokens N] [--max-seconds S]
    [--max-rounds N] [--max-bytes SIZE] [--max-memory SIZE] [--max-state SIZE] [--max-days N]
    [flags of the experiment: --data.*, --model.*, --memory, --device]"""
    if any(arg.partition("=")[0] == "--one-shot" for arg in args):
        return _offer(args)
    default, rest = _experiment(args, "client")
    own = {"--name": "", "--server": "", "--certificates": "", "--state": "", "--port": "9094"}
    most = {
        f"--max-{field.replace('_', '-')}": value for field, value in dataclasses.asdict(_deployment().Limits()).items()
    }
    own |= {flag: str(value) for flag, value in most.items()}
    options, rest = _split(rest, own)
    insecure, rest = _insecure(rest)
    experiment = _parse(type(default), rest, f"consilium client {args[0]}", default, options)
    if not args[0].endswith(".json"):
        experiment = _of_one_client(experiment, {arg.partition("=")[0] for arg in rest})
    deployment = _deployment()
    keys = _keys(options, insecure, parse_address(options["--server"], "--server"), None)
    state = Path(options["--state"] or f"site-{options['--name']}")
    limits: dict[str, Any] = {}
    for flag, value in most.items():
        given = options[flag] if isinstance(value, str) else _number(options, flag)
        limits[flag[6:].replace("-", "_")] = _whole(options, flag, 1) if type(value) is int else given
    port = _whole(options, "--port", 1)
    deployment.client(
        experiment, options["--name"], options["--server"], keys, state, port, deployment.Limits(**limits)
    )


def _of_one_client(experiment: "Experiment", given: set[str]) -> "Experiment":
    """Take a site's data as that of one client, unless its flags say how it is dealt."""
    data = experiment.data
    if "--data.clients" in given or not hasattr(data, "clients") or len(getattr(data, "tasks", ())) > 1:
        return experiment
    skewed = "--data.partition" not in given and getattr(data, "partition", "") in ("pathological", "dirichlet")
    data = dataclasses.replace(data, clients=1, **({"partition": "iid"} if skewed else {}))
    return dataclasses.replace(experiment, data=data)


def _names(text: str) -> list[str]:
    """The sites of --sites."""
    from consilium.core import CLIENT_ID

    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not CLIENT_ID.fullmatch(name):
            raise ConfigError(f"--sites names {name!r}; give names of A-Z a-z 0-9 . _ - separated by commas")
    if len(set(names)) < len(names):
        raise ConfigError(f"--sites names a site twice: {text}")
    return names


def _deployment() -> Any:
    try:
        from consilium import deployment
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    return deployment


def _insecure(args: list[str]) -> tuple[int, list[str]]:
    """How often --insecure was said, and the other arguments."""
    return args.count("--insecure"), [arg for arg in args if arg != "--insecure"]


def _keys(options: dict[str, str], insecure: int, address: Address, part: str | None) -> Path | None:
    """The folder of keys; None where plain text was asked for, on loopback once, elsewhere twice."""
    if not insecure:
        if not options["--certificates"]:
            raise ConfigError("--certificates is missing: name the folder that `consilium certificates` made")
        return Path(options["--certificates"]) / part if part else Path(options["--certificates"])
    if insecure < 2 and not address.is_loopback:
        raise ConfigError(
            f"{address.host} is not this machine: --insecure would send models in plain text and let anybody take "
            "part; use --certificates, or say --insecure twice"
        )
    return None


# --- parsing ------------------------------------------------------------------------------------------------------


def _experiment(args: list[str], command: str) -> "tuple[Experiment, list[str]]":
    """The experiment named by the first argument, and the arguments after it."""
    from consilium.experiment import from_json
    from consilium.recipes import RECIPES, find

    find_all = "see `consilium list`"
    if not args:
        raise ConfigError(f"consilium {command} needs a recipe; {find_all}")
    if args[0] in ("-h", "--help"):
        find("fedmoe-docstrings")
        commands = {
            "run": run_command, "compare": compare_command, "plan": plan_command, "server": server_command,
            "client": client_command,
        }  # fmt: skip
        doc = commands[command].__doc__
        out.print(f"{doc}\n\nRecipes: {', '.join(sorted(RECIPES))}", markup=False, highlight=False)
        out.print(f"Flags of an experiment: consilium {command} RECIPE --help", markup=False, highlight=False)
        raise SystemExit(0)
    if (Path(args[0]) / "config.json").is_file():  # a run's directory
        args = [str(Path(args[0]) / "config.json"), *args[1:]]
    if args[0].endswith(".json"):
        try:
            saved = json.loads(Path(args[0]).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{args[0]} is not a saved experiment: {type(error).__name__}") from error
        if not isinstance(saved, dict):
            raise ConfigError(f"{args[0]} is not a saved experiment: it holds a {type(saved).__name__}")
        experiment = from_json(saved.get("experiment", saved))
    else:
        experiment = find(args[0]).make()
    rest = args[1:]
    if hasattr(experiment.data, "target"):  # texts and tables say target for what images call label: both are taken
        rest = [re.sub(r"^--data\.label(?=$|=)", "--data.target", arg) for arg in rest]
    return experiment, rest


def _split(args: list[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Take a command's own options out of the arguments; the rest belongs to the experiment."""
    options, rest, i = dict(defaults), [], 0
    while i < len(args):
        name, has_value, value = args[i].partition("=")
        if name not in defaults:
            rest.append(args[i])
        elif has_value:
            options[name] = value
        elif i + 1 < len(args):
            i += 1
            options[name] = args[i]
        else:
            raise ConfigError(f"{name} needs a value, e.g. {name} {defaults[name]}")
        i += 1
    return options, rest


def _whole(options: dict[str, str], name: str, least: int) -> int:
    text = options[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number >= {least}")
    return int(text)


def _number(options: dict[str, str], name: str) -> float:
    try:
        return float(options[name])
    except ValueError:
        raise ConfigError(f"{name} is {options[name]!r}; it must be a number") from None


def _parse(
    kind: Any, args: list[str], prog: str, default: Any = None, own: Mapping[str, str | None] | None = None
) -> Any:
    """tyro, with its complaints as one line, and misspelt flags answered with the nearest.

    Args:
        default: the experiment that the flags change. own: the command's own flags, with their values.
    """
    extra = {"default": default} if default is not None else {}
    if own:
        words = {flag: flag if value is None else f"{flag} {value or 'X'}" for flag, value in own.items()}
        told = "\n".join(f"{words[flag]}: {OWN[flag]}" for flag in own)
        extra["description"] = (
            f"Beside the flags of the experiment, the command has its own, with these defaults:\n\n{told}"
        )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            value, unknown = tyro.cli(
                kind, args=args, prog=prog, return_unknown_args=True, config=(tyro.conf.AvoidSubcommands,), **extra
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(f"{_complaint(said.getvalue())}; see `{prog} --help`") from None
    if unknown:
        flags = [*(_flags(default) if default is not None else []), *(own or ())]
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"see `{prog} --help`"
        if difflib.get_close_matches(name, {"--algorithms", "--seeds", "--jobs"} - set(flags), n=1, cutoff=0.9):
            hint = "that is for `consilium compare`"
        raise ConfigError(f"unknown argument {unknown[0]!r}; {hint}")
    return value


def _complaint(box: str) -> str:
    """What tyro says in the first part of its box, as one line: the flag, the value, what is allowed."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯")))  # between the rules, drawn or typed
    text = " ".join(next((part for full, part in parts if full), ())).rstrip(".")
    if match := re.search(r"invalid choice '(.*?)' for argument '(.+?)'.*?\((.*)\)", text):
        allowed = re.findall(r"'(.*?)'", match[3])
        near = difflib.get_close_matches(match[1], allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{match[2]} is {match[1]!r}; allowed are {', '.join(allowed)}{hint}"
    text = text.removeprefix("Error parsing ")
    text = text.replace("invalid literal for int() with base 10:", "it must be a whole number, not")
    return text.replace("could not convert string to float:", "it must be a number, not")


def _flags(value: Any, prefix: str = "--") -> list[str]:
    """Every flag of an experiment, e.g. --algorithm.alpha."""
    flags = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        flags += _flags(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return flags


# --- running and finishing ----------------------------------------------------------------------------------------


def _voice(args: list[str]) -> tuple[bool, bool, list[str]]:
    """Whether --quiet and --json were said, and the other arguments."""
    return "--quiet" in args, "--json" in args, [arg for arg in args if arg not in ("--quiet", "--json")]


@contextlib.contextmanager
def _speaking(quiet: bool, as_json: bool) -> "Iterator[JsonLines | None]":
    """Within it, --quiet silences `out`, and --json hands stdout over to the lines of JSON that are yielded: whatever
    prints, ours or a library's, prints to stderr."""
    from consilium.watch import JsonLines

    lines = JsonLines(sys.stdout) if as_json else None
    out.quiet = quiet
    try:
        with contextlib.redirect_stdout(sys.stderr) if lines else contextlib.nullcontext():
            yield lines
    finally:
        out.quiet = False


def _tracked(text: str) -> list[str]:
    """--track as flags for a run's own process; mistakes are found before anything is begun."""
    if not text:
        return []
    from consilium.tracking import named

    return ["--track", ",".join(named(text))]


def _followed(work: "Callable[[Watch], Any]", folder: Path, track: str, lines: "JsonLines | None") -> None:
    """Run with progress, tracked where that was asked for, and finish; on Ctrl-C say how to go on."""
    from consilium.tracking import Tracking, named
    from consilium.watch import Several, Terminal

    with Tracking(folder, named(track)) as tracking:
        try:
            with Terminal(out) as terminal:
                work(Several([terminal, *([lines] if lines else []), tracking]))
        except KeyboardInterrupt:
            begun = (folder / "config.json").exists()
            raise KeyboardInterrupt(f"; `consilium resume {folder}` continues the run" if begun else "") from None
        tracking.report(_finish([folder], None, lines))


def _finish(folders: list[Path], target: Path | None = None, lines: "JsonLines | None" = None) -> Path:
    """Print the table, write the report, say where it is; returns the report's path.

    Args:
        lines: of --json; gets the summary of the run, or of each by its name with the rows of the table.
    """
    from consilium.report import methods, print_clients, print_table, read_runs, rows, table_files, write_report

    print_table(folders, out)
    if len(folders) == 1:
        print_clients(folders[0], out)
    if target is None:
        target = (folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))) / "report.html"
    page = write_report(folders, target)
    several = len(folders) > 1
    tables = [str(path) for path in table_files(page) if several and path.is_file()]
    if lines:
        told = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}
        more = {"table": rows(methods(read_runs(folders))), "tables": tables} if several else {}
        lines.line({"summary": told if several else told[folders[0].name], **more, "report": str(page)})
    elif out.quiet:
        print(one_line(f"report: {page}", 4000))
    else:
        if tables:
            print_line(out, f"table: {', '.join(tables)}")
        print_line(out, f"report: {page}")
    return page


if __name__ == "__main__":
    sys.exit(main())
