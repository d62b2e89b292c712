"""Flat names: `lora_unet_input_blocks_4_1_proj_in.lora_down.weight`, alphas as tensors beside the weights.

sd-scripts and LyCORIS write them in the original program's names (of SD1.x and SD2.x in diffusers'), others in diffusers' (kohya-diffusers). LyCORIS
by itself puts `lycoris_` before diffusers' names. The rotations of sd-scripts' own OFT start with `oft_unet_`; their bound means something else
than LyCORIS's (see methods/oft.py), and a fused layer has those of its parts under numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats.base import (
    LYCORIS,
    NO_KEYS,
    Answer,
    KeyParts,
    OneModel,
    denoiser,
    dotted_role,
    magnitude_axis,
)
from diffpeft.converters.formats.config import turned
from diffpeft.methods.layout import BIAS, ROLES

KOHYA_OFT = "oft_unet_"
UNET, TRANSFORMER, WRAPPER = "lora_unet_", "lora_transformer_", "lycoris_"
# diffusers' own kohya writer says lora_te1_ where sd-scripts says lora_te_
_ENCODERS = tuple(dict.fromkeys(p for table in TABLES.values() for e in table.encoders.values() for p in e.kohya))
_NUMBERS = {
    "lora_te_": "text_encoder",
    **{f"lora_te{n + 1}_": f"text_encoder{f'_{n + 1}' * (n > 0)}" for n in range(4)},
}
# what stands for the components of a family that is not known
_UNNAMED = {
    "unet": UNET,
    "transformer": TRANSFORMER,
    **{component: word for word, component in reversed(_NUMBERS.items())},
}
# the longest first: Anima's lora_unet_llm_adapter_ begins with lora_unet_
_WORDS = sorted((UNET, TRANSFORMER, KOHYA_OFT, *_NUMBERS, *_ENCODERS), key=len, reverse=True)
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)})")
_PLAIN = (
    *ROLES["full"],
    *ROLES["norm"],
    *ROLES["loha"],
    *ROLES["lokr"],
    "oft_blocks",
    "rescale",
    "dora_scale",
    BIAS,
    "alpha",
)
SUFFIXES = {**LYCORIS, **{role: role for role in _PLAIN}, "weight": "ia3_w", "on_input": "on_input"}
_SUFFIX_OF = {role: suffix for suffix, role in SUFFIXES.items()}


class Lycoris:
    """What all formats with LyCORIS's tensors have in common."""

    name, flat, folder, single, writable = "", True, False, False, True
    tables: Mapping[str, Table] = TABLES
    shared_keys: Mapping[str, str] = NO_KEYS
    owned: frozenset[str] = frozenset()
    suffixes: Mapping[str, str] = _SUFFIX_OF  # {role: what stands behind the layer's name}

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """Rotations turn the output."""
        return [turned(entry, None) for entry in entries]

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """All roles have names, and a layer one alpha."""
        roles = [(entry.layer, {*self.stored(entry)} - {*self.suffixes}) for entry in entries]
        names = sorted(set().union(*(unnamed for _, unnamed in roles)))
        alphas: dict[str, set[float | None]] = {}
        for entry in entries:
            alphas.setdefault(entry.layer, set()).add(io.number(entry.alpha))
        several = [layer for layer, values in alphas.items() if len(values) > 1]
        return Answer.unless(
            [layer for layer, unnamed in roles if unnamed], f"it has no name for {' and '.join(names)}"
        ) and Answer.unless(several, "it has one alpha a layer, for all of its methods")

    def stored(self, entry: Entry) -> dict[str, Handle]:
        """LyCORIS's magnitude is [out, 1, *1] where PEFT's is [out] or [1, out, *1]."""
        return {
            "dora_scale" if role == "lora_magnitude_vector" else role: io.reshaped(h, _column(h.shape))
            if role == "lora_magnitude_vector"
            else h
            for role, h in entry.tensors.items()
        }

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        """LyCORIS asks for a rotation's bound even where there is none, and then it is 0; to a scale that would be something else."""
        scaled = {e.layer for e in entries if e.method not in ("oft", "boft") or of_sd_scripts(e)}
        free: dict[str, Handle | float] = {e.layer: 0.0 for e in entries if e.layer not in scaled}
        return free | {e.layer: e.alpha for e in entries if e.alpha is not None}

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        """Nothing."""
        return {}


class Kohya(Lycoris):
    """`lora_unet_`, `lora_te_` and their kin."""

    owned = frozenset({"ss_network_module"})

    def __init__(self, name: str, originals: bool):
        self.name, self.originals = name, originals

    def split(self, key: str) -> KeyParts | None:
        """Everything before the first dot is the layer, with few exceptions."""
        body, _, end = key.partition(".")
        word = _WORD.match(body)
        if word is None:
            return None
        if body.startswith(KOHYA_OFT) and re.fullmatch(r"oft_blocks\.\d+", end):
            return KeyParts(word[0], body[word.end() :], "oft_blocks", int(end.partition(".")[2]))
        return flat_part(word[0], body[word.end() :], end)

    def component(self, word: str, table: Table) -> str:
        """By the family's own prefixes, else by the number."""
        if word not in _NUMBERS and word not in _ENCODERS:
            return denoiser(table)
        return next((c for c, e in table.encoders.items() if word in e.kohya), _NUMBERS.get(word, "text_encoder"))

    def word(self, component: str, table: Table) -> str | None:
        """The first prefix of an encoder; denoisers have one, and a file holds one of them."""
        if component in table.encoders:
            return next(iter(table.encoders[component].kohya), None)
        if not table.components:
            return _UNNAMED.get(component)
        if component not in table.rules or component in table.words:
            return None
        return UNET if self.originals or component == "unet" else TRANSFORMER

    def original(self, table: Table) -> bool:
        """sd-scripts names the layers of SD1.x and SD2.x as diffusers does."""
        return self.originals and not table.flat_is_diffusers

    def join(self, part: KeyParts, entry: Entry) -> str:
        """The rotations of sd-scripts have a prefix of their own."""
        word = KOHYA_OFT if of_sd_scripts(entry) and not part.word.startswith("lora_te") else part.word
        return f"{word}{part.layer.replace('.', '_')}.{self.suffixes[part.role]}"

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """With sd-scripts' bound, if the keys say so."""
        return [_clamped(entry) for entry in super().configured(entries, metadata)]

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """As for all, and sd-scripts' rotations are of no text encoder."""
        clamped = [e.layer for e in entries if of_sd_scripts(e) and parted(e.layer)[0].startswith("text_encoder")]
        return Answer.unless(clamped, "sd-scripts' OFT is not for text encoders") and super().holds(entries)

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        """The module that reads it in sd-scripts."""
        plain = all(magnitude_axis(e) is None and {*e.tensors} <= {"lora_A", "lora_B"} for e in entries)
        module = "networks.lora" if plain else "lycoris.kohya"
        return {"ss_network_module": "networks.oft" if all(map(of_sd_scripts, entries)) else module}


class Wrapper(OneModel, Lycoris):
    """`lycoris_`, diffusers' names, one model."""

    name, single = "lycoris", True

    def split(self, key: str) -> KeyParts | None:
        """Everything before the first dot is the layer."""
        body, _, end = key.partition(".")
        return flat_part("", body.removeprefix(WRAPPER), end) if body.startswith(WRAPPER) else None

    def join(self, part: KeyParts, entry: Entry) -> str:
        """The layer's name as the model has it."""
        return f"{WRAPPER}{part.layer.replace('.', '_')}.{self.suffixes[part.role]}"

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """As for all, and there are none of sd-scripts' rotations."""
        clamped = [e.layer for e in entries if of_sd_scripts(e)]
        return Answer.unless(clamped, "sd-scripts' OFT has another bound than LyCORIS's") and super().holds(entries)


def flat_part(word: str, layer: str, end: str) -> KeyParts | None:
    """A key of which a flat name and what stands behind its first dot are known: the role, or first the rest of a name that is flat only in part."""
    if end in SUFFIXES:
        return KeyParts(word, layer, SUFFIXES[end])
    layer_role = dotted_role(f"{layer}.{end}") if end else None
    if layer_role is None or not layer_role[0].startswith(layer) or layer_role[1] == "oft_R":  # that is OneTrainer's
        return None
    return KeyParts(word, layer_role[0].replace(".", "_").lstrip("_"), layer_role[1])


def of_sd_scripts(entry: Entry) -> bool:
    """Whether a rotation has sd-scripts' bound."""
    return entry.options.get("clamp") == "kohya"


def _column(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1) if len(shape) == 1 else (shape[1], 1, *shape[2:])


def _clamped(entry: Entry) -> Entry:
    """The entry with sd-scripts' bound, if its keys say so."""
    theirs = any(key.startswith(KOHYA_OFT) for key in entry.keys)
    return replace(entry, options={**entry.options, "clamp": "kohya"}) if theirs else entry
