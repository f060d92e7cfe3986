"""The log structure.jsonl: the experts that clients hold, how often they are requested, and how often trained.

Each round that changed something adds one line with its changes:

    {"round": 3, "blocks": {block: experts}, "held": {client: {block: [ids]}}, "usage": {client: {block: [shares]}},
     "trained": {client: {block: [shares]}}}

`blocks` is written only when it differs from the earlier lines. A null in place of a client's value means that the
client holds nothing any more. `fold` merges all lines into one record in the form of structure.json, which earlier
versions rewrote in every round.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from consilium.core import Server
from consilium.engine.checkpoint import append_json, write_atomic
from consilium.errors import CheckpointError

__all__ = ["NAME", "OLD", "StructureLog", "convert", "fold"]

NAME, OLD = "structure.jsonl", "structure.json"
_KINDS = ("held", "usage", "trained")


def fold(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the lines merged into one record.

    Returns:
        "blocks", "usage" and "trained" with their last values, and "rounds", round -> client -> block -> ids, for each
        round in which a client's experts changed.
    """
    record: dict[str, Any] = {"blocks": {}, "rounds": {}, "usage": {}, "trained": {}}
    experts_by_client: dict[str, Any] = {}
    for line in lines:
        record["blocks"] |= line.get("blocks") or {}
        for kind in ("usage", "trained"):
            record[kind] = _merged(record[kind], line.get(kind) or {})
        if line.get("held"):
            experts_by_client = _merged(experts_by_client, line["held"])
            record["rounds"][str(line["round"])] = experts_by_client
    return record


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {client: value for client, value in {**old, **changes}.items() if value is not None}


class StructureLog:
    """The structure.jsonl of a run while rounds are added to it.

    Args:
        path: path of structure.jsonl.
        lines: the lines that are already in it.
    """

    def __init__(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        self.path = path
        self.texts: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
        self.blocks: dict[str, int] = {}
        for line in lines:
            self.blocks |= line.get("blocks") or {}
            for kind in _KINDS:
                self._changed(kind, line.get(kind) or {})

    def add(self, number: int, server: Server) -> None:
        """Append the changes of round `number`; write nothing for a method without a client-expert map."""
        experts_by_client = server.structure()
        if experts_by_client is None:
            return
        values_by_kind = {
            "held": {
                client: {block: list(ids) for block, ids in blocks.items()}
                for client, blocks in experts_by_client.items()
            },
            "usage": server.usage(),
            "trained": server.trained(),
        }
        removals = {kind: dict.fromkeys(self.texts[kind].keys() - values_by_kind[kind].keys()) for kind in _KINDS}
        changes = {kind: self._changed(kind, {**values_by_kind[kind], **removals[kind]}) for kind in _KINDS}
        blocks = dict(server.setup.model.counts)
        line = {"blocks": blocks if blocks != self.blocks else {}, **changes}
        line = {kind: values for kind, values in line.items() if values}
        self.blocks = blocks
        if line:
            append_json(self.path, {"round": number, **line})

    def _changed(self, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that differ from the clients' last ones, and keep the new ones."""
        texts, changes = self.texts[kind], {}
        for client, value in values.items():
            text = json.dumps(value)
            if texts.get(client) != text:
                changes[client] = value
            if value is None:
                texts.pop(client, None)
            else:
                texts[client] = text
        return changes


def convert(old: Path, first: int) -> None:
    """Replace a structure.json of an earlier version by structure.jsonl, for the rounds before `first`.

    Raises:
        CheckpointError: if the old file cannot be read.
    """
    new_path = old.with_name(NAME)
    if not new_path.exists():
        try:
            record = json.loads(old.read_text())
            lines = [{"round": int(n), "held": experts} for n, experts in record["rounds"].items() if int(n) < first]
            last_values = {kind: dict(record.get(kind) or {}) for kind in ("blocks", "usage", "trained")}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{old} cannot be read ({type(error).__name__}); put the file back") from error
        lines.append({"round": first - 1, **last_values})
        write_atomic(new_path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    old.unlink()
