"""Judging what the other side says, before anything is made of it: a reply on the server, a model on the client.

A reply is accepted whole or not at all. Its tensors must be the ones that the method's server half expects of this
client (`Server.expects`: names, shapes, dtypes, ranges, all finite, nothing else), the numbers that are merged, or by
which a model is judged, of the kinds and within the ranges of `NUMBERS`, and the server half must have no objection of
its own. Experts are names: one that the client was not given is a name that was not asked for. A number that is only
for the record (`RECORDED`) and is none is left out of the record, and the reply counts.
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
"""A client whose replies were rejected so many times in a row is not selected any more."""

LARGEST = 3.4028234663852886e38
"""The largest float32, which bounds every number of a reply: sums over all clients and rounds then stay finite."""
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
"""Scalars of a reply that the engines and servers read: kind (a whole number is a float, a bool is no number), least,
most. `num_examples` must be there, and not be more than the client has registered."""

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
"""What models are measured by, next to the score of their task."""
RECORDED = {*MEASURES, "experts", "footprint", "cut", "seconds_evaluate"}
"""Those of them that nothing but the record is made of."""


def objection(server: Server, info: ClientInfo, sent: Payload, reply: Payload) -> str | None:
    """Why a client's reply to `sent` must not reach the server half, in one line; None: it may."""
    found = _tensors(server, info, sent, reply) or _scalars(info, reply.scalars) or server.objection(info, sent, reply)
    return one_line(found) if found else None


def _tensors(server: Server, info: ClientInfo, sent: Payload, reply: Payload) -> str | None:
    expected = server.expects(info, sent)
    for group, tensors in reply.groups.items():
        for key in tensors:
            if key not in expected.get(group, {}):
                return f"{group} {key} was not asked of this client"
        if group not in expected:
            return f"group {shown(group)} was not asked of this client"
    for group, likes in expected.items():
        tensors = reply.groups.get(group, {})
        for key, like in likes.items():
            if key not in tensors:
                if like.needed:
                    return f"{group} {key} is missing"
            elif wrong := like.objection(tensors[key]):
                return f"{group} {key} {wrong}"
    return None


def _scalars(info: ClientInfo, scalars: Mapping[str, Scalar]) -> str | None:
    if "num_examples" not in scalars:
        return "num_examples is missing"
    for name, (kind, least, most) in NUMBERS.items():
        most = info.num_examples if name == "num_examples" else most
        if name in RECORDED:
            continue
        if name in scalars and not number(scalars[name], least, most, kind):
            kinds = "a whole number" if kind is int else "a finite number"
            return f"{name} is {shown(scalars[name])}; it must be {kinds} {_bounds(least, most)}"
    return None


def _bounds(least: float, most: float) -> str:
    return "that a float32 can hold" if most == LARGEST else f"within {least:.16g}..{most:.16g}"


def number(value: Any, least: float = -LARGEST, most: float = LARGEST, kind: type = float) -> bool:
    """Return whether a value is a number of that kind within the bounds."""
    kinds = (int,) if kind is int else (int, float)
    return type(value) in kinds and least <= value <= most


def numbers(scalars: Mapping[str, Scalar]) -> dict[str, int | float]:
    """What a reply's scalars say, as far as it is what they should be: for the record, also of a rejected one."""
    return {
        name: scalars[name]
        for name, (kind, least, most) in NUMBERS.items()
        if name in scalars and number(scalars[name], least, most, kind)
    }


def diverged(reply: Payload) -> str | None:
    """The first value of a reply that is not finite, tensors and training loss; None if all are. For the client's own
    end, which keeps no state of a round that diverged and sends nothing of it."""
    for group, tensors in reply.groups.items():
        for key, tensor in tensors.items():
            if not finite(tensor):
                return f"{group} {key} is not finite"
    loss = reply.scalars.get("train_loss")
    return f"train_loss is {loss}" if isinstance(loss, float) and not math.isfinite(loss) else None


def check_sent(payload: Payload) -> None:
    """The client's side: nothing that the server sends is worked on unless all of it is finite. Names, shapes, dtypes
    and expert ids are checked where a model is made of it, in `Setup.build`.

    Raises:
        PayloadError: naming the first value that is not.
    """
    if wrong := diverged(Payload(payload.groups)):
        raise PayloadError(f"the server sent what no client can start from: {wrong}")


def tally(strikes: dict[ClientId, int], record: Mapping[str, Any]) -> dict[ClientId, str]:
    """Count a round's record into `strikes`, client -> rejections in a row; returns who is benched by it, and why."""
    benched = {}
    for client, told in record["clients"].items():
        strikes[client] = strikes.get(client, 0) + 1 if told["rejected"] else 0
        if strikes[client] == BENCH:
            benched[client] = str(told["rejected"])
    return benched
