"""What a picture was drawn with, as A1111 writes it into pictures and many programs read it.

    a cat <lora:style:0.8>
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Lora hashes: "style: 2b5c1ab3f9d0"

PNGs have it as the text `parameters`, JPEGs and WebPs as EXIF's user comment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from diffpeft.io import header

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_EXIF, _COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_QUALITY = {"JPEG": 95, "WEBP": 90}
_CHUNK = 1 << 24


def infotext(prompt: str, negative: str | None, settings: Mapping[str, object]) -> str:
    """The text. Settings that are None are left out; what would be read as several is quoted."""
    said = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{prompt}\n" + (f"Negative prompt: {negative}\n" if negative else "") + said


def _quoted(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def write(image: Image, file: BinaryIO, suffix: str, text: str) -> None:
    """A picture in the format of a suffix in FORMATS, with what it was drawn with."""
    from PIL import Image as images
    from PIL.PngImagePlugin import PngInfo

    kind = FORMATS[suffix.lower()]
    if kind == "PNG":
        said = PngInfo()
        said.add_text("parameters", text) if _is_latin(text) else said.add_itxt("parameters", text)
        image.save(file, kind, pnginfo=said)
        return
    exif = images.Exif()
    exif[_EXIF] = {_COMMENT: _UNICODE + text.encode("utf-16-be")}
    image.convert("RGB").save(file, kind, quality=_QUALITY[kind], exif=exif.tobytes())


def read(path: str | Path) -> str | None:
    """What a picture says that it was drawn with; None for one that says nothing."""
    from PIL import Image as images

    with images.open(path) as image:
        if image.format == "PNG":
            image.load()  # the text may stand behind the pixels
            text = image.info.get("parameters")
            return None if text is None else str(text)
        comment = image.getexif().get_ifd(_EXIF).get(_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    return comment.removeprefix(_UNICODE).decode("utf-16-be")


def _is_latin(text: str) -> bool:
    """Whether a text can stand in PNG's plain text, which all readers know."""
    return text.isascii()


def model_hash(file: Path) -> str:
    """A1111's hash of a checkpoint: the first ten digits of its SHA-256."""
    return _sha256(file)[:10]


def lora_hash(file: Path) -> str:
    """A1111's hash of an adapter: twelve digits of the SHA-256 of all behind the header, which the metadata may say."""
    said = header(file)[1].get("sshs_model_hash", "")
    if said:
        return said[:12]
    with file.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
    return _sha256(file, start)[:12]


def _sha256(file: Path, start: int = 0) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        f.seek(start)
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
