"""The training loop. It knows parameters and a loss by step, and no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpeft.errors import DivergedError, NothingLearntError


@dataclass(frozen=True)
class LearningRate:
    """The learning rate by step: `warmup` steps up, then constant, or down along a line or a cosine."""

    lr: float
    steps: int
    warmup: int = 0
    kind: str = "constant"

    def at(self, step: int) -> float:
        """The rate of step 0 .. steps - 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return (
            self.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.kind]
        )


def fit(
    parameters: Sequence[nn.Parameter],
    loss_at: Callable[[int], Tensor | Iterable[Tensor]],
    schedule: LearningRate,
    *,
    weight_decay: float,
    max_grad_norm: float,
    on_step: Callable[[int, float], None],
) -> list[float]:
    """Minimise `loss_at(step)` with AdamW; the losses by step. `on_step(steps done, loss)` is called after each.

    A loss may come in parts whose sum it is: gradients are accumulated, and a generator holds one part's graph at a time.

    Raises DivergedError for a loss that is not finite, before it reaches the parameters, and for a last gradient that is not finite;
    NothingLearntError if no gradient was ever other than zero.
    """
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=weight_decay, fused=True)
    losses: list[float] = []
    largest = torch.zeros((), device=parameters[0].device)  # of the gradients' norms; read once, at the end
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = 0.0, loss_at(step)
        for part in [parts] if isinstance(parts, Tensor) else parts:
            loss += part.item()
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {step + 1}", remedy="Lower --lr, or use --dtype fp32.")
            part.backward()
        losses.append(loss)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        largest = torch.maximum(largest, norm.to(largest))
        optimizer.step()
        on_step(step + 1, losses[-1])
    _check_gradients(largest.item())
    return losses


def _check_gradients(largest: float) -> None:
    """Raise if the largest norm of a run's gradients says that it diverged, or that nothing was learnt."""
    if not math.isfinite(largest):
        raise DivergedError("the gradient is not finite", remedy="Lower --lr, or use --dtype fp32.")
    if not largest:
        raise NothingLearntError(
            "nothing was learnt: no gradient reached the adapter",
            remedy="The loss does not depend on its layers: choose others with --targets.",
        )
