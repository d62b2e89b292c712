"""Strengths that change during denoising: `schedule.linear(1.0, 0.2, end=0.6)` wherever a strength is a number.

A step's fraction is i / n for step i of n, in a shortened run (img2img) of the steps that are run. How the step is known:
docs/decisions/005-steps-and-rows-are-decided-at-the-root.md.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpeft.errors import AdapterStateError, ConfigError, shown
from diffpeft.methods.config import is_fp32
from diffpeft.model.call import running_pipeline
from diffpeft.model.scope import Block, Scope

_told: Scope[float] = Scope("diffpeft_step")  # the fractions of `step(...)` blocks

_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}


class Schedule:
    """A strength for each fraction of the denoising steps, 0 <= fraction < 1."""

    def at(self, fraction: float) -> float:
        """The strength at a fraction."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ramp(Schedule):
    """From `first`, held until `start`, to `last`, held from `end` on."""

    first: float
    last: float
    start: float = 0.0
    end: float = 1.0
    curve: str = "linear"

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        start, end = _number("start", self.start), _number("end", self.end)
        if not 0 <= start < end <= 1:
            raise ConfigError(f"a schedule from start={start:g} to end={end:g}", remedy="It is 0 <= start < end <= 1.")

    def at(self, fraction: float) -> float:
        u = (fraction - self.start) / (self.end - self.start)
        if u <= 0 or u >= 1:  # to the last bit
            return self.first if u <= 0 else self.last
        return float(self.first + (self.last - self.first) * _CURVES[self.curve](u))

    def __repr__(self) -> str:
        return f"{self.curve}({self.first:g}, {self.last:g}, start={self.start:g}, end={self.end:g})"


@dataclass(frozen=True)
class Steps(Schedule):
    """Constant from each point (fraction, strength) to the next; before the first it has the first's strength."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = [(_number("a step's fraction", f), _number("a step's strength", s)) for f, s in self.points]
        if not points or not all(0 <= f <= 1 for f, _ in points):
            raise ConfigError(
                f"steps at {', '.join(f'{f:g}' for f, _ in points) or 'no fraction'}",
                remedy="Give {fraction: strength} with fractions from 0 to 1, such as {0.0: 1.0, 0.5: 0.3}.",
            )
        object.__setattr__(self, "points", tuple(sorted(points)))

    def at(self, fraction: float) -> float:
        return next((s for f, s in reversed(self.points) if f <= fraction), self.points[0][1])

    def __repr__(self) -> str:
        return f"steps({{{', '.join(f'{f:g}: {s:g}' for f, s in self.points)}}})"


@dataclass(frozen=True)
class ScaledSchedule(Schedule):
    """Another schedule times a number."""

    schedule: Schedule
    factor: float

    def at(self, fraction: float) -> float:
        return self.schedule.at(fraction) * self.factor

    def __repr__(self) -> str:
        return f"{self.factor:g} * {self.schedule!r}"


def linear(first: float, last: float, *, start: float = 0.0, end: float = 1.0) -> Schedule:
    """From `first` to `last` in a straight line between the fractions `start` and `end`, which holds its end values outside."""
    return Ramp(first, last, start, end)


def cosine(first: float, last: float, *, start: float = 0.0, end: float = 1.0) -> Schedule:
    """`linear` with half a wave of a cosine instead of the line: slow at both ends."""
    return Ramp(first, last, start, end, "cosine")


def constant(strength: float) -> Schedule:
    """One strength throughout."""
    return Steps(((0.0, strength),))


def steps(strengths: Mapping[float, float]) -> Schedule:
    """{fraction: strength from there on}."""
    if not isinstance(strengths, Mapping):
        raise ConfigError(
            f"steps takes a dict by fraction, not {shown(strengths)}", remedy="For example {0.0: 1.0, 0.5: 0.3}."
        )
    return Steps(tuple(strengths.items()))


def _number(name: str, value: Any) -> float:
    if not is_fp32(value):
        raise ConfigError(f"{name} of a schedule is {shown(value)}", remedy="It is a finite number.")
    return float(value)


@contextlib.contextmanager
def step(fraction: float) -> Iterator[None]:
    """Denoising is at this fraction, in this thread or task inside this block, whatever a scheduler says: for loops of one's own."""
    block = Block(_number("the fraction", fraction))
    try:
        _told.enter(block)
        yield
    finally:
        block.open = False
        _told.forget_ended()


# ---- how far denoising is


class Clock:
    """How far denoising is, from the scheduler that the pipeline has at the time. It holds the pipeline weakly."""

    def __init__(self, pipeline: object = None) -> None:
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.run = (
            threading.local()
        )  # of a thread: `timesteps`, also as `values`, and the index of the first in use, `begin`

    def __reduce__(self) -> tuple[object, ...]:
        return Clock, ()  # a copied model has no pipeline until set_adapters names one

    def fraction(self, timestep: object = None) -> float:
        """The fraction of the step in which a denoiser is called with `timestep`."""
        if told := _told.blocks:
            return told[-1].value
        running = running_pipeline()
        pipeline: Any = running or (self.pipeline() if self.pipeline else None)
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None or timestep is None:
            raise _lost("nothing tells the denoising step")
        call = self._call(scheduler, timestep, getattr(running, "_num_timesteps", None))
        total = len(self.run.values) - self.run.begin
        if running and isinstance(
            getattr(running, "_denoising_end", None), float
        ):  # SDXL's base leaves the last steps to the refiner
            total = min(total, running._num_timesteps)
        return _fraction(call, total, *_calls(scheduler))

    def _call(self, scheduler: Any, timestep: Any, length: int | None) -> int:
        """Which of the run's calls of the denoiser this is, from 0. A scheduler that counts its steps knows, others by the timestep.

        `length`: of the run, if a pipeline does it.
        """
        run, counts = self.run, any(hasattr(scheduler, name) for name in _COUNTERS)
        new = getattr(run, "timesteps", None) is not scheduler.timesteps
        index, begin = getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)
        if new:
            run.timesteps, run.values, run.begin = scheduler.timesteps, torch.as_tensor(scheduler.timesteps).tolist(), 0
        if index is None and begin is None and (new or not counts):
            index = _index(run.values, timestep, length, exact=counts)
        if new or (index is not None and index < run.begin):
            run.begin = _begin(len(run.values), index or 0, length or 0) if begin is None else begin
        if hasattr(scheduler, "counter"):
            return int(scheduler.counter)
        return 0 if index is None else index - run.begin


def _begin(total: int, index: int, length: int) -> int:
    """Where in the scheduler's timesteps a run begins that is seen at `index` first: so that `length` are left, if that is no later."""
    last = total - length
    return last if 0 <= last <= index else index


_COUNTERS = ("step_index", "counter")  # most schedulers; PNDM


def _index(timesteps: list[float], timestep: Any, length: int | None, exact: bool) -> int:
    """The index of `timestep` in the scheduler's; of several the one after which a run has `length`.

    `exact`: else it is none of them but rescaled by the pipeline, and the run a whole one. If not, to the precision of a half.
    """
    t = float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)
    off = [abs(value - t) for value in timesteps]
    least = min(off)
    if least <= (0 if exact else max(1e-3, abs(t) * 2**-8)):
        near = [i for i, far in enumerate(off) if far == least]
        return next((i for i in near if len(off) - i == length), near[0])
    if exact:
        return 0
    raise _lost(f"timestep {t:g} is none of the pipeline's")


def _lost(why: str) -> AdapterStateError:
    return AdapterStateError(
        f"a strength is a schedule, and {why}",
        remedy="Give set_adapters the pipeline that runs, or call the model inside `with diffpeft.schedule.step(i / n):`.",
    )


def _calls(scheduler: Any) -> tuple[int, int | None]:
    """(how many calls of the denoiser a step takes, for how many steps); after those a step is one call. None: for all."""
    if hasattr(scheduler, "counter") and hasattr(scheduler, "prk_timesteps"):  # PNDM: Runge-Kutta, or one trial step
        runge_kutta = not scheduler.config.skip_prk_steps
        return (4, 3) if runge_kutta else (2, 1)
    return getattr(scheduler, "order", 1), None


def _fraction(call: int, total: int, each: int, steps: int | None) -> float:
    """i / n for the step that a call belongs to, of a run of `total` calls: as a pipeline's progress bar counts."""
    if steps is None:
        i, n = call // each, -(-total // each)
    else:
        i, n = (call // each if call < each * steps else call - (each - 1) * steps), total - (each - 1) * steps
    return min(1.0, i / max(1, n))
