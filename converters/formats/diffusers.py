"""diffusers: `unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`, alphas in the metadata as PEFT's config (`lora_adapter_metadata`).

Read are all methods in PEFT's and LyCORIS's spelling, files of one component without its name in front (`UNet.save_lora_adapter`), and the
older suffixes (`.lora.down.weight`, `.lora_linear_layer.down.weight`) that diffusers' scripts write for UNets and text encoders.
Written is what `load_lora_weights` of diffusers 0.42 reads: LoRA, and DoRA with a magnitude for each output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffpeft import io, patterns
from diffpeft.bundle import COMPONENTS, Entry, Handle, dotted, parted
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats import config as configs
from diffpeft.converters.formats.base import NO_KEYS, Answer, KeyParts, dotted_role, magnitude_axis, suffix
from diffpeft.converters.formats.schema import check_fields
from diffpeft.errors import CheckpointError, ConfigError, UnsafeFileError
from diffpeft.files import Json, config_in
from diffpeft.methods.layout import LAYOUTS, PRODUCTS

METADATA = "lora_adapter_metadata"
_READ = {"lora_A", "lora_B", "lora_magnitude_vector"}  # by diffusers 0.42
# what other formats' keys begin with
_OTHERS = (
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "text_encoders.",
    "lora_",
    "lycoris_",
    "oft_unet_",
)


class Diffusers:
    """Dotted names."""

    name, flat, folder, single, writable = "diffusers", False, False, False, True
    tables: Mapping[str, Table] = TABLES
    shared_keys: Mapping[str, str] = NO_KEYS
    owned: frozenset[str] = frozenset({METADATA})

    def split(self, key: str) -> KeyParts | None:
        """The component's name, unless the file is of one component (and then the family's names say which)."""
        word, _, name = key.partition(".")
        if word not in COMPONENTS:
            word, name = "", key
        layer_role = dotted_role(name)
        return KeyParts(word, *layer_role) if layer_role and not name.startswith(_OTHERS) else None

    def component(self, word: str, table: Table) -> str:
        """It is the component."""
        return word

    def word(self, component: str, table: Table) -> str | None:
        """It is the component."""
        return component

    def original(self, table: Table) -> bool:
        """Never."""
        return False

    def join(self, part: KeyParts, entry: Entry) -> str:
        """For text encoders stock diffusers hands over to transformers, which reads a magnitude only with `.weight`."""
        end = ".weight" if part.role == "lora_magnitude_vector" and part.word.startswith("text_encoder") else ""
        return f"{dotted(part.word, part.layer)}.{suffix(part.role)}{end}"

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        config = config_in(metadata.get(METADATA, "{}"), f"the metadata {METADATA!r}")
        fields_of = {component: _of_component(config, component) for component in {parted(e.layer)[0] for e in entries}}
        for component, fields in fields_of.items():
            check_fields(fields, f"{METADATA}: {component}")
        try:
            with patterns.limited(UnsafeFileError, METADATA):
                return [_configured(entry, fields_of[parted(entry.layer)[0]]) for entry in entries]
        except ConfigError as error:  # a pattern that is none
            raise CheckpointError(f"cannot read the metadata {METADATA!r} ({error.what})") from error

    def holds(self, entries: Sequence[Entry]) -> Answer:
        foreign = [e.layer for e in entries if not {*self.stored(e)} <= _READ]
        layers = {*foreign}
        methods = " or ".join(sorted(frozenset().union(*(e.methods for e in entries if e.layer in layers))))
        inputs = [e.layer for e in entries if magnitude_axis(e) == 1]
        return (
            Answer.unless(foreign, f"stock diffusers reads no {methods} with these tensors")
            and Answer.unless(inputs, "stock diffusers reads no DoRA with a magnitude for each input")
            and Answer(*(configs.unsayable(entries) or ()))
            and Answer.unless(_mixed(entries), "stock diffusers reads LoRA and DoRA in one component as one of them")
        )

    def stored(self, entry: Entry) -> dict[str, Handle]:
        return peft_magnitude(entry)

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        return {}

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        config: Json = {}
        for component in dict.fromkeys(parted(e.layer)[0] for e in entries):
            members = [e for e in entries if parted(e.layer)[0] == component]
            config |= {f"{component}.{field}": value for field, value in _config(members).items()}
        return {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _mixed(entries: Sequence[Entry]) -> list[str]:
    """The layers of components that have LoRAs and DoRAs."""
    methods: dict[str, set[str]] = {}
    for entry in entries:
        methods.setdefault(parted(entry.layer)[0], set()).add(entry.method)
    return [entry.layer for entry in entries if {"lora", "dora"} <= methods[parted(entry.layer)[0]]]


def peft_magnitude(entry: Entry) -> dict[str, Handle]:
    """The tensors with PEFT's magnitude: [out] for a linear layer and [1, out, *1] for a convolution, where LyCORIS's is [out, 1, *1]."""
    tensors = dict(entry.tensors)
    if magnitude_axis(entry) == 0 and "dora_scale" in tensors and "lora_A" in tensors:
        m = tensors.pop("dora_scale")
        out, *ones = m.shape
        tensors["lora_magnitude_vector"] = io.reshaped(m, (1, out, *ones[1:]) if len(ones) > 1 else (out,))
    return tensors


def _config(entries: Sequence[Entry]) -> Json:
    """PEFT's fields for one component. Names start below `text_model.`: stock diffusers strips that level from keys, not from the config."""
    names = {e.layer: parted(e.layer)[1].removeprefix("text_model.") for e in entries}
    keys = {layer: f"^{name}" for layer, name in names.items()}
    scales = configs.scales(entries, keys, LAYOUTS["lora"], configs.ranks_of(entries))
    return {
        **scales,
        "target_modules": sorted(names.values()),
        "peft_type": "LORA",
        "bias": "none",
        "use_dora": any(e.method == "dora" for e in entries),
        "use_rslora": False,
    }


def _of_component(config: Json, component: str) -> Json:
    """The fields for a component; a file of one component has them without its name in front."""
    prefix = component + "."
    fields = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return fields or {k: v for k, v in config.items() if k.partition(".")[0] not in COMPONENTS}


def _configured(entry: Entry, config: Json) -> Entry:
    if LAYOUTS[entry.method].alpha == "bound":
        return configs.turned(entry, {"peft_version": "0.18", **config})
    if entry.alpha is not None or not config or entry.method not in PRODUCTS:
        return entry
    name = parted(entry.layer)[1]
    r = configs.ranks_of([entry])[entry.layer]
    return replace(entry, alpha=configs.alpha(config, (name, name.removeprefix("text_model.")), r))
