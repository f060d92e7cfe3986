"""The directory of a run, `RunDirectory`: every file that `run` writes into it and that others read.

runs/<name>/
  config.json       the resolved experiment, library versions, git revision, status
  partition.json    which client holds which data
  metrics.jsonl     one record per round, with its ledger       events.jsonl   what happened to which client
  structure.jsonl   which client holds which experts            summary.json   the result
  completions.json  completions by the models, if asked for
  checkpoints/  clients/  report.html
"""

import difflib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium.core import Server
from consilium.engine.checkpoint import append_json, write_atomic
from consilium.engine.structure import NAME as STRUCTURE
from consilium.engine.structure import OLD as OLD_STRUCTURE
from consilium.engine.structure import StructureLog, convert, fold
from consilium.errors import CheckpointError, ConfigError, RoundError
from consilium.inside import open_here, refuse_links

__all__ = ["SITES", "RunDirectory"]

SITES = {"type": "sites"}
"""The entry "data" in the config.json of a deployment's run."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run on disk."""

    path: Path

    # --- reading ----------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return True if a run has begun here."""
        return (self.path / "config.json").exists()

    def config(self) -> dict[str, Any]:
        """Read config.json.

        Raises:
            CheckpointError: if the folder is not a run, or contains a symbolic link.
        """
        refuse_links(self.path)
        runs = sorted(str(path.parent) for path in self.path.glob("*/config.json"))
        if runs and not self.exists():
            raise CheckpointError(f"{self.path} is a comparison; name one of its runs: {', '.join(runs)}")
        try:
            config = json.loads((self.path / "config.json").read_text())
            experiment, status = config["experiment"], config["status"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(self._not_a_run(error)) from error
        return {**config, "experiment": experiment, "status": status}

    def _not_a_run(self, error: Exception) -> str:
        """Return why the folder is not a run, with the run that may have been meant."""
        path = self.path
        if path.is_dir():
            return f"{path} is not a run directory: config.json {type(error).__name__}"
        candidates = [
            folder for folder in (Path("runs") / path.name, path.parent / "runs" / path.name) if folder.is_dir()
        ]
        runs = [config.parent for root in (path.parent, Path("runs")) for config in root.glob("*/config.json")]
        similar_names = difflib.get_close_matches(path.name, [folder.name for folder in runs])
        candidates += [folder for folder in runs if folder.name in similar_names]
        hint = f"; did you mean {candidates[0]}?" if candidates else ""
        return f"{path} is not a run directory: it does not exist{hint}"

    def partition(self) -> dict[str, Any]:
        """Read partition.json."""
        return self._read("partition.json")

    def summary(self) -> dict[str, Any] | None:
        """Read summary.json; return None before the run has finished."""
        return self._read("summary.json") if (self.path / "summary.json").exists() else None

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); start a new run") from error

    def rounds(self) -> Iterator[dict[str, Any]]:
        """Yield the rounds in metrics.jsonl, without those that were abandoned and retried."""
        return (record for record in self.attempts() if not record.get("abandoned"))

    def attempts(self) -> Iterator[dict[str, Any]]:
        """Yield all rounds in metrics.jsonl, abandoned ones included."""
        return _lines(self.path / "metrics.jsonl")

    def structure(self) -> dict[str, Any]:
        """Return which client holds which experts, see `engine.structure.fold`; also of a run of an earlier version."""
        old_path = self.path / OLD_STRUCTURE
        if old_path.exists() and not (self.path / STRUCTURE).exists():
            return fold([]) | self._read(OLD_STRUCTURE)
        return fold(_lines(self.path / STRUCTURE))

    # --- writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, grace: float = 0.0) -> Iterator[None]:
        """Lock the directory against other processes; the lock ends with the process, however it ends.

        Args:
            grace: seconds to wait for another process that has the lock.

        Raises:
            CheckpointError: if another process still has it after that time, or if a part of the directory is a link,
                because writing through it would change files elsewhere.
        """
        refuse_links(self.path)
        with open_here(self.path / ".lock", os.O_WRONLY | os.O_CREAT, "wb") as file:
            end = time.monotonic() + grace
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() >= end:
                        raise CheckpointError(f"{self.path} is in use by another process") from error
                time.sleep(0.1)
            yield

    def refuse_a_second_run(self) -> None:
        """Raise ConfigError if the folder contains a run, or a comparison of runs."""
        if self.exists() or any(self.path.glob("checkpoints/*.safetensors")):
            raise ConfigError(f"{self.path} already holds a run: resume it, or choose another --name or --out")
        if any(self.path.glob("*/config.json")):
            raise ConfigError(f"{self.path} holds a comparison of runs; choose another --name or --out")

    @contextmanager
    def created(self) -> Iterator[None]:
        """Create the folder, and restore the disk's former state if the block fails before a round was recorded.

        Raises:
            ConfigError: if the folder cannot be created.
        """
        missing_folders = [path for path in (self.path, *self.path.parents) if not path.exists()]
        former_entries = set(self.path.iterdir()) if not missing_folders else set()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made: {error.strerror}; choose another --out") from error
        with self.locked():
            self.refuse_a_second_run()  # another process may have been quicker
            try:
                yield
            except (CheckpointError, RoundError):
                raise
            except Exception:
                if not any((self.path / name).exists() for name in ("metrics.jsonl", "privacy.jsonl", "checkpoints")):
                    self._remove(former_entries, missing_folders)
                raise

    def _remove(self, before: set[Path], made: Sequence[Path]) -> None:
        """Remove everything that was not there before, and the folders that were created."""
        for path in set(self.path.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in made:
            with suppress(OSError):  # the folder is not empty
                path.rmdir()

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file atomically: a reader sees the old file or the new one."""
        write_atomic(self.path / name, json.dumps(value, indent=1, allow_nan=False).encode())

    def structure_log(self) -> StructureLog:
        """Return a writer that appends to structure.jsonl."""
        return StructureLog(self.path / STRUCTURE, _lines(self.path / STRUCTURE))

    def append(
        self,
        record: Mapping[str, Any],
        events: Sequence[Mapping[str, Any]],
        server: Server,
        structure: StructureLog,
    ) -> None:
        """Append the records of a round, before its checkpoint commits it; a repeated round writes them again."""
        append_json(self.path / "metrics.jsonl", record)
        for event in events:
            append_json(self.path / "events.jsonl", event)
        if not record["abandoned"]:
            structure.add(record["round"], server)

    def truncate(self, first: int) -> None:
        """Drop what rounds from `first` on have written, since no checkpoint committed them.

        Raises:
            CheckpointError: if a record of an earlier round is missing or cannot be read.
        """
        if (old_path := self.path / OLD_STRUCTURE).exists():
            convert(old_path, first)
        for name in ("metrics.jsonl", "events.jsonl", STRUCTURE):
            path = self.path / name
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                committed_lines = [
                    line for i, line in enumerate(lines, 1) if _is_committed(path, i, line, len(lines), first)
                ]
                write_atomic(path, b"".join(committed_lines))
        numbers = [record["round"] for record in self.rounds()]
        if numbers != list(range(1, first)):
            raise CheckpointError(
                f"{self.path / 'metrics.jsonl'} tells of the rounds {numbers}, committed are 1 to {first - 1}: a part "
                "of it is lost; put the file back"
            )


def _is_committed(path: Path, number: int, line: bytes, last: int, first: int) -> bool:
    """Return True if a line is of a round before `first`, or of an abandoned try of that round.

    Raises:
        CheckpointError: for a line that cannot be read, unless it is the last: the torn line of a killed run.
    """
    try:
        record = _record(path, number, line)
    except CheckpointError:
        if number == last:
            return False
        raise
    return record["round"] < first or (record["round"] == first and bool(record.get("abandoned")))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a .jsonl file of rounds, without the torn last one of a killed run.

    Raises:
        CheckpointError: for a line that cannot be read.
    """
    if not path.exists():
        return
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _record(path, number, line)


def _record(path: Path, number: int, line: bytes | str) -> dict[str, Any]:
    """Return the record in one line, with its "round" as an integer."""
    try:
        record = json.loads(line)
        return {**record, "round": int(record["round"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}:{number} cannot be read ({type(error).__name__}); put the file back") from error
