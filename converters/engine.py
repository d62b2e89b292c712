"""The one engine: header -> parts -> entries, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.detection import Detection, families_of, format_of
from converters.families import TABLES as NAMES
from converters.families import Table
from converters.formats import FORMATS, Format, Part
from converters.formats.diffusers import BARE
from converters.formats.peft import CONFIG, FILE, WEIGHTS
from converters.provenance import KEY, Place, recorded, restored
from converters.roles import ROLES, contradiction, missing, rank, split
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, canonical, named, parted
from diffpeft.errors import (
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

# families that the formats can spell so far: those whose files use diffusers' own names
TABLES = {family: NAMES[family] for family in ("sd15", "sd2")}
Source = str | os.PathLike[str] | Mapping[str, Any]
Found = dict[str, tuple[str, Handle]]  # one layer's tensors: {role: (key, handle)}
_HASHES = ("sshs_", "modelspec.hash_")  # they are over tensor bytes, so a rewritten file must not keep them


def detect(source: Source) -> Detection:
    """What a file or dict of tensors is, from the header alone."""
    tensors, _, name = opened(source)
    format = format_of(tensors, name)
    families = families_of(tensors) or ("",)
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    parts = 0
    for key, handle in tensors.items():
        if part := FORMATS[format].split(key):
            parts += 1
            found = layers.setdefault((part.component, part.layer), {})
            found |= {part.role: handle.shape} if part.role != "alpha" else {}
    methods = {m for shapes in layers.values() for method, roles in split(shapes).items() for m in named(method, roles)}
    return Detection(format, families[0], frozenset(methods), parts / max(len(tensors), 1), families[1:])


def read(
    source: Source,
    *,
    family: str | None = None,
    format: str | None = None,
    names: Mapping[str, Iterable[str]] | None = None,
) -> Bundle:
    """A file, a PEFT folder or a dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names} are a model's own, against which flat names are resolved
    before the family's table is asked, and which tell the component of a PEFT folder.
    """
    tensors, metadata, where = opened(source)
    fmt = FORMATS[_known("format", format, FORMATS) or format_of(tensors, where)]
    families = (family,) if family else families_of(tensors)
    if family:
        _known("family", family, TABLES)
    elif not fmt.folder and not set(families) & set(TABLES):
        raise WrongBaseError(
            f"this adapter is for {' or '.join(families) or 'an unknown family'}",
            where=where,
            remedy=f"Supported: {', '.join(TABLES)}.",
        )
    groups, carried = _group(tensors, fmt, next((f for f in families if f in TABLES), ""), names or {})
    _refuse_foreign(groups, where)
    entries = [entry for layer, found in groups.items() for entry in _entries(layer, found, where)]
    entries = fmt.configured(entries, metadata)
    return Bundle(fmt.name, next(iter(families), ""), entries, carried, dict(metadata), where, families)


def write(bundle: Bundle, path: str | os.PathLike[str], *, format: str, dtype: torch.dtype | None = None) -> None:
    """Write a Bundle as a file or folder of another format, whole or not at all. `dtype` casts the factors; alphas keep theirs.

    Raises CannotConvertError, which names the layers, the reason and the formats that can hold the adapter.
    """
    if error := refusal(bundle, format):
        raise error
    fmt = FORMATS[format]
    if fmt.folder and (Path(path).suffix == ".safetensors" or Path(path).is_file()):
        raise CannotConvertError(
            f"{format} is a folder, and this is a file", where=path, remedy="Give a folder's name."
        )
    places: dict[Place, Handle] = {}
    keys: dict[Place, str] = {}
    alphas = fmt.alphas(bundle.entries)
    for entry in bundle.entries:
        found = {role: io.cast(handle, dtype, entry.layer) for role, handle in fmt.stored(entry).items()}
        if entry.layer in alphas:
            found["alpha"] = _alpha_tensor(alphas[entry.layer])
        places |= {(entry.layer, role): handle for role, handle in found.items()}
        keys |= {(entry.layer, role): fmt.join(Part(*parted(entry.layer), role), entry) for role in found}
    tensors = {keys[place]: handle for place, handle in places.items()}
    own = fmt.metadata(bundle.entries, bundle.metadata)
    other = {key for f in FORMATS.values() if not f.folder for key in f.owned}
    metadata = {k: v for k, v in bundle.metadata.items() if k not in other and not k.startswith(_HASHES)}
    metadata = {"format": "pt", **metadata, **own}
    back = restored(bundle.metadata.get(KEY, ""), format, places, _ranks(bundle.entries))
    if back:
        tensors = back[0]
        metadata = {k: v for k, v in metadata.items() if k not in {KEY, "format", *fmt.owned}} | back[1]
        metadata = {k: v for k, v in metadata.items() if not k.startswith(_HASHES)}
    elif text := recorded(bundle, format, metadata):
        metadata[KEY] = text
    if not fmt.folder:
        io.save(path, {**tensors, **bundle.carried}, metadata)
        return
    with io.folder(path) as folder:
        config = metadata.pop(CONFIG)
        io.save(folder / WEIGHTS, {**tensors, **bundle.carried}, metadata)
        (folder / FILE).write_text(config + "\n", encoding="utf-8")


def _ranks(entries: Iterable[Entry]) -> dict[str, int]:
    return {e.layer: rank({role: h.shape for role, h in e.tensors.items()}) for e in entries}


def refusal(bundle: Bundle, format: str) -> CannotConvertError | None:
    """Why a format cannot hold an adapter, with the formats that can; None if it can."""
    _known("format", format, FORMATS)
    problem = _problem(bundle, format)
    if problem is None:
        return None
    others = [name for name in FORMATS if name != format and _problem(bundle, name) is None]
    return CannotConvertError(
        f"{format} cannot hold {len(problem[1])} of {len(bundle.entries)} adapted layers: {problem[0]}",
        where=listed(problem[1]),
        remedy=f"These formats can: {', '.join(others)}." if others else "No format here can hold it whole.",
    )


def _problem(bundle: Bundle, format: str) -> tuple[str, list[str]] | None:
    """Why a format cannot hold an adapter, and the layers that are to blame."""
    fmt, layers = FORMATS[format], [e.layer for e in bundle.entries]
    if not fmt.folder:
        table = TABLES.get(bundle.family)
        if table is None:
            return f"the layer names of family {shown(bundle.family)} are not known", layers
        unknown = [layer for layer in layers if not _spells(fmt, table, *parted(layer))]
        if unknown:
            return "it has no name for them", unknown
    return fmt.problem(bundle.entries)


def _spells(fmt: Format, table: Table, component: str, layer: str) -> bool:
    """Whether a format can write a layer: its family's, or one that nobody knows in the spelling (flat or dotted) in which it was read."""
    return component in table.components and (table.knows(component, layer) or fmt.flat == ("." not in layer))


def _known(kind: str, name: str | None, known: Mapping[str, Any]) -> str | None:
    if name is not None and name not in known:
        raise UnknownNameError.of(kind, name, known)
    return name


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


def _group(tensors: Mapping[str, Handle], fmt: Format, family: str, names: Mapping[str, Iterable[str]]):
    """{canonical layer: {role: (key, handle)}} of what the format takes apart, and the tensors it does not."""
    known = {component: {layer.replace(".", "_"): layer for layer in layers} for component, layers in names.items()}
    parts = {key: fmt.split(key) for key in tensors}
    placed = _component([part.layer for part in parts.values() if part], names) if fmt.folder else ""
    groups: dict[str, Found] = {}
    carried: dict[str, Handle] = {}
    for key, handle in tensors.items():
        part = parts[key]
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
        found = groups.setdefault(canonical(part.component or placed, layer), {})
        if part.role in found:
            raise CheckpointError("two keys name the same tensor", where=listed([found[part.role][0], key]))
        found[part.role] = (key, handle)
    return groups, carried


def _component(layers: Iterable[str], names: Mapping[str, Iterable[str]]) -> str:
    """The component that layers without one are of: the model's that has most of them, its only one, or the one whose names begin so."""
    layers = set(layers)
    hits = {c: len({canonical(c, n) for n in own} & {canonical(c, n) for n in layers}) for c, own in names.items()}
    best = max(hits, key=hits.__getitem__, default="")
    if len(hits) == 1 or hits.get(best):
        return best
    heads = {BARE.get(layer.partition(".")[0], "") for layer in layers}
    return heads.pop() if len(heads) == 1 else ""


def _refuse_foreign(groups: Mapping[str, Found], where: str) -> None:
    known = {"dora", *ROLES}
    foreign = {
        found[role][0]: method
        for found in groups.values()
        for method, roles in split(
            {role: handle.shape for role, (_, handle) in found.items() if role != "alpha"}
        ).items()
        if method not in known
        for role in roles
    }
    if foreign:
        raise CheckpointError(
            f"method {' and '.join(sorted(set(foreign.values())))} is not supported",
            where=f"{where}: {listed(list(foreign)[:3])}",
            remedy=f"Supported: {', '.join(known)}.",
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
    if any(handle.dtype not in ("F64", "F32", "F16", "BF16") for handle in tensors.values()):
        raise CheckpointError(f"layer {shown(layer)} has tensors that are no floating point numbers", where=where)


def _alpha_tensor(alpha: Handle | float) -> Handle:
    if isinstance(alpha, Handle):
        return alpha
    import torch

    return io.handle(torch.tensor(float(alpha)))
