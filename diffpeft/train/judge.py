"""Who says which step's adapter is best: the held-out loss is measured every so many steps, and what was measured is part of the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffpeft.train.heldout import Best, Design, HeldoutLoss, chosen

_NAME = "heldout."  # of its tensors among those of a state


@dataclass
class Judge:
    """The held-out losses of a run, by step.

    Args:
        losses: the losses [p, bands, draws] of the held-out pictures, with the adapters as they are.
        strength: the adapter alone, off at 0 and on at 1, in a block.
        design: what is measured; asked for once.
        every: steps between two measurements; step 0 and the last one are measured too.
        key: what the losses depend on besides the adapter: those of another key are forgotten.
        chooses: whether a run ends with the adapter of the lowest loss.
        told: told of each measurement.
    """

    losses: Callable[[], np.ndarray]
    strength: Callable[[float], AbstractContextManager[None]]
    design: Callable[[], Design]
    every: int
    key: str = ""
    chooses: bool = True
    told: Callable[[HeldoutLoss], None] = lambda loss: None
    history: list[HeldoutLoss] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before: np.ndarray | None = None
        self.after: dict[int, np.ndarray] = {}
        self.stateless: set[int] = set()  # steps that were measured, and whose state is not there
        self._design: Design | None = None

    def due(self, step: int, last: bool) -> bool:
        """Whether the adapter is to be measured after so many steps."""
        return (last or step % self.every == 0) and step not in self.after

    def measure(self, step: int) -> None:
        """Measure the adapter as it is after so many steps; without it, once for all."""
        if self.before is None:
            with self.strength(0.0):
                self.before = self.losses()
        with self.strength(1.0):
            self.after[step] = self.losses()
        self.history.append(self._summary(step))
        self.told(self.history[-1])

    def _summary(self, step: int) -> HeldoutLoss:
        assert self.before is not None
        self._design = self._design or self.design()
        return self._design.summary(step, self.before, self.after[step])

    @property
    def best(self) -> int | None:
        """The step with the lowest loss, the first of equals, of those whose state is there; None before the first measurement, and where nothing is chosen."""
        measured = [loss for loss in self.history if loss.step and loss.step not in self.stateless]
        losses = [(loss.after, loss.step) for loss in measured if math.isfinite(loss.after)]
        return min(losses)[1] if losses and self.chooses else None

    def verdict(self, last: int) -> Best | None:
        """What a run of so many steps ends with, and why; None where nothing was measured."""
        if self.before is None or self._design is None or last not in self.after:
            return None
        return chosen(self._design, self.before, self.after, last, self.best or last)

    # In the state of a run

    def tensors(self) -> dict[str, Tensor]:
        """What was measured."""
        if self.before is None:
            return {}
        steps = sorted(self.after)
        arrays = {"before": self.before, "steps": np.array(steps), "after": np.stack([self.after[s] for s in steps])}
        return {_NAME + name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}

    def restore(self, tensors: Mapping[str, Tensor], key: str, states: Collection[int]) -> None:
        """Go on from what a state has, where it was measured on the same pictures. `states`: the steps whose states are there."""
        if key != self.key or _NAME + "before" not in tensors:
            return
        before, steps, after = (tensors[_NAME + name].numpy() for name in ("before", "steps", "after"))
        self.before, self.after = before, {int(step): row for step, row in zip(steps, after, strict=True)}
        self.stateless = self.after.keys() - states
        self.history[:] = [self._summary(step) for step in self.after]
