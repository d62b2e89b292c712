"""The paired held-out loss: what adapter off and on come to on pictures that are not trained on, with the same noise at the same levels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """The losses at shares of noise from `low` to `high`, means over pictures and levels, and the standard error of their difference."""

    low: float
    high: float
    before: float
    after: float
    standard_error: float


@dataclass(frozen=True)
class HeldoutLoss:
    """The loss on held-out pictures with the adapter off and on, after so many steps, and the standard error of the difference over the pictures."""

    step: int
    before: float
    after: float
    standard_error: float
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Best:
    """The step whose adapter a run ends with, and why, in a sentence."""

    step: int
    reason: str
