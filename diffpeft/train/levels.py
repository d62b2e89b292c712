"""Which levels of noise a run trains at: a density, a shift towards noise, and a range.

All is defined on u in [0, 1), 0 the cleanest, by a rising function Q: a uniform number -> a level. A range cuts Q's argument, so that what is left keeps its
density; its ends are shares of noise, sigma, which the family places among its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft.families.base import Levels
from diffpeft.families.densities import DENSITIES

Quantile = Callable[[Tensor], Tensor]
_HALVINGS = 60  # of a bisection: to the last bit of a float64 in [0, 1]


@dataclass(frozen=True)
class Sampling:
    """How levels are drawn.

    Args:
        density: a name in DENSITIES, with what it is drawn with; None: the family's.
        shift: S of u -> S u / (1 + (S - 1) u); on a flow it is the shift of sigma, in the place of the model's own. None: the model's.
        span: the lowest and the highest share of noise.
    """

    levels: Levels
    density: str | None = None
    parameters: dict[str, float] = field(default_factory=dict)
    shift: float | None = None
    span: tuple[float, float] = (0.0, 1.0)

    def __call__(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """The levels [b] of uniform numbers [b], for latents [b, c, h, w] of this shape."""
        if self.span == (0.0, 1.0):
            return self._quantile(u, tuple(shape))
        low, high = self.arguments(torch.tensor(self.span, dtype=torch.float64), shape)
        return self.at(low + (high - low) * u.double(), shape).to(u.dtype).clamp(max=1 - torch.finfo(u.dtype).eps)

    def at(self, arguments: Tensor, shape: Sequence[int]) -> Tensor:
        """The levels [b] at arguments [b] of the quantile function, whatever the range."""
        return self._quantile(arguments, tuple(shape))

    def arguments(self, shares: Tensor, shape: Sequence[int]) -> Tensor:
        """The arguments [n] of the quantile function at which levels have these shares of noise [n], in float64."""
        places = self.levels.place(shares, shape).double()
        places = torch.where(shares <= 0, 0.0, torch.where(shares >= 1, 1.0, places))
        return inverse(lambda u: self._quantile(u, tuple(shape)), places)

    def _quantile(self, u: Tensor, shape: tuple[int, ...]) -> Tensor:
        level = DENSITIES[self.density or self.levels.density](u, **self.parameters)
        if self.shift is None:
            return level
        shifted = self.shift * level / (1 + (self.shift - 1) * level)
        return self.levels.place(shifted, shape) if self.levels.kind == "flow" else shifted


def inverse(quantile: Quantile, levels: Tensor) -> Tensor:
    """The uniform numbers [n] whose levels these are, by bisection, in float64."""
    low, high = torch.zeros_like(levels), torch.ones_like(levels)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = quantile(middle) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
