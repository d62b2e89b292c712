"""Between pixels and the latents that a denoiser reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component


def encoded(vae: Component, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f], at least fp32.

    They are as the pipelines take them back: (z - shift) scale, or with statistics for each channel (z - mean) scale / std.
    """
    import torch

    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = precise(posterior.mean), precise(posterior.std)
    shift, scale = (t.to(mean) for t in _normalisation(vae.config))
    return (mean - shift) * scale, std * scale


def precise(x: Tensor) -> Tensor:
    """In fp32, if it is in less."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalisation(config: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """What is taken from latents and then multiplied with them, [] or [1, c, 1, 1]."""
    import torch

    names = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    means, stds, scale, shift = (torch.tensor(config.get(name) or 0.0, dtype=torch.float64) for name in names)
    if means.ndim and stds.ndim:
        return means.view(1, -1, 1, 1), scale / stds.view(1, -1, 1, 1)
    return shift, scale


def factor(config: Mapping[str, object]) -> int | None:
    """Pixels a latent pixel, by the config of a VAE; None if it does not tell."""
    widths = config.get("block_out_channels")
    return 2 ** (len(widths) - 1) if isinstance(widths, (list, tuple)) and widths else None
