"""Which images a folder holds and what their captions are; every file is looked at once, before anything large is loaded."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from diffpeft.errors import DataError, near, shown
from diffpeft.train.data.account import Account, Example, folders_text
from diffpeft.train.data.read import Look, looked_at

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
CAPTIONS = (".txt", ".caption")  # beside NAME.png: NAME.txt, NAME.caption, NAME.png.txt, NAME.png.caption
PROMPT = "the prompt"  # where the caption of an image without a caption file is from
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_MOST = 1000  # images that are counted in a folder that is not entered


def find(folder: str | Path, prompt: str | None) -> list[Example]:
    """The images of `folder` in name order, with their captions: that of a file beside the image, or else `prompt`.

    Warns of what may not be as it was meant, such as files that are not used. Raises DataError as `survey` does.
    """
    account = survey(folder, prompt)
    for note in account.notes():
        warnings.warn(f"{account.folder}: {note}", stacklevel=2)
    return list(account.examples)


def survey(folder: str | Path, prompt: str | None, resolution: int | None = None) -> Account:
    """The account of a folder of images. `resolution` is the side of the training images in pixels, if it is known.

    Raises DataError for a folder without images (which says what is there instead), for images without any caption, and for files that
    cannot be read, all of them at once.
    """
    folder = _folder(folder)
    paths = images_in(folder)
    if not paths:
        raise _no_images(folder)
    texts = _texts_in(folder)
    sources = {path: _caption_file(path, texts) for path in paths}
    _refuse_uncaptioned(folder, sources, prompt)
    looks = _looks(paths)
    captions, unreadable = _captions(sources, prompt)
    _refuse_unreadable(folder, {p: look.error for p, look in looks.items() if look.error} | unreadable, len(paths))
    return Account(
        folder,
        tuple(Example(path, captions[path]) for path in paths),
        {path.name: looks[path].size for path in paths},
        dict(Counter(_source(path, source) for path, source in sources.items())),
        empty=tuple(path.name for path in paths if not captions[path]),
        animated=tuple(path.name for path in paths if looks[path].frames > 1),
        duplicates=_duplicates(paths),
        unread=_unread(folder, {*paths, *filter(None, sources.values())}),
        folders=_folders_in(folder),
        resolution=resolution,
    )


def _refuse_uncaptioned(folder: Path, sources: Mapping[Path, Path | None], prompt: str | None) -> None:
    """Raise DataError for images without a caption file, if there is no prompt to caption them."""
    bare = [path.name for path, source in sources.items() if source is None]
    if bare and prompt is None:
        raise DataError(
            f"{len(bare)} of {len(sources)} images have no caption: {', '.join(map(shown, bare[:3]))}",
            where=folder,
            remedy="Pass --instance-prompt, or put a text file beside each image: NAME.txt or NAME.caption.",
        )


def captioned(paths: Sequence[Path], prompt: str) -> list[Example]:
    """Images with the captions beside them, or else `prompt`. Raises DataError for files that cannot be read, all of them at once."""
    texts = {name: text for folder in {path.parent for path in paths} for name, text in _texts_in(folder).items()}
    captions, unreadable = _captions({path: _caption_file(path, texts) for path in paths}, prompt)
    broken = {path: look.error for path, look in _looks(paths).items() if look.error}
    if broken or unreadable:
        _refuse_unreadable(paths[0].parent, broken | unreadable, len(paths))
    return [Example(path, captions[path]) for path in paths]


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder in name order, by their endings."""
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not _is_junk(path) and path.is_file()


def _is_junk(path: Path) -> bool:
    """What file managers and notebooks leave behind."""
    return path.name.startswith((".", "__MACOSX")) or path.name.lower() in _JUNK


def _folder(folder: str | Path) -> Path:
    """The folder as a path. Raises DataError with a near name if it is none."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    raise DataError(
        "not a folder" if folder.exists() else "no such folder",
        where=folder,
        remedy=near(folder.name, siblings) or "Pass a folder of images.",
    )


def _no_images(folder: Path) -> DataError:
    """The error for a folder without images: what is there instead, and which folder inside has some."""
    unread, folders = _unread(folder, ()), _folders_in(folder)
    with_images = [str(folder / name) for name, n in folders.items() if n]
    other = f"{sum(map(len, unread.values()))} other files"
    kinds = f" ({', '.join(unread)})" if unread else ""
    return DataError(
        f"no images in the folder, only {other}{kinds}"
        + (f" and the folders {folders_text(folders)}" if folders else ""),
        where=folder,
        remedy=f"Folders are not entered: pass the one with the images, {shown(with_images[0])}."
        if with_images
        else f"Images end in {', '.join(ENDINGS)}.",
    )


def _normal(name: str) -> str:
    """A name as it is compared: composed letters (macOS writes them apart), and an ending in lower case."""
    stem, dot, ending = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{ending.lower()}"


def _texts_in(folder: Path) -> dict[str, Path]:
    """{name as it is compared: caption file}."""
    return {
        _normal(path.name): path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in CAPTIONS and not _is_junk(path) and path.is_file()
    }


def _caption_file(image: Path, texts: Mapping[str, Path]) -> Path | None:
    names = (_normal(stem + ending) for stem in (image.stem, image.name) for ending in CAPTIONS)
    return next((texts[name] for name in names if name in texts), None)


def _source(image: Path, text: Path | None) -> str:
    """Where a caption is from, for people: .txt, .caption, NAME.png.txt or the prompt."""
    if text is None:
        return PROMPT
    names_image = _normal(text.stem) == _normal(image.name)
    return f"NAME{image.suffix.lower()}{text.suffix.lower()}" if names_image else text.suffix.lower()


def _captions(sources: Mapping[Path, Path | None], prompt: str | None) -> tuple[dict[Path, str], dict[Path, str]]:
    """{image: its caption}, and {caption file: why it cannot be read}."""
    captions, unreadable = {}, {}
    for image, text in sources.items():
        try:
            captions[image] = text.read_text(encoding="utf-8-sig").strip() if text else prompt or ""
        except UnicodeDecodeError:
            unreadable[text] = "it is no UTF-8 text"
        except OSError as error:
            unreadable[text] = error.strerror or str(error)
    return captions, {text: why for text, why in unreadable.items() if text}


def _looks(paths: Sequence[Path]) -> dict[Path, Look]:
    """Each image decoded once, on all cores: half a file can look whole until its last byte is read."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(paths, threads.map(looked_at, paths), strict=True))


def _refuse_unreadable(folder: Path, broken: Mapping[Path, str], total: int) -> None:
    """Raise DataError if there are files that cannot be read, {file: why}."""
    if not broken:
        return
    texts = any(path.suffix.lower() in CAPTIONS for path in broken)
    names = ", ".join(f"{shown(path.name)} ({why[:80]})" for path, why in islice(broken.items(), 10))
    raise DataError(
        f"{len(broken)} files of {total} images cannot be read: {names}"
        + (f" and {len(broken) - 10} more" if len(broken) > 10 else ""),
        where=folder,
        remedy="Remove them, or save them again." + (" Captions are UTF-8 text." if texts else ""),
    )


def _duplicates(paths: Sequence[Path]) -> tuple[tuple[str, ...], ...]:
    """Groups of files with the same bytes. Only files of one length are read."""
    lengths = Counter(path.stat().st_size for path in paths)
    groups = defaultdict(list)
    for path in paths:
        if lengths[path.stat().st_size] > 1:
            with open(path, "rb") as file:
                groups[hashlib.file_digest(file, "blake2b").digest()].append(path.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _unread(folder: Path, used: Collection[Path]) -> dict[str, list[str]]:
    """{ending: names} of the files that are not used."""
    by_ending = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path not in used and not _is_junk(path):
            by_ending[path.suffix.lower() or "without an ending"].append(path.name)
    return dict(by_ending)


def _folders_in(folder: Path) -> dict[str, int]:
    """{folder: how many images are in it and in those below}."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_junk(path))
    return {path.name: _images_below(path.rglob("*")) for path in inside}


def _images_below(paths: Iterable[Path]) -> int:
    try:
        return sum(1 for _ in islice(filter(_is_image, paths), _MOST))
    except OSError:  # a folder that may not be read
        return 0
