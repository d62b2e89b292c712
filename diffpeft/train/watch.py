"""Who is told how a run is getting on."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger("diffpeft.train")


class Watch(Protocol):
    """Who is told how a run is getting on."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """What people should know of the run, a line each: what the data holds, what was passed over, which programs read a file."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A training step is done."""

    def figures(self, **numbers: float) -> None:
        """What else may be shown beside the loss, by name: `heldout`, the held-out loss; `lr`, the learning rate; `rate`, the steps a second."""

    def tick(self) -> None:
        """Still alive."""


class Quiet:
    """A Watch that says nothing."""

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, done: int, total: int, loss: float) -> None: ...

    def figures(self, **numbers: float) -> None: ...

    def tick(self) -> None: ...


class Logged(Quiet):
    """A Watch that tells the logger `diffpeft.train`: phases and notes at INFO, steps at DEBUG."""

    def __init__(self) -> None:
        self.beside: dict[str, float] = {}

    def phase(self, text: str) -> None:
        log.info("%s", text)

    def note(self, text: str) -> None:
        log.info("%s", text)

    def step(self, done: int, total: int, loss: float) -> None:
        log.debug(
            "step %d/%d, loss %.4f%s", done, total, loss, "".join(f", {k} {v:.4g}" for k, v in self.beside.items())
        )

    def figures(self, **numbers: float) -> None:
        self.beside |= numbers
