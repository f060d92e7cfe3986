"""Detection of pointer files, which `git clone` leaves if Git LFS or git-annex keeps the content."""

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
"""Maximum size of a Git LFS pointer in bytes, by its specification."""


def refuse_pointer(file: Path | IO[bytes], kind: type[ConsiliumError], name: str = "") -> None:
    """Raise an error if a file does not contain data but a pointer to it.

    Args:
        file: a path, which is ignored if it cannot be read, or an open file, whose position is restored.
        kind: class of the error.
        name: what to call the file; "": its path.
    """
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:
                head = stream.read(_LONGEST + 1)
        else:
            position = file.tell()
            head = file.read(_LONGEST + 1)
            file.seek(position)
    except OSError:
        return
    for prefix, (system, command) in _KINDS.items():
        if head.startswith(prefix) and len(head) <= _LONGEST:
            raise kind(f"{name or file} is a {system} pointer of {len(head)} bytes: run {command}")


def refuse_pointers(path: Path, kind: type[ConsiliumError]) -> None:
    """Raise an error if a path is a pointer, or a folder that directly contains one; subfolders are not searched."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            refuse_pointer(file, kind)
