"""Ctrl-C and SIGTERM: a run that is asked to stop finishes its step and keeps its state; asked again, it stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal. `number` is the signal's; the notes say where its state is and how it goes on."""

    def __init__(self, number: int = signal.SIGINT, *notes: str):
        super().__init__("interrupted")
        self.number, self.notes = number, notes

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that ended by this signal: 130 or 143."""
        return 128 + self.number


class Stop:
    """Whether a run was asked to stop: the `number` of the signal, or None."""

    number: int | None = None


_STOPS: list[Stop] = []  # those of the runs under way, the innermost last


def asked() -> bool:
    """Whether the run under way was asked to stop: what takes long looks now and then, and gives up."""
    return bool(_STOPS) and _STOPS[-1].number is not None


@contextlib.contextmanager
def stopping(note: Callable[[str], None]) -> Iterator[Stop]:
    """Signals set the Stop instead of ending the program; a second one raises Interrupted. In threads, which get no signals, it does nothing."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is not None:
            raise Interrupted(number)
        stop.number = number
        note("asked to stop: the step is finished and the state saved (once more: stop at once)")

    _STOPS.append(stop)
    try:
        with handled(handle):
            yield stop
    finally:
        _STOPS.remove(stop)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: with an exception, so that what was begun is tidied up."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handled(handle):
        yield


@contextlib.contextmanager
def handled(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Both signals are this handler's while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
