"""The engine's reading side: header -> parts -> entries. The way back is writing.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.detection import COMPONENT, Detection, Fit, bare, fit
from converters.families import TABLES, Table
from converters.formats import FORMATS, Format, Part
from converters.formats.peft import CONFIG, FILE, WEIGHTS
from converters.formats.wrappers import all_unwrapped
from converters.opening import Opened, Source, opened, parts_of
from converters.roles import OLD_OFT, missing, split
from converters.rows import aspect
from diffpeft import io
from diffpeft.bundle import COMPONENTS, Bundle, Entry, Handle, Rule, canonical, dotted
from diffpeft.errors import (
    AmbiguousFormatError,
    CheckpointError,
    ConfigError,
    MissingKeysError,
    ShapeMismatchError,
    UnknownNameError,
    WrongBaseError,
    inside,
    listed,
    shown,
)
from diffpeft.methods.layout import LAYOUTS, PRODUCTS, is_scaled, named
from diffpeft.methods.shapes import contradiction

Names = Mapping[str, Iterable[str]]  # of each component; a mapping tells the shapes of their weights too
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
        return _common(several)
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
    alpha: float | None = None,
) -> Bundle:
    """A file, a PEFT folder or a dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names, or {name: shape of the canonical weight}} are a model's own, against
    which names are resolved beside the family's table, and which tell the component where the file does not. `fits` is what `fitting` has said
    of it. `metadata` are added to the file's. `alpha` is that of all layers for which the file tells none; without it such a layer has scale 1.
    """
    check_alpha(alpha)
    known_name("format", format, FORMATS)
    known_name("family", family, TABLES)
    if several := parts_of(source):
        common = _common(several)
        family = family or (common.families[0] if common.families and not common.ambiguous else None)
        bundles = [read(part, family=family, format=format, names=names, alpha=alpha) for part in several]
        return _merged(bundles, source)
    tensors, told, where = fits.opened if fits else opened(source)
    with inside(where):
        return _read(Opened(tensors, {**told, **(metadata or {})}, where), family, format, names, fits, alpha)


def _read(
    source: Opened,
    family: str | None,
    format: str | None,
    names: Names | None,
    fits: Fit | None,
    alpha: float | None,
) -> Bundle:
    tensors, metadata, where = source
    found = fits or fit(tensors, metadata, where, format, family)
    fmt = FORMATS[found.format]
    families = _families(found, fmt, family, names, where)
    table = fmt.tables.get(next(iter(families), ""), Table({}))
    parts = {**found.parts, **_literal(tensors, fmt, names or {})}
    groups, carried = _grouped(tensors, parts, fmt, table, names or {}, metadata, where)
    _refuse_foreign(groups, where)
    shared = {role: carried.pop(key) for role, key in fmt.shared_keys.items() if key in carried}
    shapes = {
        canonical(c, n): s for c, own in (names or {}).items() if isinstance(own, Mapping) for n, s in own.items()
    }
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
            entries.append(replace(entry, rule=rule, shape=shapes.get(layer)))
    entries = fmt.configured(entries, metadata)
    entries = [replace(e, shared=shared) if LAYOUTS[e.method].shared else e for e in entries]
    if alpha is not None:
        entries = [_with_alpha(entry, alpha) for entry in entries]
    elif fmt.folder and CONFIG not in metadata and any(e.alpha is None for e in entries):
        _say_unconfigured(where)
    return Bundle(fmt.name, next(iter(families), ""), entries, carried, dict(metadata), where, families, tuple(tensors))


def _literal(keys: Iterable[str], fmt: Format, names: Names) -> dict[str, Part]:
    """Keys that would be taken for wrapped, taken apart as they stand, where the model has a layer of that name."""
    wrapped = [key for key, bare_key in all_unwrapped([*keys]).items() if bare_key != key] if names else []
    own = {flat for layers in names.values() if wrapped for name in layers for flat in (name, _flat(name))}
    return {key: part for key in wrapped if (part := fmt.split(key)) and part.layer in own}


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
        stacklevel=3,
    )


def _with_alpha(entry: Entry, alpha: float) -> Entry:
    """The entry with this alpha, if its method is scaled by one and the file tells none."""
    takes = entry.alpha is None and entry.method in PRODUCTS and is_scaled(entry.method, entry.tensors)
    return replace(entry, alpha=float(alpha)) if takes else entry


def unknown_family(found: Fit, where: object, wanted: str = "") -> WrongBaseError:
    """The error about a file whose layers no table has, with some of its keys; `wanted` is the family that it was to be."""
    alike = (
        f"its layers are those of {' or '.join(found.looks_like[:3])}"
        if found.looks_like
        else "no table has its layers"
    )
    keys = [key for key, part in found.parts.items() if part.role != "alpha"]
    return WrongBaseError(
        f"this adapter is for {f'another model than {wanted}' if wanted else 'an unknown family'}: {alike}",
        where=f"{where}: {listed(keys[:3])}{' ...' if len(keys) > 3 else ''}",
        remedy="Without a table it can only be loaded: load_lora on a pipeline of its own model takes the names from there.",
    )


def _common(parts: Sequence[Opened]) -> Fit:
    """What the files of one adapter fit together. An unknown denoiser decides; text encoders that no table knows (language models) say nothing."""
    fits = [fitting(part) for part in parts]
    encoders = [Path(part.where).name.startswith("text_encoder") for part in parts]
    unknown = [f for f, encoder in zip(fits, encoders, strict=True) if not (f.families or encoder)]
    told = sorted((f for f in fits if f.families), key=lambda f: len(f.families))
    if unknown or not told:
        return (unknown or fits)[0]
    common = tuple(family for family in told[0].families if all(family in f.families for f in told))
    ambiguous = any(f.ambiguous for f in told) and not any(len(f.families) == 1 for f in told)
    return replace(told[0], families=common, ambiguous=bool(common) and ambiguous)


def _merged(bundles: Sequence[Bundle], source: Source) -> Bundle:
    entries = [e for b in bundles for e in b.entries]
    carried = {key: h for b in bundles for key, h in b.carried.items()}
    return replace(bundles[0], entries=entries, carried=carried, order=(), source=str(source))


def _families(found: Fit, fmt: Format, family: str | None, names: Names | None, where: str) -> tuple[str, ...]:
    """The families to read a file as: the one that was asked for, if its names fit, or all that fit."""
    if family is None:
        if names is None:
            refuse_ambiguous(found, where)
            if not found.families and not fmt.folder:
                raise unknown_family(found, where)
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
    where: str,
) -> tuple[dict[tuple[str, Rule | None], Found], dict[str, Handle]]:
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
    alone = _bare([layer for word, layer, _ in spelt if not word], fmt, table, names, metadata, where)
    components = {word: _component(word, fmt, table, names) if word else alone for word, _, _ in spelt}
    spellings = {
        component: _Spelling(
            fmt, table, component, names.get(component, ()), [at[1] for at in spelt if components[at[0]] == component]
        )
        for component in dict.fromkeys(components.values())
    }
    groups: dict[tuple[str, Rule | None], Found] = {}
    for (word, layer, number), found in spelt.items():
        shapes = {role: h.shape for role, (_, h) in found.items()}
        place = spellings[components[word]].placed(layer, number, aspect(shapes))
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


def _bare(
    layers: Sequence[str], fmt: Format, table: Table, names: Names, metadata: Mapping[str, str], where: str
) -> str:
    """The component that layers without one are of: the one that the metadata name, the one that the file is called after if its names fit, the
    model's that has most of them, its only one, or the family's.
    """
    if not layers:
        return ""
    flat = {_flat(layer) for layer in layers}
    hits = {c: len(flat & {_flat(s) for n in own for s in (n, canonical(c, n))}) for c, own in names.items()}
    hits = {c: n or len(flat & {_flat(n.removeprefix("text_model.")) for n in names[c]}) for c, n in hits.items()}
    if (told := metadata.get(COMPONENT)) in COMPONENTS and (told in names or len(names) > 1):
        return str(told)
    path = Path(where).parent if Path(where).name == WEIGHTS else Path(where)
    if hits.get(called := path.name.removesuffix(".safetensors")):
        return called
    best = max(hits, key=hits.__getitem__, default="")
    return best if len(hits) == 1 or hits.get(best) else bare(table, layers, fmt, metadata)


def _component(word: str, fmt: Format, table: Table, names: Names) -> str:
    """The component that a word means. Of a denoiser that the model calls otherwise than the family the only one that it has."""
    component = fmt.component(word, table)
    denoisers = [c for c in names if not c.startswith("text_encoder")]
    if component in names or component.startswith("text_encoder") or word.startswith(component) or not denoisers:
        return component
    return denoisers[0]


class _Spelling:
    """How a file spells one component's layers: a model's own names, where a model is known, and the family's tables, of which one program's are the
    file's. A name that both have, for other layers, means what it means in the file's spelling.
    """

    def __init__(self, fmt: Format, table: Table, component: str, names: Iterable[str], layers: Sequence[str]):
        self.fmt, self.table, self.component = fmt, table, component
        self.own = {_flat(name): name for name in names}
        told = [(self._own(layer) is not None, self._is_original(layer)) for layer in layers] if self.own else []
        self.votes = told.count((False, True)) - told.count((True, False))  # above 0 for the original's names

    def placed(self, layer: str, number: int | None, aspect: int | None) -> tuple[str, Rule | None]:
        """The canonical layer behind a spelt one, and its rule if it is one of the original program's whose rows are not a layer of diffusers'.

        A name that nobody knows stays as it is: whoever needs the layer will miss it and say so.
        """
        own, original = self._own(layer), self._is_original(layer)
        if own is not None and not (original and self._is_meant(own)):
            return canonical(self.component, own), None
        if original:
            name = self.table.original_dotted(self.component, _flat(layer)) or layer
            rule = self.table.to_diffusers(self.component, name, aspect)
            if rule is not None:
                if number is not None and number < len(rule.parts):
                    return dotted(self.component, rule.parts[number][0]), None
                if rule.renames:
                    return dotted(self.component, rule.parts[0][0]), None
                return dotted(self.component, name), rule
        if self.component in self.table.encoders:
            layer = self.table.encoded(self.component, layer, self.fmt.flat) or layer
        elif self.fmt.flat:
            layer = self.table.dotted(self.component, layer) or layer
        return canonical(self.component, layer), None

    def _own(self, layer: str) -> str | None:
        """The model's layer of this name."""
        if self.fmt.flat:
            return self.own.get(layer) or self.own.get(layer.removeprefix("text_model_"))
        return layer if self.own.get(_flat(layer)) == layer else None

    def _is_meant(self, own: str) -> bool:
        """Whether a name that is also the model's is the original's here: as most of the file's are, or the format's, or where the table has no other."""
        if self.votes:
            return self.votes > 0
        return self.fmt.original(self.table) or not self.table.knows(self.component, own)

    def _is_original(self, layer: str) -> bool:
        """Whether the name is the original program's, whatever else it is."""
        if self.component not in self.table.rules:
            return False
        found = self.table.original_dotted(self.component, _flat(layer))
        return found is not None and (self.fmt.flat or found == layer)


def _refuse_foreign(groups: Mapping[Any, Found], where: str) -> None:
    foreign = {
        found[role][0]: method
        for found in groups.values()
        for method, roles in split(
            {role: handle.shape for role, (_, handle) in found.items() if role != "alpha"}
        ).items()
        if method not in LAYOUTS
        for role in roles
    }
    if foreign:
        raise CheckpointError(
            f"method {' and '.join(sorted(set(foreign.values())))} is not supported",
            where=f"{where}: {listed(list(foreign)[:3])}",
            remedy=f"Supported: {', '.join(LAYOUTS)}.",
        )


def _entries(layer: str, found: Found, where: str) -> list[Entry]:
    """One entry a method, in the order in which they act. The alpha is all methods', its key is the first's."""
    shapes = {role: handle.shape for role, (_, handle) in found.items() if role != "alpha"}
    methods = split(shapes)
    if not methods:
        key = next(iter(found.values()))[0]
        what = "an alpha" if "alpha" in found else listed(found)
        raise MissingKeysError(
            f"layer {shown(layer)} has {what} but no {listed(sorted(LAYOUTS['lora'].forms[0].needed))}",
            where=f"{where}: {key}",
        )
    alpha = found["alpha"][1] if "alpha" in found else None
    with inside(found["alpha"][0] if alpha else layer):
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
