"""A file that a site offers to its server and hands over in pieces; the server requests each piece by its offset.

    site.json             the site's name
    offered.safetensors   the file, in the site's state folder

The server keeps the pieces that have arrived and requests the missing ones, so a transfer resumes after either end was
away.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from consilium.engine.checkpoint import write_atomic
from consilium.engine.judge import number
from consilium.errors import ConfigError, PayloadError
from consilium.escape import one_line
from consilium.inside import open_here, refuse_links

__all__ = ["OFFERED", "PIECE", "piece", "save_offer", "site_name"]

OFFERED = "offered.safetensors"
PIECE = 8 << 20
"""Largest size of a piece in bytes."""


def save_offer(settings: Path, name: str, blob: bytes) -> None:
    """Write a site's settings and the file that it offers.

    Raises:
        ConfigError: if the folder is the state of another site, or of a site that takes part in rounds.
    """
    refuse_links(settings.parent, ("flower",))
    if settings.exists() and (site_name(settings) != name or not (settings.parent / OFFERED).exists()):
        raise ConfigError(f"{settings.parent} is the state of another site or run; choose another --state")
    settings.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file, content in ((settings.parent / OFFERED, blob), (settings, json.dumps({"name": name}).encode())):
        write_atomic(file, content)
        file.chmod(0o600)


def site_name(settings: Path) -> str:
    """Return the name in a site's settings.

    Raises:
        ConfigError: if they cannot be read.
    """
    try:
        return str(json.loads(settings.read_text())["name"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"the site's settings in {settings.parent} cannot be read: {type(error).__name__}") from error


def piece(settings: Path, offset: Any) -> dict[str, str | int | bytes]:
    """Return one piece of the offered file: name, size, sha256 of the whole, offset, and bytes.

    Raises:
        PayloadError: if nothing is offered here, or the offset is not within the file.
    """
    path = settings.parent / OFFERED
    try:
        with open_here(path, os.O_RDONLY, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not number(offset, 0, size, int):
                raise PayloadError(one_line(f"offset is {offset!r}; it must be a whole number within 0..{size}"))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(offset)
            blob = file.read(PIECE)
    except OSError as error:
        raise PayloadError("this site offers no package; start its client with --one-shot FILE") from error
    return {"name": site_name(settings), "size": size, "digest": digest, "offset": offset, "bytes": blob or b""}
