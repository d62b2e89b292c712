"""The learning rate by step: diffusers' schedules as functions of the step alone, so that a run that goes on needs nothing but its number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpeft.errors import ConfigError


@dataclass(frozen=True)
class LearningRate:
    """`warmup` steps up, and then what `kind` says; `cycles` are those of cosine_with_restarts, `power` that of polynomial."""

    lr: float
    steps: int
    warmup: int = 0
    kind: str = "constant"
    cycles: int = 1
    power: float = 1.0

    def at(self, step: int) -> float:
        """The rate of step 0 .. steps - 1."""
        return self.lr * self.factor(step)

    def factor(self, step: int) -> float:
        """The rate of a step over the highest. The first step has a rate too, where diffusers' warm-up begins with 0."""
        return (step + 1) / self.warmup if step < self.warmup else self._factor(step)

    @functools.cached_property
    def _factor(self) -> Callable[[int], float]:
        from diffusers.optimization import get_scheduler

        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        try:
            schedule = get_scheduler(
                {"constant": "constant_with_warmup"}.get(self.kind, self.kind),
                optimizer,
                num_warmup_steps=self.warmup,
                num_training_steps=self.steps,
                num_cycles=self.cycles,
                power=self.power,
            )
        except ValueError as error:
            raise ConfigError(
                f"lr_scheduler is {self.kind}: {error}", remedy="Choose another --lr-scheduler."
            ) from error
        return schedule.lr_lambdas[0]
