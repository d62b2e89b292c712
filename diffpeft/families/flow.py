"""Flow matching on a straight line: x = (1 - s) z + s n, and the target is the velocity n - z (Lipman et al. 2022, arXiv:2210.02747).

s = S u / (1 + (S - 1) u): the shift S makes large images noisier (Esser et al. 2024, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft.errors import WrongBaseError
from diffpeft.families.base import Noised
from diffpeft.families.devices import sent
from diffpeft.families.latents import spread

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component

Mu = Callable[[float], float]  # of the number of tokens


def line(low: float = 0.5, high: float = 1.15, few: float = 256, many: float = 4096) -> Mu:
    """The mu on the line through `low` at a few tokens and `high` at many."""
    return lambda tokens: low + (high - low) * (tokens - few) / (many - few)


USUAL = line()


def line_of(scheduler: Component) -> Mu:
    """The line that a scheduler's config says."""
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    values = [scheduler.config.get(name) for name in names]
    return USUAL if None in values else line(*values)


@dataclass(frozen=True)
class Flow:
    """The levels of a flow.

    Args:
        shift: S, the same for every size; None: by the number of tokens.
        mu: of the number of tokens.
        exponential: whether S is e^mu, or mu.
        patch: latent pixels, the side of a token.
    """

    shift: float | None = 1.0
    mu: Mu = USUAL
    exponential: bool = True
    patch: int = 1
    kind: str = field(default="flow", init=False)
    density: str = field(default="logit_normal", init=False)

    @classmethod
    def of(cls, scheduler: Component, patch: int, mu: Mu | None = None) -> Flow:
        """The levels that a flow's scheduler draws at; `mu` is on the line of its config, if nothing else is said.

        Raises WrongBaseError for a scheduler of anything else.
        """
        config = scheduler.config
        fixed = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
        if fixed is None:
            raise WrongBaseError(
                "the model is one of a flow, and its scheduler is of something else",
                where=f"its scheduler, a {type(scheduler).__name__}",
                remedy="Take the scheduler that the model was published with.",
            )
        shift = None if config.get("use_dynamic_shifting") else float(fixed)
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        return cls(shift, mu or line_of(scheduler), exponential, patch)

    def factor(self, shape: Sequence[int]) -> float:
        """S for latents [b, c, *size] of this shape."""
        if self.shift is not None:
            return self.shift
        return self.shifted(self.mu(math.prod(shape[2:]) / self.patch**2))

    def shifted(self, mu: float) -> float:
        """S by mu."""
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
        """Latents z with noise n, both [b, c, *size], at levels u [b]. Time is s."""
        s = sent(self.sigma(u, z.shape), z.device).to(z.dtype)
        share = spread(s, z)
        return Noised((1 - share) * z + share * n, s, n - z, ((1 - s) / s).square(), self.kind)
