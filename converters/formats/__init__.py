"""How files spell adapters. One file a format, one line here."""

from converters.formats.base import Format, Part
from converters.formats.diffusers import Diffusers
from converters.formats.kohya import Kohya
from converters.formats.peft import Peft

FORMATS: dict[str, Format] = {
    "kohya": Kohya(),
    "diffusers": Diffusers(),
    "peft": Peft(),
}

__all__ = ["FORMATS", "Format", "Part"]
