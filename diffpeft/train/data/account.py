"""The account of a data set: what training takes from it, and what it passes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from diffpeft.errors import listed, shown
from diffpeft.train.data.buckets import Size, Sizing, alike, share
from diffpeft.train.data.framing import Framing

SHOWN = 3  # names of each kind
_LITTLE = 0.25  # of an image is seen


class Control(NamedTuple):
    """A control image: its file, (width, height) upright, and a hash of its pixels."""

    path: Path
    size: Size
    digest: str = ""


@dataclass(frozen=True)
class Example:
    """An image file and its caption.

    Args:
        size: (width, height), upright.
        repeats: how often it counts.
        mask: the picture whose brightness, or the image itself if it is its transparency, says how much each place counts.
        name: what it is called in the account.
        trigger: what `[trigger]` in the caption stood for.
        digest: a hash of its pixels.
        length, rate: of footage, how many frames it has, and how many come a second, where that is known; an image has one.
        frames: the numbers of those that make this clip; none of an image.
        controls: what a model of edits is shown beside it, in order.
    """

    path: Path
    caption: str
    size: Size = (0, 0)
    repeats: int = 1
    mask: Path | None = None
    name: str = ""
    trigger: str | None = None
    digest: str = ""
    controls: tuple[Control, ...] = ()

    length: int = 1
    rate: float | None = None
    frames: tuple[int, ...] = ()

    @property
    def look(self) -> tuple[object, ...]:
        """What copies of an image have in common: its size and its pixels."""
        return (self.size, self.digest or self.path)


@dataclass(frozen=True)
class Group:
    """A folder of images: how many they are, and how often each counts."""

    name: str
    images: int
    repeats: int = 1

    def __str__(self) -> str:
        return f"{shown(self.name)} {counted(self.images, 'image')}" + (
            f" x {self.repeats}" if self.repeats > 1 else ""
        )


@dataclass(frozen=True)
class Account:
    """What a data set holds. Files are named by their names in it.

    Args:
        folder: the first folder that was asked for, and `where` all of it in words.
        examples: the images that are trained on, with their captions.
        captions: {where captions are from: images}.
        groups: the folders with images.
        empty: images whose caption file holds nothing.
        cut: images whose captions are longer than the tokenizer takes, of `tokens` tokens; None where it is not known.
        animated: images with several frames or pages, of which the first is taken.
        unprofiled: images with a colour profile that cannot be read, which are taken as sRGB.
        duplicates: groups of images that show the same.
        fewer_controls: images without a control image in a folder after the first; `stray_controls` files there that belong to no image.
        unmasked: images without a mask, where there are masks; `black` those whose mask leaves nothing.
        unread: {ending: the files that end so and are not used}.
        folders: {folder of which nothing is used: the images in it}; it is not entered, or has none.
        sizing: how the sizes of training pictures follow, if that is known.
        steps: how many steps of how many pictures a run takes, if that is known.
        heldout: images that are measured on and not trained on, each once; `heldout_from` the folder that they are from, if that is another, and `copies`
            how many images in it are copies of these or of what is trained on.
        framing: how clips are cut out of footage, if they are; `short` is the footage that is too short for one.
    """

    folder: Path
    examples: tuple[Example, ...]
    captions: Mapping[str, int]
    where: str = ""
    groups: tuple[Group, ...] = ()
    empty: tuple[str, ...] = ()
    cut: tuple[str, ...] | None = None
    tokens: int = 0
    animated: tuple[str, ...] = ()
    unprofiled: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    unmasked: tuple[str, ...] = ()
    black: tuple[str, ...] = ()
    fewer_controls: tuple[str, ...] = ()
    stray_controls: tuple[str, ...] = ()
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    sizing: Sizing | None = None
    steps: tuple[int, int] | None = None
    heldout: tuple[Example, ...] = ()
    heldout_from: str = ""
    copies: int = 0
    framing: Framing | None = None
    short: tuple[str, ...] = ()

    @property
    def resolution(self) -> int | None:
        """The side of the training images in pixels, the least of several; None if it is not known."""
        return min(self.sizing.resolutions) if self.sizing else None

    @property
    def sizes(self) -> dict[str, Size]:
        """{image: (width, height)}, upright."""
        return {example.name: example.size for example in self.examples}

    @property
    def targets(self) -> dict[str, tuple[Size, ...]]:
        """{image: the sizes of the pictures that are made of it}."""
        return {name: self.sizing.targets(size) for name, size in self.sizes.items()} if self.sizing else {}

    @property
    def buckets(self) -> dict[Size, int]:
        """{size of pictures: how many images are shown in it}, the most first."""
        counts = Counter(target for targets in self.targets.values() for target in targets)
        return dict(sorted(counts.items(), key=lambda row: (-row[1], row[0])))

    @property
    def pictures(self) -> int:
        """How many pictures a pass through the data has: images, as often as they count, in each of their sizes."""
        targets = self.targets
        return sum(example.repeats * len(targets.get(example.name, ("one",))) for example in self.examples)

    @property
    def small(self) -> tuple[str, ...]:
        """Images that are more than doubled in size."""
        sizes = self.sizes
        doubled = {
            name: any(t > 2 * side for t, side in zip(ts[0], sizes[name], strict=True))
            for name, ts in self.targets.items()
        }
        return tuple(name for name, enlarged in doubled.items() if enlarged)

    @property
    def extreme(self) -> tuple[str, ...]:
        """Images of which less than a quarter is seen in a picture."""
        sizes = self.sizes
        return tuple(name for name, ts in self.targets.items() if min(share(sizes[name], t) for t in ts) < _LITTLE)

    @property
    def reshaped(self) -> tuple[str, ...]:
        """Images with a control image of another shape."""
        others = (e for e in self.examples if not all(alike(control.size, e.size) for control in e.controls))
        return tuple(example.name for example in others)

    @property
    def texts(self) -> dict[str, str]:
        """{image: its caption}."""
        return {example.name: example.caption for example in self.examples}

    def summary(self) -> str:
        """How many images of what sizes, and where their captions are from."""
        images = (*self.examples, *(() if self.heldout_from else self.heldout))
        sizes = sorted({image.size for image in images}, key=lambda size: (size[0] * size[1], size))
        ends = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((sizes[0], sizes[-1])))
        captions = ", ".join(f"{n} from {source}" for source, n in self.captions.items())
        where = self.where or self.folder
        return f"{footage_of(images)} of {ends} in {where}; captions: {captions}"

    def plan(self) -> list[str]:
        """How the images are used: how often, in what sizes, with which masks."""
        lines, sizes = [], self.buckets
        if len(self.groups) > 1 or any(group.repeats > 1 for group in self.groups):
            lines.append("folders: " + ", ".join(map(str, self.groups)))
        if self.sizing and (
            len(sizes) > 1 or (self.sizing.buckets and sizes.keys() - {(r, r) for r in self.sizing.resolutions})
        ):
            lines.append("pictures: " + ", ".join(f"{n} of {w}x{h}" for (w, h), n in sizes.items()))
        if masked := sum(example.mask is not None for example in self.examples):
            lines.append(f"masks weigh the loss of {counted(masked, 'image')}")
        return [*lines, *self._clips(), *self._controls(), *self._held_out(), *self._passes()]

    def _clips(self) -> list[str]:
        """How many clips of how many frames there are, and how long they last; a line, if there are any."""
        counts = Counter(len(example.frames) for example in self.examples if example.frames)
        if not counts or self.framing is None:
            return []
        texts = [f"{n} of {count} frames" for count, n in sorted(counts.items(), reverse=True)]
        rate = self.framing.rate
        frames = sum(count * n for count, n in counts.items())
        return [
            f"clips: {', '.join(texts)}" + (f" at {rate:g} a second, {frames / rate:.3g} s in all" if rate else ""),
            *(["frames are rounded down to " + ", ".join(map(str, self.framing.fitting))] * self._rounded()),
        ]

    def _clip_counts(self) -> dict[str, object]:
        """{frames: how many clips have so many}, and the footage that is too short."""
        counts = Counter(len(example.frames) for example in self.examples if example.frames)
        return {"clips": dict(counts), "short": list(self.short)}

    def _rounded(self) -> bool:
        return self.framing is not None and {*self.framing.counts} != {*self.framing.fitting}

    def _controls(self) -> list[str]:
        """How many control images there are, a line, if there are any."""
        counts = Counter(len(example.controls) for example in self.examples)
        if not counts.keys() - {0}:
            return []
        parts = (f"{counted(n, 'control image')} beside each of {images}" for n, images in sorted(counts.items()))
        return [", ".join(parts)]

    def _held_out(self) -> list[str]:
        """Which images are measured on, a line, if any is."""
        if not self.heldout:
            return []
        names = f"of {self.heldout_from}" if self.heldout_from else listed([e.name for e in self.heldout], SHOWN)
        return [f"held out, measured on and not trained on: {counted(len(self.heldout), 'image')}, {names}"]

    def _passes(self) -> list[str]:
        """How often the pictures are passed through, a line, if that is known."""
        if not self.steps:
            return []
        steps, batch = self.steps
        times = f"{steps * batch / self.pictures:.3g}"
        passes = "pass" if times == "1" else "passes"
        return [f"{counted(steps, 'step')} of {counted(batch, 'picture')}: {times} {passes} through {self.pictures}"]

    def notes(self) -> list[str]:
        """What may not be as it was meant, a sentence each; none for a folder that is wholly used."""
        kinds = {
            f"smaller than half of {self.resolution} pixels, and scaled up": self.small,
            "so long that less than a quarter is seen, the middle": self.extreme,
            "with an empty caption file, and trained without a caption": self.empty,
            f"with captions longer than {self.tokens} tokens, and cut there (see --max-length)": self.cut or (),
            "with several frames, of which the first is used": self.animated,
            "with a colour profile that cannot be read, and taken as sRGB": self.unprofiled,
            "with a control image of another shape, which is seen whole": self.reshaped,
            "without a control image in a further folder": self.fewer_controls,
            "without a mask, and wholly used": self.unmasked,
            "with a mask that leaves nothing": self.black,
        }
        if self.short and self.framing:
            least = self.framing.fitting[-1]
            what = "clips are" if len(self.short) > 1 else "clip is"
            kinds_of_footage = [
                f"{len(self.short)} {what} too short for {least} frames, and not used: {listed(self.short, SHOWN)}"
            ]
        else:
            kinds_of_footage = []
        notes = kinds_of_footage + [
            f"{counted(len(names), 'image')} {what}: {listed(names, SHOWN)}" for what, names in kinds.items() if names
        ]
        if self.duplicates:
            groups = [" = ".join(group) for group in self.duplicates]
            what = "clip" if self.framing else "image"
            notes.append(f"{counted(len(groups), what)} more than once: {listed(groups, SHOWN)}")
        if self.stray_controls:
            notes.append(f"control images of no picture: {listed(self.stray_controls, SHOWN)}")
        if self.copies:
            notes.append(f"{counted(self.copies, 'image')} of {self.heldout_from} not used, being copies of others")
        if self.unread:
            notes.append("not used: " + ", ".join(_ending(end, names) for end, names in self.unread.items()))
        if self.folders:
            notes.append("folders of which nothing is used: " + folders_text(self.folders))
        return notes

    def lines(self) -> list[str]:
        """The whole account as text."""
        return [self.summary(), *self.plan(), *self.notes()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def table(self) -> dict[str, object]:
        """The counts, for a file of measurements."""
        return {
            "images": len(self.examples),
            "pictures": self.pictures,
            "captions": dict(self.captions),
            "groups": [
                {"folder": group.name, "images": group.images, "repeats": group.repeats} for group in self.groups
            ],
            "buckets": [{"width": w, "height": h, "images": n} for (w, h), n in self.buckets.items()],
            "heldout": [example.name for example in self.heldout],
            "controls": sum(len(example.controls) for example in self.examples),
            "masks": sum(example.mask is not None for example in self.examples),
            "passes": self.steps and self.steps[0] * self.steps[1] / self.pictures,
            "unread": {ending: len(names) for ending, names in self.unread.items()},
            "folders": dict(self.folders),
            **(self._clip_counts() if self.framing else {}),
            "duplicates": [list(group) for group in self.duplicates],
            "cut": None if self.cut is None else list(self.cut),
            **{
                name: list(getattr(self, name))
                for name in (
                    *("empty", "small", "extreme", "animated", "unprofiled", "unmasked", "black"),
                    *("reshaped", "fewer_controls", "stray_controls"),
                )
            },
        }


def folders_text(folders: Mapping[str, int]) -> str:
    """Folders with the number of images in each."""
    named = [f"{name} ({counted(n, 'image')})" if n else name for name, n in folders.items()]
    return listed(named, SHOWN)


def _ending(ending: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {ending} ({listed(names, SHOWN)})"


def counted(n: int, noun: str) -> str:
    """How many of a thing."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def footage_of(examples: Collection[Example]) -> str:
    """How many clips and images examples are of, in words. What several clips are cut out of counts once."""
    footage = {example.path for example in examples if example.frames}
    single = sum(not example.frames for example in examples)
    counts = [counted(len(footage), "clip")] * bool(footage)
    counts += [counted(single, "image")] * bool(single or not footage)
    return " and ".join(counts)
