"""What a run takes: its seconds, those of its steps alone, and the most memory, with those of the sessions that it goes on from."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Usage:
    """What a run has taken so far.

    Args:
        seconds: all of them, of loading and saving too.
        stepping: those of its steps, without what is saved, measured and drawn between them.
        steps: how many.
        peak_memory: bytes, of the GPU if there is one, else of the process.
    """

    seconds: float = 0.0
    stepping: float = 0.0
    steps: int = 0
    peak_memory: int = 0

    @property
    def rate(self) -> float:
        """Steps a second; 0 before the first."""
        return self.steps / self.stepping if self.stepping else 0.0

    def table(self, examples: int) -> dict[str, float]:
        """The figures, for a file of measurements. `examples`: of a step."""
        return {
            "seconds": round(self.seconds, 1),
            "steps_per_second": round(self.rate, 4),
            "samples_per_second": round(self.rate * examples, 4),
            "peak_memory": self.peak_memory,
        }


class Stopwatch:
    """Measures a run, from when it is made."""

    def __init__(self) -> None:
        self.begun, self.stepping, self.steps = time.perf_counter(), 0.0, 0
        self.since: float | None = None  # when the step that is under way began
        self.earlier = Usage()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """This block is a step. On an accelerator it is the time in which the host has asked for one, which is the same over many."""
        self.since = time.perf_counter()
        yield
        self.stepping, self.since = self.in_steps(), None
        self.steps += 1

    def in_steps(self) -> float:
        """The seconds of this session's steps until now."""
        return self.stepping + (0.0 if self.since is None else time.perf_counter() - self.since)

    def usage(self) -> Usage:
        """What it has taken until now."""
        before = self.earlier
        return Usage(
            before.seconds + time.perf_counter() - self.begun,
            before.stepping + self.in_steps(),
            before.steps + self.steps,
            max(before.peak_memory, peak_memory()),
        )

    def facts(self) -> dict[str, float]:
        """The same, for the state of a run."""
        usage = asdict(self.usage())
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in usage.items()}

    def restore(self, facts: Mapping[str, float]) -> None:
        """Count on from what a state has."""
        known = {name: facts[name] for name in asdict(self.earlier) if name in facts}
        self.earlier = Usage(**known)  # type: ignore[arg-type]


def peak_memory() -> int:
    """The most bytes that were taken at once: of the GPU by tensors, else of this process by everything; 0 where that is not told."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)
