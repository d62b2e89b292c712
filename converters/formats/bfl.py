"""Black Forest Labs' control LoRAs of Flux: `double_blocks.0.img_attn.qkv.lora_A.weight`, the original's names with nothing in front. Only read.

There are no alphas; `lora_B.bias` is a change of the bias. The norms of queries and keys (`img_attn.norm.query_norm.scale`) are whole, in place of
the model's. img_in takes the image and the control, so its lora_A is as wide as both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats.base import KeyParts, dotted_role
from diffpeft.converters.formats.diffusers import Diffusers

_LAYER = re.compile(r"(?:(?:double|single)_blocks\.\d+|(?:img|txt|time|vector|guidance)_in|final_layer)\b.*")
_SCALE = re.compile(r"(?P<layer>.+\.norm\.(?:query|key)_norm)\.scale")


class BFL(Diffusers):
    """Dotted names of the original program; Flux alone."""

    name, single, writable = "bfl", True, False
    tables: Mapping[str, Table] = {"flux": TABLES["flux"]}

    def split(self, key: str) -> KeyParts | None:
        """The layer and the role."""
        if not _LAYER.fullmatch(key):
            return None
        if match := _SCALE.fullmatch(key):
            return KeyParts("", match["layer"], "set_weight")
        layer_role = dotted_role(key)
        return KeyParts("", *layer_role) if layer_role else None

    def word(self, component: str, table: Table) -> str | None:
        """There is nothing in front."""
        return "" if component == "transformer" else None

    def original(self, table: Table) -> bool:
        """Always."""
        return True
