"""A signal ends the work wherever it strikes."""

import gc
import signal
import weakref

import pytest

from consilium.engine.interrupt import interruptible


@pytest.fixture(autouse=True)
def _handlers():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_a_weak_references_callback_swallows_ends_the_work_at_the_next_check(monkeypatch):
    class Thing:
        pass

    steps, ignored = [], []
    monkeypatch.setattr("sys.unraisablehook", lambda told: ignored.append(told.exc_type))
    with pytest.raises(KeyboardInterrupt), interruptible() as check:
        for step in range(5):
            check()
            steps.append(step)
            thing = Thing()
            watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
            del thing
            gc.collect()
    assert steps == [0] and watched() is None
    assert ignored == [KeyboardInterrupt]  # the hazard is real


def test_a_signal_that_ends_in_a_librarys_own_error_is_still_an_interruption():
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("half-way") from None
    assert str(caught.value.__cause__) == "half-way"


def test_a_signal_that_is_swallowed_in_the_last_step_ends_the_work_too():
    done = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            done = True
    assert done


def test_without_a_signal_errors_and_other_handlers_stay_what_they_are():
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    with interruptible() as check:
        check()
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
            signal.raise_signal(signal.SIGTERM)  # the caller's own handler goes on answering
    finally:
        signal.signal(signal.SIGTERM, own)
