"""How files spell adapters. One file a format, one line here."""

from converters.formats.base import Format, Part
from converters.formats.diffusers import Diffusers
from converters.formats.kohya import Kohya

FORMATS: dict[str, Format] = {
    "kohya": Kohya(),
    "diffusers": Diffusers(),
}

__all__ = ["FORMATS", "Format", "Part"]
