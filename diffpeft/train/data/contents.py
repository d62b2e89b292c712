"""What the folders and tables of a data set hold, before any image is opened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from diffpeft.train.data import captions
from diffpeft.train.data.account import Group
from diffpeft.train.data.captions import METADATA, PROMPT, Tables
from diffpeft.train.data.layout import Folder, ImageSource, compared, is_image, is_junk, walked

_MOST = 1000  # images that are counted in a folder that is not entered


@dataclass(frozen=True)
class Item:
    """An image before it is looked at: what it is called, how often it counts, its caption or the file with it, and where that is from."""

    path: Path
    source: ImageSource
    name: str
    repeats: int
    text: Path | None
    caption: str
    origin: str


@dataclass
class Contents:
    """All that folders hold: images, tables, other files, and the folders of which nothing is used with the images in them."""

    items: list[Item] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)
    groups: tuple[Group, ...] = ()
    files: list[Path] = field(default_factory=list)
    used: set[Path] = field(default_factory=set)
    closed: dict[str, int] = field(default_factory=dict)

    def unread(self) -> dict[str, list[str]]:
        """{ending: names} of the files that are not used."""
        by_ending = defaultdict(list)
        for path in self.files:
            if path not in self.used:
                by_ending[path.suffix.lower() or "without an ending"].append(path.name)
        return dict(by_ending)


def contents_of(sources: Sequence[ImageSource], prompt: str | None, skip: Collection[Path]) -> Contents:
    """What the folders of all sources hold, without those of `skip`. Nothing is opened but tables."""
    contents, groups = Contents(), list[Group]()
    for source in sources:
        folders = list(walked(source, skip))
        opened = [folder for folder in folders if isinstance(folder, Folder)]
        contents.closed |= {_name(f, source, sources): _images_below(f) for f in folders if isinstance(f, Path)}
        contents.closed |= {_name(f.path, source, sources): 0 for f in _bare(opened)}
        _read_tables(contents, source, opened)
        for folder in opened:
            images = folder.images if source.path.is_dir() else tuple(dict.fromkeys(contents.tables.of(source.path)))
            items = _items(folder, images, contents.tables, prompt, sources)
            contents.items += items
            contents.files += [path for path in folder.files if not is_junk(path)]
            contents.used |= {item.path for item in items} | {item.text for item in items if item.text}
            if items:
                groups.append(Group(_name(folder.path, source, sources), len(items), items[0].repeats))
    contents.groups = tuple(groups)
    return contents


def _bare(folders: Sequence[Folder]) -> list[Folder]:
    """The outermost of the folders without images in them or below; not the one that was asked for."""
    filled = {parent for folder in folders if folder.images for parent in (folder.path, *folder.path.parents)}
    bare = [folder for folder in folders[1:] if folder.path not in filled]
    return [folder for folder in bare if folder.path.parent in filled]


def _read_tables(contents: Contents, source: ImageSource, folders: Iterable[Folder]) -> None:
    """The tables of a source: itself, or those that its folders hold, of which the inner ones win."""
    inside = [path for folder in folders for path in folder.files if path.name.lower() in METADATA]
    for path in inside if source.path.is_dir() else [source.path]:
        contents.tables.read(path)
        contents.used.add(path)


def _items(
    folder: Folder, images: Iterable[Path], tables: Tables, prompt: str | None, sources: Sequence[ImageSource]
) -> list[Item]:
    texts, repeats = captions.texts_in(folder), folder.repeats * folder.source.repeats
    return [
        Item(
            path,
            folder.source,
            _name(path, folder.source, sources),
            repeats,
            *_captioned(path, texts, tables, prompt, folder.tokens),
        )
        for path in images
    ]


def items_beside(paths: Sequence[Path], prompt: str) -> list[Item]:
    """Images with the caption files beside them, or else the prompt."""
    sources = [ImageSource(folder) for folder in dict.fromkeys(path.parent for path in paths)]
    folders = {
        source.path: Folder(source.path, source, files=tuple(sorted(source.path.iterdir()))) for source in sources
    }
    return [item for path in paths for item in _items(folders[path.parent], [path], Tables(), prompt, sources[:1])]


def _captioned(
    image: Path, texts: Mapping[str, Path], tables: Tables, prompt: str | None, tokens: str | None
) -> tuple[Path | None, str, str]:
    """(caption file, caption, where it is from) of an image: the file beside it, its row of a table, the prompt, or the tokens in its folder's name."""
    text = captions.file_of(image, texts)
    if text is not None:
        return text, "", captions.kind_of(image, text)
    caption, table = tables.captions.get(compared(image), (None, ""))
    if caption is not None:
        return None, caption, table
    return (None, tokens, captions.of_folder(tokens)) if tokens and prompt is None else (None, prompt or "", PROMPT)


def _name(path: Path, source: ImageSource, sources: Sequence[ImageSource]) -> str:
    """A path as the account calls it: from the folder that was asked for, whose name is told where there are several."""
    within = path.relative_to(source.folder).as_posix() if path.is_relative_to(source.folder) else path.as_posix()
    return f"{source.folder.name}/{within}".removesuffix("/.") if len(sources) > 1 else within


def _images_below(folder: Path) -> int:
    try:
        return sum(1 for _ in islice(filter(is_image, folder.rglob("*")), _MOST))
    except OSError:  # a folder that may not be read
        return 0
