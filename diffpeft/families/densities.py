"""How levels are drawn: each takes u, uniform in [0, 1), to a level that is distributed as its name says, and higher for a higher u (Esser et al.
2024, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODE = 1.29  # the paper's best scale


def _logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The logistic function of a normal number: a mean above 0 is noisier."""
    import torch

    return (mean + std * torch.special.ndtri(u)).sigmoid()


def _mode(u: Tensor, scale: float = MODE) -> Tensor:
    """The paper's 1 - v - k (cos(pi v / 2)^2 - 1 + v) with v = 1 - u: a scale k above 0 has more levels in the middle, one below 0 fewer."""
    return u + scale * (u - (math.pi / 2 * u).sin().square())


DENSITIES: dict[str, Callable[..., Tensor]] = {"uniform": lambda u: u, "logit_normal": _logit_normal, "mode": _mode}
