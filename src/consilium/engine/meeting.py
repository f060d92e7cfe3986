"""Clients that work in step on one device, where many small models take no more time than one.

Each client runs in a thread of its own as if it were alone, and only one thread runs at a time. Where the work can be
done for all clients at once (`batched`), a client calls `meet` and waits for the others. When all clients wait or have
ended, the work is done for all that wait for the same, and each goes on with its own answer.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from consilium.core import Meet

__all__ = ["in_step"]

T = TypeVar("T")
Work = Callable[[Sequence[Any]], Sequence[Any]]


class _Over(BaseException):
    """An exception that is raised in waiting clients when the round ends without them."""


class _Party:
    """A call in a thread that runs from one meeting to the next."""

    def __init__(self, call: Callable[[Meet], Any]):
        self.call = call
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.said: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
        self.waits: tuple[Work, Any] | None = None
        self.result: Any = None
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def go_on(self, answer: Any) -> None:
        """Run the call until it meets again or ends; re-raise its exceptions."""
        self.waits = None
        self.answers.put(answer)
        kind, *values = self.said.get()
        if kind == "raised":
            raise values[0]
        if kind == "ended":
            self.result = values[0]
        else:
            self.waits = (values[0], values[1])

    def end(self) -> None:
        """End the call, wherever it waits."""
        self.answers.put(_Over())
        self.thread.join()

    def _live(self) -> None:
        try:
            if isinstance(self.answers.get(), _Over):
                return
            self.said.put(("ended", self.call(self._meet), None))
        except _Over:
            return
        except BaseException as error:
            self.said.put(("raised", error, None))

    def _meet(self, work: Work, job: Any) -> Any:
        generator_states = _generators()
        self.said.put(("met", work, job))
        if isinstance(answer := self.answers.get(), _Over):
            raise answer
        _restore(generator_states)
        return answer


def in_step(calls: Sequence[Callable[[Meet], T]]) -> list[T]:
    """Run the calls and return their results; re-raise the exception of any call.

    Each call runs in a thread of its own, and only one runs at a time.

    Args:
        calls: each is given `meet(work, job)`, which returns this job's answer of `work([job, ...])`. `work` is called
            once with the jobs of all calls at that point, in the order of the calls. Each call has its own state of
            torch's generators.
    """
    generator_states, parties = _generators(), [_Party(call) for call in calls]
    try:
        for party in parties:
            party.go_on(None)
        while waiting_parties := [party for party in parties if party.waits]:
            work = waiting_parties[0].waits[0]
            group = [party for party in waiting_parties if party.waits[0] == work]
            answers = work([party.waits[1] for party in group])
            for party, answer in zip(group, answers, strict=True):
                party.go_on(answer)
    finally:
        for party in parties:
            party.end()
        _restore(generator_states)
    return [party.result for party in parties]


def _generators() -> list[torch.Tensor]:
    """Return the states of torch's generators: the CPU's, and each GPU's if any is in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
