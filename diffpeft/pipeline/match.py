"""The entries of a Bundle and the layers of a model brought together: all checks of a load, and the slots that pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical, dotted, parted
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
from diffpeft.layers.slot import BIAS, Piece, Slot
from diffpeft.methods import METHODS, Spec
from diffpeft.model.target import spellings

WRAPPED = "base_model.model."  # what a PeftModel's keys begin with
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
    lost = [e for e, place in places if place is None and parted(e.layer)[0] in parts]
    absent = [e for e, place in places if place is None and parted(e.layer)[0] not in parts]
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
    _check_shapes(bundle, found, layers)
    tensors = iter(io.load(h for e, _ in found for h in e.tensors.values()))
    pieces: dict[tuple[str, str], list[tuple[Piece, Mapping[str, Tensor]]]] = {}
    for entry, place in found:
        module = layers[place[0]][place[1]][0]
        pieces.setdefault(place, []).append(
            _piece(bundle, entry, module, {r: next(tensors) for r in entry.tensors}, trainable)
        )
    slots: dict[str, dict[str, Slot]] = {component: {} for component in parts}
    for (component, layer), own in pieces.items():
        module = layers[component][layer][0]
        beside = {role: t for _, extra in own for role, t in extra.items()}
        slot = Slot([piece for piece, _ in own], beside, trainable=trainable)
        slots[component][layer] = slot.to(device_of(module)).train(module.training)
    return slots, absent + lost


def _refuse_base_keys(bundle: Bundle, parts: Mapping[str, nn.Module]) -> None:
    """A key that names a parameter of the base must never reach it."""
    own = {
        name
        for component, model in parts.items()
        for key in model.state_dict(keep_vars=True)
        for spelt in spellings(key)
        for name in (spelt, dotted(component, spelt), f"{WRAPPED}{spelt}")
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
    wrong: list[str] = []
    refused: list[str] = []
    taken: set[tuple[tuple[str, str], str]] = set()
    for entry, place in found:
        module, parent = layers[place[0]][place[1]]
        spec = _spec(entry, module)
        own = {role: h for role, h in entry.tensors.items() if role != BIAS}
        if why := METHODS[entry.method].check(own, spec):
            wrong.append(f"{entry.layer}: {why}")
        if BIAS in entry.tensors and entry.tensors[BIAS].shape != (spec.geometry.out,):
            wrong.append(
                f"{entry.layer}: {BIAS} {entry.tensors[BIAS].shape}, the layer has {spec.geometry.out} outputs"
            )
        if why := refusal(module, parent, place[1]):
            refused.append(f"{entry.layer}: {why}")
        twice = {(place, role) for role in entry.tensors} & taken
        taken |= {(place, role) for role in entry.tensors}
        if twice:
            raise CheckpointError("two adapters are on the same layer", where=f"{bundle.source}: {shown(entry.layer)}")
    if wrong:
        raise ShapeMismatchError(
            f"{len(wrong)} of {len(found)} layers have other shapes",
            where=f"{bundle.source}: {wrong[0]}",
            remedy="It is for another model.",
        )
    if refused:
        raise AdapterStateError(f"{len(refused)} layers cannot be adapted", where=refused[0])


def _spec(entry: Entry, module: nn.Module) -> Spec:
    site = site_of(base_class(module))
    assert site is not None
    return Spec(site.geometry_of(module), io.number(entry.alpha), entry.options)


def _piece(
    bundle: Bundle, entry: Entry, module: Any, tensors: dict[str, Tensor], trainable: bool
) -> tuple[Piece, Mapping[str, Tensor]]:
    """One method for one layer, checked for what is not finite, and what else its entry holds."""
    limit = torch.finfo(module.weight.dtype if module.weight.is_floating_point() else torch.float16).max
    numbers = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    if not all(t.abs().max().item() <= limit for t in numbers):  # NaN compares false
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has values that are not finite in {module.weight.dtype}",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    if trainable:
        # a copy: training must not reach what was passed in
        tensors = {
            role: t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for role, t in tensors.items()
        }
    beside = {role: tensors.pop(role) for role in (BIAS,) if role in tensors}
    method, spec = METHODS[entry.method], _spec(entry, module)
    p = method.adopt(tensors, spec)
    alpha = kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha
    if spec.alpha is not None and not abs(spec.alpha) < float("inf"):
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has an alpha that is not finite",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    return Piece(entry.method, p, alpha, spec), beside


def kept(handle: Handle) -> Handle:
    """The tensor in memory: its file may go away."""
    return io.handle(io.load([handle])[0])
