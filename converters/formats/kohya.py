"""kohya (sd-scripts) and LyCORIS: `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, alphas as tensors beside the weights.

The rotations of sd-scripts' own OFT start with `oft_unet_`; their bound means something else than LyCORIS's (see methods/oft.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converters.formats.base import Part, magnitude_axis
from converters.formats.config import turned
from converters.roles import BIAS, FOREIGN, ROLES
from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted

# diffusers' own kohya writer says lora_te1_ where sd-scripts says lora_te_; both are read, the later row is written
PREFIXES = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "oft_unet_": "unet",
    "lora_unet_": "unet",
}
KOHYA_OFT = "oft_unet_"
_PLAIN = (*ROLES["loha"], *ROLES["lokr"], "oft_blocks", "rescale", "dora_scale", BIAS)
SUFFIXES = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    **{role: role for role in _PLAIN},
}
_PREFIX_OF = {component: prefix for prefix, component in PREFIXES.items()}
_SUFFIX_OF = {role: suffix for suffix, role in SUFFIXES.items()}


class Kohya:
    """Flat names."""

    name, flat, folder = "kohya", True, False
    owned = frozenset({"ss_network_module"})

    def split(self, key: str) -> Part | None:
        body, _, suffix = key.partition(".")
        prefix = next((p for p in PREFIXES if body.startswith(p)), None)
        if prefix is None or (suffix not in SUFFIXES and not suffix.startswith(tuple(FOREIGN))):
            return None
        return Part(PREFIXES[prefix], body.removeprefix(prefix), SUFFIXES.get(suffix, suffix))

    def join(self, part: Part, entry: Entry) -> str:
        prefix = KOHYA_OFT if _of_sd_scripts(entry) else _PREFIX_OF[part.component]
        return f"{prefix}{part.layer.replace('.', '_')}.{_SUFFIX_OF[part.role]}"

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        return [_clamped(turned(entry, {})) for entry in entries]

    def problem(self, entries: Sequence[Entry]) -> tuple[str, list[str]] | None:
        roles = {e.layer: sorted({*self.stored(e)} - {*_SUFFIX_OF}) for e in entries}
        lost = {layer: names for layer, names in roles.items() if names}
        if lost:
            names = sorted({name for found in lost.values() for name in found})
            return f"it has no name for {' and '.join(names)}", list(lost)
        alphas: dict[str, set[float | None]] = {}
        for e in entries:
            alphas.setdefault(e.layer, set()).add(io.number(e.alpha))
        several = [layer for layer, found in alphas.items() if len(found) > 1]
        if several:
            return "it has one alpha a layer, for all of its methods", several
        clamped = [e.layer for e in entries if _of_sd_scripts(e) and parted(e.layer)[0] != "unet"]
        return ("sd-scripts' OFT is for UNets", clamped) if clamped else None

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
        scaled = {e.layer for e in entries if e.method not in ("oft", "boft") or _of_sd_scripts(e)}
        free: dict[str, Handle | float] = {e.layer: 0.0 for e in entries if e.layer not in scaled}
        return free | {e.layer: e.alpha for e in entries if e.alpha is not None}

    def metadata(self, entries: Sequence[Entry], kept: Mapping[str, str]) -> dict[str, str]:
        plain = all(magnitude_axis(e) is None and {*e.tensors} <= {"lora_A", "lora_B"} for e in entries)
        module = "networks.lora" if plain else "lycoris.kohya"
        return {"ss_network_module": "networks.oft" if all(map(_of_sd_scripts, entries)) else module}


def _column(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1) if len(shape) == 1 else (shape[1], 1, *shape[2:])


def _of_sd_scripts(entry: Entry) -> bool:
    return entry.options.get("clamp") == "kohya"


def _clamped(entry: Entry) -> Entry:
    """The entry with sd-scripts' bound, if its keys say so."""
    theirs = any(key.startswith(KOHYA_OFT) for key in entry.keys)
    return replace(entry, options={**entry.options, "clamp": "kohya"}) if theirs else entry
