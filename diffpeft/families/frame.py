"""What a training picture shows of its image: what SDXL is told as six numbers."""

from __future__ import annotations

from typing import NamedTuple


class Frame(NamedTuple):
    """A picture is its image scaled to cover `target`, and cropped. All in pixels, height before width.

    Args:
        original: the size of the image as it stands in its file, upright.
        crop: where the picture's upper left corner lies in the scaled image, as it is shown: mirrored, if it is mirrored.
        target: the size of the picture.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int) -> Frame:
        """A picture that shows all of an image of its own size."""
        return cls((height, width), (0, 0), (height, width))

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """The six numbers in the order that SDXL reads them."""
        return (*self.original, *self.crop, *self.target)
