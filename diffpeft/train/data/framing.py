"""Which frames of clips are trained on: how many, at what rate, and from where in the clip. No torch.

A clip of n frames of a model whose VAE takes k frames for one has n = k m + 1: the first frame is one by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Framing:
    """How clips are cut out of footage.

    Args:
        counts: how many frames a clip has; with several, footage is used in each that it is long enough for.
        rate: frames a second that clips are shown at; None: as they are.
        extraction: head, middle (of the footage), uniform (frames spread over all of it), or chunks (one clip after the other).
        step: frames that the model's VAE takes for one.
    """

    counts: tuple[int, ...]
    rate: float | None = None
    extraction: str = "head"
    step: int = 1

    @property
    def fitting(self) -> tuple[int, ...]:
        """The counts as the model can have them, the largest first."""
        return tuple(sorted({(count - 1) // self.step * self.step + 1 for count in self.counts}, reverse=True))

    def cuts(self, length: int, rate: float | None) -> list[tuple[int, ...]]:
        """The numbers of the frames of each clip that is cut out of footage of so many frames at a rate."""
        shown = self._resampled(length, rate)
        return [cut for count in self.fitting if count <= len(shown) for cut in self._cut(shown, count)]

    def _resampled(self, length: int, rate: float | None) -> list[int]:
        """The frames that are shown at our rate: for each time the last frame that has begun, none where the footage is slower than twice each."""
        if rate is None or self.rate is None:
            return list(range(length))
        count = int((length - 1) * self.rate / rate + 1e-6) + 1
        return [min(int(number * rate / self.rate + 1e-6), length - 1) for number in range(count)]

    def _cut(self, shown: Sequence[int], count: int) -> list[tuple[int, ...]]:
        spare = len(shown) - count
        if self.extraction == "chunks":
            return [tuple(shown[at : at + count]) for at in range(0, spare + 1, count)]
        if self.extraction == "uniform":
            last = max(count - 1, 1)
            return [tuple(shown[round(number * (len(shown) - 1) / last)] for number in range(count))]
        start = spare // 2 if self.extraction == "middle" else 0
        return [tuple(shown[start : start + count])]
