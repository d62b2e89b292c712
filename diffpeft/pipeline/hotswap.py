"""replace: another adapter into the tensors of one that is there. Nothing else changes, so that compiled models stay compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import Bundle, dotted
from diffpeft.errors import AdapterStateError, ShapeMismatchError, UnknownNameError, listed, shown
from diffpeft.layers.slot import Slot, pieces_of
from diffpeft.methods.layout import OFF
from diffpeft.methods.lora import Lora
from diffpeft.model.attach import mixes_of
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Adapter, Mix
from diffpeft.model.target import adapted, components, layers_of
from diffpeft.pipeline.load import LoadReport, beside_of, opened, report_of
from diffpeft.pipeline.match import LORAS, fitted, matched

Writes = list[tuple[Tensor, Tensor]]  # a parameter, and what it is to be
Attributes = list[tuple[Slot | Mix, dict[str, Any]]]  # what is to have them, and what they are to be


def replace(
    target: Any,
    name: str,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Bundle,
    *,
    strict: bool = True,
    family: str | None = None,
    revision: str | None = None,
    filename: str | None = None,
) -> LoadReport:
    """Put another adapter in the place of the one called `name`: same tensors in memory, same strength, no recompilation.

    The new one may have any rank up to the first's, or the `max_rank` with which that was loaded, and leave out layers. Where its scale differs, the
    ratio goes into the second factor; `save_lora` still writes the file's own tensors. Arguments as for `load_lora`.
    Raises ShapeMismatchError if it does not fit, AdapterStateError while the old one is fused, trained or in use, in which case nothing has changed.
    """
    parts = components(target)
    with exclusive(parts):
        return _replace(target, parts, name, source, strict, family, revision, filename)


def _replace(
    target: Any,
    parts: Mapping[str, nn.Module],
    name: str,
    source: Any,
    strict: bool,
    family: str | None,
    revision: str | None,
    filename: str | None,
) -> LoadReport:
    mixes = mixes_of(parts)
    known = {n for mix in mixes.values() for n in mix.adapters}
    if name not in known:
        raise UnknownNameError.of("adapter", name, known)
    own = {component: mix for component, mix in mixes.items() if name in mix.adapters}
    old = {
        component: {layer: record.slots[name] for layer, _, record in adapted(parts[component]) if name in record.slots}
        for component in own
    }
    _check_idle(name, own, old)
    layers = {component: layers_of(model) for component, model in parts.items()}
    bundle = opened(target, source, layers, family=family, revision=revision, filename=filename)
    new, absent = matched(bundle, parts, layers, strict=strict, trainable=False)
    extra = [dotted(c, layer) for c, found in new.items() for layer in found if layer not in old.get(c, {})]
    if extra:
        raise ShapeMismatchError(
            f"adapter {shown(name)} has no tensors for {len(extra)} layers of the new one",
            where=f"{bundle.source}: {listed(extra[:5])}",
            remedy="Unload it, and load the new one.",
        )
    writes: Writes = []
    for component, found in old.items():
        for layer, slot in found.items():
            writes += _writes(slot, new[component].get(layer), f"{bundle.source}: {dotted(component, layer)}")
    beside = beside_of(bundle, absent)
    sources: Attributes = [
        (slot, {"source": pieces_of(fresh) if (fresh := new[component].get(layer)) else ()})
        for component, found in old.items()
        for layer, slot in found.items()
    ]
    for n, mix in enumerate(own.values()):
        adapter = Adapter(name, mix.adapters[name].layers, **(beside if n == 0 else {}))
        sources.append((mix, {"adapters": {**mix.adapters, name: adapter}}))
    report = report_of(name, bundle, new, absent)
    _commit(writes, sources)
    return report


def _check_idle(name: str, mixes: Mapping[str, Mix], slots: Mapping[str, Mapping[str, Slot]]) -> None:
    for mix in mixes.values():
        if name in mix.fused:
            raise AdapterStateError(f"adapter {shown(name)} is fused", remedy="Call unfuse first.")
        if any(name in choice.order for choice in mix.running()):
            raise AdapterStateError(f"adapter {shown(name)} is used by a running adapters(...) block")
    if any(p.requires_grad for found in slots.values() for slot in found.values() for p in slot.parameters()):
        raise AdapterStateError(
            f"adapter {shown(name)} is trainable",
            remedy="Load it without trainable=True, or unload it and load the new one.",
        )
    if any(t.is_meta for found in slots.values() for slot in found.values() for t in slot.tensors.values()):
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
        own, tensors = old.tensors_of(before), new.tensors_of(after)
        if before.method.name in LORAS and "lora_mid" not in own and "lora_A" in own:
            scales = Lora.scale(tensors, after.spec), Lora.scale(own, before.spec)
            tensors = fitted(tensors, own["lora_A"].shape[0], *scales, where)
        elif before.additive and before.method.scale(own, before.spec) != after.method.scale(tensors, after.spec):
            raise ShapeMismatchError("the new adapter has another scale", where=where)
        elif not before.additive and io.number(before.alpha) != io.number(after.alpha):
            raise ShapeMismatchError("the new adapter has another bound", where=where)
        writes += _paired(own, tensors, where)
    rest = [role for role in old.tensors if not any(role in part.roles for part in old.parts)]
    theirs = new.tensors
    return writes + [(old.tensors[r], theirs.get(r, torch.zeros_like(old.tensors[r]))) for r in rest]


def _paired(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> Writes:
    for role, tensor in tensors.items():
        if own[role].shape != tensor.shape:
            raise ShapeMismatchError(
                f"{role} {tuple(tensor.shape)} does not fit into {tuple(own[role].shape)}", where=where
            )
    return [(own[role], tensor) for role, tensor in tensors.items()]


def _switched_off(slot: Slot, where: str) -> Writes:
    """Zeros where the method allows to change nothing."""
    if not all(part.additive for part in slot.parts):
        raise ShapeMismatchError(
            f"the new adapter leaves out a layer that {' and '.join(slot.methods)} cannot leave as it is", where=where
        )
    return [(t, torch.zeros_like(t)) for role, t in slot.tensors.items() if role in OFF]


@torch.no_grad()
def _commit(writes: Writes, attributes: Attributes) -> None:
    """Make the writes; if one is interrupted, undo those made."""
    before = [(p, p.detach().clone()) for p, _ in writes]
    were = [(owner, {name: getattr(owner, name) for name in new}) for owner, new in attributes]
    try:
        for p, tensor in writes:
            p.copy_(tensor)
        for owner, new in attributes:
            owner.__dict__.update(new)
    except BaseException:
        for p, tensor in before:
            p.copy_(tensor)
        for owner, old in were:
            owner.__dict__.update(old)
        raise
