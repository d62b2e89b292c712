"""list: what the adapters in a folder are, by their headers alone. A file that cannot be read is a row like the others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffpeft import converters
from diffpeft.bundle import trigger_words
from diffpeft.converters.detection import Signature, signature
from diffpeft.converters.formats.peft import FILE, WEIGHTS
from diffpeft.converters.inspection import FileOutline, outline
from diffpeft.converters.opening import opened
from diffpeft.errors import CheckpointError, DiffpeftError, UnreadableFileError
from diffpeft.files import present
from diffpeft.readable import Readable

END = ".safetensors"
THUMBNAIL = "modelspec.thumbnail"
PICTURES = tuple(f"{middle}{end}" for end in (".png", ".jpg", ".jpeg", ".webp") for middle in (".preview", ""))
_DATA = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=\s]+")


@dataclass(frozen=True, repr=False)
class AdapterRow(Readable):
    """One adapter of a folder.

    Args:
        path: of the file, or of the PEFT folder.
        family: empty if it is unknown.
        ranks: those of its layers, the smallest first; of a rotation the sizes of its blocks.
        size: bytes on the disk.
        thumbnail: the file of a picture beside it, "modelspec.thumbnail" for one in its metadata, or empty.
        error: why it is not shown, in one line; empty if it is.
    """

    path: str
    format: str = ""
    family: str = ""
    methods: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    layers: int = 0
    size: int = 0
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    thumbnail: str = ""
    error: str = ""


def list_adapters(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[AdapterRow]:
    """What the adapters in a folder are: its .safetensors files and PEFT folders, in order of their names.

    Only headers are read. A file that cannot be read, or that is no adapter, is a row with an `error`. With `recursive` the folders inside are
    looked through too. `folder` may also be one file. Raises UnreadableFileError if it is not there.
    """
    rows: dict[Signature, FileOutline] = {}
    return [_listed(path, rows) for path in adapters_in(folder, recursive=recursive)]


def adapters_in(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """The .safetensors files and PEFT folders in a folder, in order of their names; a file, or a PEFT folder, itself."""
    path = Path(folder)
    if is_peft(path) or path.is_file():
        return [path]
    if not path.is_dir():
        raise UnreadableFileError("no such folder", where=path, remedy="Pass a folder with adapter files.")
    return list(_inside(path, recursive))


def is_peft(path: Path) -> bool:
    """Whether a folder is an adapter of PEFT's, by its weights."""
    return path.is_dir() and present(path / WEIGHTS)


def _inside(folder: Path, recursive: bool) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:  # a row that says so
        yield folder
        return
    for path in paths:
        if (path.suffix == END and not path.is_dir()) or is_peft(path):
            yield path
        elif recursive and path.is_dir() and not path.is_symlink():
            yield from _inside(path, recursive)


def _listed(path: Path, rows: dict[Signature, FileOutline]) -> AdapterRow:
    """One row; what names and shapes tell is kept in `rows`, for folders have many files of one trainer."""
    picture = _beside(path)
    try:
        file = opened(path)
        key = signature(file.tensors, file.metadata)
        if key not in rows:
            rows[key] = outline(file)
        seen = rows[key]
        return AdapterRow(
            str(path),
            seen.fits.format,
            seen.families[0],
            tuple(sorted(seen.methods)),
            tuple(seen.ranks),
            len(seen.shapes),
            _size(path),
            file.metadata.get("modelspec.title", ""),
            trigger_words(file.metadata),
            picture or (THUMBNAIL if _DATA.fullmatch(file.metadata.get(THUMBNAIL, "")) else ""),
        )
    except (DiffpeftError, OSError) as error:
        told = error.what if isinstance(error, DiffpeftError) else error.strerror or str(error)
        return AdapterRow(str(path), size=_size(path), thumbnail=picture, error=told)


def _size(path: Path) -> int:
    """The bytes of a file, or of the files of a PEFT folder."""
    try:
        files = [path / WEIGHTS, path / FILE] if path.is_dir() else [path]
        return sum(os.stat(file).st_size for file in files)
    except OSError:  # a link to nothing
        return 0


def _beside(path: Path) -> str:
    """The picture that lies beside a file: NAME.preview.png, NAME.png, or another kind of picture."""
    stem = path.name.removesuffix(END)
    return next((str(file) for end in PICTURES if (file := path.with_name(stem + end)).is_file()), "")


def embedded(path: str | os.PathLike[str]) -> str:
    """The picture in a file's metadata, as a data URL; empty if there is none. Raises CheckpointError for a file that cannot be read."""
    text = opened(path).metadata.get(THUMBNAIL, "")
    return text if _DATA.fullmatch(text) else ""


def of_argument(text: str) -> list[Path]:
    """The adapters that an argument of a command stands for: a file, a PEFT folder, a link to the Hub, or the files and PEFT folders in a folder.

    Raises CheckpointError for a folder without any.
    """
    from diffpeft.converters import located

    folder = Path(text)
    if not folder.is_dir():
        return [located(text)]
    paths = converters.components_in(folder) or adapters_in(folder)
    if not paths:
        raise CheckpointError(
            "the folder holds no .safetensors file",
            where=folder,
            remedy="Pass an adapter's file, or a folder with one.",
        )
    return list(paths)
