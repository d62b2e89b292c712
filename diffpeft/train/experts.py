"""Models of several denoisers, each for a range of noise: which of them a run trains, and which one a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from diffpeft.errors import ConfigError
from diffpeft.families import Family
from diffpeft.train import draw
from diffpeft.train.config import TrainConfig
from diffpeft.train.formats import HALVES

BOTH, HIGH, LOW = "both", "high", "low"


@dataclass(frozen=True)
class Experts:
    """The denoisers that are trained, and the lowest and the highest share of noise of each."""

    spans: Mapping[str, tuple[float, float]]

    def at(self, seed: int, step: int) -> str:
        """The one that a step trains: in every pair of steps of a run with two each has one."""
        names = [*self.spans]
        return names[draw.order(len(names), step, 1, seed, "experts")[0]]

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest share of noise of them all."""
        lows, highs = zip(*self.spans.values(), strict=True)
        return min(lows), max(highs)

    def begins(self, seed: int) -> dict[str, tuple[int, int]]:
        """{denoiser: the first two steps that train it}."""
        turns = [self.at(seed, step) for step in range(2 * len(self.spans))]
        steps = {name: [step for step, turn in enumerate(turns) if turn == name] for name in self.spans}
        return {name: (both[0], both[1]) for name, both in steps.items()}


@contextlib.contextmanager
def asked_alone(family: Family, denoiser: str | None) -> Iterator[None]:
    """Times are of this denoiser, whatever they are; None: nobody knows."""
    family.only = denoiser
    try:
        yield
    finally:
        family.only = None


def trained_alone(experts: str | None) -> str | None:
    """The denoiser that a run trains alone, as --experts says it; None for a run that trains what there is."""
    return next((denoiser for denoiser, half in HALVES.items() if half == experts), None)


def experts_of(config: TrainConfig, family: Family) -> Experts:
    """The denoisers that a run trains. Raises ConfigError for experts that the model lacks, or whose noise is not trained at."""
    low, high = config.span()
    if family.boundary is None:
        if config.experts is not None:
            raise config.without_experts()
        return Experts({family.denoiser: (low, high)})
    noisy, clean = family.denoisers
    ranges = {noisy: (max(low, family.boundary), high), clean: (low, min(high, family.boundary))}
    chosen = {BOTH: (noisy, clean), HIGH: (noisy,), LOW: (clean,)}
    spans = {name: ranges[name] for name in chosen[config.experts or BOTH]}
    spans = {name: span for name, span in spans.items() if span[0] < span[1]} if config.experts is None else spans
    if any(start >= end for start, end in spans.values()):
        raise ConfigError(
            f"sigma_range is {low:g},{high:g}, and nothing of it is left for --experts {config.experts}: "
            f"they change over at {family.boundary:g}",
            remedy="Pass another --sigma-range, or leave --experts out.",
        )
    return Experts(spans)
