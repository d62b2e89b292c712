"""Provenance: what a file's own format can say and another cannot, kept in the other's metadata, so that the way back gives the same keys and bytes.

It is one JSON string: the format, and for each key its shape, for an alpha also its dtype and bytes, and the metadata that was left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from converters.formats import FORMATS
from diffpeft import io
from diffpeft.bundle import Bundle, Handle

KEY = "diffpeft.provenance"
Place = tuple[str, str]  # canonical layer, role


def recorded(bundle: Bundle, format: str, metadata: Mapping[str, str]) -> str | None:
    """What to keep of a bundle read from a file of another format than `format`; None if there is nothing, or if it is kept already."""
    if KEY in bundle.metadata:
        return bundle.metadata[KEY]
    if bundle.format == format or bundle.format not in FORMATS or FORMATS[bundle.format].folder:
        return None
    layers: dict[str, dict[str, Any]] = {}
    for entry in bundle.entries:
        own = layers.setdefault(entry.layer, {})
        for key in entry.keys:
            part = FORMATS[bundle.format].split(key)
            assert part is not None
            handle = entry.alpha if part.role == "alpha" else entry.tensors.get(part.role)
            own[key] = _row(handle) if isinstance(handle, Handle) else None
    lost = {k: v for k, v in bundle.metadata.items() if metadata.get(k) != v or k == "format"}
    return json.dumps({"format": bundle.format, "layers": layers, "metadata": lost}, separators=(",", ":"))


def _row(handle: Handle) -> list[Any]:
    """The shape; of a single number (an alpha) also the dtype and the bytes in hex."""
    if math.prod(handle.shape) != 1:
        return [list(handle.shape)]
    return [list(handle.shape), handle.dtype, io.raw(handle).hex()]


def restored(
    text: str, format: str, tensors: Mapping[Place, Handle], ranks: Mapping[str, int]
) -> tuple[dict[str, Handle], dict[str, str]] | None:
    """The tensors by the keys that the adapter's file of this format had, and its metadata; None if it had another format or was another adapter.

    `tensors` are what would be written without it; where the file had no alpha, the one here must be the rank.
    """
    try:
        kept = json.loads(text)
        if kept["format"] != format:
            return None
        out: dict[str, Handle] = {}
        used = set()
        for layer, rows in kept["layers"].items():
            for key, row in rows.items():
                part = FORMATS[format].split(key)
                place = (layer, part.role if part else "")
                if place not in tensors or row is None:
                    return None
                used.add(place)
                handle = tensors[place]
                if math.prod(row[0]) != math.prod(handle.shape):
                    return None
                if len(row) == 3 and place[1] == "alpha":
                    alpha = io.of_bytes(row[1], tuple(row[0]), bytes.fromhex(row[2]))
                    if io.number(alpha) != io.number(handle):
                        return None
                    out[key] = alpha
                else:
                    out[key] = io.reshaped(handle, tuple(row[0]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # somebody else's, or cut: the file is right without it
    if any(
        role != "alpha" or io.number(tensors[layer, role]) != ranks.get(layer) for layer, role in set(tensors) - used
    ):
        return None
    return out, kept["metadata"]
