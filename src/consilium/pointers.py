"""Files that only stand for others: what `git clone` leaves where Git LFS or git-annex keeps the content."""

from pathlib import Path
from typing import IO

from consilium.errors import ConsiliumError

__all__ = ["refuse_pointer", "refuse_pointers"]

_KINDS = {
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
_LONGEST = 1024
"""Bytes of a pointer of Git LFS at most, by its specification."""


def refuse_pointer(file: Path | IO[bytes], kind: type[ConsiliumError], name: str = "") -> None:
    """Raise an error if a file holds no content but a pointer to it.

    Args:
        file: a path, of which nothing is said if it cannot be read, or an open file, whose position stays.
        kind: of the error. name: what to call the file; "": its path.
    """
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                head = opened.read(_LONGEST + 1)
        else:
            place = file.tell()
            head = file.read(_LONGEST + 1)
            file.seek(place)
    except OSError:
        return
    for mark, (system, command) in _KINDS.items():
        if head.startswith(mark) and len(head) <= _LONGEST:
            raise kind(f"{name or file} is a {system} pointer of {len(head)} bytes: run {command}")


def refuse_pointers(path: Path, kind: type[ConsiliumError]) -> None:
    """Raise an error if a path is a pointer, or a folder that holds one; folders in it are not looked into."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            refuse_pointer(file, kind)
