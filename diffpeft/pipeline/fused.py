"""Entries of layers that the original program has fused, as entries of the model's own layers.

Most come apart by their rows alone (converters/rows.py). What mixes the rows of several parts is worked out from the model's weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from converters.conversion import as_lora
from converters.rows import Unfit, split
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical
from diffpeft.errors import ShapeMismatchError, listed, shown
from diffpeft.layers.carried import base_class, op_of
from diffpeft.layers.site import site_of
from diffpeft.layers.slot import BIAS
from diffpeft.methods import METHODS, Spec
from diffpeft.methods.layout import inner


def unfused(bundle: Bundle, layers: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Bundle:
    """The bundle with an entry for each of a model's layers. `layers` {component: {layer: (module, its parent)}}.

    A DoRA by input gets magnitudes that make the parts what they were together. A LoKr whose halves lie across the parts becomes a LoRA, or a whole
    difference. Other methods become whole differences from the model's present weights, with a warning.
    """
    modules = {canonical(component, layer): m for component, found in layers.items() for layer, (m, _) in found.items()}
    entries: list[Entry] = []
    dense: list[str] = []
    for entry in bundle.entries:
        try:
            entries += split(entry)
            continue
        except Unfit:
            if not set(entry.targets) <= modules.keys():
                entries += [replace(entry, layer=target, rule=None) for target in entry.targets]
                continue
        _check(entry, [modules[target] for target in entry.targets], bundle.source)
        base = {target: _weight(modules[target]) for target in entry.targets}
        found = _by_input(entry, base) or _as_lora(entry)
        if found is None:
            deltas = replace(bundle, entries=[entry]).deltas(base)
            found = [
                replace(
                    entry,
                    method="full",
                    layer=layer,
                    rule=None,
                    tensors={"diff": _like(entry, d)},
                    alpha=None,
                    options={},
                )
                for layer, d in deltas.items()
            ]
            dense += deltas
        entries += found
    if dense:
        warnings.warn(
            f"{len(dense)} layers got whole differences from their present weights: {listed(dense[:5])}", stacklevel=4
        )
    return replace(bundle, entries=entries)


def _check(entry: Entry, modules: Sequence[Any], source: str) -> None:
    """Raise ShapeMismatchError for tensors that do not fit the layers that are one in the original program."""
    parts = [site.geometry_of(m) for m in modules if (site := site_of(base_class(m))) is not None]
    joint = replace(parts[0], out=sum(part.out for part in parts))
    tensors = {role: h for role, h in entry.tensors.items() if role != BIAS}
    if why := METHODS[entry.method].check(tensors, Spec(joint, io.number(entry.alpha), entry.options)):
        shapes = ", ".join(f"{role} {shape}" for role, shape in entry.shapes.items())
        raise ShapeMismatchError(
            f"layer {shown(entry.layer)}, which is {listed(entry.targets)} here, has other shapes: {why}",
            where=f"{source}: {shapes}",
            remedy="It is for another model.",
        )


def _weight(module: Any) -> Tensor:
    return op_of(module).weight().detach()


def _like(entry: Entry, tensor: Tensor) -> Handle:
    """A tensor in the dtype of an entry's first."""
    return io.handle(tensor.to(io.dtype_of(next(iter(entry.tensors.values())))).contiguous())


def _as_lora(entry: Entry) -> list[Entry] | None:
    lora = as_lora(entry)
    return split(lora) if lora else None


def _by_input(entry: Entry, base: Mapping[str, Tensor]) -> list[Entry] | None:
    """The parts of a DoRA by input: each has the share of the magnitude that its rows have of the fused columns' norms."""
    if entry.method != "dora" or "dora_scale" not in entry.tensors:
        return None
    plain = replace(
        entry,
        method=inner(entry.tensors) or "lora",
        tensors={r: h for r, h in entry.tensors.items() if r != "dora_scale"},
    )
    try:
        parts = split(plain)
    except Unfit:
        return None
    deltas = Bundle("", "", [plain]).deltas()
    (m,) = io.load([entry.tensors["dora_scale"]])
    norms = {layer: (base[layer].double() + delta).norm(dim=0, keepdim=True) for layer, delta in deltas.items()}
    whole = torch.stack(list(norms.values())).square().sum(0).sqrt()
    shares = {
        layer: m.double().reshape(1, -1) * norm.reshape(1, -1) / whole.reshape(1, -1) for layer, norm in norms.items()
    }
    return [
        replace(
            part,
            method="dora",
            tensors={**part.tensors, "dora_scale": _like(entry, shares[part.layer].reshape(m.shape))},
        )
        for part in parts
    ]
