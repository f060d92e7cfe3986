"""The privacy filter for everything that leaves a client, whatever the server asks for: replies, errors and names.

A client half declares what its replies reveal about the client's data (`core.Client.reveals`). In every engine,
`disclosed` is the only way out for a reply. It passes on what is declared, reduced to the `privacy` that holds at the
site, and refuses what is not declared. `check` refuses a method before the first round if it needs values that the site
does not disclose.

    kind       setting             passed on, if the site discloses less
    usage      privacy.usage       "coarse" and "noised": see `privacy.usage_told`; nothing of what is only recorded
    labels     privacy.labels      "names": a count of examples becomes 1; nothing of what is only recorded
    label      privacy.labels and  nothing
     scores     privacy.scores
    score      privacy.scores      "coarse": rounded; "none": nothing
    update, size, cost             always passed on as they are
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from consilium.core import COMMON_REVEALS, Client, Payload, Reveal, Scalar
from consilium.errors import ConfigError, PayloadError
from consilium.params import Params
from consilium.privacy import Privacy, usage_told

__all__ = ["check", "disclosed", "reason", "without_paths"]

_SETTINGS = {"usage": "usage", "labels": "labels", "score": "scores"}
"""Kind of a Reveal -> the field of `Privacy` that governs it."""
_WHOLE = {"usage": "exact", "labels": "counts", "scores": "exact"}
"""Field of `Privacy` -> the setting at which values are passed on unchanged."""


def disclosed(reply: Payload, client: Client, privacy: Privacy) -> Payload:
    """Return the part of a reply that may leave the client.

    Args:
        client: the client half that made the reply.
        privacy: the settings that hold at the client's site.

    Raises:
        PayloadError: for a group or scalar that the client half does not declare.
        ConfigError: for one that the server half needs and the site does not disclose.
    """
    groups, scalars = {}, {}
    for name, tensors in reply.groups.items():
        reveal = _declared(name, "group", client)
        if _passes(name, reveal, client, privacy):
            groups[name] = _lowered_group(tensors, reveal, privacy)
    for name, value in reply.scalars.items():
        reveal = _declared(name, "scalar", client)
        if _passes(name, reveal, client, privacy):
            scalars[name] = _lowered_scalar(value, reveal, privacy)
    return Payload(groups, scalars)


def check(client: Client, privacy: Privacy) -> None:
    """Raise ConfigError if a client half must send values that these settings do not disclose."""
    for name, reveal in {**COMMON_REVEALS, **client.reveals}.items():
        _passes(name, reveal, client, privacy)


def _declared(name: str, what: str, client: Client) -> Reveal:
    reveals = {**COMMON_REVEALS, **client.reveals}
    for key in (name, *(key for key in reveals if key.endswith("*") and name.startswith(key[:-1]))):
        if key in reveals:
            return reveals[key]
    raise PayloadError(
        f"the {what} {name!r} of the reply is not declared in {type(client).__name__}.reveals, so it does not leave "
        "the client; declare what it says about the client's data"
    )


def _passes(name: str, reveal: Reveal, client: Client, privacy: Privacy) -> bool:
    """Return True if a value leaves the client at all, perhaps reduced."""
    if reveal.kind == "label scores":
        return privacy.labels == "counts" and privacy.scores == "exact"
    if reveal.kind not in _SETTINGS:
        return True
    field = _SETTINGS[reveal.kind]
    mode = getattr(privacy, field)
    if mode == _WHOLE[field]:
        return True
    if reveal.need == "exact" or (reveal.need == "less" and mode == "none"):
        required_mode = _WHOLE[field] if reveal.need == "exact" else "coarse"
        raise ConfigError(
            f"privacy.{field} is {mode!r}, but {type(client).__name__} sends {name!r}, of which its server needs more. "
            f"Use privacy.{field} {required_mode!r}, other settings of the method, or another method."
        )
    return reveal.need == "less" or (field == "scores" and mode == "coarse")


def _lowered_group(tensors: Params, reveal: Reveal, privacy: Privacy) -> Params:
    if reveal.kind == "usage":
        return usage_told(tensors, privacy)
    if reveal.kind == "labels" and privacy.labels == "names":
        return {label: torch.ones_like(count) for label, count in tensors.items()}
    if reveal.kind == "score" and privacy.scores == "coarse":
        return {name: (20 * t).round() / 20 for name, t in tensors.items()}
    return dict(tensors)


def _lowered_scalar(value: Scalar, reveal: Reveal, privacy: Privacy) -> Scalar:
    values = value if isinstance(value, list) else [value]
    if reveal.kind == "usage" and privacy.usage != "exact":
        raise PayloadError("usage must be a group of a reply, block -> counts of each expert, not a scalar")
    if reveal.kind == "labels" and privacy.labels == "names":
        if not all(type(item) is int for item in values):
            raise PayloadError("values by label that the server needs must be counts, whole numbers")
        values = [1] * len(values)
    elif reveal.kind == "score" and privacy.scores == "coarse":
        values = [_rounded(item) for item in values]
    return values if isinstance(value, list) else values[0]


def _rounded(value: Scalar) -> Scalar:
    """Return a score rounded to a multiple of 0.05, or to two digits if it is 1 or more in size."""
    if isinstance(value, str | bool) or not math.isfinite(value):
        return value
    return type(value)(round(20 * value) / 20 if abs(value) < 1 else float(f"{value:.1e}"))


# --- errors ---------------------------------------------------------------------------------------------------------

_PATH = re.compile(
    r"""(?: file:/+ | (?<!\w)[A-Za-z]:[\\/] | (?<!\S)~[\w.-]*[\\/] | (?<![\\\w])\\\\ )  # file:///, C:\, ~user/, \\host
        (?: [^\n"'`]* [\\/] )?       # as far as the last separator of the line: names of folders may hold blanks
        [^\s"'`,;:)\]}]*
      | (?<![\w:/.]) / [\w.@%+-] [^\n"'`]* / [^\s"'`,;:)\]}]*     # /home/user/notes, but not /home alone
      | (?<![\w/:.-]) [\w-] [\w.-]* (?: / [\w.-]+ )* / [\w.-]+ \. [A-Za-z]\w{0,11} \b   # notes/2024.csv
    """,
    re.VERBOSE,
)


def reason(error: BaseException, private: Iterable[object] = ()) -> str:
    """Return what a site may report about an error: its type and text, without local paths.

    Args:
        private: paths of the site; they are removed from the text wherever they occur.
    """
    filenames = [getattr(error, field, None) for field in ("filename", "filename2")]
    return f"{type(error).__name__}: {without_paths(str(error), [*filenames, *private])}"


def without_paths(text: str, private: Iterable[object] = ()) -> str:
    """Return a text in which every local path is replaced by `[path]`.

    Args:
        private: paths that are removed literally. The general rule may not find the end of a path with blanks, and does
            not recognize a name without a separator as a path.
    """
    local_paths = {str(path) for path in private if path is not None} - {"", ".", "/"}
    for path in sorted(local_paths | {str(Path.home()), str(Path.cwd())} - {"/"}, key=len, reverse=True):
        text = text.replace(path, "[path]")
    return _PATH.sub("[path]", text)
