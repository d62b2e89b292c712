"""Which images a data set has and what their captions are; every file is looked at once, before anything large is loaded."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from diffpeft.errors import ConfigError, DataError, DataWarning, joined, listed, shown
from diffpeft.train.data import captions, masks, pairing
from diffpeft.train.data.account import Account, Example, folders_text
from diffpeft.train.data.buckets import Sizing
from diffpeft.train.data.captions import PROMPT
from diffpeft.train.data.contents import Contents, Item, contents_of, items_beside
from diffpeft.train.data.footage import check_reader, frames_in, seen
from diffpeft.train.data.layout import ENDINGS, VIDEOS, is_clip, is_video, sources_of
from diffpeft.train.data.read import Look

Data = str | Path | Sequence[str | Path]


def find(data: Data, prompt: str | None) -> list[Example]:
    """The images of folders in order, with their captions: that of a file beside the image or of a table, or else `prompt`.

    Warns of what may not be as it was meant, such as files that are not used. Raises DataError as `survey` does.
    """
    account = survey(data, prompt)
    for note in account.notes():
        warnings.warn(f"{account.where}: {note}", DataWarning, stacklevel=2)
    return list(account.examples)


def survey(
    data: Data,
    prompt: str | None,
    sizing: Sizing | None = None,
    *,
    trigger: str | None = None,
    mask: str | None = None,
    control: str | Sequence[str] | None = None,
    skip: Iterable[Path] = (),
    strict: bool = True,
    clips: bool = False,
) -> Account:
    """The account of folders and tables of images.

    Args:
        data: folders, which are entered to the bottom, and tables of captions; `PATH:3` counts three times.
        prompt: the caption of images without one.
        sizing: how the sizes of training pictures follow from those of images, if it is known.
        trigger: what `[trigger]` in captions stands for.
        mask: `alpha`, or a folder of masks.
        control: folders of control images; without, those beside a folder `target`.
        skip: folders that are not entered.
        strict: whether a trigger or masks that no image has are an error.
        clips: whether video files, folders of frames and the frames of animated images are used.

    Raises DataError for data without images (which says what is there instead), for images without any caption, and for files that
    cannot be read, all of them at once; ConfigError for a trigger or masks that no image has.
    """
    sources = sources_of(data, clips)
    beside = pairing.folders_of(control, sources)
    closed = {path.resolve() for path in (*skip, *beside, *masks.folders_of(mask))}
    contents = contents_of(sources, prompt, closed)
    filled = {item.source for item in contents.items}
    for source in sources:
        if source not in filled:
            _refuse_unreadable(source.path, contents.tables.broken, len(contents.items))
            raise _no_images(source.path, contents_of([source], prompt, closed))
    _refuse_uncaptioned(contents, prompt)
    account = replace(_account(contents, trigger, strict), where=", ".join(map(str, sources)), sizing=sizing)
    if beside or contents.tables.controls:
        account = _controlled(account, beside, contents)
    return account if mask is None else _masked(account, mask, strict)


def _controlled(account: Account, folders: Sequence[Path], contents: Contents) -> Account:
    """The account with control images. Raises DataError for pictures without one, and for files that cannot be read."""
    pairs = pairing.paired(folders, contents.tables.controls, account.examples)
    looks = _looks(list(dict.fromkeys(path for paths in pairs.paths.values() for path in paths)))
    _refuse_unreadable(
        (*folders, account.folder)[0], {path: look.error for path, look in looks.items() if look.error}, len(looks)
    )
    contents.used |= looks.keys()
    entered = {name: n for name, n in account.folders.items() if account.folder / name not in folders}
    account = replace(account, folders=entered, unread=contents.unread())
    return pairing.controlled(account, pairs, looks)


def _account(contents: Contents, trigger: str | None, strict: bool) -> Account:
    """The account of what folders hold. Raises as `survey` does."""
    folder = contents.items[0].source.folder
    texts, unreadable = _captions(contents.items)
    _refuse_clips(contents.items)
    looks = _looks([item.path for item in contents.items])
    broken = {path: look.error for path, look in looks.items() if look.error} | contents.tables.broken | unreadable
    _refuse_unreadable(folder, broken, len(contents.items))
    _check_trigger(texts, trigger, folder, strict)
    examples = tuple(
        _example(item, captions.with_trigger(text, trigger), looks[item.path], trigger)
        for item, text in zip(contents.items, texts, strict=True)
    )
    return Account(
        folder,
        examples,
        dict(Counter(item.origin for item in contents.items)),
        groups=contents.groups,
        empty=tuple(e.name for e in examples if not e.caption),
        animated=tuple(e.name for e in examples if looks[e.path].frames > e.length),
        unprofiled=tuple(e.name for e in examples if not looks[e.path].profiled),
        duplicates=_duplicates(examples, looks),
        unread=contents.unread(),
        folders=contents.closed,
    )


def _refuse_uncaptioned(contents: Contents, prompt: str | None) -> None:
    """Raise DataError for images without a caption, if there is no prompt to caption them."""
    bare = [item.name for item in contents.items if item.origin == PROMPT]
    if bare and prompt is None:
        raise DataError(
            f"{len(bare)} of {len(contents.items)} images have no caption: {listed(bare, 3)}",
            where=contents.items[0].path.parent,
            remedy="Pass --instance-prompt, or put a text file beside each image: NAME.txt or NAME.caption.",
        )


def _example(item: Item, caption: str, look: Look, trigger: str | None) -> Example:
    """An image, or footage where clips are used."""
    length = look.frames if item.source.clips else 1
    return Example(
        item.path,
        caption,
        look.size,
        item.repeats,
        name=item.name,
        trigger=trigger,
        digest=look.digest,
        length=length,
        rate=look.rate,
    )


def _refuse_clips(items: Sequence[Item]) -> None:
    """Raise ConfigError for clips that a table names where nobody said how many frames are trained on, DataError where nothing reads video files."""
    check_reader([item.path for item in items if is_video(item.path)])
    if named := [item.name for item in items if not item.source.clips and is_clip(item.path)]:
        raise ConfigError(f"the data has clips, and frames is not said: {listed(named, 3)}", remedy=_CLIPS)


_CLIPS = "Pass --frames, the frames of a clip that are trained on, with a model of videos."


def captioned(paths: Sequence[Path], prompt: str) -> list[Example]:
    """Images with the captions beside them, or else `prompt`. Raises DataError for files that cannot be read, all of them at once."""
    items = items_beside(paths, prompt)
    texts, unreadable = _captions(items)
    looks = _looks(paths)
    broken = {path: look.error for path, look in looks.items() if look.error} | unreadable
    if broken:
        _refuse_unreadable(paths[0].parent, broken, len(paths))
    return [
        Example(item.path, text, looks[item.path].size, name=item.name) for item, text in zip(items, texts, strict=True)
    ]


def _captions(items: Sequence[Item]) -> tuple[list[str], dict[Path, str]]:
    """The captions of images, and {caption file: why it cannot be read}."""
    texts, unreadable = [], {}
    for item in items:
        try:
            texts.append(captions.read(item.text) if item.text else item.caption)
        except ValueError as error:
            unreadable[item.text or item.path] = str(error)
            texts.append("")
    return texts, unreadable


def _check_trigger(texts: Iterable[str], trigger: str | None, where: Path, strict: bool) -> None:
    """Raise for `[trigger]` without a trigger, and where `strict` for a trigger that no caption has."""
    texts = list(texts)
    if trigger is None:
        if marked := sum(captions.TRIGGER in text for text in texts):
            raise DataError(
                f"{marked} captions hold {captions.TRIGGER}, and nothing says what it stands for",
                where=where,
                remedy="Pass --trigger, the word that the subject is called by.",
            )
    elif strict and not any(captions.has_trigger(text, trigger) for text in texts):
        raise ConfigError(
            f"trigger is {shown(trigger)}, and no caption has it",
            where=where,
            remedy=f"Write {captions.TRIGGER} into captions or --instance-prompt, or leave --trigger out.",
        )


def _masked(account: Account, kind: str, strict: bool) -> Account:
    """The account with masks. Raises DataError for masks that cannot be read, ConfigError if there is none, where `strict`."""
    there = masks.masks_of(kind, account.examples, strict)
    _refuse_unreadable(account.folder if kind == masks.ALPHA else Path(kind), there.broken, len(account.examples))
    examples = tuple(replace(example, mask=there.paths.get(example.path)) for example in account.examples)
    return replace(
        account,
        examples=examples,
        unmasked=tuple(example.name for example in examples if example.mask is None),
        black=tuple(example.name for example in examples if example.path in there.black),
    )


def _no_images(folder: Path, contents: Contents) -> DataError:
    """The error for data without images: what is there instead."""
    unread = contents.unread()
    other = f"{sum(map(len, unread.values()))} other files"
    kinds = f" ({', '.join(unread)})" if unread else ""
    inside = {path.name: 0 for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}
    folders = inside | contents.closed
    return DataError(
        f"no images in the folder, only {other}{kinds}"
        + (f" and the folders {folders_text(folders)}" if folders else ""),
        where=folder,
        remedy=_CLIPS if {*unread} & {*VIDEOS} else f"Images end in {', '.join(ENDINGS)}.",
    )


def _looks(paths: Sequence[Path]) -> dict[Path, Look]:
    """Each image decoded once, on all cores: half a file can look whole until its last byte is read."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(paths, threads.map(seen, paths), strict=True))


def _refuse_unreadable(folder: Path, broken: Mapping[Path, str], total: int) -> None:
    """Raise DataError if there are files that cannot be read, {file: why}."""
    if not broken:
        return
    texts = any(path.suffix.lower() in captions.BESIDE for path in broken)
    names = joined((f"{shown(path.name)} ({why[:80]})" for path, why in broken.items()), 10)
    raise DataError(
        f"{len(broken)} files of {total} images cannot be read: {names}",
        where=folder,
        remedy="Remove them, or save them again." + (" Captions are UTF-8 text." if texts else ""),
    )


def _duplicates(examples: Sequence[Example], looks: Mapping[Path, Look]) -> tuple[tuple[str, ...], ...]:
    """Groups of images that show the same pixels, whatever their files are."""
    groups = defaultdict(list)
    for example in examples:
        groups[looks[example.path].size, looks[example.path].digest].append(example.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def digest_of(path: Path) -> str:
    """What a file holds, or the frames in a folder, in 64 digits."""
    if path.is_dir():
        digests = "".join(digest_of(frame) for frame in frames_in(path))
        return hashlib.blake2b(digests.encode(), digest_size=32).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
