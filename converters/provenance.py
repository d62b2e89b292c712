"""Provenance: what a file's own format can say and another cannot, kept in the other's metadata, so that the way back gives the same keys and bytes.

It is one JSON string: the format; for each key of the file, in its order, the layer and the shape, for a single number also its dtype and bytes; the
metadata that was left out, and the order of all; and which ranks of joint layers, as they are now, are whose.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from diffpeft import io
from diffpeft.bundle import Bundle, Handle
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.schema import ALPHA, MAX_SIZE, whole
from diffpeft.converters.formats.wrappers import unwrapped
from diffpeft.converters.rows import Blocks
from diffpeft.files import parsed

KEY = "diffpeft.provenance"
_RANK = whole(0, MAX_SIZE)
Place = tuple[str, str]  # canonical layer, role
Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True)
class Row:
    """What a key of a file was for: a tensor of these layers, its shape (None if it was another's then), and the tensor itself of a single number."""

    layers: tuple[str, ...]
    role: str
    shape: tuple[int, ...] | None = None
    number: Handle | None = None

    @property
    def places(self) -> list[Place]:
        """Where the tensor is in the adapter; the first is as good as any."""
        return [(layer, self.role) for layer in self.layers]

    def json(self) -> list[Json]:
        """As a record has it."""
        shape = [] if self.shape is None else [list(self.shape)]
        number = [self.number.dtype, io.raw(self.number).hex()] if self.number else []
        return [list(self.layers), self.role, *shape, *number]


@dataclass(frozen=True)
class Original:
    """What a file of a format had: its keys in their order (None: no adapter's), the metadata that no other says, the names of all metadata."""

    format: str
    keys: Mapping[str, Row | None]
    metadata: dict[str, str]
    names: Sequence[str]

    @property
    def places(self) -> set[Place]:
        """All that the file had of layers."""
        return {place for row in self.keys.values() if row for place in row.places}

    def json(self) -> dict[str, Json]:
        """As it stands in the metadata."""
        keys: dict[str, Json] = {key: row.json() if row else [] for key, row in self.keys.items()}
        return {"format": self.format, "keys": keys, "metadata": self.metadata, "names": list(self.names)}


def recorded(bundle: Bundle, format: str, metadata: Mapping[str, str], blocks: Mapping[str, Blocks]) -> str | None:
    """What to keep of a bundle read from a file of another format than `format`; None if there is nothing. An older record is kept on."""
    earlier = {key: value for key, value in _parsed(bundle.metadata.get(KEY, "")).items() if key != "blocks"}
    is_foreign = bundle.format in FORMATS and bundle.format != format
    record = earlier or (own_record(bundle, metadata).json() if is_foreign else {})
    if not (record or blocks):
        return None
    ranks = {layer: {str(part): list(span) for part, span in of.items()} for layer, of in blocks.items()}
    return json.dumps((record or {"format": ""}) | ({"blocks": ranks} if ranks else {}), separators=(",", ":"))


def own_record(bundle: Bundle, metadata: Mapping[str, str] | None = None) -> Original:
    """The record of a bundle's own file. `metadata` are what the file that it is for says too."""
    fmt = FORMATS[bundle.format]
    rows: dict[str, Row | None] = {}
    for entry in bundle.entries:
        for key in entry.keys:
            if row := rows.get(key):
                rows[key] = Row((*row.layers, entry.layer), row.role, row.shape, row.number)
                continue
            part = fmt.split(unwrapped(key)) or fmt.split(key)
            assert part is not None
            rows[key] = _row(
                entry.layer, part.role, entry.alpha if part.role == "alpha" else entry.tensors.get(part.role)
            )
    keys = {key: rows.get(key) for key in bundle.order or (*rows, *bundle.carried)}
    told = {} if metadata is None else metadata
    by_itself = {"format", *(key for key in fmt.owned if not key.startswith("diffpeft."))}
    left_out = {key: value for key, value in bundle.metadata.items() if told.get(key) != value or key in by_itself}
    return Original(bundle.format, keys, left_out, list(bundle.metadata))


def _row(layer: str, role: str, tensor: Handle | float | None) -> Row:
    if not isinstance(tensor, Handle):
        return Row((layer,), role)
    return Row((layer,), role, tensor.shape, tensor if io.count(tensor.shape) == 1 else None)


@functools.lru_cache(4)
def _parsed(text: str) -> dict[str, Json]:
    """The record; empty if it is somebody else's, or cut: the file is right without it."""
    try:
        record = parsed(text, items=io.MAX_ITEMS)
    except ValueError:
        return {}
    return record if isinstance(record.get("format"), str) and isinstance(record.get("keys", {}), dict) else {}


@functools.lru_cache(4)
def record_in(text: str, format: str) -> Original | None:
    """The record of the adapter's file of this format; None if there is none, or it is damaged."""
    match _parsed(text):
        case {"format": str(name), "keys": dict(keys), "metadata": dict(metadata), "names": list(names)} if (
            name == format
        ):
            try:
                rows = {key: _read(row) if row else None for key, row in keys.items()}
                return Original(format, rows, {str(k): str(v) for k, v in metadata.items()}, list(map(str, names)))
            except ValueError:
                return None
    return None


def _read(row: Json) -> Row:
    """A row of a record. Raises ValueError for what is none."""
    match row:
        case [[*layers], str(role), [*sizes], str(dtype), str(data)]:
            shape = _shape(sizes)
            return Row(tuple(map(str, layers)), role, shape, io.of_bytes(dtype, shape, bytes.fromhex(data)))
        case [[*layers], str(role), [*sizes]]:
            return Row(tuple(map(str, layers)), role, _shape(sizes))
        case [[*layers], str(role)]:
            return Row(tuple(map(str, layers)), role)
    raise ValueError("no row of a record")


def _shape(sizes: Sequence[Json]) -> tuple[int, ...]:
    """Sizes of axes. Raises ValueError for what no tensor has."""
    shape = tuple(size for size in sizes if type(size) is int)
    if len(shape) != len(sizes):
        raise ValueError("a size that is no number")
    io.count(shape)
    return shape


def places_in(text: str, format: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """{layer: {role: shape}} of the adapter's file of this format, if it had one."""
    places: dict[str, dict[str, tuple[int, ...]]] = {}
    record = record_in(text, format)
    for row in filter(None, record.keys.values() if record else ()):
        for layer, role in row.places:
            places.setdefault(layer, {})[role] = row.shape or ()
    return places


def blocks_in(text: str) -> dict[str, Blocks]:
    """{joint layer: the ranks of its parts}."""
    match _parsed(text):
        case {"blocks": dict(blocks)}:
            try:
                return {layer: {int(part): _block(block) for part, block in of.items()} for layer, of in blocks.items()}
            except (ValueError, AttributeError):
                return {}
    return {}


def _block(block: Json) -> tuple[int, int, float]:
    """The ranks [first, end) of a part and its ratio. Raises ValueError for what can be none."""
    match block:
        case [int(start), int(end), int(ratio) | float(ratio)]:
            if _RANK.holds(start) and _RANK.holds(end) and start < end and ALPHA.holds(ratio):
                return start, end, float(ratio)
    raise ValueError(f"no block of ranks: {block}")
