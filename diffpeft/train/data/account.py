"""The account of a folder: what training takes from it, and what it passes over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.errors import listed

EXTREME = 4  # times as long as wide: the crop at the centre keeps less than a quarter
SHOWN = 3  # names of each kind


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Account:
    """What a folder holds. Files are named by their names in it.

    Args:
        examples: the images that are trained on, with their captions.
        sizes: {image: (width, height)}, upright.
        captions: {where captions are from: images}.
        empty: images whose caption file holds nothing.
        animated: images with several frames or pages, of which the first is taken.
        duplicates: groups of images that are the same file.
        unread: {ending: the files that end so and are not used}.
        folders: {folder that is not entered: the images in it}.
        resolution: the side of the training images in pixels, if it is known.
    """

    folder: Path
    examples: tuple[Example, ...]
    sizes: Mapping[str, tuple[int, int]]
    captions: Mapping[str, int]
    empty: tuple[str, ...] = ()
    animated: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    resolution: int | None = None

    @property
    def small(self) -> tuple[str, ...]:
        """Images whose shorter side is less than half of the resolution."""
        return tuple(name for name, size in self.sizes.items() if 2 * min(size) < (self.resolution or 0))

    @property
    def extreme(self) -> tuple[str, ...]:
        """Images of which less than a quarter is left when they are cropped to a square."""
        return tuple(name for name, size in self.sizes.items() if max(size) > EXTREME * min(size))

    def summary(self) -> str:
        """How many images of what sizes, and where their captions are from."""
        sizes = sorted(set(self.sizes.values()), key=lambda size: (size[0] * size[1], size))
        ends = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((sizes[0], sizes[-1])))
        captions = ", ".join(f"{n} from {source}" for source, n in self.captions.items())
        return f"{_count(len(self.examples), 'image')} of {ends} in {self.folder}; captions: {captions}"

    def notes(self) -> list[str]:
        """What may not be as it was meant, a sentence each; none for a folder that is wholly used."""
        kinds = {
            f"smaller than half of {self.resolution} pixels, and scaled up": self.small,
            f"more than {EXTREME} times as long as wide, of which the middle is used": self.extreme,
            "with an empty caption file, and trained without a caption": self.empty,
            "with several frames, of which the first is used": self.animated,
        }
        notes = [
            f"{_count(len(names), 'image')} {what}: {listed(names, SHOWN)}" for what, names in kinds.items() if names
        ]
        if self.duplicates:
            groups = [" = ".join(group) for group in self.duplicates]
            notes.append(f"{_count(len(groups), 'image')} more than once: {listed(groups, SHOWN)}")
        if self.unread:
            notes.append("not used: " + ", ".join(_ending(end, names) for end, names in self.unread.items()))
        if self.folders:
            notes.append("folders are not entered: " + folders_text(self.folders))
        return notes

    def lines(self) -> list[str]:
        """The whole account as text."""
        return [self.summary(), *self.notes()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def table(self) -> dict[str, object]:
        """The counts, for a file of measurements."""
        return {
            "images": len(self.examples),
            "captions": dict(self.captions),
            "unread": {ending: len(names) for ending, names in self.unread.items()},
            "folders": dict(self.folders),
            "duplicates": [list(group) for group in self.duplicates],
            **{name: list(getattr(self, name)) for name in ("empty", "small", "extreme", "animated")},
        }


def folders_text(folders: Mapping[str, int]) -> str:
    """Folders with the number of images in each."""
    named = [f"{name} ({_count(n, 'image')})" if n else name for name, n in folders.items()]
    return listed(named, SHOWN)


def _ending(ending: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {ending} ({listed(names, SHOWN)})"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
