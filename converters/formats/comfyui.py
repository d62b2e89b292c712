"""ComfyUI: `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`, dots and the original program's names, alphas as tensors beside them.

Text encoders are `text_encoders.clip_l.transformer.text_model. ...`. Read is what it reads: LyCORIS's tensors and PEFT's names for a LoRA's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from diffpeft.bundle import Entry
from diffpeft.converters.families import COMFYUI, TABLES, Table
from diffpeft.converters.formats.base import Answer, KeyParts, denoiser, dotted_role
from diffpeft.converters.formats.kohya import SUFFIXES, Lycoris, of_sd_scripts

DENOISER = "diffusion_model."
# what other components are called that are within the original's denoiser, as Anima's text conditioner is
_INSIDE = sorted({e.comfyui for t in TABLES.values() for e in t.encoders.values() if e.comfyui.startswith(DENOISER)})
_BESIDE = sorted({word for table in TABLES.values() for word in table.words.values()})
_WORD = re.compile(
    rf"(?:model\.)?(?:{'|'.join(map(re.escape, (*_INSIDE, *_BESIDE, DENOISER)))})|text_encoders\.\w+\.(?:transformer\.)?"
)


class ComfyUI(Lycoris):
    """Dotted names of the original program."""

    name, flat = "comfyui", False
    tables: Mapping[str, Table] = COMFYUI
    suffixes = {role: suffix for suffix, role in SUFFIXES.items() if role not in ("ia3_w", "on_input")} | {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
    }

    def split(self, key: str) -> KeyParts | None:
        """A prefix, the layer, the role."""
        word = _WORD.match(key)
        layer_role = dotted_role(key[word.end() :]) if word else None
        return (
            KeyParts(word[0], *layer_role) if word and layer_role and layer_role[1] != "oft_R" else None
        )  # that is OneTrainer's

    def component(self, word: str, table: Table) -> str:
        """By the family's own prefixes."""
        if not word.startswith("text_encoders."):
            word = word.removeprefix("model.")
            words = {**{c: e.comfyui for c, e in table.encoders.items()}, **table.words}
            return next((c for c, theirs in words.items() if theirs == word), denoiser(table))
        return next((c for c, e in table.encoders.items() if e.comfyui.startswith(word)), "text_encoder")

    def word(self, component: str, table: Table) -> str | None:
        """Denoisers have one prefix, and a file holds one of them."""
        if component in table.encoders:
            return table.encoders[component].comfyui or None
        return table.words.get(component, DENOISER) if component in table.rules else None

    def original(self, table: Table) -> bool:
        """Always."""
        return True

    def join(self, part: KeyParts, entry: Entry) -> str:
        """A prefix, the layer, the role."""
        return f"{part.word}{part.layer}.{self.suffixes[part.role]}"

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """As for all, and there are none of sd-scripts' rotations."""
        clamped = [e.layer for e in entries if of_sd_scripts(e)]
        return Answer.unless(clamped, "ComfyUI knows no rotations with sd-scripts' bound") and super().holds(entries)
