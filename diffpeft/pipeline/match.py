"""The entries of a Bundle and the layers of a model brought together: all checks of a load, and the slots that pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical, dotted, parted
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    listed,
    near,
    shown,
)
from diffpeft.layers.carried import base_class
from diffpeft.layers.site import computing_dtype, device_of, refusal, site_of
from diffpeft.layers.slot import BIAS, Piece, Slot
from diffpeft.methods import METHODS, Spec
from diffpeft.methods.config import FP32_MAX
from diffpeft.methods.fit import too_small
from diffpeft.methods.lora import Lora
from diffpeft.model.banks import share
from diffpeft.model.target import spellings

WRAPPED = "base_model.model."  # what a PeftModel's keys begin with
LORAS = ("lora", "dora")
Layers = Mapping[str, Mapping[str, tuple[nn.Module, nn.Module | None]]]  # {component: {layer: (module, its parent)}}


def matched(
    bundle: Bundle,
    parts: Mapping[str, nn.Module],
    layers: Layers,
    *,
    strict: bool,
    trainable: bool,
    max_rank: int | None = None,
) -> tuple[dict[str, dict[str, Slot]], list[Entry]]:
    """Slots by component and layer, and the entries for components or (strict=False) layers that are not there. Raises if any is unfit.

    With `max_rank` the LoRAs' parameters have room for that rank.
    """
    _refuse_base_keys(bundle, parts)
    owners = {
        name: (component, layer)
        for component, found in layers.items()
        for layer in found
        for spelt in spellings(layer, component)
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
    specs = _checked(bundle, found, layers)
    tensors = iter(io.load(h for e, _ in found for h in e.tensors.values()))
    pieces: dict[tuple[str, str], list[tuple[Piece, Mapping[str, Tensor]]]] = {}
    for (entry, place), spec in zip(found, specs, strict=True):
        module = layers[place[0]][place[1]][0]
        pieces.setdefault(place, []).append(
            _piece(bundle, entry, module, spec, {r: next(tensors) for r in entry.tensors}, trainable)
        )
    slots: dict[str, dict[str, Slot]] = {component: {} for component in parts}
    for (component, layer), own in pieces.items():
        module = layers[component][layer][0]
        beside = {role: t for _, extra in own for role, t in extra.items()}
        made = [piece for piece, _ in own]
        room = made
        if max_rank is not None:
            where = f"{bundle.source}: {dotted(component, layer)}"
            room = [padded(piece, max_rank, where) for piece in made]
        slot = slots[component][layer] = Slot(room, beside, trainable=trainable)
        slot.source = None if max_rank is None else tuple(made)
        device = device_of(module)
        if any(
            t.device != device for own_ in (slot._parameters, slot._buffers) for t in own_.values() if t is not None
        ):
            slot.to(device)
        slot.training = module.training
    for component, made_slots in slots.items():
        _share(made_slots, [entry for entry, place in found if place[0] == component], bundle.source)
    return slots, absent + lost


def _share(slots: Mapping[str, Slot], entries: Sequence[Entry], source: str) -> None:
    """Give the slots of one component what its entries share, or what the method makes for them where their file leaves it out."""
    shared = next((entry.shared for entry in entries if entry.shared), {})
    tensors = dict(zip(shared, io.load(shared.values()), strict=True))
    _refuse_nonfinite("what the layers share", tensors, torch.float32, source)
    share(slots, tensors)


def _refuse_base_keys(bundle: Bundle, parts: Mapping[str, nn.Module]) -> None:
    """A key that names a parameter of the base must never reach it."""
    own = {
        name
        for component, model in (parts if bundle.carried else {}).items()
        for key in model.state_dict(keep_vars=True)
        for spelt in spellings(key, component)
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


def _checked(bundle: Bundle, found: Sequence[tuple[Entry, tuple[str, str]]], layers: Layers) -> list[Spec]:
    """What each entry's method must know beside its tensors. Raises if one does not fit its layer."""
    specs: list[Spec] = []
    wrong: list[str] = []
    control: list[str] = []
    refused: list[str] = []
    taken: set[tuple[tuple[str, str], str]] = set()
    for entry, place in found:
        module, parent = layers[place[0]][place[1]]
        spec = _spec(entry, module)
        specs.append(spec)
        own = {role: h for role, h in entry.tensors.items() if role != BIAS}
        if why := METHODS[entry.method].check(own, spec) or _unshared(entry, spec):
            wrong.append(f"{entry.layer}: {why}")
            control += filter(None, [_control(entry, spec)])
        if BIAS in entry.tensors and entry.tensors[BIAS].shape != (spec.geometry.out,):
            wrong.append(
                f"{entry.layer}: {BIAS} {entry.tensors[BIAS].shape}, the layer has {spec.geometry.out} outputs"
            )
        if why := refusal(module, parent, place[1]):
            refused.append(f"{entry.layer}: {why}")
        if any((place, role) in taken for role in entry.tensors):
            raise CheckpointError("two adapters are on the same layer", where=f"{bundle.source}: {shown(entry.layer)}")
        taken.update((place, role) for role in entry.tensors)
    if control:
        raise ShapeMismatchError(
            f"this is a control LoRA: {control[0]}",
            where=bundle.source,
            remedy="It is for a model that was widened for it (in_channels of its transformer), as diffusers does for FluxControlPipeline.",
        )
    if wrong:
        raise ShapeMismatchError(
            f"{len(wrong)} of {len(found)} layers have other shapes",
            where=f"{bundle.source}: {wrong[0]}",
            remedy="It is for another model.",
        )
    if refused:
        raise AdapterStateError(f"{len(refused)} layers cannot be adapted", where=refused[0])
    return specs


def _unshared(entry: Entry, spec: Spec) -> str:
    """Why what an entry shares with others is not enough for its layer; empty if it is, or is made for it."""
    shapes = {role: handle.shape for role, handle in entry.shared.items()}
    return too_small(entry.method, shapes, entry.shapes, spec.geometry.layer) if shapes else ""


def _control(entry: Entry, spec: Spec) -> str:
    """Where an adapter of a model's first layer is for several times its channels (the picture's and a control's), in words; else nothing."""
    own = spec.geometry.in_
    channels = entry.tensors["lora_A"].shape[1] if "lora_A" in entry.tensors else own
    if parted(entry.layer)[1] not in _INPUTS or channels == own or channels % own:
        return ""
    return f"{shown(entry.layer)} takes {channels} channels, the model's {own}"


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


def _spec(entry: Entry, module: nn.Module) -> Spec:
    site = site_of(base_class(module))
    assert site is not None
    return Spec(site.geometry_of(module), io.number(entry.alpha), entry.options)


def _piece(
    bundle: Bundle, entry: Entry, module: Any, spec: Spec, tensors: dict[str, Tensor], trainable: bool
) -> tuple[Piece, Mapping[str, Tensor]]:
    """One method for one layer, checked for what is not finite, and what else its entry holds."""
    _refuse_nonfinite(f"layer {shown(entry.layer)}", tensors, computing_dtype(module), bundle.source)
    if trainable:
        # a copy: training must not reach what was passed in
        tensors = {
            role: t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for role, t in tensors.items()
        }
    beside = {role: tensors.pop(role) for role in (BIAS,) if role in tensors}
    p = METHODS[entry.method].adopt(tensors, spec)
    alpha = kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha
    if spec.alpha is not None and not abs(spec.alpha) <= FP32_MAX:
        raise NonFiniteError(
            f"layer {shown(entry.layer)} has an alpha that is not finite",
            where=bundle.source,
            remedy="The file is damaged.",
        )
    return Piece(entry.method, p, alpha, spec), beside


def _refuse_nonfinite(what: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Raise NonFiniteError for numbers that a dtype cannot hold."""
    limit = torch.finfo(dtype).max
    numbers = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    if not all(
        -low.item() <= limit and high.item() <= limit for low, high in map(torch.aminmax, numbers)
    ):  # NaN compares false
        raise NonFiniteError(
            f"{what} has values that are not finite in {dtype}", where=source, remedy="The file is damaged."
        )


def padded(piece: Piece, rank: int, where: str) -> Piece:
    """A LoRA with room for a rank. Raises ShapeMismatchError for one of a higher rank, ConfigError for another method."""
    if piece.method not in LORAS or "lora_A" not in piece.tensors or "lora_mid" in piece.tensors:
        raise ConfigError(f"max_rank is for LoRA and DoRA, this is {piece.method}", where=where)
    scale = Lora.scale(piece.tensors, piece.spec)
    tensors = fitted(piece.tensors, rank, scale, scale, where)
    return replace(piece, tensors=tensors, alpha=scale * rank, spec=replace(piece.spec, alpha=scale * rank))


def fitted(tensors: Mapping[str, Tensor], rank: int, scale: float, to: float, where: str) -> dict[str, Tensor]:
    """A LoRA's tensors with zeros up to a rank, its scale turned into another one. Raises ShapeMismatchError if that cannot be."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    room = rank - A.shape[0]
    if room < 0:
        raise ShapeMismatchError(
            f"rank {A.shape[0]} is above {rank}", where=where, remedy="Load the first adapter with a higher max_rank=."
        )
    if scale != to and not to:
        raise ShapeMismatchError(
            "the first adapter has scale 0", where=where, remedy="Unload it, and load the new one."
        )
    if scale != to:
        B = (B.double() * (scale / to)).to(B.dtype)
    A = torch.cat([A, A.new_zeros(room, *A.shape[1:])])
    B = torch.cat([B, B.new_zeros(B.shape[0], room, *B.shape[2:])], 1)
    return {**tensors, "lora_A": A, "lora_B": B}


def kept(handle: Handle) -> Handle:
    """The tensor in memory: its file may go away."""
    return io.handle(io.load([handle])[0])
