"""The commands `consilium report` and `consilium list`."""

from pathlib import Path
from typing import Annotated

import tyro

import consilium
from consilium.cli.catalogue import make_catalogue, read_catalogue
from consilium.cli.parsing import parse
from consilium.cli.screen import finish, out
from consilium.errors import ConfigError
from consilium.plugins import has_plugins


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

    folders, target = parse(parameters, args, "consilium report")
    if not folders:
        raise ConfigError("no run named; give at least one run directory, e.g. `consilium report runs/*`")
    finish(list(folders), target)


def list_command(args: list[str]) -> None:
    """consilium list"""
    parse(lambda: None, args, "consilium list")
    catalogue = make_catalogue(theirs=True) if has_plugins() else read_catalogue()
    for title, kind in (("Recipes", "recipes"), ("Algorithms", "algorithms")):
        out.print(f"[bold]{title}[/bold]")
        for name, entry in sorted(catalogue[kind].items()):
            out.print(f"  {name:24} {entry['summary']}", highlight=False, soft_wrap=True)
    out.print("[bold]Shipped models[/bold]")
    for path in sorted((Path(consilium.__file__).parent / "models").glob("*/model.safetensors")):
        out.print(f"  {path.parent.name:24} {path.stat().st_size / 1e6:.1f} MB", highlight=False)
