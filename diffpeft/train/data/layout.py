"""Where the images of a data set lie: what was asked for, the folders below, and how often each image counts. No torch, and no image is opened."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from diffpeft.errors import ConfigError, DataError, near, shown

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
TABLES = (".jsonl", ".csv")  # of captions
NUMBERED = re.compile(r"(.*?)(\d+)")  # the name of a frame
MASK = "-masklabel"  # what OneTrainer adds to an image's name
RECORD = "class.json"  # in a folder of class images that we drew
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
REPEATED = re.compile(r"([1-9]\d{0,2})_(\S.*)")  # sd-scripts' name of a folder: repeats and class tokens
_TIMES = re.compile(r"(.+):(\d+)")


@dataclass(frozen=True)
class ImageSource:
    """A folder of images or a table of captions, and how often each of its images counts. `clips`: whether videos and folders of frames are used too."""

    path: Path
    repeats: int = 1
    clips: bool = False

    def __str__(self) -> str:
        return f"{self.path}" + (f" ({self.repeats} times)" if self.repeats > 1 else "")

    @property
    def folder(self) -> Path:
        """The folder that names are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Folder:
    """What one folder holds, without the folders in it.

    `tokens` and `repeats` are those of sd-scripts' `10_sks dog`, the nearest of its own and its parents' names.
    """

    path: Path
    source: ImageSource
    repeats: int = 1
    tokens: str | None = None
    files: tuple[Path, ...] = field(default=(), repr=False)

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """The image files in name order, by their endings; without masks that lie beside them (NAME-masklabel.png). With clips these too."""
        paths = [path for path in self.files if path.suffix.lower() in ENDINGS]
        paths = sorted([*paths, *filter(is_clip, self.files)]) if self.source.clips else paths
        masks = {path.stem + MASK for path in paths}
        return tuple(path for path in paths if path.stem not in masks)


def sources_of(data: str | Path | Sequence[str | Path], clips: bool = False) -> list[ImageSource]:
    """What was asked for: folders and tables, `PATH:3` for one whose images count three times. Raises DataError for what is not there."""
    entries = [data] if isinstance(data, (str, Path)) else data
    return [replace(_source(entry), clips=clips) for entry in entries]


def _source(entry: str | Path) -> ImageSource:
    path, repeats = Path(entry), 1
    times = None if path.exists() else _TIMES.fullmatch(str(entry))
    if times:
        path, repeats = Path(times[1]), int(times[2])
        if not repeats:
            raise ConfigError(f"data is {shown(entry)}: its images would not be used", remedy="Leave it out.")
    if path.is_dir() or (path.is_file() and path.suffix.lower() in TABLES):
        return ImageSource(path, repeats)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    raise DataError(
        "not a folder" if path.exists() else "no such folder",
        where=path,
        remedy=near(path.name, siblings) or "Pass a folder of images.",
    )


def is_junk(path: Path) -> bool:
    """What file managers and notebooks leave behind."""
    return path.name.startswith((".", "__MACOSX")) or path.name.lower() in _JUNK


def is_image(path: Path) -> bool:
    """Whether a path names an image, by its ending."""
    return path.suffix.lower() in ENDINGS and not is_junk(path) and path.is_file()


def is_video(path: Path) -> bool:
    """Whether a path names a video file, by its ending."""
    return path.suffix.lower() in VIDEOS


def is_clip(path: Path) -> bool:
    """Whether this is a video file, or a folder that holds the frames of a clip and nothing else: at least two images with names that are alike but for
    the number at their ends.
    """
    if not path.is_dir():
        return is_video(path)
    inside = [each for each in _listed(path) if not is_junk(each)]
    names = [NUMBERED.fullmatch(each.stem) if is_image(each) else None for each in inside]
    return len(inside) > 1 and all(names) and len({name[1] for name in names if name}) == 1


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder in name order, by their endings."""
    return sorted(path for path in folder.iterdir() if is_image(path))


def walked(source: ImageSource, skip: Collection[Path]) -> Iterator[Folder | Path]:
    """The folders of a source, itself first, in name order; of those that are not entered the path alone.

    `skip` are such, as resolved paths; so are folders of class images that were drawn here. A link is followed once.
    """
    if not source.path.is_dir():
        yield Folder(source.folder, source)
        return
    name = REPEATED.fullmatch(source.path.resolve().name)
    yield from _below(Folder(source.path, source, *_named(name, 1, None)), skip, {source.path.resolve()})


def _below(folder: Folder, skip: Collection[Path], entered: set[Path]) -> Iterator[Folder | Path]:
    inside = sorted(path for path in _listed(folder.path) if not is_junk(path))
    files = tuple(path for path in inside if path.is_file() or (folder.source.clips and is_clip(path)))
    yield Folder(folder.path, folder.source, folder.repeats, folder.tokens, files)
    for path in _folders(inside, files):
        resolved = path.resolve()
        if resolved in skip or (path / RECORD).is_file():
            yield path
        elif resolved not in entered:
            entered.add(resolved)
            repeats, tokens = _named(REPEATED.fullmatch(path.name), folder.repeats, folder.tokens)
            yield from _below(Folder(path, folder.source, repeats, tokens), skip, entered)


def _folders(inside: Iterable[Path], files: Collection[Path]) -> list[Path]:
    """The folders that are entered: not those that stand for a clip."""
    return [path for path in inside if path.is_dir() and path not in files]


def _named(name: re.Match[str] | None, repeats: int, tokens: str | None) -> tuple[int, str | None]:
    return (int(name[1]), name[2]) if name else (repeats, tokens)


def _listed(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot look into a folder ({error.strerror or error})", where=folder) from error


def compared(path: str | Path) -> str:
    """A path as it is compared: composed letters (macOS writes them apart), slashes, and an ending in lower case."""
    stem, dot, ending = unicodedata.normalize("NFC", Path(path).as_posix()).rpartition(".")
    return f"{stem}{dot}{ending.lower()}"
