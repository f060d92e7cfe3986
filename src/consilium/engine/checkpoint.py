"""What a run leaves on disk to continue from: server states and client states, atomic, one file each.

    checkpoints/round-00012.safetensors     the server after round 12, and the state version of every client
    clients/<id>/round-00011.safetensors    a client's state as it left round 11

A round is committed when its checkpoint is renamed into place. Client states are written under the number of their
round before that, and the checkpoint says which version counts, so a run killed at any moment finds all parts of the
last committed round and nothing else. The last two checkpoints are kept, with the client states that they name, so a
broken newest one costs a round and not the run. Every file carries its own SHA-256.
"""

import hashlib
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
_ZEROS = "0" * 64
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
        former: the versions as the last commit left them.
    """

    folder: Path
    versions: dict[ClientId, int] = field(default_factory=dict)
    former: dict[ClientId, int] = field(init=False)

    def __post_init__(self) -> None:
        self.former = dict(self.versions)

    def load(self, client: ClientId) -> ClientState:
        """The committed state, empty for a client that has none.

        Raises:
            CheckpointError: if the file is lost or broken.
        """
        if client not in self.versions:
            return ClientState()
        path = self._path(client, self.versions[client])
        try:
            payload = _unseal(path.read_bytes())
        except (OSError, PayloadError) as error:
            raise CheckpointError(f"the state of client {client} in {path} cannot be read: {error}") from error
        return ClientState(payload.group("params"), dict(payload.scalars))

    def save(self, client: ClientId, state: ClientState, round: int) -> None:
        """Keep a state under its round; an empty state leaves no file."""
        self.count(client, round, self.write(client, state, round))

    def write(self, client: ClientId, state: ClientState, round: int) -> bool:
        """Write a state, which does not count yet; an empty one leaves no file. Returns whether there is one."""
        if not (state.params or state.scalars):
            return False
        write_atomic(self._path(client, round), _seal(Payload({"params": state.params}, state.scalars)))
        return True

    def count(self, client: ClientId, round: int, kept: bool) -> None:
        """From now on the state that the client wrote in that round counts; kept: whether it wrote one."""
        if kept:
            self.versions[client] = round
        else:
            self.versions.pop(client, None)

    def prune(self, oldest: int) -> None:
        """Remove the versions that were superseded before round `oldest`, the oldest one that may be resumed from."""
        for folder in self.folder.glob("*/"):
            for path, _ in [item for item in _numbered(folder) if item[1] <= oldest][:-1]:
                path.unlink()

    def commit(self) -> None:
        """Remove what neither the newest checkpoint nor the one before names, also what was saved and never counted."""
        for folder in self.folder.glob("*/"):
            kept = {self.versions.get(folder.name), self.former.get(folder.name)}
            for path, round in _numbered(folder):
                if round not in kept:
                    path.unlink()
        self.former = dict(self.versions)

    def drop(self, client: ClientId, after: int, before: int) -> None:
        """Remove a client's versions of rounds between the two, which were saved and never counted."""
        for path, round in _numbered(self.folder / client):
            if after < round < before:
                path.unlink()

    def _path(self, client: ClientId, round: int) -> Path:
        return self.folder / client / f"round-{round:05d}.safetensors"


def save_checkpoint(folder: Path, round: int, server: Payload, store: ClientStore) -> None:
    """Commit a round: the server's state and the clients' versions in one atomic file; older ones are pruned."""
    scalars = {**server.scalars, "engine/round": round, "engine/versions": json.dumps(store.versions)}
    write_atomic(folder / f"round-{round:05d}.safetensors", _seal(Payload(server.groups, scalars)))
    for path, _ in _numbered(folder)[:-KEEP]:
        path.unlink()
    store.commit()


def load_checkpoint(folder: Path) -> tuple[int, Payload, dict[ClientId, int]] | None:
    """The newest checkpoint that can be read: its round, the server's state, the clients' versions. None: no file.

    A broken newest file is passed over with a warning that names both.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    broken = []
    for path, round in reversed(_numbered(folder)):
        try:
            payload = _unseal(path.read_bytes())
        except (OSError, PayloadError) as error:
            broken.append(f"{path.name} ({error})")
            continue
        if broken:
            warnings.warn(f"cannot read {', '.join(broken)}; continuing from {path.name}", stacklevel=2)
        scalars = dict(payload.scalars)
        versions = json.loads(str(scalars.pop("engine/versions")))
        scalars.pop("engine/round")
        return round, Payload(payload.groups, scalars), versions
    if broken:
        raise CheckpointError(f"none of the checkpoints in {folder} can be read: {', '.join(broken)}")
    return None


def _numbered(folder: Path) -> list[tuple[Path, int]]:
    """The files of a folder that carry a round's number, oldest first."""
    files = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("round-*.safetensors")]
    return sorted(((path, int(match[1])) for path, match in files if match), key=lambda item: item[1])


def _seal(payload: Payload) -> bytes:
    """The payload's bytes with a SHA-256 over them in the header, taken while its place held zeros."""
    blob = encode(Payload(payload.groups, {"engine/sha256": _ZEROS, **payload.scalars}))
    return blob.replace(_ZEROS.encode(), hashlib.sha256(blob).hexdigest().encode(), 1)


def _unseal(blob: bytes) -> Payload:
    """The payload that `_seal` was given.

    Raises:
        PayloadError: if a bit has changed since.
    """
    payload = decode(blob)
    scalars = dict(payload.scalars)
    digest = str(scalars.pop("engine/sha256", ""))
    if not digest or hashlib.sha256(blob.replace(digest.encode(), _ZEROS.encode(), 1)).hexdigest() != digest:
        raise PayloadError("its SHA-256 does not match")
    return Payload(payload.groups, scalars)
