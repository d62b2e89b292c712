"""Old diffusers (before 0.22): `unet.mid_block. ... .attn1.processor.to_q_lora.down.weight`, the LoRAs of an attention's processor. Only read.

Files of a UNet alone have no `unet.` in front. In text encoders the processor's names stand for transformers': `self_attn.to_q_lora` is q_proj. The
same files spell other layers as `diffusers` does. There are no alphas, with few exceptions; then the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffpeft.bundle import COMPONENTS
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats.base import KeyParts
from diffpeft.converters.formats.diffusers import Diffusers

_KEY = re.compile(
    r"(?P<attention>.+?)(?:\.processor)?\.(?P<layer>(?:to|add)_\w+)_lora\.(?P<role>(?:down|up)\.weight|alpha)"
)
_ROLES = {"down.weight": "lora_A", "up.weight": "lora_B", "alpha": "alpha"}
_UNET = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "add_k": "add_k_proj",
    "add_v": "add_v_proj",
}
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class DiffusersOld(Diffusers):
    """Dotted names of processors."""

    name, writable = "diffusers-old", False
    tables: Mapping[str, Table] = {family: TABLES[family] for family in ("sd15", "sd2", "sdxl", "sdxl_refiner")}

    def split(self, key: str) -> KeyParts | None:
        """The component's name or none, the attention, and which of its layers."""
        word, _, name = key.partition(".")
        word, name = (word, name) if word in COMPONENTS else ("", key)
        match = _KEY.fullmatch(name) if "_lora." in name else None
        if match is None:
            return super().split(key)
        layers = _CLIP if match["attention"].endswith("self_attn") else _UNET
        layer = layers.get(match["layer"].removesuffix("_proj"))
        return KeyParts(word, f"{match['attention']}.{layer}", _ROLES[match["role"]]) if layer else None
