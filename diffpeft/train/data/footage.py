"""Moving pictures as frames: video files, animated images, and folders of numbered images. No torch.

Video files need PyAV (`pip install diffpeft[video]`), and nothing else does.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffpeft.errors import DataError, joined
from diffpeft.train.data.layout import NUMBERED, images_in, is_video
from diffpeft.train.data.read import Look, looked_at, on_white, opened, picture

EXTRA = "diffpeft[video]"


def frames_in(folder: Path) -> list[Path]:
    """The frames of a folder, by their numbers."""
    return sorted(images_in(folder), key=_number)


def _number(path: Path) -> tuple[int, str]:
    name = NUMBERED.fullmatch(path.stem)
    return int(name[2]) if name else 0, path.name


def seen(path: Path) -> Look:
    """What one look at a clip or an image tells: every frame is decoded."""
    try:
        if path.is_dir():
            return _of_folder(path)
        if is_video(path):
            return _of_video(path)
        look = looked_at(path)
        return look if look.error or look.frames == 1 else replace(look, rate=_rate_of_animation(path))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like for a damaged file
        return Look(error=getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _of_folder(folder: Path) -> Look:
    """Frames of one size."""
    looks = {path: looked_at(path) for path in frames_in(folder)}
    if broken := {path.name: look.error for path, look in looks.items() if look.error}:
        return Look(error=joined((f"{name}: {why}" for name, why in broken.items()), 3))
    size = next(iter(looks.values())).size
    if odd := [path.name for path, look in looks.items() if look.size != size]:
        return Look(error=f"{odd[0]} has another size than the frame before")
    digest = hashlib.blake2b("".join(look.digest for look in looks.values()).encode(), digest_size=16).hexdigest()
    return Look(size, len(looks), digest=digest, profiled=all(look.profiled for look in looks.values()))


def _of_video(path: Path) -> Look:
    count, size, digest = 0, (0, 0), hashlib.blake2b(digest_size=16)
    with _video(path) as video:
        rate = video.streams.video[0].average_rate
        for frame in video.decode(video=0):
            if not count % 16:
                digest.update(frame.reformat(width=32, height=32, format="rgb24").to_ndarray().tobytes())
                size = _upright(frame).size if not count else size
            count += 1
    if not count:
        return Look(error="it has no frames")
    return Look(size, count, digest=digest.hexdigest(), rate=float(rate) if rate else None)


@contextlib.contextmanager
def _video(path: Path) -> Iterator[Any]:  # an input container of PyAV
    """A video file that is read. Raises DataError without PyAV."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            "video files are read by PyAV, which is not installed",
            where=path,
            remedy=f"pip install '{EXTRA}', or pass a folder of frames.",
        ) from error
    with av.open(str(path)) as video:
        video.streams.video[0].thread_type = "AUTO"
        yield video


def check_reader(paths: Sequence[Path]) -> None:
    """Raise DataError for video files where nothing reads them."""
    import importlib.util

    if paths and importlib.util.find_spec("av") is None:
        with _video(paths[0]):
            pass


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = getattr(frame, "rotation", 0)
    return image.rotate(turn, expand=True) if turn else image


def _rate_of_animation(path: Path) -> float | None:
    """Frames a second of an animated image, by the mean of their times."""
    with opened(path) as image:
        times = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            times.append(float(image.info.get("duration", 0)))
    return 1000 * len(times) / sum(times) if sum(times) else None


def pictures_of(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """The frames of these numbers of a clip, in their order, in RGB. Raises DataError if one cannot be read."""
    if path.is_dir():
        files = frames_in(path)
        return [picture(files[number]) for number in numbers]
    if not is_video(path) and set(numbers) == {0}:
        return [picture(path)] * len(numbers)
    try:
        frames = dict(_of_file(path, set(numbers)))
        return [frames[number] for number in numbers]
    except (MemoryError, DataError):
        raise
    except Exception as error:  # as above
        raise DataError(f"cannot read a clip ({error})", where=path, remedy="Remove it, or save it again.") from error


def _of_file(path: Path, numbers: set[int]) -> Iterator[tuple[int, Image.Image]]:
    if not is_video(path):
        with opened(path) as image:
            for number in sorted(numbers):
                image.seek(number)
                yield number, on_white(image.copy())
        return
    with _video(path) as video:
        for number, frame in enumerate(video.decode(video=0)):
            if number in numbers:
                yield number, _upright(frame).convert("RGB")
            if number >= max(numbers):
                return
