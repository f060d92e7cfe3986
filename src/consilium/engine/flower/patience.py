"""A Grid with bounded retries.

Flower retries a call if there is no answer, but gives up if its server answers with an internal error, for example
while its database is locked or its disk is full. Flower also waits for a reply that has arrived only in part, for up to
two hours if its sender is gone. The Grid in this module retries such calls, and lets its caller look at the other
replies meanwhile.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.retry import RetryInvoker, exponential

from consilium.errors import RoundError
from consilium.escape import one_line

__all__ = ["PATIENCE", "Patient"]

PATIENCE = 60.0
"""Seconds for which a call is retried. After retries have failed, each call is tried once, until one succeeds."""
SLOW = 30.0
"""Seconds to wait for a reply before others are looked at, which are then in memory next to it."""


class Patient:
    """A Grid that retries calls and, if that fails, treats a message as not taken and a reply as not there yet.

    A call is retried if the server answers with an internal error (HTTP 500 and above) or has not stored its input. A
    message that the server already has counts as the same message.
    """

    def __init__(self, grid: Grid):
        self.grid, self.seconds = grid, PATIENCE
        self.pulls: dict[str, _Pull] = {}

    def get_nodes(self) -> list[Any]:
        """Return the connected nodes.

        Raises:
            RoundError: if the server does not list them.
        """
        try:
            return list(self._tried(self.grid.get_nodes))
        except httpx.HTTPStatusError as error:
            raise RoundError(f"Flower's server does not say which sites are connected: {one_line(error)}") from error

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        """Send the messages and return their ids; None, or nothing, stands for a message that was not taken."""
        try:
            return list(self._tried(self.grid.push_messages, messages))
        except ObjectPushError:
            return []
        except httpx.HTTPStatusError as error:
            return _none(error)

    def pull_message(self, identifier: str) -> list[Message]:
        """Return the replies to a message that have arrived; call again for more."""
        if pull := self.pulls.get(identifier):
            pull.join(0)
        else:
            pull = self.pulls[identifier] = _Pull(self.grid, identifier)
            pull.join(SLOW)
        if pull.is_alive():
            return []
        del self.pulls[identifier]
        if isinstance(pull.error, httpx.HTTPStatusError):
            return _none(pull.error)
        if pull.error:
            raise pull.error
        return pull.replies

    def _tried(self, call: Callable[..., Any], *args: Any) -> Any:
        def gave_up(_: Any) -> None:
            self.seconds = 0.0

        result = RetryInvoker(
            wait_gen_factory=lambda: exponential(max_delay=5),
            recoverable_exceptions=(httpx.HTTPStatusError, ObjectPushError),
            max_tries=None,
            max_time=self.seconds,
            should_giveup=lambda error: isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500,
            on_giveup=gave_up,
        ).invoke(call, *args)
        self.seconds = PATIENCE
        return result


class _Pull(threading.Thread):
    """A thread that fetches the replies to a message; it does not keep the process alive."""

    def __init__(self, grid: Grid, identifier: str):
        super().__init__(name="pull", daemon=True)
        self.grid, self.identifier = grid, identifier
        self.replies: list[Message] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.replies = list(self.grid.pull_messages([self.identifier]))
        except BaseException as error:  # `pull_message` raises it
            self.error = error


def _none(error: httpx.HTTPStatusError) -> list[Any]:
    """Return no results for an internal error of the server; raise an error of this side, which is a bug."""
    if error.response.status_code < 500:
        raise error
    return []
