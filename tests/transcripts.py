"""Pages of which the `console` blocks are what a terminal shows: commands after "$ ", the lines of a here-document
after "> ", and what was printed. They are run in one folder, block after block, and compared with the page.

Of two lines, words must be equal. "..." in the page stands for anything: seconds, hashes. A number with a decimal point
(scores, megabytes) may differ by 0.1 or a sixth, as it does from one kind of processor to another.
"""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from processes import ENVIRONMENT

import consilium

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"(\d+\.\d+)")
SECONDS = re.compile(r"(?<![\w.])\d+(\.\d)? s\b")


@dataclass(frozen=True)
class Step:
    """A command, with its here-document if it has one, and the lines that it printed."""

    command: str
    output: tuple[str, ...]

    @property
    def shown(self) -> str:
        """As it stands in a page."""
        first, *more = self.command.splitlines()
        return "\n".join([f"$ {first}", *(f"> {line}".rstrip() for line in more), *self.output])


def steps(page: str) -> list[Step]:
    """Of all console blocks of a page."""
    found = []
    for block in BLOCK.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            first, *lines = part.rstrip("\n").splitlines()
            more = next((i for i, line in enumerate(lines) if not line.startswith(">")), len(lines))
            command = "\n".join([first, *(line[2:] for line in lines[:more])])
            found.append(Step(command, tuple(line.rstrip() for line in lines[more:])))
    return found


def ran(command: str, folder: Path, seconds: float = 300) -> tuple[str, ...]:
    """What a command prints on stdout in a shell 80 columns wide; fails unless it exits with 0 and gives no warning."""
    source = Path(consilium.__file__).parent.parent
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "80", "PYTHONPATH": str(source), "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0 and "consilium: " not in done.stderr, f"{command}\n{done.stdout}{done.stderr}"
    return tuple(line.rstrip() for line in done.stdout.rstrip("\n").splitlines())


def same(shown: str, printed: str) -> bool:
    """Whether a line of a page is one that was printed. How wide columns are does not count."""
    shown, printed = (re.sub(r"─+", "─", " ".join(line.split())) for line in (shown, printed))
    pattern = "".join(
        rf"({NUMBER.pattern[1:-1]})" if NUMBER.fullmatch(part) else re.escape(part).replace(r"\.\.\.", ".*?")
        for part in NUMBER.split(shown)
    )
    found = re.fullmatch(pattern, printed)
    return found is not None and all(
        math.isclose(float(a), float(b), rel_tol=1 / 6, abs_tol=0.1)
        for a, b in zip(NUMBER.findall(shown), found.groups(), strict=True)
    )


def differences(step: Step, printed: tuple[str, ...]) -> list[str]:
    """Lines of the page that were not printed, and the other way round; [] if there are none."""
    lines = [*zip(step.output, printed, strict=False)]
    wrong = [f"page:    {a}\nprinted: {b}" for a, b in lines if not same(a, b)]
    return wrong + [f"only in one: {line}" for line in (*step.output[len(lines) :], *printed[len(lines) :])]


def rewritten(page: str, printed: list[tuple[str, ...]]) -> str:
    """The page with what was printed now; a step whose old output still holds is left as it is."""
    made = iter(
        step if not differences(step, lines) else Step(step.command, tuple(SECONDS.sub("... s", x) for x in lines))
        for step, lines in zip(steps(page), printed, strict=True)
    )

    def block(match: re.Match) -> str:
        number = len(steps(match[0]))
        return "```console\n" + "\n".join(next(made).shown for _ in range(number)) + "\n```"

    return BLOCK.sub(block, page)


def python_alone(command: str) -> bool:
    """Whether a step runs Python that imports nothing of this package."""
    return command.startswith("python ") and "consilium" not in command.replace(sys.prefix, "")
