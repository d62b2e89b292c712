"""Control images: what a model of edits is shown beside the picture that is trained on.

One that has the shape of its picture is scaled, cropped and mirrored as that is. Another is seen whole, in its own shape, at about the picture's area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffpeft.train.data.account import Example
from diffpeft.train.data.buckets import Size, alike, covering, reshaped
from diffpeft.train.data.read import View, numbers, picture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Controls:
    """Control images as they are shown: the file of each, and how."""

    paths: tuple[Path, ...] = ()
    views: tuple[View, ...] = ()

    def images(self) -> list[Image.Image]:
        """Each as it is shown."""
        return [view.of(picture(path)) for path, view in zip(self.paths, self.views, strict=True)]

    def pixels(self) -> list[Tensor]:
        """Each as [1, 3, h, w] in [-1, 1]."""
        return [numbers(image)[None] for image in self.images()]


NONE = Controls()


def shown_with(example: Example, view: View, multiple: int) -> Controls:
    """The control images of an example where it is shown so. `multiple` is what sides must be multiples of, for the model."""
    if not example.controls:
        return NONE
    views = (_view(control.size, example.size, view, multiple) for control in example.controls)
    return Controls(tuple(control.path for control in example.controls), tuple(views))


def _view(size: Size, of: Size, view: View, multiple: int) -> View:
    """How a control image of `size` is shown beside a picture of the size `of`."""
    if not alike(size, of):
        return View.centred(size, reshaped(size, view.target, multiple), view.flipped)
    room = [side - end for side, end in zip(covering(size, view.target), view.target, strict=True)]
    return replace(view, left=min(view.left, room[0]), top=min(view.top, room[1]))


def sizes_with(example: Example, target: Size, multiple: int) -> tuple[Size, ...]:
    """The sizes in which the control images of an example are shown where its picture has a size."""
    sizes = (control.size for control in example.controls)
    return tuple(target if alike(size, example.size) else reshaped(size, target, multiple) for size in sizes)


def stacked(controls: Sequence[Controls]) -> list[Tensor]:
    """The control images of several examples with sizes in common, each [b, 3, h, w]."""
    import torch

    return [torch.cat(pixels) for pixels in zip(*(one.pixels() for one in controls), strict=True)]
