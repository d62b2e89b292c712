"""How a run is getting on: a bar on a terminal, and elsewhere plain lines, one at least every ten seconds, each with the loss."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

EVERY = 5.0  # seconds between plain lines
PATIENCE = 20  # seconds before the first one, if no step is done by then


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    return f"{minutes}:{seconds:02d}"


class Progress:
    """A Watch that prints. Use it as a context manager."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.text, self.done, self.total, self.loss = "starting", 0, 0, float("nan")
        self.training = self.start
        self.beside: dict[str, float] = {}
        self.bar: Any = None
        self.stop = threading.Event()

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich import progress as rich

            columns = (
                rich.SpinnerColumn(),
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.TextColumn("{task.fields[numbers]}"),
            )
            self.bar = rich.Progress(*columns)
            self.task = self.bar.add_task("starting", total=None, numbers="")
            self.bar.start()
        else:
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        if self.bar:
            self.bar.stop()
        else:
            self.thread.join()

    def phase(self, text: str) -> None:
        self.text = text
        if text == "training":
            self.training = time.monotonic()
        self._show()

    def note(self, text: str) -> None:
        """A line that stays: above the bar on a terminal."""
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(f"[{_clock(time.monotonic() - self.start)}] {text}", flush=True)

    def step(self, done: int, total: int, loss: float) -> None:
        smooth = loss if done == 1 else 0.95 * self.loss + 0.05 * loss
        self.done, self.total, self.loss = done, total, smooth
        self._show(at_once=done in (1, total))

    def figures(self, **numbers: float) -> None:
        self.beside |= numbers

    def tick(self) -> None:
        self._show()

    def numbers(self) -> str:
        """step, loss, it/s and the time left of training."""
        if not self.done:
            return f"step 0{f'/{self.total}' if self.total else ''}  loss -"
        rate = self.done / max(time.monotonic() - self.training, 1e-9)
        left = f"  left {_clock((self.total - self.done) / rate)}" if self.done < self.total else ""
        speed = f"  {rate:.2f} it/s" if self.done < self.total else ""
        return f"step {self.done}/{self.total}  loss {self.loss:.4f}{speed}{left}"

    def _show(self, at_once: bool = False) -> None:
        """Bring the bar up to date, or at the first and last step print a line."""
        if self.bar:
            self.bar.update(
                self.task, description=self.text, completed=self.done, total=self.total or None, numbers=self.numbers()
            )
        elif at_once:
            self._line()

    def _line(self) -> None:
        if self.done or time.monotonic() - self.start > PATIENCE:
            print(f"[{_clock(time.monotonic() - self.start)}] {self.text}: {self.numbers()}", flush=True)

    def _beat(self) -> None:
        while not self.stop.wait(EVERY):
            self._line()
