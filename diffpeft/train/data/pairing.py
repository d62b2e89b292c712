"""Which control images belong to which pictures: by a table's columns, or by the names of files in folders of their own.

`target/`, `control/`, `control2/` ... in a data folder are such folders, and so are those of `--control DIR,DIR2`. Where one folder has several control images
of a picture, they are NAME_0, NAME_1 ... The first folder must have one for each picture; a further one may be without some.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from diffpeft.errors import ConfigError, DataError, joined, near, shown
from diffpeft.train.data.account import Account, Control, Example
from diffpeft.train.data.buckets import alike
from diffpeft.train.data.layout import ENDINGS, ImageSource, compared, is_junk
from diffpeft.train.data.read import Look

TARGET, CONTROL = "target", re.compile(r"control_?([1-9]?)", re.IGNORECASE)
_NAMES = 10  # that are told at most


@dataclass(frozen=True)
class Wanted:
    """The control images that a model reads: the fewest and the most of an example, and whether they must have its shape."""

    fewest: int = 0
    most: int = 10
    aligned: bool = False


@dataclass(frozen=True)
class Pairs:
    """The control images of a data set: {picture: its own, in order}, pictures that lack one of a further folder, and files that belong to nobody."""

    paths: Mapping[Path, tuple[Path, ...]]
    fewer: tuple[str, ...] = ()
    stray: tuple[str, ...] = ()


def folders_of(said: str | Sequence[str] | None, sources: Sequence[ImageSource]) -> list[Path]:
    """The folders of control images: those that were said, or else those beside a folder `target` in the data. Raises DataError for one that is not there."""
    if said is not None:
        folders = [Path(entry.strip()) for entry in (said.split(",") if isinstance(said, str) else said)]
        for folder in folders:
            if not folder.is_dir():
                siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
                remedy = (
                    near(folder.name, siblings) or "Pass a folder of control images that are named as the pictures."
                )
                raise DataError("no such folder of control images", where=folder, remedy=remedy)
        return folders
    inside = [folders for source in sources if (folders := _beside_target(source.path))]
    if len(inside) > 1:
        raise ConfigError(
            "several data folders have control images of their own",
            where=inside[1][0],
            remedy="Put the pictures into one folder target, or pass --control.",
        )
    return inside[0] if inside else []


def _beside_target(folder: Path) -> list[Path]:
    """control, control2 ... of a folder that has target too, in order."""
    if not folder.is_dir():
        return []
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    matches = ((CONTROL.fullmatch(name), path) for name, path in folders.items())
    numbered = sorted((int(match[1] or 1), path) for match, path in matches if match)
    return [path for _, path in numbered] if TARGET in folders else []


def paired(folders: Sequence[Path], tables: Mapping[Path, tuple[Path, ...]], examples: Sequence[Example]) -> Pairs:
    """The control images of examples: those that tables name, or else those of the folders. Raises DataError for pictures without one, all at once."""
    files = [_files_of(folder) for folder in folders]
    named = [example for example in examples if example.path not in tables]
    by_folder = {example.path: [_of(example, names) for names in files] for example in named}
    if folders:
        _refuse_bare(folders[0], examples, [example.name for example in named if not by_folder[example.path][0]])
    paths = {**tables, **{path: tuple(chain(*groups)) for path, groups in by_folder.items()}}
    fewer = tuple(example.name for example in named if not all(by_folder[example.path]))
    used = set(chain(*paths.values()))
    stray = [path.name for names in files for path in names.values() if path not in used]
    return Pairs(paths, fewer, tuple(dict.fromkeys(stray)))


def _refuse_bare(folder: Path, examples: Sequence[Example], names: Sequence[str]) -> None:
    """Raise DataError if there are pictures without a control image."""
    if names:
        raise DataError(
            f"{len(names)} of {len(examples)} pictures have no control image: {joined(map(shown, names), _NAMES)}",
            where=folder,
            remedy="A control image is named as its picture. Add them, or take the pictures out.",
        )


def _files_of(folder: Path) -> dict[str, Path]:
    """{name without its ending, as it is compared: image} of a folder and those below."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file())
    return {compared(path.relative_to(folder).with_suffix("")): path for path in paths if not is_junk(path)}


def _of(example: Example, files: Mapping[str, Path]) -> list[Path]:
    """The control images of an example in a folder: that of its name, with the folders above it or without, or those with numbers after it."""
    parts = Path(example.name).with_suffix("").parts
    for name in ("/".join(parts[start:]) for start in range(len(parts))):
        if one := files.get(compared(name)):
            return [one]
        if numbered := _numbered(name, 0, files) or _numbered(name, 1, files):
            return numbered
    return []


def _numbered(name: str, start: int, files: Mapping[str, Path]) -> list[Path]:
    """NAME_0, NAME_1 ... or from another number on, as far as they are there."""
    several = list[Path]()
    while path := files.get(compared(f"{name}_{start + len(several)}")):
        several.append(path)
    return several


def controlled(account: Account, pairs: Pairs, looks: Mapping[Path, Look]) -> Account:
    """The account with control images, each of which was looked at."""

    def beside(example: Example) -> tuple[Control, ...]:
        paths = pairs.paths.get(example.path, ())
        return tuple(Control(path, looks[path].size, looks[path].digest) for path in paths)

    examples = tuple(replace(example, controls=beside(example)) for example in account.examples)
    return replace(account, examples=examples, fewer_controls=pairs.fewer, stray_controls=pairs.stray)


def check(account: Account, wanted: Wanted) -> None:
    """Raise DataError where the control images of an account are not what the model reads."""
    examples = (*account.examples, *account.heldout)
    if not wanted.most and any(example.controls for example in examples):
        raise DataError(
            "there are control images, and this model reads none",
            where=account.folder,
            remedy="Pass a model of edits (Flux.2, Flux.1 Kontext, Qwen-Image-Edit), or the folder of the pictures alone.",
        )
    places = "Control images are in --control DIR with the pictures' names, or in the column control of a table."
    faults: list[tuple[str, Callable[[Example], bool], str]] = [
        (
            f"fewer than {wanted.fewest} control image{'s' * (wanted.fewest > 1)}, which this model must have",
            lambda example: len(example.controls) < wanted.fewest,
            places,
        ),
        (
            f"more than {wanted.most} control image{'s' * (wanted.most > 1)}, which this model reads at most",
            lambda example: len(example.controls) > wanted.most,
            places,
        ),
        (
            "a control image of another shape, and this model lays them over one another",
            lambda example: wanted.aligned and not _alike(example),
            "Give each the ratio of sides of its picture.",
        ),
    ]
    for what, is_at_fault, remedy in faults:
        if names := [shown(example.name) for example in examples if is_at_fault(example)]:
            raise DataError(
                f"{len(names)} of {len(examples)} pictures have {what}: {joined(names, _NAMES)}",
                where=account.folder,
                remedy=remedy,
            )


def _alike(example: Example) -> bool:
    return all(alike(control.size, example.size) for control in example.controls)
