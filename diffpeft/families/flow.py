"""Flow matching on a straight line: x = (1 - s) z + s n, and the target is the velocity n - z (Lipman et al. 2022, arXiv:2210.02747).

s = S u / (1 + (S - 1) u): the shift S makes large images noisier (Esser et al. 2024, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft.families.base import Noised
from diffpeft.families.devices import sent

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component

_DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
_DEFAULTS = (0.5, 1.15, 256, 4096)


@dataclass(frozen=True)
class Flow:
    """The levels of a flow.

    Args:
        shift: S, the same for every size; None: by the number of tokens.
        line: mu at some number of tokens, mu at another, and these numbers: mu is on the line through both.
        exponential: whether S is e^mu, or mu.
        patch: latent pixels, the side of a token.
    """

    shift: float | None = 1.0
    line: tuple[float, float, int, int] = _DEFAULTS
    exponential: bool = True
    patch: int = 1
    kind: str = field(default="flow", init=False)
    density: str = field(default="logit_normal", init=False)

    @classmethod
    def of(cls, scheduler: Component, patch: int) -> Flow:
        """The levels that a flow's scheduler draws at."""
        config = scheduler.config
        line = tuple(config.get(name, default) for name, default in zip(_DYNAMIC, _DEFAULTS, strict=True))
        shift = None if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
        return cls(shift, line, config.get("time_shift_type", "exponential") == "exponential", patch)

    def factor(self, shape: Sequence[int]) -> float:
        """S for latents [b, c, h, w] of this shape."""
        if self.shift is not None:
            return self.shift
        low, high, few, many = self.line
        tokens = math.prod(shape[-2:]) / self.patch**2
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if self.exponential else mu

    def sigma(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """s [b] at levels u [b]."""
        factor = self.factor(shape)
        return factor * u / (1 + (factor - 1) * u)

    def place(self, sigma: Tensor, shape: Sequence[int]) -> Tensor:
        """The level u [b] that has s."""
        factor = self.factor(shape)
        return sigma / (factor - (factor - 1) * sigma)

    def noised(self, z: Tensor, n: Tensor, u: Tensor) -> Noised:
        """Latents z with noise n, both [b, c, h, w], at levels u [b]. Time is s."""
        s = sent(self.sigma(u, z.shape), z.device).to(z.dtype)
        share = s.view(-1, 1, 1, 1)
        return Noised((1 - share) * z + share * n, s, n - z, ((1 - s) / s).square(), self.kind)
