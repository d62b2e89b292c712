"""The writing side's last step: a finished file in the words of the file that its adapter was once read from, if that was one of its format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.formats import FORMATS, Format
from diffpeft.converters.formats.config import ranks_of
from diffpeft.converters.holding import Held
from diffpeft.converters.provenance import KEY, Original, Place, Row, own_record, record_in
from diffpeft.converters.spelling import HASHES, OWNED, Draft, is_ours
from diffpeft.errors import CheckpointError
from diffpeft.methods.layout import LAYOUTS, is_scaled


def restored(file: Draft, held: Held) -> Draft:
    """The file with the keys and alphas of the earlier one, and its metadata if these still say the same; as it is if there is no record of one, or it
    was another adapter's.
    """
    bundle, fmt, entries = held.bundle, FORMATS[held.format], held.arranged.entries
    record = (
        own_record(bundle) if bundle.format == held.format else record_in(bundle.metadata.get(KEY, ""), held.format)
    )
    tensors = _tensors(record, file, entries) if record else None
    if record is None or tensors is None:
        return file
    metadata = _metadata(record, bundle, file, fmt)
    return replace(file, tensors=tensors, metadata=metadata if _agrees(fmt, entries, metadata) else file.metadata)


def _tensors(record: Original, file: Draft, entries: Sequence[Entry]) -> dict[str, Handle] | None:
    """The file's tensors by the keys that a record has for them; None if it is of another adapter.

    An alpha that only one of both has must be the rank.
    """
    ranks, unscaled, placed = ranks_of(entries), _unscaled(entries), {*file.places.values()}
    spelt = {place: file.tensors[key] for place, key in file.places.items()}
    tensors = {**{(layer, "alpha"): io.scalar(rank) for layer, rank in ranks.items() if rank}, **spelt}
    beside = {key: handle for key, handle in file.tensors.items() if key not in placed}  # of no layer
    out: dict[str, Handle] = {}
    for key, row in record.keys.items():
        handle = _as_before(row, tensors, unscaled) if row else beside.get(key)
        if row and handle is None:
            return None
        out |= {key: handle} if handle else {}
    added = {place: tensors[place] for place in tensors.keys() - record.places}
    if not _are_ranks(added, ranks):
        return None
    return {**out, **{key: handle for key, handle in beside.items() if key not in out}}


def _are_ranks(tensors: Mapping[Place, Handle], ranks: Mapping[str, int]) -> bool:
    """Whether these are alphas alone that say no more than the rank does."""
    return all(role == "alpha" and io.number(h) == ranks.get(layer) for (layer, role), h in tensors.items())


def _as_before(row: Row, tensors: Mapping[Place, Handle], unscaled: Collection[str]) -> Handle | None:
    """A tensor as it was; None if there is none like it now. An alpha of layers that are `unscaled` means nothing, and is what it was."""
    is_alpha = row.role == "alpha"
    if is_alpha and {*row.layers} <= {*unscaled}:
        return row.number
    if row.shape is None or not {*row.places} <= tensors.keys():
        return None
    now = tensors[row.places[0]]
    if math.prod(row.shape) != math.prod(now.shape):
        return None
    if not is_alpha or row.number is None:
        return io.reshaped(now, row.shape)
    return row.number if _alike(io.number(row.number), io.number(now)) else None


def _unscaled(entries: Iterable[Entry]) -> set[str]:
    """Layers of which no entry has a scale: whole differences, norms, (IA)^3, a LoKr of two whole halves."""
    entries = list(entries)
    scaled = {e.layer for e in entries if LAYOUTS[e.method].alpha == "bound" or is_scaled(e.method, e.tensors)}
    return {entry.layer for entry in entries} - scaled


def _metadata(record: Original, bundle: Bundle, file: Draft, fmt: Format) -> dict[str, str]:
    """The earlier file's metadata, in its order, with what was added since; the config of a folder that had none."""
    names, before = record.names, record.metadata
    if bundle.format != fmt.name:
        before = {k: v for k, v in bundle.metadata.items() if k in names or not (k in OWNED or is_ours(k))} | before
    metadata = {key: before[key] for key in (*names, *before) if key in before and not key.startswith(HASHES)}
    config = {key: value for key, value in file.metadata.items() if fmt.folder and key in fmt.owned}
    return metadata if config.keys() <= metadata.keys() else metadata | config


def _agrees(fmt: Format, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bool:
    """Whether metadata of an earlier file say of these entries what they are now; an alpha beside the tensors was checked already."""
    if not fmt.owned & metadata.keys():
        return True
    beside = fmt.alphas(entries)
    bare = [replace(entry, alpha=entry.alpha if entry.layer in beside else None, options={}) for entry in entries]
    try:
        told = fmt.configured(bare, metadata)
    except CheckpointError:  # they are of other entries than these
        return False
    return all(
        _alike(io.number(old.alpha), io.number(new.alpha))
        and old.options.get("scale", 1) == new.options.get("scale", 1)
        for old, new in zip(told, entries, strict=True)
    )


def _alike(a: float | None, b: float | None) -> bool:
    """Whether two alphas are the same as far as float32 tells; no number is alike itself, and so is none."""
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
