"""The page of a run while it is under way: written before the first step, renewed where samples are drawn and now and then between, and at the end.

An open tab is the live view. What ends a run before its time is on the page too, with the command that goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffpeft.files import Json
from diffpeft.train import machines
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.report.page import Page, Status
from diffpeft.train.signals import Interrupted
from diffpeft.train.usage import Stopwatch

EVERY = 30.0  # seconds between two pages where no samples are drawn


class Live:
    """The page of a run.

    Args:
        path: the file.
        page: what is known of the run before it begins.
        rate: the learning rate of a step.
        changes: what else there is to show, asked for each page: {field of Page: value}.
        clock: what the run takes.
        command: what goes on with the run, where a state of it is in the page's folder.
    """

    def __init__(
        self,
        path: Path,
        page: Page,
        rate: Callable[[int], float] = lambda step: 0.0,
        changes: Callable[[], Json] = dict,
        command: str = "",
        clock: Stopwatch | None = None,
    ):
        self.path, self.page, self.rate, self.changes, self.command = path, page, rate, changes, command
        self.clock, self.written = clock or Stopwatch(), time.monotonic()
        self.losses, self.rates = list[float](page.losses), list[float]()

    def step(self, done: int, loss: float) -> None:
        """A step is done. Now and then the page is renewed; where that fails it is left to the next time."""
        self.losses[done - 1 :] = [loss]
        if time.monotonic() - self.written > EVERY:
            with contextlib.suppress(OSError):
                self.renew()

    def renew(self, changes: Json | None = None) -> Page:
        """Write the page with these changes; of several processes the main one does. Raises OSError."""
        page = self.current(changes)
        if machines.world().main:
            page.write(self.path)
        self.written = time.monotonic()
        return self.page

    def current(self, changes: Json | None = None) -> Page:
        """The page as it is now, with these changes."""
        self.rates += [self.rate(step) for step in range(len(self.rates), len(self.losses))]
        usage = self.clock.usage()
        facts: Json = {
            "losses": tuple(self.losses),
            "rates": tuple(self.rates) if any(self.rates) else (),
            "seconds": usage.seconds,
            "per_second": usage.rate,
            "memory": usage.peak_memory,
        }
        self.page = replace(self.page, **facts | self.changes() | (changes or {}))
        return self.page

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever ends the block before its time is said on the page, with the command that goes on if there is a state of the run."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(Exception):
                self.renew({"status": _ended(error, self.command if checkpoints_in(self.path.parent) else "")})
            raise


def _ended(error: BaseException, command: str) -> Status:
    """What a page says of a run that ended before its time."""
    notes: Sequence[str] = error.notes if isinstance(error, Interrupted) else getattr(error, "__notes__", ())
    said = [note for note in notes if not command or command not in note]
    if isinstance(error, KeyboardInterrupt):
        signal = "SIGTERM" if isinstance(error, Interrupted) and error.exit_code == 143 else "Ctrl-C"
        return Status("stopped", "\n".join([f"The run was asked to stop ({signal}).", *said]), command)
    return Status("failed", "\n".join([f"{type(error).__name__}: {error}", *said]), command)
