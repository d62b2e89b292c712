"""The engine's reading side: header -> parts -> entries. The way back is writing.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.detection import Detection, Fit, bare, fit, known
from converters.families import TABLES, Table
from converters.formats import FORMATS, Format, Part
from converters.opening import Opened, Source, opened, parts_of
from converters.roles import OLD_OFT, ROLES, contradiction, missing, split
from converters.rows import aspect
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, Rule, canonical, dotted, named
from diffpeft.errors import (
    AmbiguousFormatError,
    CheckpointError,
    MissingKeysError,
    ShapeMismatchError,
    UnknownNameError,
    WrongBaseError,
    inside,
    listed,
    shown,
)

Names = Mapping[str, Iterable[str]]
Spelt = tuple[str, str, int | None]  # what says the component, the layer as the format spells it, the part of it
Found = dict[str, tuple[str, Handle]]  # one layer's tensors: {role: (key, handle)}
_NUMBERS = ("alpha", "on_input")  # roles that are numbers


def detect(source: Source) -> Detection:
    """What a file or dict of tensors is, from the header alone. Raises AmbiguousFormatError if its names fit families that spell others apart."""
    tensors, metadata, where = opened(source)
    with inside(where):
        found = fit(tensors, metadata, where)
        refuse_ambiguous(found, where)
        return detected(found, tensors)


def fitting(source: Source, family: str | None = None) -> Fit:
    """All that a file fits, the ambiguous among it. Of a folder with a file for each component, what all of them fit.

    `family` is known to be what the file is asked for, where formats of different families look alike.
    """
    if several := parts_of(source):
        family, first = _common(several), fitting(several[0])
        return replace(first, families=(family,) if family else first.families, ambiguous=family is None)
    tensors, metadata, where = opened(source)
    with inside(where):
        return fit(tensors, metadata, where, family=family)


def detected(found: Fit, tensors: Mapping[str, Handle]) -> Detection:
    """A Detection of what fits."""
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, part in found.parts.items():
        own = layers.setdefault((part.word, part.layer), {})
        own |= {part.role: tensors[key].shape} if part.role != "alpha" else {}
    methods = {m for shapes in layers.values() for method, roles in split(shapes).items() for m in named(method, roles)}
    family = found.families[0] if found.families else ""
    return Detection(found.format, family, frozenset(methods), found.confidence(len(tensors)), found.families[1:])


def refuse_ambiguous(found: Fit, where: str) -> None:
    """Raise AmbiguousFormatError where only a guess is left."""
    if found.ambiguous:
        raise AmbiguousFormatError(
            f"these layers are in {' and in '.join(found.families)}, and nothing else tells which it is",
            where=where,
            remedy=f"Say family=, for example family={found.families[0]!r} (--family {found.families[0]}).",
        )


def read(
    source: Source,
    *,
    family: str | None = None,
    format: str | None = None,
    names: Names | None = None,
    fits: Fit | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Bundle:
    """A file, a PEFT folder or a dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names} are a model's own, against which names are resolved
    before the family's table is asked, and which tell the component where the file does not. `fits` is what `fitting` has said of it.
    `metadata` are added to the file's.
    """
    known_name("format", format, FORMATS)
    known_name("family", family, TABLES)
    if several := parts_of(source):
        family = family or _common(several)
        return _merged([read(part, family=family, format=format, names=names) for part in several], source)
    tensors, own, where = fits.opened if fits else opened(source)
    with inside(where):
        return _read(Opened(tensors, {**own, **(metadata or {})}, where), family, format, names, fits)


def _read(source: Opened, family: str | None, format: str | None, names: Names | None, fits: Fit | None) -> Bundle:
    tensors, metadata, where = source
    found = fits or fit(tensors, metadata, where, format, family)
    fmt = FORMATS[found.format]
    families = _families(found, fmt, family, names, where)
    table = fmt.tables.get(next(iter(families), ""), Table({}))
    groups, carried = _grouped(tensors, found.parts, fmt, table, names or {}, metadata)
    _refuse_foreign(groups, where)
    placed: dict[tuple[str, str], str] = {}
    entries: list[Entry] = []
    for (layer, rule), own in groups.items():
        for entry in _entries(layer, own, where):
            for target in entry.targets:
                if placed.setdefault((target, entry.method), layer) != layer:
                    raise CheckpointError(
                        f"two layers of the file are the same rows of {shown(target)}",
                        where=f"{where}: {listed([placed[target, entry.method], layer])}",
                    )
            entries.append(entry if rule is None else replace(entry, rule=rule))
    entries = fmt.configured(entries, metadata)
    return Bundle(fmt.name, next(iter(families), ""), entries, carried, dict(metadata), where, families, tuple(tensors))


def _common(parts: Sequence[Opened]) -> str | None:
    """The family of files of one adapter: the first that fits all."""
    fits = sorted((fitting(part) for part in parts), key=lambda f: len(f.families))
    if any(f.ambiguous for f in fits) and not any(len(f.families) == 1 for f in fits):
        return None
    return next((family for family in fits[0].families if all(family in f.families for f in fits)), None)


def _merged(bundles: Sequence[Bundle], source: Source) -> Bundle:
    entries = [e for b in bundles for e in b.entries]
    carried = {key: h for b in bundles for key, h in b.carried.items()}
    return replace(bundles[0], entries=entries, carried=carried, order=(), source=str(source))


def _families(found: Fit, fmt: Format, family: str | None, names: Names | None, where: str) -> tuple[str, ...]:
    """The families to read a file as: the one that was asked for, if its names fit, or all that fit."""
    if family is None:
        if names is None:
            refuse_ambiguous(found, where)
        if not found.families and not fmt.folder and not names:
            raise WrongBaseError(
                "this adapter is for an unknown family: no table has its layers",
                where=where,
                remedy=f"Supported: {', '.join(TABLES)}.",
            )
        return found.families
    if names is None and found.known.get(family, 0) < max(found.known.values(), default=0):
        raise WrongBaseError(
            f"this adapter is for {' or '.join(found.families)}, not {family}", where=where, remedy="Leave out family=."
        )
    return (family,)


def known_name(kind: str, name: str | None, among: Mapping[str, Any]) -> str | None:
    """The name. Raises UnknownNameError, with near matches, if it is none of the known."""
    if name is not None and name not in among:
        raise UnknownNameError.of(kind, name, among)
    return name


def _grouped(
    tensors: Mapping[str, Handle],
    parts: Mapping[str, Part],
    fmt: Format,
    table: Table,
    names: Names,
    metadata: Mapping[str, str],
):
    """{(canonical layer, rule): {role: (key, handle)}} of what the format takes apart, and the tensors it does not."""
    spelt: dict[Spelt, Found] = {}
    carried: dict[str, Handle] = {}
    alphas = [key for key, part in parts.items() if part.role in _NUMBERS]
    numbers = dict(zip(alphas, io.held(tensors[key] for key in alphas), strict=True))
    for key, handle in {**tensors, **numbers}.items():
        part = parts.get(key)
        if part is None:
            carried[key] = handle
            continue
        _add(spelt.setdefault((part.word, part.layer, part.part), {}), part.role, key, handle)
    for (word, layer, number), found in list(spelt.items()):
        if number is not None and (whole := spelt.get((word, layer, None))):  # an alpha beside the parts is theirs
            for role, (key, handle) in whole.items():
                _add(found, role, key, handle)
    for word, layer in {(word, layer) for word, layer, number in spelt if number is not None}:
        spelt.pop((word, layer, None), None)
    component = _bare([layer for word, layer, _ in spelt if not word], fmt, table, names, metadata)
    own = {c: {_flat(n): n for n in layers} for c, layers in names.items()}
    groups: dict[tuple[str, Rule | None], Found] = {}
    for at, found in spelt.items():
        place = _placed(at, found, component, fmt, table, own)
        for role, (key, handle) in found.items():
            _add(groups.setdefault(place, {}), role, key, handle)
    return {place: _today(found) for place, found in groups.items()}, carried


def _today(found: Found) -> Found:
    """PEFT's rotations of before 0.16 as what they are: up to 0.13 LyCORIS's of the output with another sign and scale; then, with `oft_s`, a
    BOFT of one stage (formats: PEFT's sources of these versions).
    """
    if "oft_r" not in found:
        return found
    key, blocks = found["oft_r"]
    rest = {role: own for role, own in found.items() if role not in OLD_OFT}
    if "oft_s" in found:
        return {"boft_R": (key, io.reshaped(blocks, (1, *blocks.shape))), "boft_s": found["oft_s"], **rest}
    return {"oft_blocks": (key, io.scaled(blocks, -0.5)), **rest}


def _add(found: Found, role: str, key: str, handle: Handle) -> None:
    if role in found:
        raise CheckpointError("two keys name the same tensor", where=listed([found[role][0], key]))
    found[role] = (key, handle)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _bare(layers: Sequence[str], fmt: Format, table: Table, names: Names, metadata: Mapping[str, str]) -> str:
    """The component that layers without one are of: the model's that has most of them, its only one, or the family's."""
    if not layers:
        return ""
    flat = {_flat(layer) for layer in layers}
    hits = {c: len(flat & {_flat(s) for n in own for s in (n, canonical(c, n))}) for c, own in names.items()}
    hits = {c: n or len(flat & {_flat(n.removeprefix("text_model.")) for n in names[c]}) for c, n in hits.items()}
    best = max(hits, key=hits.__getitem__, default="")
    return best if len(hits) == 1 or hits.get(best) else bare(table, layers, fmt, metadata)


def _placed(
    at: Spelt, found: Found, bare: str, fmt: Format, table: Table, names: Mapping[str, Mapping[str, str]]
) -> tuple[str, Rule | None]:
    """The canonical layer behind a spelt one, and its rule if it is one of the original program's whose rows are not a layer of diffusers'.

    A model's own names decide, then the tables. A name that nobody knows stays as it is: whoever needs the layer will miss it and say so.
    """
    word, layer, number = at
    component = fmt.component(word, table) if word else bare
    own = names.get(component, {})
    if fmt.flat and (exact := own.get(layer) or own.get(layer.removeprefix("text_model_"))):
        return canonical(component, exact), None
    if not fmt.flat and own.get(_flat(layer)) == layer:
        return canonical(component, layer), None
    if known(fmt, table, component, layer) == "original" and component not in table.encoders:
        name = table.original_dotted(component, _flat(layer)) or layer
        rule = table.to_diffusers(component, name, aspect({role: h.shape for role, (_, h) in found.items()}))
        if rule is not None:
            if number is not None and number < len(rule.parts):
                return dotted(component, rule.parts[number][0]), None
            if rule.renames:
                return dotted(component, rule.parts[0][0]), None
            return dotted(component, name), rule
    if component in table.encoders:
        layer = table.encoded(component, layer, fmt.flat) or layer
    elif fmt.flat:
        layer = table.dotted(component, layer) or layer
    return canonical(component, layer), None


def _refuse_foreign(groups: Mapping[Any, Found], where: str) -> None:
    every = {"dora", *ROLES}
    foreign = {
        found[role][0]: method
        for found in groups.values()
        for method, roles in split(
            {role: handle.shape for role, (_, handle) in found.items() if role != "alpha"}
        ).items()
        if method not in every
        for role in roles
    }
    if foreign:
        raise CheckpointError(
            f"method {' and '.join(sorted(set(foreign.values())))} is not supported",
            where=f"{where}: {listed(list(foreign)[:3])}",
            remedy=f"Supported: {', '.join(every)}.",
        )


def _entries(layer: str, found: Found, where: str) -> list[Entry]:
    """One entry a method, in the order in which they act. The alpha is all methods', its key is the first's."""
    shapes = {role: handle.shape for role, (_, handle) in found.items() if role != "alpha"}
    methods = split(shapes)
    if not methods:
        key = next(iter(found.values()))[0]
        what = "an alpha" if "alpha" in found else listed(found)
        raise MissingKeysError(
            f"layer {shown(layer)} has {what} but no {listed(ROLES['lora'][:2])}", where=f"{where}: {key}"
        )
    alpha = found["alpha"][1] if "alpha" in found else None
    io.number(alpha)
    entries: list[Entry] = []
    for method, roles in methods.items():
        _check(layer, method, {role: found[role][1] for role in roles}, f"{where}: {found[roles[0]][0]}")
        own = {*roles, *(() if entries else ("alpha",))}
        keys = tuple(key for role, (key, _) in found.items() if role in own)
        entries.append(Entry(method, layer, {role: found[role][1] for role in roles}, alpha, keys))
    return entries


def _check(layer: str, method: str, tensors: Mapping[str, Handle], where: str) -> None:
    """Raise for one method's tensors on one layer that are no whole, contradict each other, or are no floating point numbers."""
    lost = missing(tensors)
    if lost is None:
        raise CheckpointError(
            f"layer {shown(layer)} has {listed(sorted(tensors))}, which are parts of more than one {method}",
            where=where,
        )
    if lost:
        raise MissingKeysError(
            f"layer {shown(layer)} has {listed(sorted(tensors))} of {method} but no {listed(lost)}", where=where
        )
    if why := contradiction({role: handle.shape for role, handle in tensors.items()}):
        raise ShapeMismatchError(f"layer {shown(layer)}: {why}", where=where)
    floats, either = (
        ("F64", "F32", "F16", "BF16"),
        ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
    )
    if any(h.dtype not in (either if role in _NUMBERS else floats) for role, h in tensors.items()):
        raise CheckpointError(f"layer {shown(layer)} has tensors that are no floating point numbers", where=where)
