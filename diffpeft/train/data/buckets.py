"""Sizes of training pictures by aspect ratio, as sd-scripts has them, so that little of an image is cropped. All sizes are (width, height).

The buckets of resolution R are the sizes with sides that are multiples of a step and an area of at most R^2: for each width from the least to the most,
the largest height, and the same turned; and the square. An image goes to the bucket whose ratio is nearest, is scaled to cover it and cropped.
At 512 the sides go from 256 to 1024, which is sd-scripts' default; larger resolutions reach twice their side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]
STEP, LEAST, MOST = 64, 256, 1024  # sd-scripts' defaults
_COARSE = 4  # steps on the side of a square, where it is too small for STEP


@dataclass(frozen=True)
class Sizing:
    """How the sizes of training pictures follow from those of images.

    Args:
        resolutions: the sides of the squares whose area pictures have at most. With several an image is used in each that does not enlarge it.
        buckets: whether pictures have the shapes of their images; else all are squares.
        multiple: what sides must be multiples of, for the model.
    """

    resolutions: tuple[int, ...]
    buckets: bool = True
    multiple: int = 1

    def targets(self, size: Size) -> tuple[Size, ...]:
        """The sizes of the pictures that are made of an image of `size`: one for each resolution, or for the least, if all are larger than the image."""
        return _targets(self, size)

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """The sizes that pictures of a resolution may have."""
        if not self.buckets:
            return ((resolution, resolution),)
        return buckets(resolution, *bounds(resolution, self.multiple))


@functools.lru_cache(maxsize=1 << 16)
def _targets(sizing: Sizing, size: Size) -> tuple[Size, ...]:
    width, height = size
    within = [side for side in sizing.resolutions if side * side <= width * height] or [min(sizing.resolutions)]
    return tuple(dict.fromkeys(nearest(size, sizing.sizes(side)) for side in within))


def bounds(resolution: int, multiple: int = 1) -> tuple[int, int, int]:
    """The step of the sides of a resolution's buckets, the least and the most. Below 256 pixels the step is a quarter of the side."""
    step = math.lcm(STEP if resolution >= LEAST else max(resolution // _COARSE, 1), multiple)
    least = max(min(LEAST, resolution // 2) // step, 1) * step
    return step, least, max(MOST, 2 * resolution) if resolution >= LEAST else 2 * resolution


@functools.lru_cache
def buckets(resolution: int, step: int, least: int, most: int) -> tuple[Size, ...]:
    """The buckets of a resolution, in order of width."""
    square = resolution // step * step or step
    sizes = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most // step * step, resolution * resolution // width // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The size itself, if it is one of `sizes`, else that with the nearest ratio of width to height."""
    if size in sizes:
        return size
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - size[0] / size[1]))


def covering(size: Size, target: Size) -> Size:
    """The size of an image scaled so that it just covers `target`."""
    (width, height), (w, h) = size, target
    if width * h > w * height:  # the image is wider
        return max(int(width * h / height + 0.5), w), h
    return w, max(int(height * w / width + 0.5), h)


def alike(a: Size, b: Size) -> bool:
    """Whether two sizes have one shape, up to the rounding of the smaller."""
    slack = max(a[0] / b[0], a[1] / b[1], b[0] / a[0], b[1] / a[1])
    return abs(a[0] * b[1] - a[1] * b[0]) <= slack * max(*a, *b)


def reshaped(size: Size, target: Size, multiple: int) -> Size:
    """A size with the shape of `size` and about the area of `target`, in whole multiples, as the pipelines of edit models have it."""
    side = math.sqrt(target[0] * target[1] / (size[0] * size[1]))
    width, height = (max(round(side * n / multiple), 1) * multiple for n in size)
    return width, height


def share(size: Size, target: Size) -> float:
    """How much of an image is seen in a picture of size `target`, 0 to 1."""
    width, height = covering(size, target)
    return target[0] * target[1] / (width * height)
