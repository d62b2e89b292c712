"""The numbers of a run while it trains, a row every so many steps: into metrics.csv, and into trackers.

A row has what is known of its step: the mean loss since the row before, the learning rates, the norm of the gradients, the speed, and the held-out losses
where they were measured. It is handed on with the next step, or when the state is saved: so that a run that goes on from that state has it once.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from diffpeft.io import replacing
from diffpeft.train.heldout import BANDS, HeldoutLoss
from diffpeft.train.outputs import ROWS

PACE = 0.9  # of the seconds of a step of late stays with each step
Numbers = Mapping[str, float]
LOSS, GRADIENT, SPEED, RATE = "loss/train", "norm/grad", "perf/it_s", "lr/"
HELDOUT = {
    "loss/heldout": "heldout_loss",
    "loss/heldout_base": "heldout_base",
    "loss/heldout_error": "heldout_standard_error",
}
BY_BAND = {f"loss/heldout_sigma_{band}": f"heldout_sigma_{band}" for band in range(BANDS)}
COLUMNS = {LOSS: "loss", GRADIENT: "gradient_norm", SPEED: "it_s", **HELDOUT, **BY_BAND}  # {number: its column}


@dataclass(frozen=True)
class StepNumbers:
    """What is read of a step: how many are done with it, its loss, the norm of its gradients, and {group: learning rate}."""

    done: int
    loss: float
    gradient: float
    rates: Numbers


class Sink(Protocol):
    """Where rows go."""

    name: str

    def begin(self, done: int) -> None:
        """A run begins, or goes on after so many steps: what is there of later ones does not count."""

    def row(self, step: int, numbers: Numbers) -> None:
        """The numbers of a step."""

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Pictures that were drawn after so many steps, {name: file}."""

    def close(self) -> None:
        """The run has ended."""


@dataclass
class Logbook:
    """Who makes rows of what is told.

    Args:
        sinks: where they go. One that fails is left out from then on, and said: a run does not end for what watches it.
        every: steps between two rows.
        seconds: the seconds of all steps so far.
        note: tells people.
        figures: shown beside the loss at every step: `lr`, the learning rate of the first group, and `rate`, the steps a second of late.
    """

    sinks: Sequence[Sink] = ()
    every: int = 1
    seconds: Callable[[], float] = lambda: 0.0
    note: Callable[[str], None] = lambda text: None
    figures: Callable[..., None] = lambda **numbers: None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sinks = list(self.sinks)
        self.step, self.numbers = 0, dict[str, float]()
        self.clock = (0, 0.0)  # steps and seconds at the last row
        self.stepped: float | None = None  # the seconds at the last step
        self.pace = 0.0  # the seconds of a step of late

    def add(self, sink: Sink) -> None:
        """One more place for rows."""
        self.sinks = [*self.sinks, sink]

    def begin(self, done: int, losses: Sequence[float]) -> None:
        """A run begins, or goes on after so many steps, with the losses of all that are done."""
        self.losses, self.clock = list(losses[done - done % self.every : done]), (done, self.seconds())
        self._tell(lambda sink: sink.begin(done))

    def told(self, numbers: StepNumbers) -> None:
        """A step was read."""
        if numbers.done > self.step:
            self.flush()
        self.losses.append(numbers.loss)
        seconds = self.seconds()
        self._pace(next(iter(numbers.rates.values()), 0.0), seconds)
        if numbers.done % self.every:
            return
        row = {LOSS: sum(self.losses) / len(self.losses), GRADIENT: numbers.gradient}
        row |= {RATE + group: rate for group, rate in numbers.rates.items()}
        if seconds > self.clock[1]:
            row[SPEED] = (numbers.done - self.clock[0]) / (seconds - self.clock[1])
        self.losses, self.clock = [], (numbers.done, seconds)
        self._add(numbers.done, row)

    def _pace(self, rate: float, seconds: float) -> None:
        """Show the learning rate, and how fast steps are of late."""
        if self.stepped is not None:  # the first is slower: what is compiled is compiled then
            took = seconds - self.stepped
            self.pace = PACE * self.pace + (1 - PACE) * took if self.pace else took
        self.stepped = seconds
        self.figures(lr=rate, **({"rate": 1 / self.pace} if self.pace > 0 else {}))

    def measured(self, loss: HeldoutLoss) -> None:
        """The held-out loss was measured."""
        numbers = dict(zip(HELDOUT, (loss.after, loss.before, loss.standard_error), strict=True))
        bands = zip(BY_BAND, (band.after for band in loss.bands), strict=False)  # texts have none
        self._add(loss.step, numbers | dict(bands))

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Pictures were drawn."""
        self._tell(lambda sink: sink.images(step, images))

    def _add(self, step: int, numbers: Numbers) -> None:
        if step != self.step:
            self.flush()
        self.step = step
        self.numbers |= numbers

    def flush(self) -> None:
        """Hand on the row that was begun."""
        step, numbers = self.step, self.numbers
        self.numbers = {}
        if numbers:
            self._tell(lambda sink: sink.row(step, numbers))

    def close(self) -> None:
        """The run has ended."""
        self.flush()
        self._tell(lambda sink: sink.close())

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:  # trackers raise what they like
                self.sinks = [other for other in self.sinks if other is not sink]
                self.note(f"{sink.name} is told nothing more of this run: {error or type(error).__name__}")


class CsvTable:
    """metrics.csv: a row a step, which is its first column."""

    name = ROWS

    def __init__(self, out: Path, groups: Sequence[str], measured: Iterable[str] = ()):
        rates = {RATE + group: f"lr_{group}" if len(groups) > 1 else "lr" for group in groups}
        numbers = [LOSS, *rates, GRADIENT, SPEED, *measured]
        self.path, self.last = out / ROWS, dict[str, str]()
        self.columns = {number: rates.get(number) or COLUMNS[number] for number in numbers}

    def begin(self, done: int) -> None:
        """Leave the rows until so many steps; none for a run that begins."""
        rows = [row for row in self._rows() if _step_of(row) <= done] if done else []
        self.last = dict(rows[-1]) if rows else {}
        for name in dict.fromkeys(name for row in rows for name in row):
            if name != "step" and name not in self.columns.values():
                self.columns[name] = name  # a session before had it
        self._write(rows)

    def row(self, step: int, numbers: Numbers) -> None:
        """Write a line at the end; what is told of a step later goes into its line."""
        values = {self.columns[name]: f"{value:.6g}" for name, value in numbers.items() if name in self.columns}
        if self.last.get("step") == str(step):
            self.last |= values
            self._write([*self._rows()[:-1], self.last])
            return
        self.last = {"step": str(step), **values}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(self._line(self.last))

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """They are files already."""

    def close(self) -> None:
        """It is whole after each row."""

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        with replacing(self.path) as f:
            f.write("".join([self._line({n: n for n in self._names}), *map(self._line, rows)]).encode())

    @property
    def _names(self) -> list[str]:
        return ["step", *self.columns.values()]

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a row
        return [
            {name: value for name, value in row.items() if name and value} for row in csv.DictReader(io.StringIO(whole))
        ]

    def _line(self, values: Mapping[str, str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([values.get(name, "") for name in self._names])
        return text.getvalue()


def _step_of(row: Mapping[str, str]) -> float:
    """The step of a row; of one without a number, which is not ours, more than any."""
    return int(row["step"]) if row.get("step", "").isdigit() else float("inf")
