"""An nn.MultiheadAttention in PEFT's files. PEFT adapts its two projections together, and a config speaks of the attention alone:

    base_model.model.attn.lora_A.weight                        of queries, keys and values, a layer `attn`
    base_model.model.attn.base_layer.out_proj.lora_A.weight    of the output, a layer `attn.out_proj`, with the rank and alpha of `attn`

PEFT 0.21.2 adds the second to its weight twice, in training, in evaluation and when it merges. An adapter was trained so, and acts so here: an entry's
alpha is twice what the config says.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.methods.shapes import rank

OUTPUT, TIMES = "out_proj", 2
_SPELT = f"base_layer.{OUTPUT}"


def around(layer: str, layers: Collection[str]) -> str | None:
    """The attention whose output projection a layer is, if it is adapted too; None for any other layer."""
    outer, _, last = layer.rpartition(".")
    return outer if last == OUTPUT and outer in layers else None


def times(layer: str, layers: Collection[str]) -> int:
    """How many times PEFT adds the LoRA of a layer among those that an adapter is on."""
    return 1 if around(layer, layers) is None else TIMES


def spelt(layer: str, layers: Collection[str]) -> str:
    """A layer's name in PEFT's keys: the inverse of `read`."""
    outer = around(layer, layers)
    return layer if outer is None else f"{outer}.{_SPELT}".lstrip(".")


def read(name: str) -> str:
    """The layer that PEFT's keys call so."""
    outer = name.removesuffix(_SPELT)
    return f"{outer}{OUTPUT}" if outer != name and outer[-1:] in ("", ".") else name


def spoken(entries: Sequence[Entry]) -> list[Entry]:
    """The entries under the names by which a config speaks of their layers."""
    return [entry if outer is None else _named_as(entry, outer) for entry, outer in _pairs(entries)]


def _named_as(entry: Entry, outer: Entry) -> Entry:
    return replace(entry, layer=outer.layer, keys=outer.keys, own=outer.own)


def _pairs(entries: Sequence[Entry]) -> list[tuple[Entry, Entry | None]]:
    """Each entry, with that of the attention around it."""
    by_layer = {entry.layer: entry for entry in entries}
    outers = (around(entry.layer, by_layer) for entry in entries)
    return [(entry, None if outer is None else by_layer[outer]) for entry, outer in zip(entries, outers, strict=True)]


def said(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that a config has to speak of."""
    return [entry for entry, outer in _pairs(entries) if outer is None]


def doubled(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with the alphas that a file's config, or without one its tensors, give them, as PEFT lets them act."""
    return [entry if outer is None else _doubled(entry) for entry, outer in _pairs(entries)]


def _doubled(entry: Entry) -> Entry:
    if entry.method != "lora":
        return entry
    alpha = io.number(entry.alpha)
    return replace(entry, alpha=TIMES * (rank(entry.shapes) if alpha is None else alpha))


def adjusted(entries: Sequence[Entry]) -> list[Entry]:
    """Entries for PEFT's files: with the keys' names of their layers, and of an output projection numbers that act alike at the alpha it has there."""
    return [entry if outer is None else _adjusted(entry, outer) for entry, outer in _pairs(entries)]


def _adjusted(entry: Entry, outer: Entry) -> Entry:
    name = f"{parted(outer.layer)[1] if outer.own is None else outer.own}.{_SPELT}".lstrip(".")
    if entry.method != "lora" or outer.method != "lora" or not (r := rank(entry.shapes)):
        return replace(entry, own=name)
    ours, theirs = _scale(entry), TIMES * _scale(outer)
    if math.isclose(ours, theirs, rel_tol=1e-6) or not theirs:  # some formats' alphas are float32
        return replace(entry, own=name)
    return replace(entry, own=name, alpha=r * theirs, tensors=_scaled(entry.tensors, ours / theirs))


def _scale(entry: Entry) -> float:
    alpha = io.number(entry.alpha)
    return 1.0 if alpha is None else alpha / rank(entry.shapes)


def _scaled(tensors: Mapping[str, Handle], by: float) -> dict[str, Handle]:
    return {role: io.scaled(h, by) if role.startswith("lora_B") else h for role, h in tensors.items()}


def troubles(entries: Sequence[Entry]) -> tuple[str, list[str]] | None:
    """Why PEFT has no such adapter of attentions, and the layers that are to blame."""
    pairs = [(entry, outer) for entry, outer in _pairs(entries) if outer is not None]
    uneven = [
        e.layer for e, outer in pairs if outer.method == e.method == "lora" and rank(e.shapes) != rank(outer.shapes)
    ]
    if uneven:
        return "in PEFT both projections of an attention have the same rank", uneven
    others = [e.layer for e, _ in pairs if e.method != "lora"]
    if others:
        return "PEFT has nothing but LoRA on an attention", others
    off = [e.layer for e, outer in pairs if not _scale(outer) and _scale(e)]
    return ("in PEFT both projections of an attention have the same alpha", off) if off else None
