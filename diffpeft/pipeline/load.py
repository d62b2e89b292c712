"""load_lora and save_lora: from a file onto a pipeline and back. All checks first, then a commit that cannot fail."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import converters
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    WrongBaseError,
    listed,
    near,
    shown,
)
from diffpeft.families import family_of
from diffpeft.layers.adapted import base_class
from diffpeft.layers.site import device_of, refusal, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods import METHODS
from diffpeft.model.attach import OVERSIZED, Plan, install, mixes_of, oversized
from diffpeft.model.mix import Adapter, check_mix, check_name, check_strength
from diffpeft.model.state import bundle_of
from diffpeft.model.target import components, layers_of, spellings
from diffpeft.pipeline.locate import located


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `matched` are the layers adapted, `carried` the keys that were kept but not applied."""

    name: str
    format: str
    family: str
    methods: frozenset[str]
    matched: tuple[str, ...]
    carried: tuple[str, ...]
    trigger_words: tuple[str, ...]


def load_lora(
    target: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Bundle,
    *,
    name: str | None = None,
    weight: float = 1.0,
    strict: bool = True,
    trainable: bool = False,
    family: str | None = None,
    revision: str | None = None,
    filename: str | None = None,
) -> LoadReport:
    """Load an adapter onto a pipeline (or one of its models) and activate it at strength `weight`, after those already active.

    Args:
        source: a .safetensors file, a folder with one, a dict of tensors, a Bundle, or a Hub id (`revision`, `filename`).
        name: default: the file's name without its ending.
        strict: False carries an adapter's tensors for layers that the model lacks, with a warning, instead of refusing the file.
        trainable: the tensors get gradients, and are float32.
        family: overrides the detected family.

    Raises CheckpointError and its kin, UnknownNameError, ConfigError or AdapterStateError, in which case nothing has changed.
    """
    name = _default_name(source) if name is None else name
    check_name(name)
    check_strength(name, weight)
    parts = components(target)
    mixes = mixes_of(parts)
    if any(name in mix.adapters for mix in mixes.values()):
        raise AdapterStateError(
            f"an adapter named {shown(name)} is loaded already", remedy="Choose another name=, or unload it first."
        )
    layers = {component: layers_of(model) for component, model in parts.items()}
    own = family or family_of(target)
    bundle = (
        source
        if isinstance(source, Bundle)
        else _read(located(source, revision, filename), own, family, {c: list(found) for c, found in layers.items()})
    )
    _check_family(bundle.families or (bundle.family,), own, bundle.source)
    slots, absent = _match(bundle, parts, layers, strict, trainable)
    carried = {key: _kept(h) for key, h in bundle.carried.items()}
    plan, first = Plan(), True
    for component, found in slots.items():
        if found:
            adapter = Adapter(
                name,
                tuple(found),
                bundle.metadata if first else {},
                carried if first else {},
                tuple(map(_entry_kept, absent)) if first else (),
            )
            install(
                plan,
                component,
                {layer: layers[component][layer][0] for layer in found},
                found,
                mixes.get(component),
                adapter,
                weight,
            )
            first = False
    check_mix({name: weight}, [_preview(mix, new) for mix, new in plan.mixes])
    report = LoadReport(
        name,
        bundle.format,
        bundle.family,
        frozenset(bundle.methods),
        tuple(_names(slots)),
        (*carried, *(key for e in absent for key in e.keys or (e.layer,))),
        bundle.trigger_words,
    )
    idle = [entry.layer for entry in bundle.entries if io.number(entry.alpha) == 0]
    large = [
        layer
        for component, found in slots.items()
        for layer in oversized({n: layers[component][n][0] for n in found}, found)
    ]
    for what, names in (
        ("tensors are kept but have no effect here", report.carried),
        ("layers have alpha 0 and no effect", idle),
        (OVERSIZED, large),
    ):
        if names:  # said before the commit: a warning may be an error
            warnings.warn(f"adapter {name!r}: {len(names)} {what}: {listed(names[:5])}", stacklevel=2)
    plan.commit()
    return report


def save_lora(
    target: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: str = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter to `path` (.safetensors), whole or not at all.

    Args:
        name: may be left out if there is only one.
        format: one of converters.FORMATS.
        dtype: of the factors; default: as they are stored.
        metadata: added to what the adapter's own file held.
    """
    if name is None:
        known = {n for mix in mixes_of(components(target)).values() for n in mix.adapters}
        if len(known) != 1:
            raise ConfigError(
                f"there are {len(known)} adapters",
                remedy=f"Say name=, one of {', '.join(sorted(known))}." if known else "Load or attach one first.",
            )
        name = known.pop()
    bundle = bundle_of(target, name, family_of(target) or next(iter(converters.TABLES)))
    bundle.metadata |= {str(k): str(v) for k, v in (metadata or {}).items()}
    converters.write(bundle, path, format=format, dtype=dtype)


def _default_name(source: Any) -> str:
    if not isinstance(source, (str, os.PathLike)):
        return "default"
    stem = Path(source).name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:128] or "default"


def _read(source: Any, own: str | None, family: str | None, names: Mapping[str, Sequence[str]]) -> Bundle:
    """The Bundle behind a file or dict. The family comes first: in a file for another one no key is worth a complaint."""
    if family is None:
        found = converters.detect(source)
        _check_family(
            (found.family, *found.alternatives), own, "a dict of tensors" if isinstance(source, Mapping) else source
        )
    return converters.read(source, family=family, names=names)


def _check_family(fits: Sequence[str], own: str | None, where: object) -> None:
    if own is not None and own not in fits:
        them = " or ".join(filter(None, fits)) or "an unknown family"
        raise WrongBaseError(
            f"the adapter is for {them}, this pipeline is {own}", where=where, remedy=f"Use a pipeline of {them}."
        )


def _match(
    bundle: Bundle,
    parts: Mapping[str, nn.Module],
    layers: Mapping[str, Mapping[str, Any]],
    strict: bool,
    trainable: bool,
) -> tuple[dict[str, dict[str, Slot]], list[Entry]]:
    """Slots by component and layer, and the entries for components or (strict=False) layers that are not there. Raises if any is unfit."""
    _refuse_base_keys(bundle, parts)
    owners = {
        name: (component, layer)
        for component, found in layers.items()
        for layer in found
        for spelt in spellings(layer)
        for name in (canonical(component, layer), f"{component}.{spelt}" if component else spelt)
    }
    places = [(entry, owners.get(entry.layer)) for entry in bundle.entries]
    lost = [e for e, place in places if place is None and e.layer.partition(".")[0] in parts]
    absent = [e for e, place in places if place is None and e.layer.partition(".")[0] not in parts]
    if lost and strict:
        raise UnknownKeysError(
            f"the model has no layer for {len(lost)} of {len(places)} adapted layers",
            where=f"{bundle.source}: {listed([e.layer for e in lost])}",
            remedy=f"{near(lost[0].layer, owners)} It is for another model, or pass strict=False to load the rest.".strip(),
        )
    found = [(e, place) for e, place in places if place is not None]
    if not found:
        raise UnknownKeysError(
            "no tensor of this adapter fits the model",
            where=f"{bundle.source}: {listed([*(e.layer for e in bundle.entries), *bundle.carried])}",
        )
    counts = Counter(place for _, place in found)
    twice = [e.layer for e, place in found if counts[place] > 1]
    if twice:
        raise CheckpointError("two adapters are on the same layer", where=f"{bundle.source}: {listed(twice)}")
    _check_shapes(bundle, found, layers)
    tensors = iter(io.load(h for e, _ in found for h in e.tensors.values()))
    slots: dict[str, dict[str, Slot]] = {component: {} for component in parts}
    for entry, (component, layer) in found:
        slots[component][layer] = _slot(
            bundle, entry, layers[component][layer][0], {role: next(tensors) for role in entry.tensors}, trainable
        )
    return slots, absent + lost


def _refuse_base_keys(bundle: Bundle, parts: Mapping[str, nn.Module]) -> None:
    """A key that names a parameter of the base must never reach it."""
    own = {
        name
        for component, model in parts.items()
        for key in model.state_dict(keep_vars=True)
        for spelt in spellings(key)
        for name in (spelt, f"{component}.{spelt}")
    }
    bad = [key for key in bundle.carried if key in own or ".base_layer." in key] + [
        e.layer for e in bundle.entries if "base_layer" in e.layer.split(".")
    ]
    if bad:
        raise UnknownKeysError(
            "the file holds weights of the base model, not only an adapter",
            where=f"{bundle.source}: {listed(bad)}",
            remedy="Load a whole model with -m or from_pretrained.",
        )


def _check_shapes(
    bundle: Bundle, found: Sequence[tuple[Entry, tuple[str, str]]], layers: Mapping[str, Mapping[str, Any]]
) -> None:
    wrong, refused = [], []
    for entry, (component, layer) in found:
        module, parent = layers[component][layer]
        site = site_of(base_class(module))
        assert site is not None
        if why := METHODS[entry.method].check(entry.tensors, site.geometry(module)):
            wrong.append(f"{entry.layer}: {why}")
        if why := refusal(module, parent, layer):
            refused.append(f"{entry.layer}: {why}")
    if wrong:
        raise ShapeMismatchError(
            f"{len(wrong)} of {len(found)} layers have other shapes",
            where=f"{bundle.source}: {wrong[0]}",
            remedy="It is for another model.",
        )
    if refused:
        raise AdapterStateError(f"{len(refused)} layers cannot be adapted", where=refused[0])


def _slot(bundle: Bundle, entry: Entry, module: Any, tensors: dict[str, Tensor], trainable: bool) -> Slot:
    site, limit = site_of(base_class(module)), torch.finfo(module.weight.dtype).max
    assert site is not None
    if not all(t.numel() == 0 or t.abs().max().item() <= limit for t in tensors.values()):  # NaN compares false
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has values that are not finite in {module.weight.dtype}",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    if trainable:
        tensors = {
            role: t.detach().to(torch.float32, copy=True) for role, t in tensors.items()
        }  # training must not reach what was passed in
    p = METHODS[entry.method].adopt(tensors, site.geometry(module))
    alpha = _kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha
    slot = Slot(entry.method, p, alpha, trainable=trainable)
    if not abs(slot.scale) < float("inf"):
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has an alpha that is not finite",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    return slot.to(device_of(module)).train(module.training)


def _kept(handle: Handle) -> Handle:
    """The tensor in memory: its file may go away."""
    return io.handle(io.load([handle])[0])


def _entry_kept(entry: Entry) -> Entry:
    return replace(
        entry,
        tensors={role: _kept(h) for role, h in entry.tensors.items()},
        alpha=_kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha,
    )


def _names(slots: Mapping[str, Mapping[str, Slot]]) -> list[str]:
    return [f"{component}.{layer}" if component else layer for component, found in slots.items() for layer in found]


def _preview(mix: Any, new: Mapping[str, Any]) -> Any:
    return replace(mix, **new)
