"""X-Labs: `double_blocks.0.processor.qkv_lora1.down.weight`, LoRAs of the processors of Flux's blocks, without alphas.

In a double block 1 is the image's stream and 2 the text's. The `qkv_lora` of a single block is for the first rows of linear1 alone, so it is a layer
that the original program does not have. Files of other programs have `diffusion_model.` in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.converters.families import Table
from diffpeft.converters.families.base import renamed, table
from diffpeft.converters.formats.base import NO_KEYS, Answer, KeyParts
from diffpeft.methods.shapes import rank

_SINGLE_QKV = "single_blocks.{}.linear1.qkv"
FLUX = table(
    renamed(
        {
            "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"),
            "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{p}_proj" for p in "qkv"),
            "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
            "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
            _SINGLE_QKV: tuple(f"single_transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"),
            "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
        }
    ),
    {},
)
WORD = "processor"
# {(block, layer in it): the processor's name for it}
_NAMES = {
    ("double_blocks", "img_attn.qkv"): "qkv_lora1",
    ("double_blocks", "txt_attn.qkv"): "qkv_lora2",
    ("double_blocks", "img_attn.proj"): "proj_lora1",
    ("double_blocks", "txt_attn.proj"): "proj_lora2",
    ("single_blocks", "linear1.qkv"): "qkv_lora",
    ("single_blocks", "linear2"): "proj_lora",
}
_LAYERS = {(block, name): layer for (block, layer), name in _NAMES.items()}
_ROLES = {"down.weight": "lora_A", "up.weight": "lora_B"}
_KEY = re.compile(
    r"(?:diffusion_model\.)?(?P<block>\w+)\.(?P<number>\d+)\.processor\.(?P<name>\w+)\.(?P<role>(?:down|up)\.weight)"
)


class XLabs:
    """Dotted names of processors; Flux alone."""

    name, flat, folder, single, writable = "xlabs", False, False, False, True
    shared_keys: Mapping[str, str] = NO_KEYS
    owned: frozenset[str] = frozenset()
    tables: Mapping[str, Table] = {"flux": FLUX}
    suffixes: Mapping[str, str] = {role: suffix for suffix, role in _ROLES.items()}

    def split(self, key: str) -> KeyParts | None:
        """The block and the processor's layer tell the original's."""
        match = _KEY.fullmatch(key)
        layer = _LAYERS.get((match["block"], match["name"])) if match else None
        if match is None or layer is None:
            return None
        return KeyParts(WORD, f"{match['block']}.{match['number']}.{layer}", _ROLES[match["role"]])

    def component(self, word: str, table: Table) -> str:
        """Always the transformer."""
        return "transformer"

    def word(self, component: str, table: Table) -> str | None:
        """There is no name for text encoders."""
        return WORD if component == "transformer" else None

    def original(self, table: Table) -> bool:
        """Always."""
        return True

    def join(self, part: KeyParts, entry: Entry) -> str:
        """The processor's name in the layer's block."""
        block, number, layer = part.layer.split(".", 2)
        return f"{block}.{number}.processor.{_NAMES[block, layer]}.{self.suffixes[part.role]}"

    def has(self, layer: str) -> bool:
        """Whether there is a name for a layer, or for a joint one that it is part of."""
        component, name = parted(layer)
        return component == "transformer" and FLUX.knows(component, name)

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """There is nothing more to say: without an alpha the scale is 1."""
        return list(entries)

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """It holds plain LoRAs of scale 1, on attentions."""
        plain = [e for e in entries if {*e.tensors} == {"lora_A", "lora_B"}]
        others = [t for e in entries if {*e.tensors} != {"lora_A", "lora_B"} for t in e.targets]
        scaled = [t for e in plain if e.alpha is not None and io.number(e.alpha) != rank(e.shapes) for t in e.targets]
        unnamed = [target for e in entries for target in e.targets if not self.has(target)]
        return (
            Answer.unless(unnamed, "it has names for the attentions of Flux's blocks alone")
            and Answer.unless(others, "X-Labs' processors are plain LoRAs")
            and Answer.unless(scaled, "it has no alphas, and the scale of these is not 1")
        )

    def stored(self, entry: Entry) -> dict[str, Handle]:
        """As they are."""
        return dict(entry.tensors)

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        """None."""
        return {}

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        """Nothing."""
        return {}
