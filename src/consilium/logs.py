"""Logging of the commands that run for days: levels, times, and one escaped line per record.

Modules log to `logging.getLogger(__name__)`. A command chooses where the records go:

    to_screen           the commands of one machine: "consilium: warning: ..." on stderr
    start               a server and a site: time, level and text on stdout, and in a file that rotates
    start_from_environment   the same in the processes that Flower starts
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

from consilium.errors import ConfigError
from consilium.escape import one_line, terminal
from consilium.inside import open_here

__all__ = ["LEVELS", "flower_level", "start", "start_from_environment", "to_screen"]

LEVELS = ("debug", "info", "warning", "error")
"""Values of --log-level. Messages of Flower below a warning are shown with "debug" alone."""
LEVEL, FILE = "CONSILIUM_LOG_LEVEL", "CONSILIUM_LOG_FILE"
"""Environment variables that hold the level and the path of the log file."""
SIZE, COPIES = 5_000_000, 5
"""Bytes after which a log file is renamed to FILE.1, and number of such older files."""


class _Lines(logging.Formatter):
    """A formatter of records as one line each, followed by the traceback if there is one, with all text escaped."""

    default_msec_format = ""

    def format(self, record: logging.LogRecord) -> str:
        text = one_line(record.getMessage(), 4000)
        line = f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {record.levelname.lower():7} {text}"
        return f"{line}\n{terminal(self.formatException(record.exc_info), keep=chr(10))}" if record.exc_info else line


class _SharedFile(RotatingFileHandler):
    """A log file that rotates and that several processes write; none keeps it open between two records."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, maxBytes=SIZE, backupCount=COPIES, encoding="utf-8", delay=True)

    def _open(self) -> io.TextIOWrapper:
        raw = open_here(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab")
        return io.TextIOWrapper(raw, encoding="utf-8", write_through=True)

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self.stream:
            self.stream.close()
            self.stream = None


class _Screen(logging.Handler):
    """A handler that gives the level and the text of each record to a function."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"{record.levelname.lower()}: {one_line(record.getMessage(), 4000)}")


@contextlib.contextmanager
def to_screen(say: Callable[[str], None]) -> Iterator[None]:
    """Pass warnings and errors to a function inside the block, unless `start` has been called in it."""
    logger, handler = logging.getLogger("consilium"), _Screen(say)
    handlers, level = logger.handlers[:], logger.level
    variables = {name: os.environ.get(name) for name in (LEVEL, FILE)}
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def start(level: str = "info", file: Path | None = None) -> None:
    """Log to stdout, and to a file if one is given, from this level on; earlier handlers are replaced.

    Environment variables hold the settings, so that processes started by this one can repeat them.

    Args:
        level: one of `LEVELS`.
        file: path of the log file; it must not be a link.

    Raises:
        ConfigError: for another level.
    """
    if level not in LEVELS:
        raise ConfigError(f"--log-level is {level!r}; allowed are {', '.join(LEVELS)}")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None:
        handlers.append(_SharedFile(file))
    for handler in handlers:
        handler.setFormatter(_Lines())
    logger = logging.getLogger("consilium")
    logger.handlers[:] = handlers
    logger.setLevel(level.upper())
    os.environ.update({LEVEL: level, FILE: str(file.absolute()) if file else ""})


def start_from_environment() -> None:
    """Repeat a parent process's `start` in this process; do nothing if there was none."""
    if level := os.environ.get(LEVEL):
        file = os.environ.get(FILE)
        start(level, Path(file) if file else None)
        logging.getLogger("flwr").setLevel(flower_level())


def flower_level() -> str:
    """Return the level from which Flower's own messages are shown: all with level "debug", else warnings."""
    return "DEBUG" if os.environ.get(LEVEL) == "debug" else "WARNING"
