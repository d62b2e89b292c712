"""PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`, keys `base_model.model.mid_block.attentions.0.proj_in.lora_A.weight`.

A folder holds one component and one method; alphas, ranks and what rotations must know stand in the config. Written in the dialect of PEFT 0.21.2.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from diffpeft import io, patterns
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats import attention
from diffpeft.converters.formats import config as configs
from diffpeft.converters.formats.base import Answer, KeyParts, OneModel, dotted_role, magnitude_axis, suffix
from diffpeft.converters.formats.diffusers import peft_magnitude
from diffpeft.converters.formats.fields import (
    TYPES,
    Unsayable,
    dialect_of,
    fields,
    is_old_oft,
    layers_of,
    names_of,
    own_name,
)
from diffpeft.converters.formats.schema import Config, check_fields
from diffpeft.converters.formats.wrappers import PEFT as PREFIX
from diffpeft.errors import CheckpointError, CheckpointWarning, ConfigError, UnsafeFileError, listed, shown
from diffpeft.files import config_in
from diffpeft.methods.layout import LAYOUTS, PRODUCTS

WEIGHTS, FILE = "adapter_model.safetensors", "adapter_config.json"
CONFIG = "diffpeft.adapter_config"  # where a Bundle's metadata has the config
_HELD = {"lora_magnitude_vector"} | {
    role for layout in LAYOUTS.values() if layout.peft for form in layout.forms if form.peft for role in form.axes
} - {"dora_scale"}


class Peft(OneModel):
    """Dotted names without a component."""

    name, flat, folder, single, writable = "peft", False, True, True, True
    tables: Mapping[str, Table] = TABLES
    owned: frozenset[str] = frozenset({CONFIG})
    shared_keys: Mapping[str, str] = {
        role: f"base_model.{role}" for layout in LAYOUTS.values() for role in layout.shared
    }

    def split(self, key: str) -> KeyParts | None:
        """A PeftModel's prefix, the layer, the role."""
        named = dotted_role(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        return KeyParts("", attention.read(named[0]), named[1]) if named else None

    def join(self, part: KeyParts, entry: Entry) -> str:
        """The layer's name as the model has it."""
        return f"{PREFIX}{own_name(entry)}.{suffix(part.role, entry.method)}"

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        if CONFIG not in metadata:
            return attention.doubled(_unconfigured(entries))
        config = config_in(metadata[CONFIG], FILE)
        check_fields({"peft_type": config.get("peft_type")}, FILE)
        _check_type(config, entries)
        check_fields(config, FILE)
        try:
            with patterns.limited(UnsafeFileError, FILE):
                spoken = attention.spoken(entries)
                _check(config, spoken)
                configured = [dialect_of(entry.method).configured(entry, config) for entry in spoken]
                named = zip(configured, entries, strict=True)
                return attention.doubled([replace(c, layer=e.layer, keys=e.keys, own=e.own) for c, e in named])
        except KeyError as error:
            raise CheckpointError(f"{FILE} lacks the field {error}") from error
        except ConfigError as error:  # a pattern that is none
            raise CheckpointError(f"cannot read {FILE} ({error.what})") from error

    def holds(self, entries: Sequence[Entry]) -> Answer:
        try:
            self._fields(entries)
        except Unsayable as why:
            return Answer(why.why, why.layers)
        return Answer()

    def stored(self, entry: Entry) -> dict[str, Handle]:
        """The core of a one-dimensional convolution has one more axis here than in LyCORIS."""
        cores = {role for role, axes in LAYOUTS[entry.method].axes.items() if axes.endswith("*k1")}
        return {
            role: io.reshaped(h, (*h.shape, 1)) if role in cores and len(h.shape) == 3 else h
            for role, h in peft_magnitude(entry).items()
        }

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        return {}

    def metadata(self, entries: Sequence[Entry], before: Mapping[str, str]) -> dict[str, str]:
        """The config: the adapter's own where that still says the same."""
        if CONFIG in before and self._says(before[CONFIG], entries):
            return {CONFIG: before[CONFIG]}
        config = {"base_model_name_or_path": None, "task_type": None, **self._fields(entries)}
        config |= {"target_modules": sorted({own_name(e) for e in attention.said(entries)})}
        return {CONFIG: json.dumps(config, indent=2, sort_keys=True)}

    def _says(self, config: str, entries: Sequence[Entry]) -> bool:
        """Whether a config gives these entries the alphas and options that they have."""
        options = lambda e: {k: v for k, v in e.options.items() if v is not None}  # noqa: E731
        alpha = lambda e: math.nan if (a := io.number(e.alpha)) is None else a  # noqa: E731
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = self.configured([replace(e, alpha=None, options={}) for e in entries], {CONFIG: config})
        except CheckpointError:
            return False
        return all(
            options(a) == options(b)
            and (a.alpha is b.alpha or math.isclose(alpha(a), alpha(b), rel_tol=1e-6))  # kohya's alphas are float32
            and all(a.tensors[role] is b.tensors[role] for role in a.tensors)
            for a, b in zip(again, entries, strict=True)
        )

    def _fields(self, entries: Sequence[Entry]) -> dict[str, object]:
        """The fields of a config with which PEFT makes these tensors. Raises Unsayable."""
        if trouble := next(self._troubles(entries), None):
            raise Unsayable(*trouble)
        return fields(attention.said(entries))

    def _troubles(self, entries: Sequence[Entry]) -> Iterator[tuple[str, list[str]]]:
        """Why a folder cannot hold entries, and the layers that are to blame."""
        if not entries:
            yield "there is no adapter", []
        if len(components := {parted(e.layer)[0] for e in entries}) > 1:
            yield f"a folder holds one component, not {' and '.join(sorted(components))}", layers_of(entries)
        if nested := [e for e in entries if len(e.methods) > 1]:
            yield f"PEFT has no {' over '.join(sorted(nested[0].methods))}", layers_of(nested)
        yield from self._unheld(entries)
        if len(methods := Counter(e.method for e in entries)) > 1:
            fewest = min(sorted(methods), key=methods.__getitem__)
            yield f"a folder holds one method, not {' and '.join(sorted(methods))}", layers_of(entries, fewest)
        for trouble in (attention.troubles(entries), configs.unsayable(entries)):
            if trouble:
                yield trouble

    def _unheld(self, entries: Sequence[Entry]) -> Iterator[tuple[str, list[str]]]:
        """The tensors that PEFT does not have."""
        if inputs := [e.layer for e in entries if magnitude_axis(e) == 1]:
            yield "PEFT's DoRA has a magnitude for each output, not for each input", inputs
        unknown = {e.layer: {*self.stored(e)} - _HELD for e in entries}
        if roles := sorted(set().union(*unknown.values())):
            what = " (PEFT turns inputs, LyCORIS and sd-scripts outputs)" if "oft_blocks" in roles else ""
            yield f"PEFT has no {' and '.join(roles)}{what}", [layer for layer, extra in unknown.items() if extra]


# Reading


def _check_type(config: Config, entries: Sequence[Entry]) -> None:
    """Raise for a config of another method than the tensors'."""
    kind = config.get("peft_type")
    old = [e for e in entries if is_old_oft(e)] if kind == "OFT" else []
    if old and config.get("block_share"):
        raise CheckpointError(
            f"{FILE} says block_share, of PEFT before 0.16",
            remedy="Save it with block_share=False, or as another method.",
        )
    others = [e for e in entries if TYPES.get(e.method) != kind and e not in old]
    if others or kind not in TYPES.values():
        methods = sorted({e.method for e in others})
        raise CheckpointError(
            f"{FILE} says {shown(kind)}, the tensors {' and '.join(methods) or 'something else'}",
            where=listed(layers_of(others), 3),
            remedy=f"Supported: {', '.join(dict.fromkeys(TYPES.values()))}.",
        )


def _check(config: Config, entries: Sequence[Entry]) -> None:
    """Raise for a config that says something else than the tensors, or that names code."""
    if config.get("megatron_core") not in (None, "megatron.core"):
        raise UnsafeFileError(
            f"{FILE} names code to import, {shown(config['megatron_core'])}", remedy="Remove the field if you trust it."
        )
    wrong = {
        e.layer: why
        for e in entries
        if (why := dialect_of("oft" if is_old_oft(e) else e.method).disagreement(e, config))
    }
    if wrong:
        raise CheckpointError(
            f"{FILE} disagrees with the tensors of {len(wrong)} layers: {next(iter(wrong.values()))}",
            where=listed(wrong, 3),
        )
    _check_targets(config.get("target_modules"), entries)


def _check_targets(targets: object, entries: Sequence[Entry]) -> None:
    """The tensors decide which layers are adapted. A target without tensors is refused, tensors that are no target are named in a warning."""
    names = {e.layer: names_of(e) for e in entries}
    if isinstance(targets, str) and targets != "all-linear":
        outside = [
            layer for layer, spellings in names.items() if not any(patterns.fullmatch(targets, n) for n in spellings)
        ]
    elif isinstance(targets, list):
        ends = {
            layer: {end for name in spellings for end in patterns.name_ends(name)} for layer, spellings in names.items()
        }
        without = sorted({*targets} - set().union(*ends.values()))
        if without:
            raise CheckpointError(f"{FILE} names target_modules without tensors: {listed(without, 5)}")
        outside = [layer for layer, spellings in ends.items() if spellings.isdisjoint(targets)]
    else:
        outside = []
    if outside:
        warnings.warn(
            f"{len(outside)} adapted layers are not among target_modules: {listed(outside, 5)}",
            CheckpointWarning,
            stacklevel=2,
        )


def _unconfigured(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of a file that has no config beside it. Without an alpha a scale is 1; a rotation or AdaLoRA cannot be told from its tensors."""
    others = [e for e in entries if e.method not in PRODUCTS]
    if others:
        raise CheckpointError(
            f"these are PEFT's names, and there is no {FILE} that says how {' and '.join(sorted({e.method for e in others}))} is meant",
            where=listed([e.layer for e in others], 3),
            remedy=f"Pass the folder with {WEIGHTS} and {FILE}.",
        )
    return list(entries)
