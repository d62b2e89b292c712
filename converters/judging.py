"""The reading side's second step: what a layer's tensors are, one entry a method, judged by their names, shapes and dtypes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffpeft import io
from diffpeft.bundle import Entry, Handle, Rule, canonical
from diffpeft.converters.formats.peft import CONFIG, FILE, WEIGHTS
from diffpeft.converters.placing import NUMBERS, Keyed, Names, Place, Reading
from diffpeft.converters.roles import missing, split
from diffpeft.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    MissingKeysError,
    ShapeMismatchError,
    inside,
    listed,
    shown,
)
from diffpeft.methods.layout import LAYOUTS, PRODUCTS, is_scaled
from diffpeft.methods.shapes import contradiction

_DAMAGED = "The file is damaged, or was made by a program in its own way: get or export it anew."
_FLOATS = ("F64", "F32", "F16", "BF16")
_ANY = (*_FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")  # dtypes of numbers


def judged(places: Mapping[Place, Keyed], by: Reading) -> list[Entry]:
    """The entries of layers, in the file's order. Raises CheckpointError and its kin, with the layer and the keys."""
    _refuse_foreign(places.values(), by.where)
    shapes = _shapes(by.names)
    holder: dict[tuple[str, str], str] = {}
    entries: list[Entry] = []
    for (layer, rule), keyed in places.items():
        for entry in _entries(layer, keyed, shapes.get(layer), rule, by.where):
            for target in entry.targets:
                if (other := holder.setdefault((target, entry.method), layer)) != layer:
                    raise CheckpointError(
                        f"two layers of the file are the same rows of {shown(target)}",
                        where=f"{by.where}: {listed([other, layer])}",
                        remedy=_DAMAGED,
                    )
            entries.append(entry)
    return entries


def _shapes(names: Names) -> dict[str, tuple[int, ...]]:
    """{canonical layer: shape of its weight}, of a model that tells them."""
    return {
        canonical(component, name): shape
        for component, layers in names.items()
        if isinstance(layers, Mapping)
        for name, shape in layers.items()
    }


def _refuse_foreign(layers: Iterable[Keyed], where: str) -> None:
    """Raise CheckpointError for tensors of methods that exist and are not known here."""
    foreign = {
        keyed[role][0]: method
        for keyed in layers
        for method, roles in split(_shapes_of(keyed)).items()
        if method not in LAYOUTS
        for role in roles
    }
    if foreign:
        raise CheckpointError(
            f"method {' and '.join(sorted(set(foreign.values())))} is not supported",
            where=f"{where}: {listed(foreign, 3)}",
            remedy=f"Supported: {', '.join(LAYOUTS)}.",
        )


def _shapes_of(keyed: Keyed) -> dict[str, tuple[int, ...]]:
    """Shapes by role, without the alpha's."""
    return {role: handle.shape for role, (_, handle) in keyed.items() if role != "alpha"}


def _entries(layer: str, keyed: Keyed, shape: tuple[int, ...] | None, rule: Rule | None, where: str) -> list[Entry]:
    """One entry a method, in the order in which they act. The alpha is all methods', its key is the first's."""
    methods = split(_shapes_of(keyed))
    if not methods:
        key = next(iter(keyed.values()))[0]
        present = "an alpha" if "alpha" in keyed else listed(keyed)
        raise MissingKeysError(
            f"layer {shown(layer)} has {present} but no {listed(sorted(LAYOUTS['lora'].forms[0].needed))}",
            where=f"{where}: {key}",
            remedy=_DAMAGED,
        )
    alpha_key, alpha = keyed.get("alpha", (layer, None))
    if alpha is not None:
        with inside(alpha_key):
            io.number(alpha)
    entries: list[Entry] = []
    for method, roles in methods.items():
        tensors = {role: keyed[role][1] for role in roles}
        _check(layer, method, tensors, f"{where}: {keyed[roles[0]][0]}")
        shared = () if entries else ("alpha",)
        keys = tuple(key for role, (key, _) in keyed.items() if role in (*roles, *shared))
        entries.append(Entry(method, layer, tensors, alpha, keys, shape=shape, rule=rule))
    return entries


def _check(layer: str, method: str, tensors: Mapping[str, Handle], where: str) -> None:
    """Raise for one method's tensors on one layer that are not complete, contradict each other, or are no floating point numbers."""
    lacking = missing(tensors)
    if lacking is None:
        raise CheckpointError(
            f"layer {shown(layer)} has {listed(sorted(tensors))}, which are parts of more than one {method}",
            where=where,
            remedy=_DAMAGED,
        )
    if lacking:
        raise MissingKeysError(
            f"layer {shown(layer)} has {listed(sorted(tensors))} of {method} but no {listed(lacking)}",
            where=where,
            remedy=_DAMAGED,
        )
    if why := contradiction({role: handle.shape for role, handle in tensors.items()}):
        raise ShapeMismatchError(f"layer {shown(layer)}: {why}", where=where, remedy=_DAMAGED)
    if any(handle.dtype not in (_ANY if role in NUMBERS else _FLOATS) for role, handle in tensors.items()):
        raise CheckpointError(
            f"layer {shown(layer)} has tensors that are no floating point numbers", where=where, remedy=_DAMAGED
        )


def with_alphas(entries: Sequence[Entry], alpha: float | None, by: Reading) -> list[Entry]:
    """The entries, with an alpha that the user says where the file says none. A file that should have said them gets a warning or CheckpointError."""
    if alpha is not None:
        return [_with_alpha(entry, alpha) for entry in entries]
    if by.fmt.folder and CONFIG not in by.metadata and any(entry.alpha is None for entry in entries):
        _say_unconfigured(by.where)
    return list(entries)


def check_alpha(alpha: float | None) -> None:
    """Raise ConfigError for what is no alpha."""
    if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {shown(alpha)}", remedy="It is a finite number: the update is alpha / rank * B A.")


def _say_unconfigured(where: str) -> None:
    """Say that PEFT's tensors have no config that tells their alphas. Raises CheckpointError for a file that must have had one beside it."""
    path = Path(where)
    if path.name == WEIGHTS or path.is_dir():
        raise CheckpointError(
            f"there is no {FILE} beside {WEIGHTS}, and nothing else says the alphas",
            where=where,
            remedy=f"Pass the folder with both, or say alpha= (as lora_alpha in {FILE}).",
        )
    warnings.warn(
        f"{where}: no {FILE} says the alphas, so each is taken to be the rank (scale 1); alpha= says otherwise",
        CheckpointWarning,
        stacklevel=3,
    )


def _with_alpha(entry: Entry, alpha: float) -> Entry:
    """The entry with this alpha, if its method is scaled by one and the file tells none."""
    takes = entry.alpha is None and entry.method in PRODUCTS and is_scaled(entry.method, entry.tensors)
    return replace(entry, alpha=float(alpha)) if takes else entry
