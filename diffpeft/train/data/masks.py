"""Masks: how much each place of an image counts, by an image's transparency or by pictures in a folder. White counts, black does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffpeft.errors import ConfigError, DataError, near
from diffpeft.train.data.account import Example
from diffpeft.train.data.buckets import Size, alike
from diffpeft.train.data.layout import ENDINGS, MASK, compared
from diffpeft.train.data.read import Look, View, looked_at, mask

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "alpha"


@dataclass(frozen=True)
class Masks:
    """The masks of a data set: {image: its mask}, what is wrong with some, {file: why}, and whose masks leave nothing."""

    paths: Mapping[Path, Path]
    broken: Mapping[Path, str]
    black: tuple[Path, ...] = ()


def check(kind: str) -> None:
    """Raise DataError if `kind` is neither alpha nor a folder."""
    folder = Path(kind)
    if kind != ALPHA and not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        remedy = (
            near(folder.name, [*siblings, ALPHA]) or f"Pass {ALPHA}, or a folder of masks that are named as the images."
        )
        raise DataError("no such folder of masks", where=folder, remedy=remedy)


def folders_of(kind: str | None) -> list[Path]:
    """The folder of masks, if there is one. Raises DataError as `check` does."""
    if kind is not None:
        check(kind)
    return [] if kind in (None, ALPHA) else [Path(str(kind))]


def masks_of(kind: str, examples: Sequence[Example], strict: bool = True) -> Masks:
    """The masks that are there. Raises ConfigError if there is none, where `strict`: the option would do nothing."""
    paths = {e.path: e.path for e in examples} if kind == ALPHA else _in_folder(Path(kind), examples)
    looks = {example: look for example in examples if (look := _looked_at(example, paths.get(example.path)))}
    if not looks and strict:
        what = "no image is transparent anywhere" if kind == ALPHA else "no file there is named as an image"
        raise ConfigError(f"mask is {kind}, and {what}", remedy="Leave --mask out.")
    wrong = {paths[example.path]: _wrong(look, example.size) for example, look in looks.items()}
    return Masks(
        {example.path: paths[example.path] for example in looks},
        {path: why for path, why in wrong.items() if why},
        tuple(example.path for example, look in looks.items() if not look.brightest),
    )


def _wrong(look: Look, size: Size) -> str:
    """Why a mask cannot be that of an image of `size`; nothing if it can."""
    shape = "" if look.error or alike(look.size, size) else f"its shape {look.size} is not that of the image, {size}"
    return look.error or shape


def _looked_at(example: Example, path: Path | None) -> Look | None:
    """What a mask looks like; None for an image that has none, or no transparency."""
    look = None if path is None else looked_at(path)
    if path is None or look is None or look.error:
        return look
    grey = mask(path, alpha=path == example.path)
    return None if grey is None else Look(look.size, brightest=int(np.asarray(grey).max()))


def _in_folder(folder: Path, examples: Sequence[Example]) -> dict[Path, Path]:
    """{image: the mask named as it is}: with the folders below, or by the file's name alone; `NAME-masklabel.png` too."""
    files = {
        compared(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in ENDINGS and path.is_file()
    }
    masks = {}
    for example in examples:
        parts = Path(example.name).with_suffix("").parts
        names = ["/".join(parts[start:]) for start in range(len(parts))]
        keys = [compared(name + ending) for name in names for ending in (MASK, "")]
        path = next((files[key] for key in keys if key in files and files[key] != example.path), None)
        if path:
            masks[example.path] = path
    return masks


def masked(example: Example, view: View, size: tuple[int, int]) -> Tensor | None:
    """How much each place of a view counts [1, h, w], 0 to 1, at a `size` (height, width) of latents by areas; None without a mask."""
    if example.mask is None:
        return None
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    grey = mask(example.mask, alpha=example.mask == example.path)
    if grey is None:
        return None
    if grey.size != example.size:
        grey = grey.resize(example.size, Image.Resampling.BOX)
    weights = torch.from_numpy(np.array(view.of(grey))).float()[None] / 255
    return adaptive_avg_pool2d(weights, size)
