"""Images and their captions from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.errors import DataError, listed, near

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


def find(folder: str | Path, prompt: str | None) -> list[Example]:
    """The images of `folder` in name order. The caption of NAME.png is NAME.txt beside it, or else `prompt`.

    Raises DataError, which says what was found instead, for a folder without images, and for images without any caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise DataError(
            "not a folder" if folder.exists() else "no such folder",
            where=folder,
            remedy=near(folder.name, siblings) or "Pass a folder of images.",
        )
    files = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file() and not p.name.startswith(".")
    )
    if not files:
        folders = sorted(p.name for p in folder.iterdir() if p.is_dir())
        found = f"{sum(p.is_file() for p in folder.iterdir())} other files" + (
            f" and the folders {listed(folders)}" if folders else ""
        )
        raise DataError(
            f"no images in the folder, only {found}", where=folder, remedy=f"Images end in {', '.join(ENDINGS)}."
        )
    captions = {p: _caption(p, prompt) for p in files}
    bare = [p.name for p, caption in captions.items() if caption is None]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(files)} images have no caption: {listed(bare[:3])}",
            where=folder,
            remedy="Pass --instance-prompt, or put a .txt beside each image.",
        )
    return [Example(p, caption) for p, caption in captions.items() if caption is not None]


def _caption(image: Path, prompt: str | None) -> str | None:
    text = image.with_suffix(".txt")
    if not text.is_file():
        return prompt
    try:
        return text.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a caption ({error})", where=text, remedy="Captions are UTF-8 text.") from error


def pixels(path: Path, size: int) -> Tensor:
    """The image as [3, size, size] in [-1, 1]: turned upright, transparent parts white, scaled to cover the square, cropped at the centre."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = ImageOps.fit(Image.alpha_composite(white, image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read an image ({error})", where=path, remedy="Remove it, or save it again.") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def stacked(paths: Sequence[Path], size: int) -> Tensor:
    """Several images as [b, 3, size, size]."""
    import torch

    return torch.stack([pixels(path, size) for path in paths])
