"""How levels are drawn: each takes u, uniform in [0, 1), to a level that is distributed as its name says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def _logit_normal(u: Tensor) -> Tensor:
    """The logistic function of a standard normal number (Esser et al. 2024)."""
    import torch

    return torch.special.ndtri(u).sigmoid()


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"uniform": lambda u: u, "logit_normal": _logit_normal}
