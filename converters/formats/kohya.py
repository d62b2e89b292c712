"""kohya (sd-scripts): `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, alphas as tensors beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.formats.base import Part
from converters.roles import FOREIGN
from diffpeft.bundle import Entry

# diffusers' own kohya writer says lora_te1_ where sd-scripts says lora_te_; both are read, the later row is written
PREFIXES = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_unet_": "unet",
}
SUFFIXES = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"}
_PREFIX_OF = {component: prefix for prefix, component in PREFIXES.items()}
_SUFFIX_OF = {role: suffix for suffix, role in SUFFIXES.items()}


class Kohya:
    """Flat names."""

    name, flat, alpha_is_tensor = "kohya", True, True

    def split(self, key: str) -> Part | None:
        body, _, suffix = key.partition(".")
        prefix = next((p for p in PREFIXES if body.startswith(p)), None)
        if prefix is None or (suffix not in SUFFIXES and not suffix.startswith(tuple(FOREIGN))):
            return None
        return Part(PREFIXES[prefix], body.removeprefix(prefix), SUFFIXES.get(suffix, suffix))

    def join(self, part: Part) -> str:
        return f"{_PREFIX_OF[part.component]}{part.layer.replace('.', '_')}.{_SUFFIX_OF[part.role]}"

    def alphas(self, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
        return {}

    def metadata(self, entries: Sequence[Entry], ranks: Mapping[str, int]) -> dict[str, str]:
        return {"ss_network_module": "networks.lora"}
