"""Latents as tokens, one a square of latent pixels, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 2  # the side of the square


def packed(x: Tensor) -> Tensor:
    """Latents [b, c, h, w] as tokens [b, h / 2 w / 2, 4 c], one a patch."""
    return x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Tokens [b, h / 2 w / 2, 4 c] as latents [b, c, h, w] of this shape."""
    b, c, h, w = shape
    patches = tokens.view(b, h // PATCH, w // PATCH, c, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def places(x: Tensor, patch: int = PATCH) -> Tensor:
    """0, row and column of every patch of latents [b, c, h, w]: [h / p w / p, 3]."""
    import torch

    h, w = (side // patch for side in x.shape[-2:])
    rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in (h, w)), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def patchified(x: Tensor) -> Tensor:
    """Latents [b, c, h, w] with the pixels of a patch as channels [b, 4 c, h / 2, w / 2]."""
    import torch

    return torch.nn.functional.pixel_unshuffle(x, PATCH)
