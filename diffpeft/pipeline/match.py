"""The entries of a Bundle and the layers of a model brought together: all checks of a load, and the slots that pass them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical, dotted
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    listed,
    near,
    shown,
)
from diffpeft.layers.adapted import base_class
from diffpeft.layers.site import device_of, refusal, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods import METHODS
from diffpeft.model.target import spellings

Layers = Mapping[str, Mapping[str, tuple[nn.Module, nn.Module | None]]]  # {component: {layer: (module, its parent)}}


def matched(
    bundle: Bundle,
    parts: Mapping[str, nn.Module],
    layers: Layers,
    *,
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
        for name in (canonical(component, layer), dotted(component, spelt))
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


def _check_shapes(bundle: Bundle, found: Sequence[tuple[Entry, tuple[str, str]]], layers: Layers) -> None:
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
        # a copy: training must not reach what was passed in
        tensors = {role: t.detach().to(torch.float32, copy=True) for role, t in tensors.items()}
    p = METHODS[entry.method].adopt(tensors, site.geometry(module))
    alpha = kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha
    slot = Slot(entry.method, p, alpha, trainable=trainable)
    if not abs(slot.scale) < float("inf"):
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has an alpha that is not finite",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    return slot.to(device_of(module)).train(module.training)


def kept(handle: Handle) -> Handle:
    """The tensor in memory: its file may go away."""
    return io.handle(io.load([handle])[0])
