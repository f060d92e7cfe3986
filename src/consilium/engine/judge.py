"""Checks of what the other side sends, before anything is built from it: a reply on the server, a model on the client.

A reply is accepted whole or not at all. It must meet three conditions:

- Its tensors are the ones that the method's server half expects of this client (`Server.expects`: names, shapes,
  dtypes, ranges, all finite), and there are no others.
- The numbers that are merged, or that a model is judged by, have the kinds and ranges in `NUMBERS`.
- The server half has no objection of its own.

Experts are addressed by name, so an expert that the client was not given is a name that was not requested. A number
that is used for the record alone (`RECORDED`) is left out of the record if it is invalid, and the reply still counts.
"""

import math
from collections.abc import Mapping
from typing import Any

from consilium.core import ClientId, ClientInfo, Payload, Scalar, Server
from consilium.errors import PayloadError, shown
from consilium.escape import one_line
from consilium.params import finite

__all__ = [
    "BENCH",
    "LARGEST",
    "MEASURES",
    "SECONDS",
    "check_sent",
    "diverged",
    "number",
    "numbers",
    "objection",
    "tally",
]

BENCH = 3
"""Number of rejected replies in a row after which a client is not selected any more."""

LARGEST = 3.4028234663852886e38
"""The largest float32. It bounds every number of a reply, so that sums over all clients and rounds stay finite."""
SECONDS = 1e9
"""The longest duration that a client may report: thirty years."""

NUMBERS: dict[str, tuple[type, float, float]] = {
    "num_examples": (int, 1, 2**53),
    "validation": (float, 0, 1),
    "train_loss": (float, -LARGEST, LARGEST),
    "balanced": (float, 0, 1),
    "perplexity": (float, 0, LARGEST),
    "bits_per_byte": (float, 0, LARGEST),
    "personal": (float, 0, 1),
    "personal_bits_per_byte": (float, 0, LARGEST),
    "personal_validation": (float, 0, LARGEST),
    "full_k": (float, 0, 1),
    "full_k_bits_per_byte": (float, 0, LARGEST),
    "steps": (int, 0, 2**53),
    "experts": (int, 0, 2**53),
    "footprint": (int, 0, 2**63),
    "cut": (int, 0, 2**53),
    "seconds_evaluate": (float, 0, SECONDS),
}
"""Scalars of a reply that the engines and servers read: kind, least, most. A whole number passes as a float, and a bool
is not a number. `num_examples` is required, and must not exceed the number that the client has registered."""

MEASURES = (
    "balanced",
    "perplexity",
    "bits_per_byte",
    "personal",
    "personal_bits_per_byte",
    "personal_validation",
    "full_k",
    "full_k_bits_per_byte",
)
"""Measures of a model, in addition to the score of its task."""
RECORDED = {*MEASURES, "experts", "footprint", "cut", "seconds_evaluate"}
"""Names in `NUMBERS` that are used for the record alone."""


def objection(server: Server, info: ClientInfo, sent: Payload, reply: Payload) -> str | None:
    """Return why a client's reply to `sent` must not reach the server half, in one line; None: it may."""
    reason = _tensors(server, info, sent, reply) or _scalars(info, reply.scalars) or server.objection(info, sent, reply)
    return one_line(reason) if reason else None


def _tensors(server: Server, info: ClientInfo, sent: Payload, reply: Payload) -> str | None:
    likes_by_group = server.expects(info, sent)
    for group, tensors in reply.groups.items():
        for key in tensors:
            if key not in likes_by_group.get(group, {}):
                return f"{group} {key} was not asked of this client"
        if group not in likes_by_group:
            return f"group {shown(group)} was not asked of this client"
    for group, likes in likes_by_group.items():
        tensors = reply.groups.get(group, {})
        for key, like in likes.items():
            if key not in tensors:
                if like.needed:
                    return f"{group} {key} is missing"
            elif reason := like.objection(tensors[key]):
                return f"{group} {key} {reason}"
    return None


def _scalars(info: ClientInfo, scalars: Mapping[str, Scalar]) -> str | None:
    if "num_examples" not in scalars:
        return "num_examples is missing"
    for name, (kind, least, most) in NUMBERS.items():
        most = info.num_examples if name == "num_examples" else most
        if name in RECORDED:
            continue
        if name in scalars and not number(scalars[name], least, most, kind):
            kind_text = "a whole number" if kind is int else "a finite number"
            return f"{name} is {shown(scalars[name])}; it must be {kind_text} {_bounds(least, most)}"
    return None


def _bounds(least: float, most: float) -> str:
    return "that a float32 can hold" if most == LARGEST else f"within {least:.16g}..{most:.16g}"


def number(value: Any, least: float = -LARGEST, most: float = LARGEST, kind: type = float) -> bool:
    """Return whether a value is a number of this kind within the bounds."""
    kinds = (int,) if kind is int else (int, float)
    return type(value) in kinds and least <= value <= most


def numbers(scalars: Mapping[str, Scalar]) -> dict[str, int | float]:
    """Return the valid numbers among a reply's scalars for the record, which covers rejected replies as well."""
    return {
        name: scalars[name]
        for name, (kind, least, most) in NUMBERS.items()
        if name in scalars and number(scalars[name], least, most, kind)
    }


def diverged(reply: Payload) -> str | None:
    """Return a message about the first value of a reply, tensor or training loss, that is not finite; None: all are.

    The client's end keeps no state of a round that diverged, and sends nothing of it.
    """
    for group, tensors in reply.groups.items():
        for key, tensor in tensors.items():
            if not finite(tensor):
                return f"{group} {key} is not finite"
    loss = reply.scalars.get("train_loss")
    return f"train_loss is {loss}" if isinstance(loss, float) and not math.isfinite(loss) else None


def check_sent(payload: Payload) -> None:
    """Raise an error unless everything that the server sends is finite; the client calls this before it works on it.

    Names, shapes, dtypes and expert ids are checked where a model is made of the payload, in `Setup.build`.

    Raises:
        PayloadError: naming the first value that is not finite.
    """
    if reason := diverged(Payload(payload.groups)):
        raise PayloadError(f"the server sent what no client can start from: {reason}")


def tally(strikes: dict[ClientId, int], record: Mapping[str, Any]) -> dict[ClientId, str]:
    """Count a round's record into `strikes`, and return the clients that are benched by it, with the reasons.

    Args:
        strikes: client -> rejections in a row, updated in place.
    """
    bench_reasons = {}
    for client, client_record in record["clients"].items():
        strikes[client] = strikes.get(client, 0) + 1 if client_record["rejected"] else 0
        if strikes[client] == BENCH:
            bench_reasons[client] = str(client_record["rejected"])
    return bench_reasons
