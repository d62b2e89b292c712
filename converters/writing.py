"""The engine's writing side: entries -> fused and named as a format needs them -> file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.detection import COMPONENT, FORMAT, HINT
from converters.engine import known_name
from converters.families import Table
from converters.formats import FORMATS, Format, Part
from converters.formats.config import ranks_of
from converters.formats.fields import without_scale
from converters.formats.peft import CONFIG, FILE, WEIGHTS
from converters.provenance import KEY, Place, blocks_in, own_record, places_in, recorded, restored
from converters.rows import Blocks, Unfit, aspect, joined
from converters.rows import split as taken_apart
from diffpeft import io
from diffpeft.bundle import COMPONENTS, Bundle, Entry, Handle, Rule, dotted, parted
from diffpeft.errors import CannotConvertError, ConfigError, listed, shown
from diffpeft.files import config_in
from diffpeft.methods.layout import LAYOUTS, is_scaled

if TYPE_CHECKING:
    import torch

_HASHES = ("sshs_", "modelspec.hash_")  # they are over tensor bytes, so a rewritten file must not keep them


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
    table = fmt.tables.get(bundle.family, Table({}))
    text = bundle.metadata.get(KEY, "")
    before, known_blocks = places_in(text, fmt.name), blocks_in(text)
    original = fmt.original(table)
    out = Arranged([])
    groups: dict[tuple[str, str, str], dict[int, Entry]] = {}
    rules: dict[tuple[str, str, str], Rule] = {}
    entries: list[Entry] = []
    for entry in bundle.entries if fmt.folder else map(without_scale, bundle.entries):
        if not entry.rule or entry.layer in before or (original and table.is_original(*parted(entry.layer))):
            entries.append(entry)
            continue
        try:
            entries += taken_apart(entry, known_blocks.get(entry.layer))
        except Unfit as why:
            out.failed[entry.layer] = str(why)
            entries.append(entry)
    for entry in entries:
        if entry.rule:
            out.entries.append(entry)
            if entry.layer in known_blocks:
                out.blocks[entry.layer] = known_blocks[entry.layer]
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
    if fmt.folder:
        out.entries = [_named(entry, table) for entry in out.entries]
    return out


def _named(entry: Entry, table: Table) -> Entry:
    """The entry with the name that its layer has in the family's model, if no model told it."""
    component, layer = parted(entry.layer)
    if entry.own is not None or component not in table.encoders:
        return entry
    return replace(entry, own=table.own_name(component, layer))


def _fused(entry: Entry, table: Table) -> tuple[str, Rule, int] | None:
    """The original's fused layer that a layer of diffusers' is a part of, with the rule and the part's number."""
    component, layer = parted(entry.layer)
    if component not in table.rules:
        return None
    found = table.to_original(component, layer, aspect(entry.shapes))
    if found is None or found[0].renames:
        return None
    return dotted(component, found[0].original), *found


def _over(entry: Entry) -> str:
    return " ".join(sorted(entry.methods))


def _spelt(fmt: Format, table: Table, entry: Entry, source: str) -> Part | None:
    """How a format names a layer (the role is still to say); None if it has no name for it.

    A layer that no table has is spelt as it was read from a `source` of another format, if both have the same program's names, flat or dotted. One
    of a component that no table has (a model of a family that is not known) has its own name.
    """
    component, layer = parted(entry.layer)
    if fmt.folder:
        return Part("", layer, "")
    word = fmt.word(component, table)
    if word is None:
        return None
    if component not in table.components:
        foreign = fmt.original(table) and not component.startswith("text_encoder")
        return None if foreign else Part(word, layer, "")
    original = fmt.original(table) and component in table.rules
    if entry.rule:
        return Part(word, layer, "")
    if original:
        found = table.to_original(component, layer, aspect(entry.shapes))
        if found:
            return Part(word, found[0].original, "")
    elif entry.own is not None or table.knows(component, layer):
        return Part(word, layer, "")
    before = source in FORMATS and FORMATS[source].original(table) and component in table.rules
    alike = fmt.flat == ("." not in layer) and before == original and not table.knows(component, layer)
    return Part(word, layer, "") if alike else None


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
    store(plans(bundle, format, path, dtype), path, format)


def plans(
    bundle: Bundle, format: str, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> dict[str, Plan]:
    """{component: what `write` would write}. The component is empty unless there are several, the format holds one, and `path` is a folder's name.

    Raises CannotConvertError.
    """
    known_name("format", format, FORMATS)
    check_path(path)
    fmt, file = FORMATS[format], os.fspath(path).endswith(".safetensors") or os.path.isfile(path)
    components = list(dict.fromkeys(parted(e.layer)[0] for e in bundle.entries))
    several = fmt.single and not file and len(components) > 1
    _check_place(Path(path), format, folder=fmt.folder or several)
    if not several:
        return {"": planned(bundle, format, dtype)}
    _refuse_strangers(Path(path), components)
    found = {}
    for n, component in enumerate(components):
        own = [e for e in bundle.entries if parted(e.layer)[0] == component]
        part = replace(bundle, entries=own, carried={} if n else bundle.carried)
        found[component] = planned(part, format, dtype, bundle)
    return found


def check_path(path: object) -> None:
    """Raise ConfigError for what is no path."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise ConfigError(f"the output is {shown(path)}", remedy="It is a path.")


def _check_place(path: Path, format: str, *, folder: bool) -> None:
    """Raise CannotConvertError for a place where this cannot be written because of what is there."""
    if folder and (path.suffix == ".safetensors" or path.is_file()):
        raise CannotConvertError(
            f"{format} is a folder, and this is a file", where=path, remedy="Give a folder's name."
        )
    if not folder and path.is_dir():
        raise CannotConvertError(
            f"{format} is a file, and this is a folder", where=path, remedy="Give a name that ends in .safetensors."
        )
    above = next((place for place in path.parents if os.path.lexists(place)), None)
    if above is not None and not above.is_dir():
        raise CannotConvertError(
            "nothing can be written below a file", where=f"{path}: {above}", remedy="Give another place."
        )


def _refuse_strangers(path: Path, components: Sequence[str]) -> None:
    """Raise CannotConvertError if a folder holds files of another adapter that would be read along with these, or instead of them."""
    names = [component for component in COMPONENTS if component not in components]
    ends = (f"/{WEIGHTS}", ".safetensors")
    strangers = [f"{name}{end}" for name in names for end in ends if io.present(path / f"{name}{end}")]
    strangers += [WEIGHTS] if io.present(path / WEIGHTS) else []
    if strangers:
        raise CannotConvertError(
            "the folder holds parts of another adapter, with which this one would be read",
            where=f"{path}: {listed(strangers)}",
            remedy="Remove them, or give another folder.",
        )


def planned(bundle: Bundle, format: str, dtype: torch.dtype | None = None, whole: Bundle | None = None) -> Plan:
    """What `write` would write to one file or folder, of a bundle that may be a part of a `whole` one. Raises CannotConvertError."""
    fmt = FORMATS[format]
    table = fmt.tables.get(bundle.family, Table({}))
    order, trouble = _tried(bundle, fmt)
    if trouble:
        raise _refused(bundle, format, *trouble)
    entries = order.entries
    places: dict[Place, Handle] = {}
    keys: dict[Place, str] = {}
    alphas = fmt.alphas(entries)
    for entry in entries:
        found = {role: io.cast(handle, dtype, entry.layer) for role, handle in fmt.stored(entry).items()}
        if entry.layer in alphas:
            alpha = alphas[entry.layer]
            found["alpha"] = alpha if isinstance(alpha, Handle) else io.scalar(float(alpha))
        spelt = _spelt(fmt, table, entry, bundle.format)
        assert spelt is not None
        places |= {(entry.layer, role): handle for role, handle in found.items()}
        keys |= {(entry.layer, role): fmt.join(replace(spelt, role=role), entry) for role in found}
    tensors = {keys[place]: handle for place, handle in places.items()} | _shared(bundle, fmt, dtype) | bundle.carried
    text = own_record(bundle) if bundle.format == format else bundle.metadata.get(KEY, "")
    if back := restored(text, format, places, ranks_of(entries), bundle.carried, _unscaled(entries)):
        tensors, before, names = back
        if bundle.format != format:
            own = {"format", *(key for f in FORMATS.values() for key in f.owned)}
            since = {k: v for k, v in bundle.metadata.items() if k in names or not (k in own or _ours(k))}
            before = since | before
        metadata = {k: before[k] for k in (*names, *before) if k in before and not k.startswith(_HASHES)}
        if fmt.folder and CONFIG not in metadata:  # the file that this is from had none
            metadata |= fmt.metadata(entries, bundle.metadata)
        if _agrees(fmt, entries, metadata):
            return Plan(tensors, metadata, tuple(order.inexact))
    other = {key for f in FORMATS.values() if not f.folder for key in f.owned}
    metadata = {k: v for k, v in bundle.metadata.items() if k not in other and not k.startswith(_HASHES)}
    metadata = {"format": "pt", **{k: v for k, v in metadata.items() if not _ours(k) or k == CONFIG}}
    metadata |= fmt.metadata(entries, bundle.metadata)
    certain = bundle.family and len(bundle.families) < 2 and (whole or not fmt.folder)
    metadata |= {HINT: bundle.family} if certain else {}
    metadata |= {COMPONENT: parted(entries[0].layer)[0]} if fmt.single and parted(entries[0].layer)[0] else {}
    metadata |= {FORMAT: format} if format == "onetrainer" else {}
    if record := recorded(whole or bundle, format, metadata, order.blocks):
        metadata[KEY] = record
    return Plan(tensors, metadata, tuple(order.inexact))


def _shared(bundle: Bundle, fmt: Format, dtype: torch.dtype | None) -> dict[str, Handle]:
    """The tensors of the whole adapter by their keys, unless all its layers say that they are not saved."""
    saved = [e.shared for e in bundle.entries if e.options.get("save_projection", True)]
    return {fmt.shared_keys[role]: io.cast(h, dtype, role) for shared in saved for role, h in shared.items()}


def _ours(key: str) -> bool:
    return key.startswith("diffpeft.")


def _agrees(fmt: Format, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bool:
    """Whether metadata of an earlier file say of these entries what they are now; an alpha beside the tensors was checked already."""
    if not fmt.owned & {*metadata}:
        return True
    beside = fmt.alphas(entries)
    bare = [replace(e, alpha=e.alpha if e.layer in beside else None, options={}) for e in entries]
    for old, new in zip(fmt.configured(bare, metadata), entries, strict=True):
        a, b = io.number(old.alpha), io.number(new.alpha)
        if (a is None) != (b is None):
            return False
        if old.options.get("scale", 1) != new.options.get("scale", 1):
            return False
        if a is not None and not math.isclose(a, b or 0.0, rel_tol=1e-6) and not (a != a and b != b):
            return False
    return True


def store(found: Mapping[str, Plan], path: str | os.PathLike[str], format: str) -> None:
    """Write what is planned, whole or not at all."""
    end = "" if FORMATS[format].folder else ".safetensors"
    if [*found] == [""]:
        _store(found[""], Path(path), format)
        return
    with io.folder(path) as folder:
        for component, plan in found.items():
            _store(plan, folder / f"{component}{end}", format)


def _store(plan: Plan, path: Path, format: str) -> None:
    if not FORMATS[format].folder:
        io.save(path, plan.tensors, plan.metadata)
        return
    with io.folder(path) as folder:
        metadata = dict(plan.metadata)
        config = metadata.pop(CONFIG)
        io.save(folder / WEIGHTS, plan.tensors, metadata)
        write_config(folder / FILE, config + "\n")


def write_config(path: Path, text: str) -> None:
    """Write a config, unless it would not be read again: then CannotConvertError."""
    try:
        config_in(text, FILE)
        encoded = text.encode()
    except ValueError as error:
        raise CannotConvertError(f"a config like this would not be read again ({error})", where=path) from error
    with io.replacing(path) as f:
        f.write(encoded)


def _unscaled(entries: Iterable[Entry]) -> set[str]:
    """Layers of which no entry has a scale: whole differences, norms, (IA)^3, a LoKr of two whole halves."""
    scaled = {e.layer for e in entries if LAYOUTS[e.method].alpha == "bound" or is_scaled(e.method, e.tensors)}
    return {e.layer for e in entries} - scaled


def refusal(bundle: Bundle, format: str) -> CannotConvertError | None:
    """Why a format cannot hold an adapter, with the formats that can; None if it can."""
    known_name("format", format, FORMATS)
    trouble = problem(bundle, format)
    return _refused(bundle, format, *trouble) if trouble else None


def _refused(bundle: Bundle, format: str, why: str, layers: list[str]) -> CannotConvertError:
    told = {e.layer: e.targets for e in bundle.entries}
    layers = list(dict.fromkeys(target for layer in layers for target in told.get(layer, (layer,))))
    others = [name for name, fmt in FORMATS.items() if name != format and fmt.writable and not problem(bundle, name)]
    return CannotConvertError(
        f"{format} cannot hold {len(layers)} of {len(bundle.entries)} adapted layers: {why}",
        where=listed(layers),
        remedy=f"These formats can: {', '.join(others)}." if others else "No format here can hold it whole.",
    )


def problem(bundle: Bundle, format: str) -> tuple[str, list[str]] | None:
    """Why a format cannot hold an adapter, and the layers that are to blame."""
    return _tried(bundle, FORMATS[format])[1]


def _tried(bundle: Bundle, fmt: Format) -> tuple[Arranged, tuple[str, list[str]] | None]:
    """The entries as the format needs them, and why it cannot hold them, with the layers that are to blame."""
    layers = [e.layer for e in bundle.entries]
    if not fmt.writable:
        return Arranged([]), ("it is only read, not written", layers)
    if bundle.family and bundle.family not in fmt.tables and not fmt.folder:
        return Arranged([]), (f"it is not for family {shown(bundle.family)}", layers)
    order = arranged(bundle, fmt)
    trouble = _trouble(order, fmt, fmt.tables.get(bundle.family, Table({})), layers, bundle.format)
    if taken := [key for key in bundle.carried if not trouble and bundle.format != fmt.name and fmt.split(key)]:
        trouble = "there are keys that are no adapter's, and would be one's in this format", taken
    return order, trouble


def _trouble(
    order: Arranged, fmt: Format, table: Table, layers: list[str], source: str
) -> tuple[str, list[str]] | None:
    if order.failed:
        return (
            f"a fused layer cannot be {'joined' if fmt.original(table) else 'taken apart'}: {next(iter(order.failed.values()))}",
            [*order.failed],
        )
    components = {parted(e.layer)[0] for e in order.entries}
    if fmt.single and len(components) > 1:
        return f"it holds one component, not {' and '.join(sorted(components))}", layers
    unknown = [e.layer for e in order.entries if _spelt(fmt, table, e, source) is None]
    if unknown and not table.components:
        return "what other programs call the layers of a model of an unknown family is not known", unknown
    if unknown:
        return "it has no name for them", unknown
    taken: dict[tuple[str, str], int] = {}
    for e in order.entries:
        for role in fmt.stored(e):
            taken[e.layer, role] = taken.get((e.layer, role), 0) + 1
    twice = list(dict.fromkeys(layer for (layer, _), n in taken.items() if n > 1))
    if twice:
        return "it has room for one adapter of a kind on a layer", twice
    return fmt.problem(order.entries)
