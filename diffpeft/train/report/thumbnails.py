"""Pictures inside a page: small WebP files as data URIs, so that nothing is fetched."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

SIDE = 320  # pixels of the longer side, at most


def data_uri(image: Image.Image | np.ndarray, side: int = SIDE) -> str:
    """A picture, or one as numbers [h, w, 3] uint8, scaled down to `side`."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=92 if max(picture.size) <= 128 else 80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_uri(path: Path, side: int = SIDE) -> str:
    """The picture in a file; one that did not change is read once."""
    return _file_uri(path, path.stat().st_mtime_ns, side)


@functools.lru_cache(maxsize=4096)
def _file_uri(path: Path, modified: int, side: int) -> str:
    with Image.open(path) as image:
        frames = [frame.copy() for frame in ImageSequence.Iterator(image)]
        return data_uri(image, side) if len(frames) == 1 else _clip_uri(frames, side, image.info.get("duration", 62))


def _clip_uri(frames: list[Image.Image], side: int, duration: int) -> str:
    """A clip that moves, scaled down to `side`. `duration` of a frame in milliseconds."""
    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small[0].save(buffer, "WEBP", save_all=True, append_images=small[1:], duration=duration, loop=0, quality=70)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
