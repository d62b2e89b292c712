"""What a family is and does where it says nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Defaults:
    """A family of images that reads no pictures beside those that are trained. One that does says so, and what its denoiser reads of them."""

    controls: tuple[int, int] = (0, 0)
    aligned: bool = False
    first_frame: bool = False
    viewers: tuple[str, ...] = ("vae",)
    looking: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    together: bool = False
    only: str | None = None
    temporal: int | None = None
    rate: float | None = None

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """Nothing."""
        return {}

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The image that a clip begins with, for a family that is shown it."""
        return {"image": images[0]} if images and self.first_frame else {}
