"""How near generated pictures are to a style, how much of their shapes an adapter keeps, and whether it helps on pictures it has not seen.

The patch distance is the Frechet distance between Gaussians fitted to features of small patches, as in SIFID (Shaham et al. 2019, SinGAN,
arXiv:1905.01164), here on feature maps of the base's own VAE encoder (after its first convolution and its first two levels), each divided by the
mean of the two covariance traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpeft.families import Family, Frame
from diffpeft.families.prompts import embedded
from diffpeft.train.draw import generator
from diffpeft.train.objective import Batch, denoising


@torch.no_grad()
def patch_features(vae: Any, images: np.ndarray) -> list[Tensor]:
    """[n, h, w, 3] uint8 -> three feature maps, each [patches, channels] in fp64."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    x = vae.encoder.conv_in(x)
    maps = [x]
    for block in vae.encoder.down_blocks[:2]:
        for resnet in block.resnets:
            x = resnet(x, None)
        maps.append(x)
        for downsampler in block.downsamplers:
            x = downsampler(x)
    return [m.permute(0, 2, 3, 1).flatten(0, 2).double() for m in maps]


def patch_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Mean over the feature maps, each [patches, channels], of the normalised Frechet distance; 0 for equal statistics."""
    return float(np.mean([frechet(x, y) for x, y in zip(a, b, strict=True)]))


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), over the mean of tr A and tr B. a, b [n, c] in fp64."""
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = _root(A)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    traces = A.trace() + B.trace()
    return (((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross) / (traces / 2)).item()


def _root(matrix: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix [c, c]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


_WHITE = 0.93  # a pixel is drawn on if any channel is below


def shape_kept(before: np.ndarray, after: np.ndarray) -> float:
    """How much of their shapes pictures keep, [n, h, w, 3] uint8 both: the intersection over union of what is not white, the mean over the pictures.

    Two blank pictures have the same shape: 1.
    """
    a, b = ((images / 255 < _WHITE).any(axis=-1) for images in (before, after))
    both, either = (drawn.sum(axis=(1, 2)) for drawn in (a & b, a | b))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


@torch.no_grad()
def heldout_loss(
    family: Family,
    pixels: Tensor,
    prompts: list[str],
    *,
    seed: int,
    levels: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Mean denoising error on images [n, 3, h, w], with fixed noise at fixed levels: for a paired comparison call it with the adapter off and on."""
    z, _ = family.encode(pixels)
    height, width = pixels.shape[-2:]
    frames = [Frame((height, width), (0, 0), (height, width))] * len(z)
    texts, none = embedded(family, prompts), torch.zeros(len(z), dtype=torch.bool)
    losses = []
    for level in range(levels):
        noise = torch.stack(
            [torch.randn(z.shape[1:], generator=generator(seed, "heldout", i, level)) for i in range(len(z))]
        ).to(z.device)
        u = torch.full((len(z),), (level + 0.5) / levels)
        losses.append(denoising(family, Batch(z, noise, u, prompts, none, frames), texts).mean().item())
        tick()
    return float(np.mean(losses))
