"""A Grid with bounded patience.

Its server may answer with an error of its own, as Flower's does while its database is locked or its disk is full:
Flower tries again where there is no answer, and gives up where there is such a one. And a reply that was begun and is
not there yet is waited for, up to two hours if its sender is gone: meanwhile the others are looked at.
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
"""Seconds for which a call is tried again. Once that was in vain, calls are tried once, until one is answered."""
SLOW = 30.0
"""Seconds for which a reply is waited for before others are looked at, which are then in memory beside it."""


class Patient:
    """Calls a Grid again where its server answers with an error of its own (HTTP 500 and above), or has not stored what
    it was sent (a message that it has already, it takes for the same); when that is in vain a message counts as not
    taken, and a reply as not there yet."""

    def __init__(self, grid: Grid):
        self.grid, self.seconds = grid, PATIENCE
        self.pulls: dict[str, _Pull] = {}

    def get_nodes(self) -> list[Any]:
        """The connected nodes.

        Raises:
            RoundError: if the server does not tell.
        """
        try:
            return list(self._tried(self.grid.get_nodes))
        except httpx.HTTPStatusError as error:
            raise RoundError(f"Flower's server does not say which sites are connected: {one_line(error)}") from error

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        """Ids of the messages; None, or nothing, for one that was not taken."""
        try:
            return list(self._tried(self.grid.push_messages, messages))
        except ObjectPushError:
            return []
        except httpx.HTTPStatusError as error:
            return _none(error)

    def pull_message(self, identifier: str) -> list[Message]:
        """The replies to a message that are there; whoever waits for more asks again."""
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

        found = RetryInvoker(
            wait_gen_factory=lambda: exponential(max_delay=5),
            recoverable_exceptions=(httpx.HTTPStatusError, ObjectPushError),
            max_tries=None,
            max_time=self.seconds,
            should_giveup=lambda error: isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500,
            on_giveup=gave_up,
        ).invoke(call, *args)
        self.seconds = PATIENCE
        return found


class _Pull(threading.Thread):
    """Fetches the replies to a message; it does not keep the process when that ends."""

    def __init__(self, grid: Grid, identifier: str):
        super().__init__(name="pull", daemon=True)
        self.grid, self.identifier = grid, identifier
        self.replies: list[Message] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.replies = list(self.grid.pull_messages([self.identifier]))
        except BaseException as error:  # raised where the reply is looked for
            self.error = error


def _none(error: httpx.HTTPStatusError) -> list[Any]:
    """Nothing, for an error of the server's own; one of this side is a fault of the program, and is raised."""
    if error.response.status_code < 500:
        raise error
    return []
