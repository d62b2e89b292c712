"""The loss of a batch: denoise at random noise levels, weighted by min-SNR, with prior preservation.

min-SNR: Hang et al. 2023, arXiv:2303.09556. Prior preservation: DreamBooth, Ruiz et al. 2023, arXiv:2208.12242.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigError, shown
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
    """Mean squared error of the prediction by sample [b], weighted. `text` [b, tokens, width] is what the denoiser reads."""
    noised = family.noised(batch.latents, batch.noise, batch.u)
    error = (family.predict(noised.x, noised.t, text) - noised.target.float()).square().flatten(1).mean(1)
    return error if snr_gamma is None else error * min_snr(noised, snr_gamma)


# {what a model predicts: what divides min(SNR, gamma), the weight of an error in the clean image}
_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
}


def check_weighted(kind: str) -> None:
    """Raise ConfigError for a kind of prediction that min-SNR has no weight for: a velocity of a flow, for example."""
    if kind not in _OVER:
        raise ConfigError(
            f"min-SNR has no weight for {shown(kind)} predictions",
            remedy=f"It is for {', '.join(_OVER)}. Leave --snr-gamma out.",
        )


def min_snr(noised: Noised, gamma: float) -> Tensor:
    """The weight [b] of each sample's error: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, as it is for x0.

    Raises ConfigError for other predictions.
    """
    check_weighted(noised.kind)
    snr = noised.snr.clamp(min=1e-8)
    return snr.clamp(max=gamma) / _OVER[noised.kind](snr)


def with_prior(losses: Tensor, is_class: Tensor, prior_weight: float) -> Tensor:
    """The loss of a batch from those of its samples [b]: mean over the instance images plus prior_weight x mean over the class images.

    So the prior weighs the same however many class images there are. `is_class` [b] is on the CPU: nobody waits for the losses' device.
    """
    if not is_class.any():
        return losses.mean()
    weights = torch.where(is_class, prior_weight / is_class.sum(), 1 / (~is_class).sum())
    return (losses * sent(weights.to(losses.dtype), losses.device)).sum()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
