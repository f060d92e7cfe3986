"""The output of a command: its lines, its progress, and the table and the report at the end."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from consilium.escape import one_line, print_line

if TYPE_CHECKING:
    from consilium.loop import Watch
    from consilium.watch import JsonLines

out = Console()
err = Console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Print one line on stderr."""
    err.print(f"consilium: {one_line(text, 4000)}", markup=False, highlight=False)


VOICE = ("--quiet", "--json")
"""The flags that set how much a command with a run prints."""


def split_voice(args: list[str]) -> tuple[bool, bool, list[str]]:
    """Return whether --quiet and --json were given, and the other arguments."""
    return "--quiet" in args, "--json" in args, [arg for arg in args if arg not in ("--quiet", "--json")]


@contextlib.contextmanager
def speaking(quiet: bool, as_json: bool) -> "Iterator[JsonLines | None]":
    """Apply --quiet and --json inside the block.

    The flag --quiet silences `out`. The flag --json reserves stdout for the lines of JSON that are yielded. All other
    output, of this package or a library, then goes to stderr.
    """
    from consilium.watch import JsonLines

    lines = JsonLines(sys.stdout) if as_json else None
    out.quiet = quiet
    try:
        with contextlib.redirect_stdout(sys.stderr) if lines else contextlib.nullcontext():
            yield lines
    finally:
        out.quiet = False


def tracking_flags(text: str) -> list[str]:
    """Return --track as flags for the process of a run; raise ConfigError for a mistake before anything starts."""
    if not text:
        return []
    from consilium.tracking import named

    return ["--track", ",".join(named(text))]


def follow(work: "Callable[[Watch], Any]", folder: Path, track: str, lines: "JsonLines | None") -> None:
    """Run with progress, track the run if requested, and finish; on Ctrl-C, say how to continue."""
    from consilium.tracking import Tracking, named
    from consilium.watch import Several, Terminal

    with Tracking(folder, named(track)) as tracking:
        try:
            with Terminal(out) as terminal:
                work(Several([terminal, *([lines] if lines else []), tracking]))
        except KeyboardInterrupt:
            has_config = (folder / "config.json").exists()
            raise KeyboardInterrupt(f"; `consilium resume {folder}` continues the run" if has_config else "") from None
        tracking.report(finish([folder], None, lines))


def finish(folders: list[Path], target: Path | None = None, lines: "JsonLines | None" = None) -> Path:
    """Print the table, write the report, print the path of the report, and return it.

    Args:
        lines: lines of --json; they get the summary of the run, or of each by its name with the rows of the table.
    """
    from consilium.report import methods, print_clients, print_table, read_runs, rows, table_files, write_report
    from consilium.rundir import RunDirectory

    print_table(folders, out)
    if len(folders) == 1:
        print_clients(folders[0], out)
    if target is None:
        target = (folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))) / "report.html"
    page = write_report(folders, target)
    has_several = len(folders) > 1
    tables = [str(path) for path in table_files(page) if has_several and path.is_file()]
    if lines:
        summaries = {folder.name: RunDirectory(folder).summary() for folder in folders}
        extras = {"table": rows(methods(read_runs(folders))), "tables": tables} if has_several else {}
        lines.line({"summary": summaries if has_several else summaries[folders[0].name], **extras, "report": str(page)})
    elif out.quiet:
        print(one_line(f"report: {page}", 4000))
    else:
        if tables:
            print_line(out, f"table: {', '.join(tables)}")
        print_line(out, f"report: {page}")
    return page
