"""The loss of a batch: denoise at random noise levels, weighted by min-SNR, with prior preservation.

min-SNR: Hang et al. 2023, arXiv:2303.09556. Prior preservation: DreamBooth, Ruiz et al. 2023, arXiv:2208.12242.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.families import Family, Noised


@dataclass(frozen=True)
class Batch:
    """Latents and noise [b, c, h, w], noise levels u [b] in [0, 1), prompts, and which of them are class images."""

    latents: Tensor
    noise: Tensor
    u: Tensor
    prompts: list[str]
    is_class: Tensor  # [b] bool


def denoising(family: Family, batch: Batch, text: Tensor, snr_gamma: float | None = None) -> Tensor:
    """Mean squared error of the prediction by sample [b], weighted."""
    noised = family.noised(batch.latents, batch.noise, batch.u)
    error = (family.predict(noised.x, noised.t, text) - noised.target.float()).square().flatten(1).mean(1)
    return error if snr_gamma is None else error * min_snr(noised, snr_gamma)


def min_snr(noised: Noised, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, as it is for x0."""
    snr = noised.snr.clamp(min=1e-8)
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[noised.kind]
    return snr.clamp(max=gamma) / over


def with_prior(losses: Tensor, is_class: Tensor, prior_weight: float) -> Tensor:
    """Mean over the instance images plus prior_weight x mean over the class images, so that the prior weighs the same however many there are."""
    if not is_class.any():
        return losses.mean()
    return losses[~is_class].mean() + prior_weight * losses[is_class].mean()
