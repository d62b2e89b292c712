"""One image file as pixels: upright, in 8 bits, on white."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from diffpeft.errors import DataError
from diffpeft.families.base import Frame

if TYPE_CHECKING:
    from torch import Tensor

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: the values that exchange width and height
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_DEEP = ("I;16", "I", "F")  # what Pillow's names of modes with more than 8 bits start with
_SCALES = {"I": (2**8 - 1, 2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}  # where white may lie


@dataclass(frozen=True)
class Look:
    """What one look at an image file tells: its size upright, how many frames it has, and why it cannot be read, if so."""

    size: tuple[int, int] = (0, 0)
    frames: int = 1
    error: str = ""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture through a file of ours: by its path Pillow maps an uncompressed TIFF into memory, and gets those wrong that are turned."""
    with open(path, "rb") as raw, Image.open(raw) as image:
        yield image


def looked_at(path: Path) -> Look:
    """Read the whole file without keeping its pixels; a JPEG at an eighth of its size, which is quicker and finds as much."""
    try:
        with _opened(path) as file:
            width, height = file.size
            upright = _upright(file)
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a phone's JPEG with a depth map
            file.seek(0)
            file.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            file.load()
            if file.mode.startswith(_DEEP):
                white_of(file)
            return Look(upright, frames)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like for a damaged file
        return Look(error=str(error) or type(error).__name__)


def _upright(file: Image.Image) -> tuple[int, int]:
    """Width and height of a picture that was just opened, as it will be turned. Pillow turns TIFFs itself."""
    turned = file.format != "TIFF" and file.getexif().get(_ORIENTATION) in _TURNED
    width, height = file.size
    return (height, width) if turned else (width, height)


def framed(path: Path, size: int) -> Frame:
    """What `pixels` takes of the image: all of its shorter side, the middle of its longer one."""
    with _opened(path) as file:
        width, height = _upright(file)
    scale = size / min(width, height)
    top, left = (round((side * scale - size) / 2) for side in (height, width))
    return Frame((height, width), (top, left), (size, size))


def pixels(path: Path, size: int) -> Tensor:
    """The image as [3, size, size] in [-1, 1]: turned upright, transparent parts white, scaled to cover the square, cropped at the centre."""
    import torch

    try:
        with _opened(path) as file:
            image = _on_white(ImageOps.exif_transpose(eight_bit(file)))
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(f"cannot read an image ({error})", where=path, remedy="Remove it, or save it again.") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def stacked(paths: Sequence[Path], size: int) -> Tensor:
    """Several images as [b, 3, size, size]."""
    import torch

    return torch.stack([pixels(path, size) for path in paths])


def eight_bit(image: Image.Image) -> Image.Image:
    """A picture of 16 bits, integers or floats scaled to 8 bits, which Pillow would cut off; others as they are.

    Colour pictures of 16 bits are not among them: Pillow reads their upper bytes. A grey value that means transparency becomes alpha.
    Raises ValueError if it cannot be told which value is white.
    """
    if not image.mode.startswith(_DEEP):
        return image
    image.load()
    white = white_of(image)
    values = np.asarray(image).astype(np.float64)
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    exif = Image.Exif()
    exif[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    scaled.info["exif"] = exif.tobytes()
    return scaled


def white_of(image: Image.Image) -> float:
    """The value that is white in a picture of more than 8 bits.

    16-bit files say it. Where integers or floats may mean several things, it is the least of the usual values that no pixel is above: 1 (floats), 255,
    65535, and 2^31 - 1 (integers).
    """
    if image.mode.startswith("I;16"):
        return 2.0 ** (_tag(image, _BITS) or 16) - 1
    if image.mode == "I" and _tag(image, _BITS) == 16:  # with a sign
        return 2.0**15 - 1
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    scales = (2**16 - 1,) if image.format in ("PNG", "PPM") else _SCALES[image.mode[0]]
    white = next((scale for scale in scales if high <= scale), None)
    if not low >= 0 or white is None:
        raise ValueError(f"its values go from {low:g} to {high:g}, and which of them is white is not known")
    return white


def _tag(image: Image.Image, tag: int) -> int | None:
    """A number of a TIFF's, None for other formats."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _on_white(image: Image.Image) -> Image.Image:
    """A picture without transparency: what is clear is white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
