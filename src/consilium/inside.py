"""Safety checks for folders that must not lead elsewhere: run directories, the state of a site, models, data sets.

The person who hands over a folder chooses the links and file names in it. Writing through a link overwrites a file
elsewhere, and a file that is read through a link is not covered by the folder's fingerprint.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from consilium.errors import CheckpointError, ConsiliumError

__all__ = ["open_here", "refuse_links", "refuse_name_outside", "refuse_outside", "shards_of"]

_TRACKERS = ("wandb",)
"""Folders of tools that keep links to their own files in a run directory."""


def open_here(path: Path, flags: int, mode: str) -> IO[bytes]:
    """Open a file that must not be a link, without buffering; a new one has the permissions of the umask.

    Raises:
        OSError: if the path is a symbolic link, among others.
    """
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), mode, buffering=0)


def refuse_links(folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Raise an error if a run directory, or the state of a site, contains a symbolic link.

    The folder itself may be a link.

    Args:
        leave_out: subfolders that belong to another program.

    Raises:
        CheckpointError: with the link.
    """
    for link in _links(folder, leave_out):
        is_tracker_link = link.relative_to(folder).parts[0] in _TRACKERS and _leads_into(link, folder)
        if not is_tracker_link:
            raise CheckpointError(f"{link} is a symbolic link, which a run directory must not hold; link to all of it")


def refuse_outside(folder: Path, kind: type[ConsiliumError]) -> None:
    """Raise an error if a link in a folder leads out of it; the hub's cache may link snapshots to blobs."""
    is_hub_cache = folder.resolve().parent.name == "snapshots"
    for link in _links(folder):
        if not _leads_into(link, folder) and not (
            is_hub_cache and _leads_into(link, folder.resolve().parents[1] / "blobs")
        ):
            raise kind(f"{link} leads to {link.resolve()}, outside of {folder}; put the file itself there")


def shards_of(index: Path, kind: type[ConsiliumError]) -> list[str]:
    """Return the file names in an index of shards (`*.safetensors.index.json`), sorted.

    Raises:
        ConsiliumError: of the given type, if the index cannot be read, or names a file that is not next to it or below
            it.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise kind(f"{index} is no index of safetensors ({type(error).__name__}): get it again") from error
    for name in names:
        refuse_name_outside(name, index, kind)
    return sorted(names)


def refuse_name_outside(name: Any, named_in: Path, kind: type[ConsiliumError]) -> None:
    """Raise an error unless a name refers to a file or folder next to, or below, the file that names it."""
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise kind(f"{named_in} names {name!r}, which is outside of {named_in.parent}")


def _links(folder: Path, leave_out: Sequence[str] = ()) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        if Path(directory) == folder:
            folders[:] = [name for name in folders if name not in leave_out]
        yield from (path for name in sorted([*folders, *files]) if (path := Path(directory, name)).is_symlink())


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False
