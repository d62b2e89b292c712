"""Joint layers: entries of layers that the original program has as one (q, k and v), as entries of the model's own layers.

Most come apart by their rows alone (converters/rows.py). What mixes the rows of several parts is worked out from the model's weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical
from diffpeft.converters.conversion import as_lora
from diffpeft.converters.rows import Unfit, split
from diffpeft.errors import CheckpointWarning, ShapeMismatchError, listed, shown
from diffpeft.layers.carried import base_class, op_of
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import BIAS
from diffpeft.methods import METHODS, Spec
from diffpeft.methods.layout import inner


def separated(bundle: Bundle, layers: Mapping[str, Mapping[str, tuple[nn.Module, nn.Module | None]]]) -> Bundle:
    """The bundle with an entry for each of a model's layers. `layers` {component: {layer: (module, its parent)}}.

    A DoRA by input gets magnitudes that make the parts what they were together. A LoKr whose halves lie across the parts becomes a LoRA, or a whole
    difference. Other methods become whole differences from the model's present weights, with a warning.
    """
    modules = {
        canonical(component, layer): module for component, by in layers.items() for layer, (module, _) in by.items()
    }
    entries: list[Entry] = []
    dense: list[str] = []  # the layers that got whole differences
    for entry in bundle.entries:
        try:
            entries += split(entry)
        except Unfit:
            if set(entry.targets) <= modules.keys():
                check_joint(entry, [modules[target] for target in entry.targets], bundle.source)
                entries += _worked_out(bundle, entry, modules, dense)
            else:
                entries += [replace(entry, layer=target, rule=None) for target in entry.targets]
    if dense:
        warnings.warn(
            f"{len(dense)} layers got whole differences from their present weights: {listed(dense, 5)}",
            CheckpointWarning,
            stacklevel=5,
        )
    return replace(bundle, entries=entries)


def _worked_out(bundle: Bundle, entry: Entry, modules: Mapping[str, nn.Module], dense: list[str]) -> list[Entry]:
    """The parts of an entry that mixes their rows. Those that are whole differences are added to `dense`."""
    base = {target: op_of(modules[target]).weight().detach() for target in entry.targets}
    if parts := _by_input(entry, base):
        return parts
    if lora := as_lora(entry):
        return split(lora)
    deltas = replace(bundle, entries=[entry]).deltas(base)
    dense += deltas
    plain = replace(entry, method="full", rule=None, alpha=None, options={})
    return [replace(plain, layer=layer, tensors={"diff": _like(entry, delta)}) for layer, delta in deltas.items()]


def check_joint(entry: Entry, modules: Sequence[nn.Module], source: str) -> None:
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


def _like(entry: Entry, tensor: Tensor) -> Handle:
    """A tensor of any shape in the dtype of an entry's first."""
    return io.handle(tensor.to(io.dtype_of(next(iter(entry.tensors.values())))).contiguous())


def _by_input(entry: Entry, base: Mapping[str, Tensor]) -> list[Entry] | None:
    """The parts of a DoRA by input, whose magnitude is [1, i, *1]: each has the share of it that its rows have of the joint columns' norms.

    None for other entries. `base` {layer: weight [o, i, *k]}.
    """
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
    joint = torch.stack(list(norms.values())).square().sum(0).sqrt().reshape(1, -1)
    shares = {layer: m.double().reshape(1, -1) * norm.reshape(1, -1) / joint for layer, norm in norms.items()}
    return [
        replace(
            part,
            method="dora",
            tensors={**part.tensors, "dora_scale": _like(entry, shares[part.layer].reshape(m.shape))},
        )
        for part in parts
    ]
