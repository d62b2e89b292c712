"""An adapted model read back: the tensors of one adapter, as parameters to train or as a Bundle to write."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import MEMORY, Bundle, Entry, canonical
from diffpeft.errors import CannotConvertError, UnknownNameError, listed, shown
from diffpeft.layers.carried import ADAPTERS, COPIES, bare, escaped, is_adapted
from diffpeft.layers.hooks import present
from diffpeft.layers.slot import Piece, Slot, as_stored
from diffpeft.methods import METHODS, Spec
from diffpeft.methods.layout import DROPOUTS
from diffpeft.model.attach import mixes_of
from diffpeft.model.banks import shared_by
from diffpeft.model.plan import Plan
from diffpeft.model.target import FSDP_UNIT, adapted, components

TRAINING = DROPOUTS | {"adjusted", "rank_dropout_scale"}  # no part of what f is


def slots_of(target: object, name: str) -> dict[str, Slot]:
    """{canonical layer: slot} of one adapter, over all components."""
    return {
        canonical(component, layer): slot
        for component, model in components(target).items()
        for layer, slot in slots_in(model, name).items()
    }


def slots_in(model: nn.Module, name: str, plan: Plan | None = None) -> dict[str, Slot]:
    """{layer: slot} of one adapter on one module, as it is or as a plan will have it."""
    records = ((layer, plan.record_of(m) if plan else record) for layer, m, record in adapted(model))
    slots = {layer: record.slots[name] for layer, record in records if record is not None and name in record.slots}
    return {layer: getattr(slot, FSDP_UNIT, slot) for layer, slot in slots.items()}


def beside_slots(plan: Plan, model: nn.Module, where: str, name: str) -> nn.Module | None:
    """The copy or the patch that an adapter has, or will have, of the module of this name; None if there is none."""
    record = plan.record_of(model.get_submodule(where))
    return None if record is None else next(iter(record.beside(name)), None)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of a module without what it carries."""
    state: dict[str, Tensor] = bare(module).state_dict()
    return state


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict without what its adapters hold in it: the keys that it has without them, and its own tensors."""
    carrying = [name for name, module in model.named_modules(remove_duplicate=False) if is_adapted(module)]
    inside = tuple(f"{name}.{part}.".lstrip(".") for name in carrying for part in (ADAPTERS, COPIES))
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}


def whole_tensors(
    model: nn.Module, name: str, prefix: str, gathered: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of the modules that an adapter trains whole, and of those whose parameters it changes."""
    tensors: dict[str, Tensor] = {}
    for where, _, record in adapted(model):
        for module in record.beside(name, hidden=False):
            at = f"{where}.{COPIES}.{escaped(name)}."
            module = getattr(module, FSDP_UNIT, module)
            for key, tensor in module.state_dict().items():
                tensors[f"{prefix}{where}.{key}"] = (gathered or {}).get(at + key, tensor).detach()
    return tensors


def gathered_slot(layer: str, name: str, slot: Slot, gathered: Mapping[str, Tensor]) -> Slot:
    """A slot with those of its tensors, by their names in the model, that were gathered from shards."""
    return _with(slot, _gathered(layer, name, slot, gathered))


def _gathered(layer: str, name: str, slot: Slot, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{role: tensor} of those of a slot's tensors that were gathered from shards."""
    names = {role: f"{layer}.{ADAPTERS}.{escaped(name)}.{role}" for role in slot.tensors}
    return {role: gathered[key] for role, key in names.items() if key in gathered}


def _with(slot: Slot, tensors: Mapping[str, Tensor]) -> Slot:
    """A slot with other tensors, by role."""
    if not tensors:
        return slot
    other = copy.copy(slot)
    other.__dict__["_parameters"] = {
        role: nn.Parameter(tensors[role], requires_grad=False) if role in tensors else p
        for role, p in slot._parameters.items()
    }
    return other


def parameters_of(target: object, name: str) -> list[nn.Parameter]:
    """The trainable parameters of one adapter."""
    return [p for slot in slots_of(target, name).values() for p in slot.parameters() if p.requires_grad]


def trained_parameters(target: object, name: str) -> dict[str, nn.Parameter]:
    """{layer.role: parameter} of all that has gradients, over all components; an adapter's names are without the adapter's."""
    inside = f".{ADAPTERS}.{escaped(name)}."
    return {
        canonical(component, where.replace(inside, ".")): p
        for component, model in components(target).items()
        for where, p in model.named_parameters()
        if p.requires_grad
    }


def _tensors(slot: Slot) -> dict[str, Tensor]:
    """The slot's tensors by role; those that an offloading hook keeps elsewhere are fetched."""
    return present(slot, lambda: {role: p.detach() for role, p in slot.tensors.items()})


def bundle_of(target: object, name: str, family: str) -> Bundle:
    """The adapter as a Bundle: its tensors in their own dtype, and all that its file held beside them."""
    adapters = [mix.adapters[name] for mix in mixes_of(components(target)).values() if name in mix.adapters]
    if not adapters:
        raise UnknownNameError.of(
            "adapter", name, {n for mix in mixes_of(components(target)).values() for n in mix.adapters}
        )
    whole = [module for adapter in adapters for module in adapter.modules]
    if whole:
        raise CannotConvertError(
            f"adapter {shown(name)} trains more than layers",
            where=listed(whole, 5),
            remedy="Only a PEFT folder has a place for that: use PeftModel.save_pretrained.",
        )
    entries = []
    for component, model in components(target).items():
        slots = slots_in(model, name)
        shared = {role: io.handle(t.contiguous()) for role, t in shared_by(slots).items()}
        for layer, slot in slots.items():
            for entry in entries_of(canonical(component, layer), slot):
                used = shared if METHODS[entry.method].shared else {}
                entries.append(replace(entry, own=layer, shared=used))
    bundle = Bundle(MEMORY, family, entries, source=name)
    for adapter in adapters:
        bundle.entries += adapter.absent
        bundle.carried |= adapter.carried
        bundle.metadata |= adapter.metadata
    return bundle


def entries_of(layer: str, slot: Slot) -> list[Entry]:
    """What a slot holds, part by part; a change of the bias goes with the first, or is an entry of its own."""
    entries, tensors = [], _tensors(slot)
    for part in slot.parts:
        of_part = {role: tensors.pop(role) for role in part.roles}
        if slot.source is None:
            piece = as_stored(slot, Piece(part.method.name, of_part, part.alpha, part.spec))
            entries.append(_entry(layer, part.method, dict(piece.tensors), piece.alpha, piece.spec))
    for piece in slot.source or ():
        entries.append(_entry(layer, METHODS[piece.method], dict(piece.tensors), piece.alpha, piece.spec))
    if slot.source == ():
        return []
    beside = {role: io.handle(t) for role, t in tensors.items()}
    if beside:
        entries[:1] = [replace(e, tensors={**e.tensors, **beside}) for e in entries[:1] or [Entry("full", layer, {})]]
    return entries


def _entry(layer: str, method: Any, tensors: dict[str, Tensor], alpha: Any, spec: Spec) -> Entry:
    p, alpha = method.stored(tensors, alpha)
    options = {k: v for k, v in spec.options.items() if k not in TRAINING}
    return Entry(
        method.name, layer, {role: io.handle(t) for role, t in p.items()}, alpha, (), options, spec.geometry.shape
    )
