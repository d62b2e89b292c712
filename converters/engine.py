"""The one engine: header -> parts -> entries, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converters.detection import Detection, families_of, format_of
from converters.families import TABLES, Table
from converters.formats import FORMATS, Format, Part
from converters.roles import FOREIGN, ROLES
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical
from diffpeft.errors import (
    CannotConvertError,
    CheckpointError,
    MissingKeysError,
    ShapeMismatchError,
    UnknownNameError,
    WrongBaseError,
    listed,
    shown,
)

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str] | Mapping[str, Any]
_HASHES = ("sshs_", "modelspec.hash_")  # they are over tensor bytes, so a rewritten file must not keep them


def detect(source: Source) -> Detection:
    """What a file or dict of tensors is, from the header alone."""
    tensors, _, name = _open(source)
    format = format_of(tensors, name)
    families = families_of(tensors) or ("",)
    parts = [part for key in tensors if (part := FORMATS[format].split(key))]
    methods = frozenset(_method(part.role) for part in parts if part.role != "alpha")
    return Detection(format, families[0], methods, len(parts) / max(len(tensors), 1), families[1:])


def read(
    source: Source,
    *,
    family: str | None = None,
    format: str | None = None,
    names: Mapping[str, Iterable[str]] | None = None,
) -> Bundle:
    """A file or dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names} are a model's own, against which flat names are resolved
    before the family's table is asked.
    """
    tensors, metadata, where = _open(source)
    fmt = FORMATS[_known("format", format, FORMATS) or format_of(tensors, where)]
    families = (family,) if family else families_of(tensors)
    if family:
        _known("family", family, TABLES)
    elif not set(families) & set(TABLES):
        raise WrongBaseError(
            f"this adapter is for {' or '.join(families) or 'an unknown family'}",
            where=where,
            remedy=f"Supported: {', '.join(TABLES)}.",
        )
    groups, carried = _group(tensors, fmt, next(f for f in families if f in TABLES), names or {})
    _refuse_foreign(groups, where)
    entries = [_entry(layer, found, where) for layer, found in groups.items()]
    ranks = {e.layer: e.tensors["lora_A"].shape[0] for e in entries}
    configured = fmt.alphas(metadata, ranks)
    entries = [
        Entry(e.method, e.layer, e.tensors, configured.get(e.layer) if e.alpha is None else e.alpha, e.keys)
        for e in entries
    ]
    return Bundle(fmt.name, families[0], entries, carried, dict(metadata), where, families)


def write(bundle: Bundle, path: str | os.PathLike[str], *, format: str, dtype: torch.dtype | None = None) -> None:
    """Write a Bundle as a file of another format, whole or not at all. `dtype` casts the factors; alphas keep theirs."""
    _known("format", format, FORMATS)
    if bundle.family not in TABLES:
        raise CannotConvertError(
            f"the layer names of family {shown(bundle.family)} are not known",
            where=bundle.source,
            remedy=f"Known: {', '.join(TABLES)}.",
        )
    fmt, table = FORMATS[format], TABLES[bundle.family]
    tensors: dict[str, Handle] = {}
    unknown = [e.layer for e in bundle.entries if not _spells(fmt, table, *e.layer.partition(".")[::2])]
    if unknown:
        raise CannotConvertError(f"{format} has no name for layers of this adapter", where=listed(unknown))
    for entry in bundle.entries:
        component, _, layer = entry.layer.partition(".")
        for role, handle in entry.tensors.items():
            tensors[fmt.join(Part(component, layer, role))] = io.cast(handle, dtype, entry.layer)
        if fmt.alpha_is_tensor and entry.alpha is not None:
            tensors[fmt.join(Part(component, layer, "alpha"))] = _alpha_tensor(entry.alpha)
    ranks = {e.layer: e.tensors["lora_A"].shape[0] for e in bundle.entries}
    other = {key for f in FORMATS.values() for key in f.metadata(bundle.entries[:1], ranks)}
    metadata = {k: v for k, v in bundle.metadata.items() if k not in other and not k.startswith(_HASHES)}
    io.save(path, {**tensors, **bundle.carried}, {"format": "pt", **metadata, **fmt.metadata(bundle.entries, ranks)})


def _spells(fmt: Format, table: Table, component: str, layer: str) -> bool:
    """Whether a format can write a layer: its family's, or one that nobody knows in the spelling (flat or dotted) in which it was read."""
    return component in table.components and (table.knows(component, layer) or fmt.flat == ("." not in layer))


def _known(kind: str, name: str | None, known: Mapping[str, Any]) -> str | None:
    if name is not None and name not in known:
        raise UnknownNameError.of(kind, name, known)
    return name


def _open(source: Source) -> tuple[dict[str, Handle], dict[str, str], str]:
    if isinstance(source, Mapping):
        if not source or not all(
            isinstance(k, str) and hasattr(t, "dtype") and hasattr(t, "shape") for k, t in source.items()
        ):
            raise CheckpointError("a dict of tensors maps names to tensors, and holds at least one")
        return {key: io.handle(tensor) for key, tensor in source.items()}, {}, "a dict of tensors"
    handles, metadata = io.header(source)
    return handles, metadata, str(source)


def _group(tensors: Mapping[str, Handle], fmt: Format, family: str, names: Mapping[str, Iterable[str]]):
    """{canonical layer: {role: (key, handle)}} of what the format takes apart, and the tensors it does not."""
    known = {component: {layer.replace(".", "_"): layer for layer in layers} for component, layers in names.items()}
    groups: dict[str, dict[str, tuple[str, Handle]]] = {}
    carried: dict[str, Handle] = {}
    for key, handle in tensors.items():
        part = fmt.split(key)
        if part is None:
            carried[key] = handle
            continue
        layer = part.layer
        if fmt.flat:  # a name nobody knows stays flat: whoever needs the layer will miss it and say so
            own = known.get(part.component, {})
            layer = (
                own.get(layer)
                or own.get(layer.removeprefix("text_model_"))
                or TABLES[family].dotted(part.component, layer)
                or layer
            )
        found = groups.setdefault(canonical(part.component, layer), {})
        if part.role in found:
            raise CheckpointError("two keys name the same tensor", where=listed([found[part.role][0], key]))
        found[part.role] = (key, handle)
    return groups, carried


def _method(role: str) -> str:
    return next((m for m, roles in ROLES.items() if role in roles), None) or next(
        (m for start, m in FOREIGN.items() if role.startswith(start)), role
    )


def _refuse_foreign(groups: Mapping[str, Mapping[str, tuple[str, Handle]]], where: str) -> None:
    known = {"alpha", *(role for roles in ROLES.values() for role in roles)}
    foreign = {key: _method(role) for found in groups.values() for role, (key, _) in found.items() if role not in known}
    if foreign:
        raise CheckpointError(
            f"method {' and '.join(sorted(set(foreign.values())))} is not supported",
            where=f"{where}: {listed(list(foreign)[:3])}",
            remedy=f"Supported: {', '.join(ROLES)}.",
        )


def _entry(layer: str, found: Mapping[str, tuple[str, Handle]], where: str) -> Entry:
    missing = [role for role in ROLES["lora"] if role not in found]
    if missing:
        raise MissingKeysError(
            f"layer {shown(layer)} has {listed(sorted(found))} but no {listed(missing)}",
            where=f"{where}: {found[next(iter(found))][0]}",
        )
    a, b = (found[role][1].shape for role in ROLES["lora"])
    if min(len(a), len(b)) < 2 or len(a) != len(b) or a[0] != b[1] or a[0] < 1:
        raise ShapeMismatchError(
            f"lora_A {a} and lora_B {b} of layer {shown(layer)} do not fit each other", where=where
        )
    if any(handle.dtype not in ("F64", "F32", "F16", "BF16") for role, (_, handle) in found.items() if role != "alpha"):
        raise CheckpointError(f"layer {shown(layer)} has tensors that are no floating point numbers", where=where)
    alpha = found["alpha"][1] if "alpha" in found else None
    io.number(alpha)
    return Entry(
        "lora", layer, {role: found[role][1] for role in ROLES["lora"]}, alpha, tuple(key for key, _ in found.values())
    )


def _alpha_tensor(alpha: Handle | float) -> Handle:
    if isinstance(alpha, Handle):
        return alpha
    import torch

    return io.handle(torch.tensor(float(alpha)))
