"""What a run leaves on disk to continue from: server states and client states, atomic, one file each.

    checkpoints/round-00012.safetensors     the server after round 12, and the state version of every client
    clients/<id>/round-00011.safetensors    a client's state as it left round 11

A round is committed when its checkpoint is renamed into place. Client states are written under the number of their
round before that, and the checkpoint says which version counts, so a run killed at any moment finds all parts of the
last committed round and nothing else. Superseded files are removed after the commit.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from consilium.core import ClientId, ClientState, Payload
from consilium.engine.codec import decode, encode
from consilium.errors import CheckpointError, PayloadError

__all__ = ["ClientStore", "append_json", "load_checkpoint", "save_checkpoint", "write_atomic"]

_NAME = re.compile(r"round-(\d{5,})\.safetensors")
KEEP = 2


def write_atomic(path: Path, blob: bytes) -> None:
    """Write a file so that its name holds either the old or the whole new content, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_json(path: Path, record: Mapping[str, object]) -> None:
    """Append one line to a .jsonl file and make it last."""
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass
class ClientStore:
    """Client states on disk, loaded when a client works and at no other time.

    Args:
        folder: `clients/` of the run.
        versions: client -> round of its committed state; clients without one start empty.
    """

    folder: Path
    versions: dict[ClientId, int] = field(default_factory=dict)

    def load(self, client: ClientId) -> ClientState:
        """The committed state, empty for a client that has none.

        Raises:
            CheckpointError: if the file is lost or broken.
        """
        if client not in self.versions:
            return ClientState()
        path = self._path(client, self.versions[client])
        try:
            payload = decode(path.read_bytes())
        except (OSError, PayloadError) as error:
            raise CheckpointError(f"the state of client {client} in {path} cannot be read: {error}") from error
        return ClientState(payload.group("params"), dict(payload.scalars))

    def save(self, client: ClientId, state: ClientState, round: int) -> None:
        """Keep a state under its round; an empty state leaves no file."""
        if state.params or state.scalars:
            blob = encode(Payload({"params": state.params}, state.scalars))
            write_atomic(self._path(client, round), blob)
            self.versions[client] = round

    def prune(self) -> None:
        """Remove every version but the committed ones."""
        for path in self.folder.glob("*/round-*.safetensors"):
            if path != self._path(path.parent.name, self.versions.get(path.parent.name, -1)):
                path.unlink()

    def _path(self, client: ClientId, round: int) -> Path:
        return self.folder / client / f"round-{round:05d}.safetensors"


def save_checkpoint(folder: Path, round: int, server: Payload, store: ClientStore) -> None:
    """Commit a round: the server's state and the clients' versions in one atomic file; older ones are pruned."""
    scalars = {**server.scalars, "engine/round": round, "engine/versions": json.dumps(store.versions)}
    write_atomic(folder / f"round-{round:05d}.safetensors", encode(Payload(server.groups, scalars)))
    for path, _ in _checkpoints(folder)[:-KEEP]:
        path.unlink()
    store.prune()


def load_checkpoint(folder: Path) -> tuple[int, Payload, dict[ClientId, int]] | None:
    """The newest checkpoint that can be read: its round, the server's state, the clients' versions. None: no file.

    A broken newest file is passed over with a warning that names both.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    found = _checkpoints(folder)
    for path, round in reversed(found):
        try:
            payload = decode(path.read_bytes())
        except (OSError, PayloadError) as error:
            warnings.warn(f"checkpoint {path.name} cannot be read ({error}); trying the one before", stacklevel=2)
            continue
        scalars = dict(payload.scalars)
        versions = json.loads(str(scalars.pop("engine/versions")))
        scalars.pop("engine/round")
        return round, Payload(payload.groups, scalars), versions
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def _checkpoints(folder: Path) -> list[tuple[Path, int]]:
    files = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("round-*.safetensors")]
    return sorted(((path, int(match[1])) for path, match in files if match), key=lambda item: item[1])
