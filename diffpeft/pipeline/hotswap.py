"""replace: another adapter into the tensors of one that is there. Nothing else changes, so that compiled models stay compiled."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import Bundle, dotted
from diffpeft.converters.locating import Where
from diffpeft.errors import AdapterStateError, ShapeMismatchError, UnknownNameError, listed, shown
from diffpeft.layers.slot import Part, Slot, pieces_of
from diffpeft.methods.layout import OFF
from diffpeft.methods.lora import Lora
from diffpeft.model.attach import mixes_of
from diffpeft.model.mix import Adapter, Mix
from diffpeft.model.plan import Plan, planned
from diffpeft.model.room import LORAS, fitted
from diffpeft.model.state import slots_in
from diffpeft.model.target import components, layers_of
from diffpeft.pipeline.load import Hints, LoadReport, beside_of, opened, report_of
from diffpeft.pipeline.match import matched

log = logging.getLogger(__name__)

Writes = list[tuple[Tensor, Tensor]]  # a parameter, and what it is to be
Slots = Mapping[str, Mapping[str, Slot]]  # {component: {layer: slot}}


def replace(
    target: object,
    name: str,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Bundle,
    *,
    strict: bool = True,
    family: str | None = None,
    **where: Unpack[Where],
) -> LoadReport:
    """Put another adapter in the place of the one called `name`: same tensors in memory, same strength, no recompilation.

    The new one may have any rank up to the first's, or the `max_rank` with which that was loaded, and leave out layers. Where its scale differs, the
    ratio goes into the second factor; `save_lora` still writes the file's own tensors. Arguments as for `load_lora`.
    Raises ShapeMismatchError if it does not fit, AdapterStateError while the old one is fused, trained or in use, in which case nothing has changed.
    """
    parts = components(target)
    with planned(parts) as plan:
        mixes = _having(name, mixes_of(parts))
        slots = {component: slots_in(parts[component], name, plan) for component in mixes}
        _check_idle(name, mixes, slots)
        _refuse_trained(name, slots)
        layers = {component: layers_of(model) for component, model in parts.items()}
        bundle = opened(target, source, layers, Hints(family, where))
        report = plan_replaced(plan, parts, name, bundle, strict=strict)
    log.info("replaced by %r", report)
    return report


def plan_replaced(
    plan: Plan, parts: Mapping[str, nn.Module], name: str, bundle: Bundle, *, strict: bool = True
) -> LoadReport:
    """Plan what `replace` does with what was opened, also for an adapter that is trained. Raises what it raises."""
    mixes = _having(name, mixes_of(parts))
    old = {component: slots_in(parts[component], name, plan) for component in mixes}
    _check_idle(name, mixes, old)
    layers = {component: layers_of(model) for component, model in parts.items()}
    new, absent = matched(bundle, parts, layers, strict=strict, trainable=False)
    extra = [dotted(c, layer) for c, slots in new.items() for layer in slots if layer not in old.get(c, {})]
    if extra:
        raise ShapeMismatchError(
            f"adapter {shown(name)} has no tensors for {len(extra)} layers of the new one",
            where=f"{bundle.source}: {listed(extra, 5)}",
            remedy="Unload it, and load the new one.",
        )
    for component, slots in old.items():
        for layer, slot in slots.items():
            fresh = new[component].get(layer)
            for tensor, value in _writes(slot, fresh, f"{bundle.source}: {dotted(component, layer)}"):
                plan.fill(tensor, value)
            plan.set(slot, source=pieces_of(fresh) if fresh else ())
    beside = beside_of(bundle, absent)
    for mix in mixes.values():
        adapters = plan.view(mix).adapters
        plan.set(mix, adapters={**adapters, name: Adapter(name, adapters[name].layers, **beside)})
        beside = {}
    return report_of(name, bundle, new, absent)


def _having(name: str, mixes: Mapping[str, Mix]) -> dict[str, Mix]:
    """The components that have an adapter. Raises UnknownNameError if none has."""
    having = {component: mix for component, mix in mixes.items() if name in mix.adapters}
    if not having:
        raise UnknownNameError.of("adapter", name, {n for mix in mixes.values() for n in mix.adapters})
    return having


def _refuse_trained(name: str, slots: Slots) -> None:
    """Raise AdapterStateError for an adapter that is trained."""
    if any(p.requires_grad for of_component in slots.values() for s in of_component.values() for p in s.parameters()):
        raise AdapterStateError(
            f"adapter {shown(name)} is trainable",
            remedy="Load it without trainable=True, or unload it and load the new one.",
        )


def _check_idle(name: str, mixes: Mapping[str, Mix], slots: Slots) -> None:
    """Raise AdapterStateError for an adapter that is fused, in use or not here."""
    for mix in mixes.values():
        if name in mix.fused:
            raise AdapterStateError(f"adapter {shown(name)} is fused", remedy="Call unfuse first.")
        if any(name in choice.order for choice in mix.running()):
            raise AdapterStateError(f"adapter {shown(name)} is used by a running adapters(...) block")
    if any(t.is_meta for of_component in slots.values() for s in of_component.values() for t in s.tensors.values()):
        raise AdapterStateError(
            f"the tensors of adapter {shown(name)} are offloaded", remedy="Unload it, and load the new one."
        )


def _writes(old: Slot, new: Slot | None, where: str) -> Writes:
    """What the parameters of a slot are to be. Raises ShapeMismatchError."""
    if new is None:
        return _switched_off(old, where)
    kinds = [(part.method.name, set(part.roles), part.spec.options) for part in old.parts]
    if kinds != [(part.method.name, set(part.roles), part.spec.options) for part in new.parts] or (
        {*new.tensors} - {*old.tensors}
    ):
        raise ShapeMismatchError(
            f"the new adapter is {' and '.join(new.methods)} with {listed(sorted(new.tensors))}, the old one {' and '.join(old.methods)}",
            where=where,
            remedy="Unload the old one, and load the new one.",
        )
    writes: Writes = []
    for before, after in zip(old.parts, new.parts, strict=True):
        present = old.tensors_of(before)
        writes += _paired(present, _as_there(before, present, after, new.tensors_of(after), where), where)
    beside = [role for role in old.tensors if not any(role in part.roles for part in old.parts)]
    tensors = new.tensors
    return writes + [(old.tensors[r], tensors.get(r, torch.zeros_like(old.tensors[r]))) for r in beside]


def _as_there(
    before: Part, present: Mapping[str, Tensor], after: Part, tensors: dict[str, Tensor], where: str
) -> Mapping[str, Tensor]:
    """A part's new tensors, in the shapes and at the scale of those that are there. Raises ShapeMismatchError."""
    if before.method.name in LORAS and "lora_mid" not in present and "lora_A" in present:
        scales = Lora.scale(tensors, after.spec), Lora.scale(present, before.spec)
        return fitted(tensors, present["lora_A"].shape[0], *scales, where)
    if before.additive and before.method.scale(present, before.spec) != after.method.scale(tensors, after.spec):
        raise ShapeMismatchError("the new adapter has another scale", where=where)
    if not before.additive and io.number(before.alpha) != io.number(after.alpha):
        raise ShapeMismatchError("the new adapter has another bound", where=where)
    return tensors


def _paired(present: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> Writes:
    for role, tensor in tensors.items():
        if present[role].shape != tensor.shape:
            raise ShapeMismatchError(
                f"{role} {tuple(tensor.shape)} does not fit into {tuple(present[role].shape)}", where=where
            )
    return [(present[role], tensor) for role, tensor in tensors.items()]


def _switched_off(slot: Slot, where: str) -> Writes:
    """Zeros where the method allows to change nothing."""
    if not all(part.additive for part in slot.parts):
        raise ShapeMismatchError(
            f"the new adapter leaves out a layer that {' and '.join(slot.methods)} cannot leave as it is", where=where
        )
    return [(t, torch.zeros_like(t)) for role, t in slot.tensors.items() if role in OFF]
