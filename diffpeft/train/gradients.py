"""The gradients of a step: their norms, the numbers that are read of them, clipping, and the loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class Readout:
    """Readout [n] on their way from the device. A late one is copied without waiting; `numbers` waits for this copy and for nothing after it."""

    def __init__(self, step: int, values: Tensor, late: bool):
        self.step = step
        self.host = values.to("cpu", non_blocking=late)
        self.copied = torch.Event(values.device) if late and values.device.type != "cpu" else None
        if self.copied is not None:
            self.copied.record()

    def numbers(self) -> np.ndarray:
        """The numbers, [n]."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.numpy()


def norms_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norms [n] of the gradients, 0 where there is none, on the device of the first."""
    with_gradient = [p.grad for p in parameters if p.grad is not None]
    norms = iter(torch._foreach_norm(with_gradient) if with_gradient else ())
    zero = torch.zeros((), device=parameters[0].device, dtype=parameters[0].dtype)
    return torch.stack([zero if p.grad is None else next(norms).to(zero) for p in parameters])


def clip(parameters: Sequence[nn.Parameter], total: Tensor, limit: float, guarded: bool) -> None:
    """Scale the gradients down to the norm `limit`. `guarded`: make them 0 if their norm `total` [] is not finite, without looking."""
    with_gradient = [p for p in parameters if p.grad is not None]
    nn.utils.clip_grads_with_norm_(with_gradient, limit, total)
    if guarded:
        broken = ~total.isfinite()
        for p in with_gradient:
            p.grad.masked_fill_(broken.to(p.grad.device), 0)  # type: ignore[union-attr]


@dataclass
class LossScale:
    """What a loss in fp16 is multiplied by, so that small gradients are not rounded to zero, as in Micikevicius et al. 2018, arXiv:1710.03740.

    A step whose gradients overflow is left out and halves it; `patience` good ones in a row double it.
    """

    value: float = 65536.0
    good: int = 0
    patience: int = 2000
    least: float = 2.0**-14

    def fits(self, loss: float, total: float) -> bool:
        """Whether the gradients of a step with this norm may be used; the scale follows. A loss that is not finite is another matter."""
        if math.isfinite(total) or not math.isfinite(loss) or self.value <= self.least:
            self.good += 1
            if self.good >= self.patience:
                self.value, self.good = self.value * 2, 0
            return True
        self.value, self.good = self.value / 2, 0
        return False
