"""How models name their layers. One file an architecture, one line a family here."""

from converters.families import clip, unet
from converters.families.base import Table

TABLES: dict[str, Table] = {
    "sd15": Table({"unet": unet.LAYERS, "text_encoder": clip.LAYERS}),
    "sd2": Table({"unet": unet.LAYERS, "text_encoder": clip.LAYERS}),
}

__all__ = ["TABLES", "Table"]
