"""Between pixels and the latents that a denoiser reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component


def encoded(vae: Component, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [b, 3, *size] in [-1, 1] -> mean and standard deviation of the latents [b, c, *size / f], at least fp32.

    They are as the pipelines take them back: (z - shift) scale, or with statistics for each channel (z - mean) scale / std.
    """
    mean, std = moments(vae, pixels)
    shift, scale = (spread(t.to(mean), mean, 1) for t in _normalisation(vae))
    return (mean - shift) * scale, std * scale


def of_one_frame(vae: Component, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents [b, c, h / f, w / f] of images [b, 3, h, w], by a VAE of clips."""
    mean, std = encoded(vae, pixels.unsqueeze(2))
    return mean.squeeze(2), std.squeeze(2)


def moments(vae: Component, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a VAE's own latents [b, c, *size / f], at least fp32. One that draws nothing has no deviation."""
    import torch

    with torch.no_grad():
        out = vae.encode(pixels.to(vae.device, vae.dtype))
    if "latent" in out:
        mean = precise(out.latent)
        return mean, torch.zeros_like(mean)
    return precise(out.latent_dist.mean), precise(out.latent_dist.std)


def precise(x: Tensor) -> Tensor:
    """In fp32, if it is in less."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(values: Tensor, x: Tensor, axis: int = 0) -> Tensor:
    """Values [n] along an axis of x, or [], with ones for the other axes."""
    return values.view(*(-1 if n == axis else 1 for n in range(x.ndim))) if values.ndim else values


def _normalisation(vae: Component) -> tuple[Tensor, Tensor]:
    """What is taken from latents and then multiplied with them, [] or [c]."""
    import torch

    scale, shift = (
        torch.tensor(vae.config.get(name) or default, dtype=torch.float64)
        for name, default in (("scaling_factor", 1.0), ("shift_factor", 0.0))
    )
    buffers = dict(vae.named_buffers(recurse=False))  # where LTX's has them
    mean, std = (vae.config.get(name) or buffers.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return shift, scale
    return torch.as_tensor(mean, dtype=torch.float64), scale / torch.as_tensor(std, dtype=torch.float64)


def temporal_factor(config: Mapping[str, object]) -> int | None:
    """Frames a latent frame, by the config of a VAE; None if it does not tell."""
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        if isinstance(config.get(name), int):
            return config[name]  # type: ignore[return-value]
    scaled, expanded, halved = (
        config.get(name) for name in ("spatio_temporal_scaling", "temporal_expansions", "temperal_downsample")
    )
    if isinstance(expanded, (list, tuple)):  # Mochi's
        return math.prod(expanded)
    patch = config.get("patch_size_t") if isinstance(config.get("patch_size_t"), int) else 1
    halves = scaled if isinstance(scaled, (list, tuple)) else halved
    return patch * 2 ** sum(map(bool, halves)) if isinstance(halves, (list, tuple)) else None


def factor(config: Mapping[str, object]) -> int | None:
    """Pixels a latent pixel, by the config of a VAE; None if it does not tell."""
    if isinstance(config.get("spatial_compression_ratio"), int):
        return config["spatial_compression_ratio"]  # type: ignore[return-value]
    scaled, halved, patch = (
        config.get(name) for name in ("spatio_temporal_scaling", "temperal_downsample", "patch_size")
    )
    patch = patch if isinstance(patch, int) else 1
    if isinstance(scaled, (list, tuple)):  # LTX's
        return patch * 2 ** sum(map(bool, scaled))
    if isinstance(halved, (list, tuple)):  # Wan's and Qwen's: a level for each
        return patch * 2 ** len(halved)
    widths = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    return 2 ** (len(widths) - 1) if isinstance(widths, (list, tuple)) and widths else None
