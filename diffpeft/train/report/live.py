"""The page of a run while it is under way: written before the first step, renewed where samples are drawn and now and then between, and at the end.

An open tab is the live view. What ends a run before its time is on the page too, with the command that goes on.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffpeft.files import Json
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.report.page import Page, Status
from diffpeft.train.signals import Interrupted

EVERY = 30.0  # seconds between two pages where no samples are drawn
_STEPS = 50  # whose times tell the speed


def peak_memory() -> int:
    """The most bytes that this process has had: on the GPU if there is one, else in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Live:
    """The page of a run.

    Args:
        path: the file.
        page: what is known of the run before it begins.
        rate: the learning rate of a step.
        changes: what else there is to show, asked for each page: {field of Page: value}.
        command: what goes on with the run, where a state of it is in the page's folder.
    """

    def __init__(
        self,
        path: Path,
        page: Page,
        rate: Callable[[int], float] = lambda step: 0.0,
        changes: Callable[[], Json] = dict,
        command: str = "",
    ):
        self.path, self.page, self.rate, self.changes, self.command = path, page, rate, changes, command
        self.losses, self.rates = list[float](page.losses), list[float]()
        self.begun = self.last_step = self.written = time.monotonic()
        self.took: deque[float] = deque(maxlen=_STEPS)

    def step(self, done: int, loss: float) -> None:
        """A step is done. Now and then the page is renewed; where that fails it is left to the next time."""
        now = time.monotonic()
        self.took.append(now - self.last_step)
        self.last_step = now
        self.losses[done - 1 :] = [loss]
        if now - self.written > EVERY:
            with contextlib.suppress(OSError):
                self.renew()

    def renew(self, **changes: Any) -> Page:
        """Write the page with these changes. Raises OSError."""
        self.current(**changes).write(self.path)
        self.written = time.monotonic()
        return self.page

    def current(self, **changes: Any) -> Page:
        """The page as it is now, with these changes."""
        self.rates += [self.rate(step) for step in range(len(self.rates), len(self.losses))]
        facts: Json = {
            "losses": tuple(self.losses),
            "rates": tuple(self.rates) if any(self.rates) else (),
            "seconds": time.monotonic() - self.begun,
            "per_second": self.per_second,
            "memory": peak_memory(),
        }
        self.page = replace(self.page, **facts | self.changes() | changes)
        return self.page

    @property
    def per_second(self) -> float:
        """Training steps per second: of the last ones, without what was done between them now and then."""
        took = statistics.median(self.took) if self.took else 0.0
        return 1 / took if took else 0.0

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever ends the block before its time is said on the page, with the command that goes on if there is a state of the run."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(Exception):
                self.renew(status=_ended(error, self.command if checkpoints_in(self.path.parent) else ""))
            raise


def _ended(error: BaseException, command: str) -> Status:
    """What a page says of a run that ended before its time."""
    notes: Sequence[str] = error.notes if isinstance(error, Interrupted) else getattr(error, "__notes__", ())
    said = [note for note in notes if not command or command not in note]
    if isinstance(error, KeyboardInterrupt):
        signal = "SIGTERM" if isinstance(error, Interrupted) and error.exit_code == 143 else "Ctrl-C"
        return Status("stopped", "\n".join([f"The run was asked to stop ({signal}).", *said]), command)
    return Status("failed", "\n".join([f"{type(error).__name__}: {error}", *said]), command)
