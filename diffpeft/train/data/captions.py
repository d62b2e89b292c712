"""Captions: from files beside images, from tables, from the prompt or a folder's name; and what training does to them. No torch but for what is drawn."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.errors import shown
from diffpeft.train.data.layout import TABLES, Folder, compared, is_clip, is_image, is_junk

BESIDE = (".txt", ".caption")  # beside NAME.png: NAME.txt, NAME.caption, NAME.png.txt, NAME.png.caption
PROMPT = "the prompt"  # where the caption of an image without a caption file is from
METADATA = tuple("metadata" + ending for ending in TABLES)
TRIGGER = "[trigger]"
_FILES = ("file_name", "file", "filename", "image", "image_path", "path")  # columns of tables
# columns of control images: ours, sd-scripts' and musubi's, DiffSynth's, and diffusers'
_CONTROLS = re.compile(r"(?:control(?:_images?|_path)?|edit_image|cond(?:itioning)?_image|source_image)(?:_?(\d))?")
_TEXTS = ("text", "caption", "prompt", "description")


@dataclass
class Tables:
    """What tables of captions say.

    Args:
        captions: {image as it is compared: (its caption or None, the table's name)}.
        controls: {image: its control images} of those that have some.
        images: {table: the images that it names and that are there, in order}.
        broken: {file: why it cannot be read}.
    """

    captions: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    controls: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    images: dict[Path, list[Path]] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)

    def of(self, table: Path) -> list[Path]:
        """The images that a table names."""
        return self.images.get(table, [])

    def read(self, path: Path) -> None:
        """Add a table's rows. Its paths are relative to its folder."""
        try:
            for name, caption, controls in _rows(path):
                image, *beside = (path.parent / named.replace("\\", "/") for named in (name, *controls))  # of Windows
                for missing in (
                    file for file in (image, *beside) if not (is_image(file) or (file is image and is_clip(file)))
                ):
                    why = "no image" if missing.exists() else "not there"
                    self.broken[missing] = f"{path.name} names it, and it is {why}"
                if is_image(image) or is_clip(image):
                    self.captions[compared(image)] = caption, path.name
                    self.images.setdefault(path, []).append(image)
                    self.controls |= {image: tuple(beside)} if beside else {}
        except (OSError, ValueError) as error:
            self.broken[path] = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _rows(path: Path) -> Iterator[tuple[str, str | None, list[str]]]:
    """(file name, caption, control images) of each row. Raises ValueError, which says the line, for one that cannot be understood."""
    text = path.read_text(encoding="utf-8-sig")
    rows = _json_rows(text) if path.suffix.lower() == ".jsonl" else _csv_rows(text)
    for line, row in rows:
        name = next((row[column] for column in _FILES if row.get(column)), None)
        caption = next((row[column] for column in _TEXTS if row.get(column) is not None), None)
        if not isinstance(name, str):
            raise ValueError(f"line {line} has no {_FILES[0]}")
        if not isinstance(caption, (str, type(None))):
            raise ValueError(f"line {line}: the caption is no text")
        yield name, None if caption is None else caption.strip(), _controls_of(line, row)


def _controls_of(line: int, row: Mapping[str, object]) -> list[str]:
    """The control images of a row: of columns that are called so, by number, each one name or a list of them. Raises ValueError."""
    matches = ((_CONTROLS.fullmatch(column), value) for column, value in row.items() if isinstance(column, str))
    numbered = sorted((int(match[1] or 0), value) for match, value in matches if match and value)
    names = [name for _, value in numbered for name in (value if isinstance(value, list) else [value])]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"line {line}: a control image is no text")
    return [str(name) for name in names]


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line} is no JSON") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {line} is no table")
        yield line, value


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no CSV ({error})") from error


def texts_in(folder: Folder) -> dict[str, Path]:
    """{name as it is compared: caption file} of a folder."""
    files = (path for path in folder.files if path.suffix.lower() in BESIDE and not is_junk(path))
    return {compared(path.name): path for path in files}


def file_of(image: Path, texts: Mapping[str, Path]) -> Path | None:
    """The caption file beside an image, if there is one among `texts`."""
    names = (compared(stem + ending) for stem in (image.stem, image.name) for ending in BESIDE)
    return next((texts[name] for name in names if name in texts), None)


def kind_of(image: Path, text: Path) -> str:
    """What a caption file is called, for people: .txt, .caption or NAME.png.txt."""
    names_image = compared(text.stem) == compared(image.name)
    return f"NAME{image.suffix.lower()}{text.suffix.lower()}" if names_image else text.suffix.lower()


def read(text: Path) -> str:
    """The caption in a file. Raises ValueError, which says why it cannot be read."""
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8 text") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def of_folder(tokens: str) -> str:
    """Where a caption is from that a folder's name gives."""
    return f"the folder's name {shown(tokens)}"


def with_trigger(caption: str, trigger: str | None) -> str:
    """A caption with the trigger in the place of `[trigger]`."""
    return caption if trigger is None else caption.replace(TRIGGER, trigger)


def without_trigger(caption: str, trigger: str | None) -> str:
    """A caption as if its subject were not known: without `[trigger]`, and without the trigger where it stands as words of its own."""
    words = caption.replace(TRIGGER, " ")
    if trigger:
        words = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", words)
    parts = (" ".join(part.split()) for part in words.split(","))
    return ", ".join(part for part in parts if part)


def has_trigger(caption: str, trigger: str) -> bool:
    """Whether a caption names the subject."""
    return TRIGGER in caption or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption) is not None


def shuffled(caption: str, keep: int, *key: int | str) -> str:
    """The parts of a caption between commas in another order, a function of `key`, after the `keep` first of them."""
    import torch

    from diffpeft.train.draw import generator

    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    if len(tags) <= keep + 1:
        return caption
    order = torch.randperm(len(tags) - keep, generator=generator(*key)).tolist()
    return ", ".join([*tags[:keep], *(tags[keep + place] for place in order)])
