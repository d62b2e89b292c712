"""Provenance: what a file's own format can say and another cannot, kept in the other's metadata, so that the way back gives the same keys and bytes.

It is one JSON string: the format; for each key of the file, in its order, the layer and the shape, for a single number also its dtype and bytes; the
metadata that was left out, and the order of all; and which ranks of fused layers, as they are now, are whose.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from converters.formats import FORMATS
from converters.formats.schema import ALPHA, MAX_SIZE, whole
from converters.formats.wrappers import unwrapped
from converters.rows import Blocks
from diffpeft import io
from diffpeft.bundle import Bundle, Handle
from diffpeft.files import parsed

KEY = "diffpeft.provenance"
_RANK = whole(0, MAX_SIZE)
Place = tuple[str, str]  # canonical layer, role


def recorded(bundle: Bundle, format: str, metadata: Mapping[str, str], blocks: Mapping[str, Blocks]) -> str | None:
    """What to keep of a bundle read from a file of another format than `format`; None if there is nothing. An older record is kept on."""
    ranks = {layer: {str(part): list(span) for part, span in own.items()} for layer, own in blocks.items()}
    kept = _parsed(bundle.metadata.get(KEY, ""))
    if kept:
        return _text({**{k: v for k, v in kept.items() if k != "blocks"}, **({"blocks": ranks} if ranks else {})})
    if bundle.format not in FORMATS or bundle.format == format:
        return _text({"format": "", "blocks": ranks}) if ranks else None
    return _text({**_record(bundle, metadata), **({"blocks": ranks} if ranks else {})})


def own_record(bundle: Bundle) -> str:
    """What `restored` needs to give a bundle's own keys again, for a file of its own format."""
    return _text(_record(bundle, {}))


def _record(bundle: Bundle, metadata: Mapping[str, str]) -> dict[str, Any]:
    rows: dict[str, list[Any]] = {}
    for entry in bundle.entries:
        for key in entry.keys:
            part = FORMATS[bundle.format].split(unwrapped(key)) or FORMATS[bundle.format].split(key)
            assert part is not None
            handle = entry.alpha if part.role == "alpha" else entry.tensors.get(part.role)
            if key in rows:
                rows[key][0].append(entry.layer)
            else:
                rows[key] = [[entry.layer], part.role, *(_row(handle) if isinstance(handle, Handle) else ())]
    keys = {key: rows.get(key, []) for key in bundle.order or (*rows, *bundle.carried)}
    own = {"format", *(k for k in FORMATS[bundle.format].owned if not k.startswith("diffpeft."))}
    lost = {k: v for k, v in bundle.metadata.items() if metadata.get(k) != v or k in own}
    return {"format": bundle.format, "keys": keys, "metadata": lost, "names": list(bundle.metadata)}


def _text(kept: Mapping[str, Any]) -> str:
    return json.dumps(kept, separators=(",", ":"))


def _row(handle: Handle) -> list[Any]:
    """The shape; of a single number (an alpha) also the dtype and the bytes in hex."""
    if math.prod(handle.shape) != 1:
        return [list(handle.shape)]
    return [list(handle.shape), handle.dtype, io.raw(handle).hex()]


@functools.lru_cache(4)
def _parsed(text: str) -> dict[str, Any]:
    """The record; empty if it is somebody else's, or cut: the file is right without it."""
    try:
        kept = parsed(text, items=io.MAX_ITEMS)
        assert isinstance(kept["format"], str) and isinstance(kept.get("keys", {}), dict)
        return kept
    except (ValueError, KeyError, AssertionError):
        return {}


def places_in(text: str, format: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """{layer: {role: shape}} of the adapter's file of this format, if it had one."""
    kept = _parsed(text)
    out: dict[str, dict[str, tuple[int, ...]]] = {}
    try:
        for row in kept["keys"].values() if kept.get("format") == format else ():
            for layer in row[0] if row else ():
                out.setdefault(layer, {})[row[1]] = tuple(row[2]) if len(row) > 2 else ()
    except (KeyError, TypeError, AttributeError, IndexError):
        return {}
    return out


def blocks_in(text: str) -> dict[str, Blocks]:
    """{fused layer: the ranks of its parts}."""
    try:
        blocks = _parsed(text).get("blocks", {})
        return {layer: {int(part): _block(*block) for part, block in own.items()} for layer, own in blocks.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _block(first: Any, end: Any, ratio: Any) -> tuple[int, int, float]:
    """The ranks [first, end) of a part and its ratio. Raises ValueError for what can be none."""
    if not (_RANK.holds(first) and _RANK.holds(end) and first < end and ALPHA.holds(ratio)):
        raise ValueError(f"no block of ranks: {first}, {end}, {ratio}")
    return first, end, float(ratio)


def restored(
    text: str,
    format: str,
    tensors: Mapping[Place, Handle],
    ranks: Mapping[str, int],
    carried: Mapping[str, Handle],
    unscaled: Collection[str],
) -> tuple[dict[str, Handle], dict[str, str], list[str]] | None:
    """What the adapter's file of this format had: the tensors by its keys, the metadata that were left out, the order of all of them.

    None if it had another format or was another adapter.

    `tensors` are what would be written without it; an alpha that only one of them has must be the rank. An alpha of a layer that is `unscaled`
    means nothing, and is what it was.
    """
    kept = _parsed(text)
    if kept.get("format") != format:
        return None
    tensors = {**{(layer, "alpha"): io.scalar(r) for layer, r in ranks.items() if r}, **tensors}
    try:
        out: dict[str, Handle] = {}
        used = set()
        for key, row in kept["keys"].items():
            if not row:
                if key in carried:
                    out[key] = carried[key]
                continue
            layers, role, *rest = row
            places = [(layer, role) for layer in layers]
            shape, *value = rest
            used.update(places)
            if role == "alpha" and {*layers} <= {*unscaled}:
                out[key] = io.of_bytes(value[0], tuple(shape), bytes.fromhex(value[1]))
                continue
            if not {*places} <= {*tensors}:
                return None
            handle = tensors[places[0]]
            if io.count(shape) != io.count(handle.shape):
                return None
            if value and role == "alpha":
                alpha = io.of_bytes(value[0], tuple(shape), bytes.fromhex(value[1]))
                before, now = io.number(alpha) or 0.0, io.number(handle) or 0.0
                if not math.isclose(before, now, rel_tol=1e-6) and not (before != before and now != now):
                    return None
                out[key] = alpha
            else:
                out[key] = io.reshaped(handle, tuple(shape))
        out |= {key: handle for key, handle in carried.items() if key not in out}
        lost, names = dict(kept["metadata"]), list(kept["names"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    if any(
        role != "alpha" or io.number(tensors[layer, role]) != ranks.get(layer) for layer, role in set(tensors) - used
    ):
        return None
    return out, lost, names
