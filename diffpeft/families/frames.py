"""The first frame of clips, where a model of videos is shown it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffpeft.families.controls import drawn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def first_of(pixels: Tensor) -> tuple[Tensor, int]:
    """The first frame [b, 3, 1, h, w] of pixels [b, 3, (f,) h, w], and how many frames there are."""
    clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
    return clips[:, :, :1], clips.shape[2]


def images_of(opening: Tensor) -> list[Image]:
    """First frames [b, 3, 1, h, w] in [-1, 1] as images."""
    return [drawn(pixels) for pixels in opening[:, :, 0]]


def started(x: Tensor, opening: Tensor, time: Tensor, patch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents x [b, c, f, h, w] with the first frame [b, c, 1, h, w] in its place, and times [b] by token [b, n]: 0 for those of the first frame."""
    import torch

    tokens = math.prod(x.shape[3:]) // patch**2
    times = time[:, None].repeat(1, x.shape[2] * tokens)
    times[:, :tokens] = 0
    return torch.cat([opening, x[:, :, 1:]], 2), times


def alone(opening: Tensor, frames: int) -> Tensor:
    """The latents of a first frame [b, c, 1, h, w] with zeros behind: [b, c, f, h, w]."""
    import torch

    return torch.cat([opening, opening.new_zeros(*opening.shape[:2], frames - 1, *opening.shape[3:])], dim=2)


def uncounted(frames: int, known: Tensor) -> Tensor:
    """Which frames of latents are predicted [b, 1, f, 1, 1]: all but the first."""
    counts = known.new_ones(len(known), 1, frames, 1, 1)
    counts[:, :, 0] = 0
    return counts
