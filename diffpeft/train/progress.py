"""How a run is getting on: a bar on a terminal and in a notebook, and elsewhere plain lines, one at least every ten seconds, each with the loss."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from diffpeft.train.watch import Logged, Watch

EVERY = 5.0  # seconds between plain lines
PATIENCE = 20  # seconds before the first one, if no step is done by then
SMOOTH = 0.95  # of the mean loss stays with each step


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook that can show a bar, for which it needs ipywidgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None and find_spec("ipywidgets") is not None


@contextlib.contextmanager
def shown(watch: Watch | None) -> Iterator[Watch]:
    """Who is told in this block: the Watch, or where there is none a bar in a notebook, and elsewhere the logger."""
    if watch is not None or not in_notebook():
        yield watch or Logged()
        return
    quiet_bars()
    with Progress() as progress:
        yield progress


def quiet_bars() -> None:
    """No progress bars of diffusers and transformers: ours is the only one."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.disable_progress_bar()
        module.set_verbosity_error()


class Progress:
    """A Watch that prints. Use it as a context manager."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.text, self.done, self.total, self.loss = "starting", 0, 0, float("nan")
        self.training, self.before = self.start, 0  # since when steps are timed, and how many were done by then
        self.beside: dict[str, float] = {}
        self.bar: Any = None
        self.stop = threading.Event()

    def __enter__(self) -> Progress:
        if sys.stdout.isatty() or in_notebook():
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.SpinnerColumn(),
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.TextColumn("{task.fields[numbers]}"),
            )
            console = Console(force_jupyter=True) if in_notebook() else None
            self.bar = rich.Progress(*columns, console=console)
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
        begins = self.done == 0
        self.before = done - 1 if begins else self.before  # a run that goes on has steps behind it
        self.loss = loss if math.isnan(self.loss) else SMOOTH * self.loss + (1 - SMOOTH) * loss
        self.done, self.total = done, total
        self._show(at_once=begins or done == total)
        if begins:  # what came before the first step comes once
            self.training, self.before = time.monotonic(), done

    def figures(self, **numbers: float) -> None:
        self.beside |= numbers

    def tick(self) -> None:
        self._show()

    def numbers(self) -> str:
        """Step, loss, held-out loss, learning rate, steps a second, and the time that is left, with what is saved and measured on the way."""
        if not self.done:
            return f"step 0{f'/{self.total}' if self.total else ''}  loss -"
        parts = [f"step {self.done}/{self.total}", f"loss {self.loss:.4f}"]
        parts += [text.format(self.beside[name]) for name, text in _BESIDE.items() if name in self.beside]
        if self.before < self.done < self.total:
            pace = (time.monotonic() - self.training) / (self.done - self.before)  # seconds a step, all in all
            parts += [f"{self.beside.get('rate') or 1 / max(pace, 1e-9):.2f} it/s"]
            parts += [f"left {_clock((self.total - self.done) * pace)}"]
        return "  ".join(parts)

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


_BESIDE = {"heldout": "held-out {:.4f}", "lr": "lr {:.3g}"}
