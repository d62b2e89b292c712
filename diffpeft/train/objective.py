"""The loss of a batch: denoise at random noise levels, weighted by min-SNR, with prior preservation.

min-SNR: Hang et al. 2023, arXiv:2303.09556. Prior preservation: DreamBooth, Ruiz et al. 2023, arXiv:2208.12242.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpeft.errors import ConfigError, shown
from diffpeft.families import Conditions, Family, Frame, Noised


@dataclass(frozen=True)
class Batch:
    """Latents and noise [b, c, h, w], noise levels u [b] in [0, 1), prompts, which of them are class images, and where the pixels are from.

    `mask` [b, 1, h, w] says how much each place counts, `prior_prompts` under which prompts the base's predictions are to be kept.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    prompts: list[str]
    is_class: Tensor  # [b] bool
    frames: Sequence[Frame]
    mask: Tensor | None = None
    prior_prompts: list[str] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        mask = None if self.mask is None else sent(self.mask, device)
        return replace(self, latents=sent(self.latents, device), noise=sent(self.noise, device), mask=mask)


def denoising(family: Family, batch: Batch, texts: Conditions, snr_gamma: float | None = None) -> Tensor:
    """Mean squared error of the prediction by sample [b], weighted. `texts` is what the denoiser reads of the prompts."""
    noised = family.levels.noised(batch.latents, batch.noise, batch.u)
    prediction = family.predict(noised.x, noised.t, texts | family.framed(batch.frames))
    error = (prediction - noised.target.float()).square()
    error = (error if batch.mask is None else error * batch.mask).flatten(1).mean(1)
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

    So the prior weighs the same however many class images there are. A batch may have images of one kind only. `is_class` [b] is on the CPU: nobody
    waits for the losses' device.
    """
    if not is_class.any():
        return losses.mean()
    weights = torch.zeros(len(is_class), dtype=losses.dtype)
    for weight, mask in ((1.0, ~is_class), (prior_weight, is_class)):
        weights[mask] = weight / max(int(mask.sum()), 1)
    return (losses * sent(weights, losses.device)).sum()


def preserved(
    family: Family,
    batch: Batch,
    texts: Callable[[Sequence[str]], Conditions],
    base: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """|model(x_t, t, p) - base(x_t, t, p)|^2 [b] under the batch's prior prompts p, for its noised latents x_t. The base is the model inside `base()`."""
    noised, frames = family.levels.noised(batch.latents, batch.noise, batch.u), family.framed(batch.frames)
    assert batch.prior_prompts is not None
    with torch.no_grad(), base():
        target = family.predict(noised.x, noised.t, texts(batch.prior_prompts) | frames)
    prediction = family.predict(noised.x, noised.t, texts(batch.prior_prompts) | frames)
    return (prediction - target).square().flatten(1).mean(1)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
