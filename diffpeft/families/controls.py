"""What denoisers read of control images: their latents, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def numbered(latents: Sequence[Tensor]) -> Conditions:
    """The latents of control images as conditions."""
    return {f"control_{number}": z for number, z in enumerate(latents, 1)}


def in_order(conditions: Conditions) -> list[Tensor]:
    """The latents of control images among conditions."""
    names = (f"control_{number}" for number in range(1, len(conditions) + 1))
    return [conditions[name] for name in names if name in conditions]


def luma(pixels: Tensor) -> Tensor:
    """How bright pixels [b, 3, *size] are [b, 1, *size]."""
    weights = pixels.new_tensor([0.299, 0.587, 0.114])
    return (pixels * weights.view(-1, *(1,) * (pixels.ndim - 2))).sum(1, keepdim=True)


def drawn(pixels: Tensor) -> Image:
    """Pixels [3, h, w] in [-1, 1] as a picture of 8 bits; of those without numbers one of their size."""
    from PIL import Image

    if pixels.is_meta:
        return Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]))
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
