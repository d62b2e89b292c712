"""The one engine: header -> parts -> entries, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.detection import COMPONENT, HINT, Detection, Fit, bare, fit, known
from converters.families import TABLES, Table
from converters.formats import FORMATS, Format, Part
from converters.formats.peft import CONFIG, FILE, WEIGHTS
from converters.provenance import KEY, Place, blocks_in, places_in, recorded, restored
from converters.roles import ROLES, contradiction, missing, rank, split
from converters.rows import Blocks, Unfit, extent, joined
from converters.rows import split as taken_apart
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, Rule, canonical, dotted, named, parted
from diffpeft.errors import (
    AmbiguousFormatError,
    CannotConvertError,
    CheckpointError,
    MissingKeysError,
    ShapeMismatchError,
    UnknownNameError,
    UnreadableFileError,
    WrongBaseError,
    listed,
    shown,
)

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str] | Mapping[str, Any]
Names = Mapping[str, Iterable[str]]
Spelt = tuple[str, str, int | None]  # what says the component, the layer as the format spells it, the part of it
Found = dict[str, tuple[str, Handle]]  # one layer's tensors: {role: (key, handle)}
_HASHES = ("sshs_", "modelspec.hash_")  # they are over tensor bytes, so a rewritten file must not keep them
FORMAT = "diffpeft.format"  # where a file says its format, if its keys could be of another


# Reading


def detect(source: Source) -> Detection:
    """What a file or dict of tensors is, from the header alone. Raises AmbiguousFormatError if its names fit families that spell others apart."""
    tensors, metadata, where = opened(source)
    found = fit(tensors, metadata, where)
    refuse_ambiguous(found, where)
    return detected(found, tensors)


def fitting(source: Source) -> Fit:
    """All that a file fits, the ambiguous among it."""
    tensors, metadata, where = opened(source)
    return fit(tensors, metadata, where)


def detected(found: Fit, tensors: Mapping[str, Handle]) -> Detection:
    """A Detection of what fits: its confidence is the share of the keys that are an adapter's, times that of the layers that the family knows."""
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, handle in tensors.items():
        if part := FORMATS[found.format].split(key):
            own = layers.setdefault((part.word, part.layer), {})
            own |= {part.role: handle.shape} if part.role != "alpha" else {}
    methods = {m for shapes in layers.values() for method, roles in split(shapes).items() for m in named(method, roles)}
    family = found.families[0] if found.families else ""
    share = found.known.get(family, 0) / max(found.layers, 1) if family else 0.5
    confidence = found.parsed / max(len(tensors), 1) * share
    return Detection(found.format, family, frozenset(methods), confidence, found.families[1:])


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
) -> Bundle:
    """A file, a PEFT folder or a dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names} are a model's own, against which names are resolved
    before the family's table is asked, and which tell the component where the file does not.
    """
    tensors, metadata, where = opened(source)
    _known("format", format, FORMATS)
    _known("family", family, TABLES)
    found = fit(tensors, metadata, where, format)
    fmt = FORMATS[found.format]
    families = _families(found, fmt, family, names, where)
    table = TABLES.get(next(iter(families), ""), Table({}))
    groups, carried = _grouped(tensors, fmt, table, names or {}, metadata)
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
            entries.append(replace(entry, rule=rule))
    entries = fmt.configured(entries, metadata)
    return Bundle(fmt.name, next(iter(families), ""), entries, carried, dict(metadata), where, families, tuple(tensors))


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


def opened(source: Source) -> tuple[dict[str, Handle], dict[str, str], str]:
    """The tensors, the metadata and where they are. The config beside PEFT's weights counts as metadata."""
    if isinstance(source, Mapping):
        if not source or not all(
            isinstance(k, str) and hasattr(t, "dtype") and hasattr(t, "shape") for k, t in source.items()
        ):
            raise CheckpointError("a dict of tensors maps names to tensors, and holds at least one")
        return {key: io.handle(tensor) for key, tensor in source.items()}, {}, "a dict of tensors"
    path = Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    handles, metadata = io.header(path)
    config = path.with_name(FILE)
    if path.name == WEIGHTS and config.is_file():
        try:
            metadata = {**metadata, CONFIG: config.read_text(encoding="utf-8").rstrip("\n")}
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFileError(f"cannot read {FILE} ({error})", where=config) from error
    return handles, metadata, str(source)


def _known(kind: str, name: str | None, among: Mapping[str, Any]) -> str | None:
    if name is not None and name not in among:
        raise UnknownNameError.of(kind, name, among)
    return name


def _grouped(tensors: Mapping[str, Handle], fmt: Format, table: Table, names: Names, metadata: Mapping[str, str]):
    """{(canonical layer, rule): {role: (key, handle)}} of what the format takes apart, and the tensors it does not."""
    spelt: dict[Spelt, Found] = {}
    carried: dict[str, Handle] = {}
    for key, handle in tensors.items():
        part = fmt.split(key)
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
    return groups, carried


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
        shape = extent({role: h.shape for role, (_, h) in found.items()})
        rule = table.to_diffusers(component, name, shape[0] // shape[1] if shape else None)
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
        raise MissingKeysError(
            f"layer {shown(layer)} has an alpha but no {listed(ROLES['lora'][:2])}",
            where=f"{where}: {found['alpha'][0]}",
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
    if any(handle.dtype not in ("F64", "F32", "F16", "BF16") for r, handle in tensors.items() if r != "on_input"):
        raise CheckpointError(f"layer {shown(layer)} has tensors that are no floating point numbers", where=where)


# Writing


@dataclass
class Arranged:
    """The entries of a bundle as a format needs them: fused layers in the original's names, taken apart in diffusers'.

    `failed` {layer: why it cannot be}; `blocks` {fused layer: ranks of its parts}; `inexact` are layers whose numbers had to be computed.
    """

    entries: list[Entry]
    failed: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Blocks] = field(default_factory=dict)
    inexact: list[str] = field(default_factory=list)


def arranged(bundle: Bundle, fmt: Format) -> Arranged:
    """A bundle's entries as a format needs them. Layers that the file had before, if it was of this format, become these again."""
    table = TABLES.get(bundle.family, Table({}))
    text = bundle.metadata.get(KEY, "")
    before, known_blocks = places_in(text, fmt.name), blocks_in(text)
    original = fmt.original(table)
    out = Arranged([])
    groups: dict[tuple[str, str, str], dict[int, Entry]] = {}
    rules: dict[tuple[str, str, str], Rule] = {}
    for entry in bundle.entries:
        if entry.rule and (original or entry.layer in before):
            out.entries.append(entry)
            if entry.layer in known_blocks:
                out.blocks[entry.layer] = known_blocks[entry.layer]
        elif entry.rule:
            try:
                out.entries += taken_apart(entry, known_blocks.get(entry.layer))
            except Unfit as why:
                out.failed[entry.layer] = str(why)
                out.entries.append(entry)
        elif (place := _fused(entry, table)) and entry.layer not in before and (original or place[0] in before):
            layer, rule, part = place
            at = (layer, entry.method, _over(entry))
            if at not in groups:
                out.entries.append(entry)  # its place
            groups.setdefault(at, {})[part] = entry
            rules[at] = rule
        else:
            out.entries.append(entry)
    for at, found in groups.items():
        first = next(iter(found.values()))
        where = next(n for n, e in enumerate(out.entries) if e is first)
        shapes = before.get(at[0], {})
        try:
            one = joined(parted(at[0])[0], rules[at], found, shapes.get("lora_A", (None,))[0])
        except Unfit as why:
            out.failed |= {e.layer: f"{at[0]}: {why}" for e in found.values()}
            out.entries[where : where + 1] = list(found.values())
            continue
        out.entries[where] = one.entry
        out.inexact += [] if one.exact else [at[0]]
        if one.blocks:
            out.blocks[at[0]] = one.blocks
    return out


def _fused(entry: Entry, table: Table) -> tuple[str, Rule, int] | None:
    """The original's fused layer that a layer of diffusers' is a part of, with the rule and the part's number."""
    component, layer = parted(entry.layer)
    if component not in table.rules:
        return None
    shape = extent({role: h.shape for role, h in entry.tensors.items()})
    found = table.to_original(component, layer, shape[0] // shape[1] if shape else None)
    if found is None or found[0].renames:
        return None
    return dotted(component, found[0].original), *found


def _over(entry: Entry) -> str:
    return " ".join(sorted(entry.methods))


def _spelt(fmt: Format, table: Table, entry: Entry) -> Part | None:
    """How a format names a layer (the role is still to say); None if it has no name for it.

    A layer that nobody knows is spelt as it was read, flat or dotted.
    """
    component, layer = parted(entry.layer)
    word = fmt.word(component, table) if table.components or not fmt.folder else ""
    if fmt.folder:
        return Part("", layer, "")
    if word is None or component not in table.components:
        return None
    if entry.rule is None and component in table.rules and fmt.original(table):
        shape = extent({role: h.shape for role, h in entry.tensors.items()})
        found = table.to_original(component, layer, shape[0] // shape[1] if shape else None)
        if found:
            return Part(word, found[0].original, "")
        return None if table.knows(component, layer) or fmt.flat != ("." not in layer) else Part(word, layer, "")
    if entry.rule is None and not table.knows(component, layer) and fmt.flat != ("." not in layer):
        return None
    return Part(word, layer, "")


@dataclass(frozen=True)
class Plan:
    """All that a file will hold, and which layers' numbers had to be computed for it."""

    tensors: Mapping[str, Handle]
    metadata: Mapping[str, str]
    inexact: tuple[str, ...] = ()


def write(bundle: Bundle, path: str | os.PathLike[str], *, format: str, dtype: torch.dtype | None = None) -> None:
    """Write a Bundle as a file or folder of another format, whole or not at all. `dtype` casts the factors; alphas keep theirs.

    Raises CannotConvertError, which names the layers, the reason and the formats that can hold the adapter.
    """
    store(planned(bundle, format, dtype), path, format)


def planned(bundle: Bundle, format: str, dtype: torch.dtype | None = None) -> Plan:
    """What `write` would write. Raises CannotConvertError."""
    if error := refusal(bundle, format):
        raise error
    fmt, table = FORMATS[format], TABLES.get(bundle.family, Table({}))
    order = arranged(bundle, fmt)
    entries = order.entries
    places: dict[Place, Handle] = {}
    keys: dict[Place, str] = {}
    alphas = fmt.alphas(entries)
    for entry in entries:
        found = {role: io.cast(handle, dtype, entry.layer) for role, handle in fmt.stored(entry).items()}
        if entry.layer in alphas:
            alpha = alphas[entry.layer]
            found["alpha"] = alpha if isinstance(alpha, Handle) else io.scalar(float(alpha))
        spelt = _spelt(fmt, table, entry)
        assert spelt is not None
        places |= {(entry.layer, role): handle for role, handle in found.items()}
        keys |= {(entry.layer, role): fmt.join(replace(spelt, role=role), entry) for role in found}
    tensors = {keys[place]: handle for place, handle in places.items()} | bundle.carried
    own = fmt.metadata(entries, bundle.metadata)
    other = {key for f in FORMATS.values() if not f.folder for key in f.owned}
    kept = {
        k: v
        for k, v in bundle.metadata.items()
        if k not in other and not k.startswith((*_HASHES, FORMAT, HINT, COMPONENT))
    }
    metadata = {"format": "pt", **kept, **own}
    if back := restored(bundle.metadata.get(KEY, ""), format, places, _ranks(entries), bundle.carried):
        tensors, lost, names = back
        metadata = {k: v for k, v in metadata.items() if k not in {KEY, "format", *fmt.owned}} | lost
        metadata = {k: metadata[k] for k in (*names, *metadata) if k in metadata and not k.startswith(_HASHES)}
    else:
        certain = bundle.family and len(bundle.families) < 2 and not fmt.folder
        metadata |= {HINT: bundle.family} if certain else {}
        metadata |= {COMPONENT: parted(entries[0].layer)[0]} if fmt.single and not fmt.folder else {}
        metadata |= {FORMAT: format} if format == "onetrainer" else {}
        if text := recorded(bundle, format, metadata, order.blocks):
            metadata[KEY] = text
        else:
            metadata.pop(KEY, None)
    return Plan(tensors, metadata, tuple(order.inexact))


def store(plan: Plan, path: str | os.PathLike[str], format: str) -> None:
    """Write what is planned, whole or not at all."""
    if not FORMATS[format].folder:
        io.save(path, plan.tensors, plan.metadata)
        return
    if Path(path).suffix == ".safetensors" or Path(path).is_file():
        raise CannotConvertError(
            f"{format} is a folder, and this is a file", where=path, remedy="Give a folder's name."
        )
    with io.folder(path) as folder:
        metadata = dict(plan.metadata)
        config = metadata.pop(CONFIG)
        io.save(folder / WEIGHTS, plan.tensors, metadata)
        (folder / FILE).write_text(config + "\n", encoding="utf-8")


def _ranks(entries: Iterable[Entry]) -> dict[str, int]:
    return {e.layer: rank({role: h.shape for role, h in e.tensors.items()}) for e in entries}


def refusal(bundle: Bundle, format: str) -> CannotConvertError | None:
    """Why a format cannot hold an adapter, with the formats that can; None if it can."""
    _known("format", format, FORMATS)
    trouble = problem(bundle, format)
    if trouble is None:
        return None
    why, layers = trouble
    others = [name for name, fmt in FORMATS.items() if name != format and fmt.writable and not problem(bundle, name)]
    return CannotConvertError(
        f"{format} cannot hold {len(layers)} of {len(bundle.entries)} adapted layers: {why}",
        where=listed(layers),
        remedy=f"These formats can: {', '.join(others)}." if others else "No format here can hold it whole.",
    )


def problem(bundle: Bundle, format: str) -> tuple[str, list[str]] | None:
    """Why a format cannot hold an adapter, and the layers that are to blame."""
    fmt, layers = FORMATS[format], [e.layer for e in bundle.entries]
    if not fmt.writable:
        return "it is only read, not written", layers
    table = TABLES.get(bundle.family)
    if table is None and not fmt.folder:
        return f"the layer names of family {shown(bundle.family)} are not known", layers
    order = arranged(bundle, fmt)
    if order.failed:
        return (
            f"a fused layer cannot be {'joined' if fmt.original(table or Table({})) else 'taken apart'}: {next(iter(order.failed.values()))}",
            [*order.failed],
        )
    components = {parted(e.layer)[0] for e in order.entries}
    if fmt.single and len(components) > 1:
        return f"it holds one component, not {' and '.join(sorted(components))}", layers
    unknown = [e.layer for e in order.entries if _spelt(fmt, table or Table({}), e) is None]
    if unknown:
        return "it has no name for them", unknown
    return fmt.problem(order.entries)
