"""Discrete levels of noise: x_t = sqrt(a_t) z + sqrt(1 - a_t) n for t = 0 .. T - 1, a_t a table of the model's scheduler.

The target is n (Ho et al. 2020, arXiv:2006.11239), v = sqrt(a_t) n - sqrt(1 - a_t) z (Salimans and Ho 2022, arXiv:2202.00512), or z. With a zero-terminal
SNR (Lin et al. 2023, arXiv:2305.08891) the last a_t is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.errors import WrongBaseError, shown
from diffpeft.families.base import Noised
from diffpeft.families.devices import sent
from diffpeft.families.latents import spread

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component

_KINDS = ("epsilon", "v_prediction", "sample")


class Discrete:
    """The levels of a scheduler with a table of betas. Time is the number of the level."""

    density = "uniform"

    def __init__(self, scheduler: Component):
        from diffusers import DDPMScheduler

        config = scheduler.config
        self.kind: str = config.get("prediction_type", "")
        if self.kind not in _KINDS or "beta_schedule" not in config:
            said = f"predicts {shown(self.kind)}" if self.kind not in _KINDS else "has noise levels of its own"
            raise WrongBaseError(
                f"the model {said} and cannot be trained",
                where=f"its scheduler, a {type(scheduler).__name__}",
                remedy="Models that predict epsilon, v_prediction or sample, at levels by betas, can.",
            )
        kind = (
            type(scheduler) if "snr_shift_scale" in config else DDPMScheduler
        )  # which does not know CogVideoX's shift
        self.alphas: Tensor = kind.from_config(config).alphas_cumprod.float()  # [T], falling

    def sigma(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """sqrt(1 - a_t) [b] at levels u [b]."""
        return (1 - self.alphas[self._number(u)]).sqrt()

    def place(self, sigma: Tensor, shape: Sequence[int]) -> Tensor:
        """The first level u [b] with at least this much noise; the last, if none has."""
        import torch

        number = torch.searchsorted((1 - self.alphas).sqrt(), sigma.to(self.alphas))
        return (number.clamp(max=len(self.alphas) - 1) + 0.5) / len(self.alphas)

    def noised(self, z: Tensor, n: Tensor, u: Tensor) -> Noised:
        """Latents z with noise n, both [b, c, *size], at levels u [b]."""
        t, device = self._number(u), z.device
        a = sent(self.alphas[t], device)
        signal, sigma = (spread(root.to(z.dtype), z) for root in (a.sqrt(), (1 - a).sqrt()))
        target = {"epsilon": n, "sample": z}.get(self.kind, signal * n - sigma * z)
        return Noised(signal * z + sigma * n, sent(t, device), target, a / (1 - a), self.kind)

    def _number(self, u: Tensor) -> Tensor:
        return (u * len(self.alphas)).long().to(self.alphas.device)
