"""Checkpoints of a run: server states and client states, one atomically written file each.

    checkpoints/round-00012.safetensors     the server after round 12, and the state version of every client
    clients/<id>/round-00011.safetensors    a client's state after round 11

A round is committed when its checkpoint is renamed into place. Client states are written before that, under the number
of their round, and the checkpoint names the version that counts for each client. A run that is killed at any moment
therefore resumes from all parts of the last committed round and nothing else. The last two checkpoints are kept with
the client states that they name, so a broken newest checkpoint costs a round and not the run. The best checkpoint is
kept, too, if the run names it. Every file carries its own checksum, and every checkpoint describes the run that it
belongs to. A write that fails (on a full disk) raises an error and leaves the existing files unchanged.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from consilium.core import ClientId, ClientState, Payload
from consilium.engine.codec import Buffer, decode, parts
from consilium.errors import CheckpointError, PayloadError
from consilium.inside import open_here

log = logging.getLogger(__name__)

__all__ = [
    "Checkpoint",
    "ClientStore",
    "append_json",
    "load_checkpoint",
    "remove_unfinished",
    "save_checkpoint",
    "write_atomic",
]

_NAME = re.compile(r"round-(\d{5,})\.safetensors")
_ZEROS = "0" * 32
SHA256, XXH3 = "engine/sha256", "engine/xxh3"
KEEP = 2
FORMAT = 2
"""Format of the checkpoints. Every format of a released version stays readable. Up to format 1, the checksum was a
SHA-256."""


class Checkpoint(NamedTuple):
    """A committed round.

    Args:
        round: number of the round.
        server: the server's state.
        versions: client -> round of its committed state.
        begun: description of the run, as given to `save_checkpoint`.
    """

    round: int
    server: Payload
    versions: dict[ClientId, int]
    begun: dict[str, Any]


def write_atomic(path: Path, *parts: Buffer) -> None:
    """Write a file atomically, from one part or several: its name holds either the whole old or the whole new content.

    Raises:
        CheckpointError: if the file cannot be written; its old content is unchanged.
    """
    # A temporary file of a killed process, or a link in its place, is removed and never followed.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        new_folders = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(temporary):
            temporary.unlink()
        with open_here(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "wb") as file:
            for part in parts:
                remainder = memoryview(part)
                while remainder:
                    remainder = remainder[file.write(remainder) :]
            os.fsync(file.fileno())
        temporary.replace(path)
        # The name of a new folder lies in its parent.
        for folder in (path.parent, *(folder.parent for folder in new_folders)):
            _sync(folder)
    except BaseException as error:  # a signal may interrupt the write, too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritten(path, sum(map(len, parts)), error) from error
        raise


def append_json(path: Path, record: Mapping[str, object]) -> None:
    """Append one line to a .jsonl file and fsync it.

    Raises:
        CheckpointError: if the line cannot be written; the file keeps the whole lines that it had before.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    try:
        with open_here(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab") as file:
            size, remainder = file.tell(), memoryview(line)
            try:
                while remainder:
                    remainder = remainder[file.write(remainder) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if not size:  # the file may be new, so its name needs an fsync of the folder
            _sync(path.parent)
    except OSError as error:
        raise _unwritten(path, len(line), error) from error


def _sync(folder: Path) -> None:
    """Fsync a directory so that renames survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritten(path: Path, size: int, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({size:,} bytes: {error.strerror or error}); what was saved before is as it was: "
        "free space, then go on from there"
    )


def remove_unfinished(folder: Path) -> None:
    """Remove the half-written files that a killed process has left in a run directory or in a site's folder."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(".replies-*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class ClientStore:
    """Client states on disk, loaded only while a client works.

    Args:
        folder: `clients/` of the run.
        versions: client -> round of its committed state; clients without one start with an empty state.
        former: the versions at the last commit.
        reset: client -> the reason why its state was discarded.
    """

    folder: Path
    versions: dict[ClientId, int] = field(default_factory=dict)
    former: dict[ClientId, int] = field(init=False)
    reset: dict[ClientId, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.former = dict(self.versions)

    def load(self, client: ClientId) -> ClientState:
        """Return the committed state of a client; it is empty if there is none.

        Raises:
            CheckpointError: if the file is missing or broken.
        """
        if client not in self.versions:
            return ClientState()
        path = self._path(client, self.versions[client])
        try:
            payload = _unseal(path.read_bytes())
        except (OSError, PayloadError) as error:
            raise CheckpointError(f"the state of client {client} in {path} cannot be read: {error}") from error
        return ClientState(payload.group("params"), dict(payload.scalars))

    def load_or_reset(self, client: ClientId) -> ClientState:
        """Return the committed state, or an empty one if it is missing or broken; `reset` then holds the reason."""
        try:
            return self.load(client)
        except CheckpointError as error:
            self.reset[client] = str(error)
            return ClientState()

    def save(self, client: ClientId, state: ClientState, round: int) -> None:
        """Write a state under its round and make it count; an empty state leaves no file."""
        self.count(client, round, self.write(client, state, round))

    def write(self, client: ClientId, state: ClientState, round: int) -> bool:
        """Write a state that does not count yet, and return whether there is a file; an empty state leaves none."""
        if state.empty:
            return False
        write_atomic(self._path(client, round), *_seal(Payload({"params": state.params}, state.scalars)))
        return True

    def count(self, client: ClientId, round: int, kept: bool) -> None:
        """Make the state that the client wrote in a round the one that counts.

        Args:
            kept: whether the client wrote a state in that round.
        """
        if kept:
            self.versions[client] = round
        else:
            self.versions.pop(client, None)

    def rounds(self, client: ClientId) -> list[int]:
        """Return the rounds that have a state of the client, oldest first, whether the states count or not."""
        return [round for _, round in _numbered(self.folder / client)]

    def prune(self, oldest: int) -> None:
        """Remove versions superseded before round `oldest`, the oldest round that a run may resume from."""
        for folder in self.folder.glob("*/"):
            for path, _ in [item for item in _numbered(folder) if item[1] <= oldest][:-1]:
                path.unlink()

    def commit(self, best: int = 0) -> None:
        """Remove states that neither of the last two checkpoints names, even those that were saved and never counted.

        Args:
            best: round of a checkpoint to keep as well, with the states that it names.
        """
        for folder in self.folder.glob("*/"):
            files = _numbered(folder)
            kept_rounds = {self.versions.get(folder.name), self.former.get(folder.name)}
            kept_rounds.add(max((round for _, round in files if round <= best), default=None))
            for path, round in files:
                if round not in kept_rounds:
                    path.unlink()
        self.former = dict(self.versions)

    def drop(self, client: ClientId, after: int, before: int) -> None:
        """Remove a client's versions of rounds between `after` and `before`, exclusive.

        They were saved and never counted.
        """
        for path, round in _numbered(self.folder / client):
            if after < round < before:
                path.unlink()

    def _path(self, client: ClientId, round: int) -> Path:
        return self.folder / client / f"round-{round:05d}.safetensors"


def save_checkpoint(
    folder: Path, round: int, server: Payload, store: ClientStore, begun: Mapping[str, Any] | None = None, best: int = 0
) -> None:
    """Commit a round: write the server's state and the clients' versions to one atomic file, and prune older ones.

    Args:
        begun: description of the run, JSON, for a later resume.
        best: round of a checkpoint to keep in addition to the last `KEEP`; 0: none.

    Raises:
        CheckpointError: if it cannot be written; the existing checkpoints are unchanged.
    """
    metadata = {
        "engine/format": FORMAT,
        "engine/round": round,
        "engine/versions": json.dumps(store.versions, sort_keys=True),
        "engine/begun": json.dumps(begun or {}, sort_keys=True),
    }
    write_atomic(
        folder / f"round-{round:05d}.safetensors", *_seal(Payload(server.groups, {**server.scalars, **metadata}))
    )
    kept_rounds = {best, *[number for _, number in _numbered(folder) if number <= round][-KEEP:]}
    for path, number in _numbered(folder):  # later ones were broken, and their rounds are run again
        if number not in kept_rounds:
            path.unlink()
    store.commit(best)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint, or None if there is no file.

    A broken newest file is skipped with a warning that names both files.

    Raises:
        CheckpointError: if there are checkpoints and none can be read, or if a newer version of Consilium wrote them.
    """
    broken_files = []
    for path, round in reversed(_numbered(folder)):
        try:
            payload = _unseal(path.read_bytes())
        except (OSError, PayloadError) as error:
            broken_files.append(f"{path.name} ({error})")
            continue
        if broken_files:
            log.warning(f"cannot read {', '.join(broken_files)}; continuing from {path.name}")
        scalars = dict(payload.scalars)
        metadata = {key: scalars.pop(key) for key in payload.scalars if key.startswith("engine/")}
        if (format_version := metadata.get("engine/format", 1)) not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} has format {format_version}, this version reads {FORMAT}: resume with the newer one"
            )
        versions = json.loads(str(metadata["engine/versions"]))
        return Checkpoint(
            round, Payload(payload.groups, scalars), versions, json.loads(str(metadata.get("engine/begun", "{}")))
        )
    if broken_files:
        raise CheckpointError(f"none of the checkpoints in {folder} can be read: {', '.join(broken_files)}")
    return None


def _numbered(folder: Path) -> list[tuple[Path, int]]:
    """Return the files of a folder that carry a round's number, with that number, oldest first."""
    files = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("round-*.safetensors")]
    return sorted(((path, int(match[1])) for path, match in files if match), key=lambda item: item[1])


def _seal(payload: Payload) -> list[Buffer]:
    """Return the payload's bytes in parts, with their XXH3-128 digest in the header.

    The digest is computed while its place in the header holds zeros.
    """
    header, *buffers = parts(Payload(payload.groups, {XXH3: _ZEROS, **payload.scalars}))
    digest = _digest(xxhash.xxh3_128(), header, *buffers)
    return [header.replace(_ZEROS.encode(), digest.encode(), 1), *buffers]


def _unseal(blob: bytes) -> Payload:
    """Return the payload that `_seal` was given, after checking its digest; files of earlier versions have a SHA-256.

    Raises:
        PayloadError: if a bit has changed since.
    """
    payload = decode(blob)
    scalars = dict(payload.scalars)
    digest_key, new_hash = (SHA256, hashlib.sha256) if SHA256 in scalars else (XXH3, xxhash.xxh3_128)
    digest, size = str(scalars.pop(digest_key, "")), 2 * new_hash().digest_size
    position, view = blob.find(digest.encode("utf-8", "replace")), memoryview(blob)
    if len(digest) != size or _digest(new_hash(), view[:position], b"0" * size, view[position + size :]) != digest:
        raise PayloadError(f"its {digest_key.removeprefix('engine/')} does not match")
    return Payload(payload.groups, scalars)


def _digest(found: Any, *parts: Buffer) -> str:
    """Return the hex digest of the parts as if they were one buffer; nothing is copied."""
    for part in parts:
        found.update(part)
    return found.hexdigest()
