"""One image file as pixels: upright, in 8 bits, in sRGB, on white."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps

from diffpeft.errors import DataError
from diffpeft.families.base import Frame
from diffpeft.train.data.buckets import Size, covering

if TYPE_CHECKING:
    from torch import Tensor

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: the values that exchange width and height
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_DEEP = ("I;16", "I", "F")  # what Pillow's names of modes with more than 8 bits start with
_SCALES = {"I": (2**8 - 1, 2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}  # where white may lie


@dataclass(frozen=True)
class Look:
    """What one look at an image file tells: its size upright, how many frames it has, and why it cannot be read, if so.

    `rate` is how many of them come a second, where that is known. `profiled` is False for a colour profile that cannot be read, `brightest` the largest
    value of a mask, `digest` a hash of the pixels: of a JPEG of an eighth of them, each the mean of 64.
    """

    size: Size = (0, 0)
    frames: int = 1
    error: str = ""
    profiled: bool = True
    brightest: int = 255
    digest: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class View:
    """One way to show an image: scaled to cover `target`, cropped to it from `left` and `top`, and then mirrored or not. Pixels, width before height.

    `frames` are the numbers of the frames of a clip that is shown so; an image has none.
    """

    target: Size
    left: int = 0
    top: int = 0
    flipped: bool = False
    frames: tuple[int, ...] = ()

    @classmethod
    def centred(cls, size: Size, target: Size, flipped: bool = False) -> View:
        """The middle of an image of `size`."""
        return cls.at(size, target, 0.5, 0.5, flipped)

    @classmethod
    def at(cls, size: Size, target: Size, x: float, y: float, flipped: bool = False) -> View:
        """Where `x` and `y` from 0 to 1 say how far from the left and from the top."""
        width, height = covering(size, target)
        return cls(target, int((width - target[0]) * x), int((height - target[1]) * y), flipped)

    def frame(self, size: Size) -> Frame:
        """What it shows of an image of `size`, as a model may be told."""
        (width, height), (w, h) = size, self.target
        left = covering(size, self.target)[0] - w - self.left if self.flipped else self.left
        return Frame((height, width), (self.top, left), (h, w))

    def of(self, image: Image.Image) -> Image.Image:
        """It, of an image."""
        (w, h), scaled = self.target, covering(image.size, self.target)
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.LANCZOS)
        shown = image.crop((self.left, self.top, self.left + w, self.top + h))
        return ImageOps.mirror(shown) if self.flipped else shown


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture through a file of ours: by its path Pillow maps an uncompressed TIFF into memory, and gets those wrong that are turned."""
    with open(path, "rb") as raw, Image.open(raw) as image:
        yield image


def looked_at(path: Path) -> Look:
    """Read the whole file without keeping its pixels; a JPEG at an eighth of its size, which is quicker and finds as much."""
    try:
        with opened(path) as file:
            width, height = file.size
            upright = _upright(file)
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a phone's JPEG with a depth map
            file.seek(0)
            file.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            file.load()
            shown = hashlib.blake2b(on_white(eight_bit(file)).tobytes(), digest_size=16).hexdigest()
            return Look(upright, frames, profiled=_profile(file) is not False, digest=shown)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like for a damaged file
        return Look(error=str(error) or type(error).__name__)


def _upright(file: Image.Image) -> tuple[int, int]:
    """Width and height of a picture that was just opened, as it will be turned. Pillow turns TIFFs itself."""
    turned = file.format != "TIFF" and file.getexif().get(_ORIENTATION) in _TURNED
    width, height = file.size
    return (height, width) if turned else (width, height)


def pixels(path: Path, size: int) -> Tensor:
    """The middle of an image as [3, size, size] in [-1, 1], scaled to cover the square."""
    image = picture(path)
    return numbers(View.centred(image.size, (size, size)).of(image))


def stacked(paths: Sequence[Path], size: int) -> Tensor:
    """Several images as [b, 3, size, size]."""
    import torch

    return torch.stack([pixels(path, size) for path in paths])


def numbers(image: Image.Image) -> Tensor:
    """A picture in RGB as [3, h, w] in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def picture(path: Path) -> Image.Image:
    """The whole image in RGB: turned upright, in sRGB, transparent parts white. Raises DataError if it cannot be read."""
    with _readable(path), opened(path) as file:
        return on_white(_in_srgb(ImageOps.exif_transpose(eight_bit(file))))


def mask(path: Path, alpha: bool) -> Image.Image | None:
    """The whole image as a mask, in 8 bits: its transparency, None if it has none, or else its brightness."""
    with _readable(path), opened(path) as file:
        image = ImageOps.exif_transpose(eight_bit(file))
        if not alpha:
            return on_white(image).convert("L")
        if not image.has_transparency_data:
            return None
        band = image.convert("RGBA").getchannel("A")
        return None if band.getextrema()[0] == 255 else band


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a decoder raises in this block is a DataError."""
    try:
        yield
    except (MemoryError, DataError):
        raise
    except Exception as error:  # as above
        raise DataError(f"cannot read an image ({error})", where=path, remedy="Remove it, or save it again.") from error


_SPACES = {
    "RGB ": ("RGB",),
    "GRAY": ("L",),
    "CMYK": ("CMYK",),
}  # {colour space of a profile: Pillow's modes that have it}
_SRGB = ImageCms.createProfile("sRGB")


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | bool | None:
    """The colour profile of an image, None if it is sRGB or has none, False if it cannot be read."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return None if ImageCms.getProfileDescription(profile).startswith("sRGB") else profile
    except (ImageCms.PyCMSError, OSError):
        return False


def _in_srgb(image: Image.Image) -> Image.Image:
    """An image in sRGB, if it has a colour profile that fits its colours."""
    profile = _profile(image)
    if not isinstance(profile, ImageCms.ImageCmsProfile):
        return image
    clear = image.has_transparency_data
    plain = (
        image.convert("RGB")
        if image.mode in ("P", "RGBA", "PA", "1")
        else image.convert("L")
        if image.mode == "LA"
        else image
    )
    if plain.mode not in _SPACES.get(profile.profile.xcolor_space, ()):
        return image
    alpha = image.convert("RGBA").getchannel("A") if clear else None
    try:
        transform = ImageCms.buildTransform(profile, _SRGB, plain.mode, "RGB")
        turned = ImageCms.applyTransform(plain, transform)
    except ImageCms.PyCMSError:  # it has the head of a profile and not its tables
        return image
    assert turned is not None  # it is, if not in place
    if alpha is not None:
        turned.putalpha(alpha)
    return turned


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
    if profile := image.info.get("icc_profile"):
        scaled.info["icc_profile"] = profile
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


def on_white(image: Image.Image) -> Image.Image:
    """A picture in RGB without transparency: what is clear is white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
