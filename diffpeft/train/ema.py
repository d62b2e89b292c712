"""Averages of the parameters: while training (EMA), and what an optimiser like Schedule-Free keeps itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Ema:
    """shadow <- d shadow + (1 - d) parameter, as diffusers has it: d = min(decay, (1 + s) / (10 + s)) after s steps before this one, 0 at the first.

    So early values fade soon.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Follow the parameters, after so many steps."""
        decay = min(self.decay, done / (9 + done)) if done > 1 else 0.0
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)


@torch.no_grad()
def average(parameters: Mapping[str, Tensor], ema: Ema | None, optimizer: torch.optim.Optimizer) -> None:
    """Make the parameters the averages, as they are saved and drawn with; without such they stay."""
    if _has_modes(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]
    if ema is not None:
        torch._foreach_copy_(list(parameters.values()), list(ema.shadow.values()))


@contextlib.contextmanager
def averaged(parameters: Mapping[str, Tensor], ema: Ema | None, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In this block the parameters are the averages; afterwards they are what they were, bit for bit."""
    if ema is None and not _has_modes(optimizer):
        yield
        return
    before = [p.detach().clone() for p in parameters.values()]
    average(parameters, ema, optimizer)
    try:
        yield
    finally:
        if _has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            torch._foreach_copy_(list(parameters.values()), before)


def _has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser has averages of its own, which it shows in `eval()`."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")
