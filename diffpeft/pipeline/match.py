"""The entries of a Bundle and the layers of a model brought together: all checks of a load, and the slots that pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

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
from diffpeft.layers.carried import base_class
from diffpeft.layers.hooks import computing_dtype, device_of, refusal
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import BIAS, Piece, Slot
from diffpeft.methods import METHODS, Spec
from diffpeft.methods.config import FP32_MAX
from diffpeft.methods.fit import too_small
from diffpeft.methods.linalg import is_finite
from diffpeft.model.banks import share
from diffpeft.model.room import padded
from diffpeft.model.target import spellings, unseen

WRAPPED = "base_model.model."  # what a PeftModel's keys begin with
HandleOrNumber = TypeVar("HandleOrNumber", Handle, Handle | float | None)  # a tensor, an alpha
LayersByComponent = Mapping[
    str, Mapping[str, tuple[nn.Module, nn.Module | None]]
]  # {component: {layer: (module, its parent)}}
LayerPlace = tuple[str, str]  # a component and the name of a layer in it
Slots = dict[str, dict[str, Slot]]  # {component: {layer: its slot}}
Made = list[
    tuple[Piece, Mapping[str, Tensor]]
]  # what one layer gets: methods, each with the tensors that lie beside it


def matched(
    bundle: Bundle,
    parts: Mapping[str, nn.Module],
    layers: LayersByComponent,
    *,
    strict: bool,
    trainable: bool,
    max_rank: int | None = None,
) -> tuple[Slots, list[Entry]]:
    """Slots by component and layer, and the entries for components or (strict=False) layers that are not there. Raises if any is unfit.

    With `max_rank` the LoRAs' parameters have room for that rank.
    """
    refuse_base_keys(bundle, parts)
    placed, absent = _placed(bundle, parts, layers, strict)
    specs = _checked(bundle, placed, parts, layers)
    slots: Slots = {component: {} for component in parts}
    for (component, layer), made in _pieces(bundle, placed, specs, layers, trainable).items():
        where = "" if max_rank is None else f"{bundle.source}: {dotted(component, layer)}"
        slots[component][layer] = _slot(made, layers[component][layer][0], trainable, max_rank, where)
    for component, by_layer in slots.items():
        in_order = {layer: by_layer[layer] for layer in layers[component] if layer in by_layer} if by_layer else {}
        _share(in_order, [entry for entry, place in placed if place[0] == component], bundle.source)
    return slots, absent


def _share(slots: Mapping[str, Slot], entries: Sequence[Entry], source: str) -> None:
    """Give the slots of one component what its entries share, or what the method makes for them where their file leaves it out."""
    shared = next((entry.shared for entry in entries if entry.shared), {})
    tensors = dict(zip(shared, io.load(shared.values()), strict=True))
    if not all(map(is_finite, tensors.values())):
        raise NonFiniteError(
            "what the layers share has values that are not finite", where=source, remedy="The file is damaged."
        )
    share(slots, tensors)


def owners_of(layers: LayersByComponent) -> dict[str, LayerPlace]:
    """{name: where it is} of all names that a model's layers go by."""
    return {
        name: (component, layer)
        for component, by_layer in layers.items()
        for layer in by_layer
        for spelt in spellings(layer, component)
        for name in (canonical(component, layer), dotted(component, spelt))
    }


def _placed(
    bundle: Bundle, parts: Mapping[str, nn.Module], layers: LayersByComponent, strict: bool
) -> tuple[list[tuple[Entry, LayerPlace]], list[Entry]]:
    """Each entry with the layer that it is for, and the entries whose component or layer is not there.

    Raises UnknownKeysError if a component that is there lacks a layer (strict), or if no entry has a place.
    """
    owners = owners_of(layers)
    placed = [(entry, owners[entry.layer]) for entry in bundle.entries if entry.layer in owners]
    absent: list[Entry] = []  # of components that are not there
    unknown: list[Entry] = []  # of components that are there
    for entry in bundle.entries:
        if entry.layer not in owners:
            (unknown if parted(entry.layer)[0] in parts else absent).append(entry)
    if unknown and strict:
        raise UnknownKeysError(
            f"the model has no layer for {len(unknown)} of {len(bundle.entries)} adapted layers",
            where=f"{bundle.source}: {listed([e.layer for e in unknown])}",
            remedy=f"{near(unknown[0].layer, owners)} It is for another model, or pass strict=False to load the rest.".strip(),
        )
    if not placed:
        raise UnknownKeysError(
            "no tensor of this adapter fits the model",
            where=f"{bundle.source}: {listed([*(e.layer for e in bundle.entries), *bundle.carried])}",
        )
    return placed, absent + unknown


def _pieces(
    bundle: Bundle,
    placed: Sequence[tuple[Entry, LayerPlace]],
    specs: Sequence[Spec],
    layers: LayersByComponent,
    trainable: bool,
) -> dict[LayerPlace, Made]:
    """What each layer gets, read from the file in one go."""
    tensors = iter(io.load(handle for entry, _ in placed for handle in entry.tensors.values()))
    pieces: dict[LayerPlace, Made] = {}
    for (entry, (component, layer)), spec in zip(placed, specs, strict=True):
        by_role = {role: next(tensors) for role in entry.tensors}
        module = layers[component][layer][0]
        pieces.setdefault((component, layer), []).append(_piece(bundle, entry, module, spec, by_role, trainable))
    return pieces


def _slot(made: Made, module: nn.Module, trainable: bool, max_rank: int | None, where: str) -> Slot:
    """The slot of a layer, on the layer's device and in its mode; with `max_rank` it remembers what the file holds."""
    pieces = [piece for piece, _ in made]
    beside = {role: t for _, by_role in made for role, t in by_role.items()}
    room = pieces if max_rank is None else [padded(piece, max_rank, where) for piece in pieces]
    slot = Slot(room, beside, trainable=trainable)
    slot.source = None if max_rank is None else tuple(pieces)
    device = device_of(module)
    for table in (slot._parameters, slot._buffers):
        for tensor in table.values():
            if tensor is not None and tensor.device != device:
                slot.to(device)
    slot.__dict__["training"] = module.training
    return slot


def refuse_base_keys(bundle: Bundle, parts: Mapping[str, nn.Module]) -> None:
    """A key that names a parameter of the base must never reach it."""
    parameters = {
        name
        for component, model in (parts if bundle.carried else {}).items()
        for key in model.state_dict(keep_vars=True)
        for spelt in spellings(key, component)
        for name in (spelt, dotted(component, spelt), f"{WRAPPED}{spelt}")
    }
    bad = [key for key in bundle.carried if key in parameters or ".base_layer." in key]
    bad += [entry.layer for entry in bundle.entries if "base_layer" in entry.layer.split(".")]
    if bad:
        raise UnknownKeysError(
            "the file holds weights of the base model, not only an adapter",
            where=f"{bundle.source}: {listed(bad)}",
            remedy="Load a whole model with -m or from_pretrained.",
        )


def _checked(
    bundle: Bundle,
    placed: Sequence[tuple[Entry, LayerPlace]],
    parts: Mapping[str, nn.Module],
    layers: LayersByComponent,
) -> list[Spec]:
    """What each entry's method must know beside its tensors. Raises if one does not fit its layer."""
    _refuse_two(bundle, placed)
    modules = [layers[component][layer] for _, (component, layer) in placed]
    specs = [spec_of(entry, module) for (entry, _), (module, _) in zip(placed, modules, strict=True)]
    wrong: list[str] = []
    for (entry, _), spec in zip(placed, specs, strict=True):
        wrong += misfits(bundle, entry, spec)
    if wrong:
        raise ShapeMismatchError(
            f"size mismatch in {len(wrong)} of {len(placed)} layers: {wrong[0]}",
            where=bundle.source,
            remedy="It is for another model.",
        )
    refused = [
        f"{entry.layer}: {why}"
        for (entry, (component, layer)), (module, parent) in zip(placed, modules, strict=True)
        if (why := refusal(module, parent, layer) or unseen(parts[component], layer))
    ]
    if refused:
        raise AdapterStateError(f"{len(refused)} layers cannot be adapted", where=refused[0])
    return specs


def _refuse_two(bundle: Bundle, placed: Sequence[tuple[Entry, LayerPlace]]) -> None:
    """Raise CheckpointError for tensors of the same role for the same layer."""
    taken: set[tuple[LayerPlace, str]] = set()
    for entry, place in placed:
        roles = {(place, role) for role in entry.tensors}
        if taken & roles:
            raise CheckpointError("two adapters are on the same layer", where=f"{bundle.source}: {shown(entry.layer)}")
        taken |= roles


def misfits(bundle: Bundle, entry: Entry, spec: Spec) -> list[str]:
    """In what an entry's tensors do not fit its layer, in words. Raises ShapeMismatchError for a control LoRA."""
    factors = {role: handle for role, handle in entry.tensors.items() if role != BIAS}
    why = METHODS[entry.method].check(factors, spec) or _unshared(entry, spec)
    wrong = [why] if why else []
    if wrong and (control := _control(entry, spec)):
        raise ShapeMismatchError(
            f"this is a control LoRA: {control}",
            where=bundle.source,
            remedy="It is for a model that was widened for it (in_channels of its transformer), as diffusers does for FluxControlPipeline.",
        )
    if BIAS in entry.tensors and entry.tensors[BIAS].shape != (spec.geometry.out,):
        wrong.append(f"{BIAS} {entry.tensors[BIAS].shape}, the layer has {spec.geometry.out} outputs")
    return [f"{entry.layer}: {why}" for why in wrong]


def _unshared(entry: Entry, spec: Spec) -> str:
    """Why what an entry shares with others is not enough for its layer; empty if it is, or is made for it."""
    shapes = {role: handle.shape for role, handle in entry.shared.items()}
    return too_small(entry.method, shapes, entry.shapes, spec.geometry.layer) if shapes else ""


def _control(entry: Entry, spec: Spec) -> str:
    """Where an adapter of a model's first layer is for several times its channels (the picture's and a control's), in words; else nothing."""
    inputs = spec.geometry.in_
    channels = entry.tensors["lora_A"].shape[1] if "lora_A" in entry.tensors else inputs
    if parted(entry.layer)[1] not in _INPUTS or channels == inputs or channels % inputs:
        return ""
    return f"{shown(entry.layer)} takes {channels} channels, the model's {inputs}"


# the layers that take a model's channels
_INPUTS = (
    "x_embedder",
    "x_embedder.proj",
    "img_in",
    "proj_in",
    "pos_embed.proj",
    "patch_embed.proj",
    "patch_embedding",
    "conv_in",
)


def spec_of(entry: Entry, module: nn.Module) -> Spec:
    site = site_of(base_class(module))
    assert site is not None
    return Spec(site.geometry_of(module), io.number(entry.alpha), entry.options)


def _piece(
    bundle: Bundle, entry: Entry, module: nn.Module, spec: Spec, tensors: dict[str, Tensor], trainable: bool
) -> tuple[Piece, Mapping[str, Tensor]]:
    """One method for one layer, checked for what is not finite, and what else its entry holds."""
    dtype = computing_dtype(module)
    _refuse_infinite(bundle, entry, spec, tensors, dtype)
    if trainable:
        # a copy: training must not reach what was passed in
        tensors = {
            role: t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for role, t in tensors.items()
        }
    beside = {role: tensors.pop(role) for role in (BIAS,) if role in tensors}
    p = METHODS[entry.method].adopt(tensors, spec)
    return Piece(entry.method, p, in_memory(entry.alpha), spec), beside


def _refuse_infinite(
    bundle: Bundle, entry: Entry, spec: Spec, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Raise NonFiniteError for numbers that are not finite in the layer's dtype, or an alpha that is not."""
    limit = _MAX[dtype]
    wrong = ""
    if not all(_holds(limit, t) for t in tensors.values()):
        wrong = f"values that are not finite in {dtype}"
    elif spec.alpha is not None and not abs(spec.alpha) <= FP32_MAX:
        wrong = "an alpha that is not finite"
    if wrong:
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has {wrong}", where=bundle.source, remedy="The file is damaged."
        )


_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def _holds(limit: float, t: Tensor) -> bool:
    """Whether no number of a tensor is larger than the limit, or is none."""
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = torch.aminmax(t)
    return -low.item() <= limit and high.item() <= limit  # nor NaN


def in_memory(number: HandleOrNumber) -> HandleOrNumber:
    """A handle whose tensor is in memory, because its file may go away; a plain number as it is."""
    return io.handle(io.load([number])[0]) if isinstance(number, Handle) else number
