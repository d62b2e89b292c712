"""PEFT's configs as files have them: patterns for names, alphas, ranks, and what a rotation must know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from diffpeft import io, patterns
from diffpeft.bundle import Entry
from diffpeft.converters.formats.schema import ALPHA as FINITE
from diffpeft.converters.formats.schema import MAX_RANK, NOTHING, Config, whole
from diffpeft.methods.layout import LAYOUTS, Layout
from diffpeft.methods.shapes import rank

_ALPHAS, _RANKS = FINITE | NOTHING, whole(0, MAX_RANK)  # what a config can say


def alpha(config: Config, names: Iterable[str], r: int) -> float | None:
    """The alpha by which alpha / rank is the scale; rank-stabilised configs mean alpha / sqrt(rank)."""
    value = patterns.first(config.get("alpha_pattern"), names, config.get("lora_alpha", config.get("alpha")))
    if value is None:
        return None
    return float(value) * r**0.5 if config.get("use_rslora") else float(value)


def rotation(config: Config) -> dict[str, object]:
    """The options of an input-side OFT. The series ended in another term before PEFT 0.18, which is also when configs began to say a version."""
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    options = {"neumann": terms, "coft": float(config.get("eps", 6e-5)) if config.get("coft") else None}
    version = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "0.17")
    old = version is not None and (int(version[1]), int(version[2])) < (0, 18)
    return {**options, **({"neumann_last": 2} if old and terms else {})}


def turned(entry: Entry, config: Config | None) -> Entry:
    """The entry with the options of a rotation: LyCORIS's blocks turn the output; PEFT's tensors the input, as its config says."""
    if LAYOUTS[entry.method].alpha != "bound":
        return entry
    if "oft_blocks" in entry.tensors:
        return replace(entry, options={"side": "output"})
    return replace(
        entry, options={"side": "input", **(rotation(config) if config is not None and entry.method == "oft" else {})}
    )


def scales(
    entries: Sequence[Entry], keys: Mapping[str, str], layout: Layout, ranks: Mapping[str, int]
) -> dict[str, object]:
    """Rank, alpha and the patterns for layers that differ from most, in the fields of a method's config. No alpha: alpha = rank.

    keys: by which the patterns mean the layers.
    """
    alphas = {e.layer: float(ranks[e.layer]) if e.alpha is None else io.number(e.alpha) for e in entries}
    r, by_rank = _with_pattern(ranks, keys)
    alpha, by_alpha = _with_pattern(alphas, keys)
    fields = {layout.rank_field: r, layout.patterns: by_rank}
    return {**fields, **({layout.alpha_field: alpha, "alpha_pattern": by_alpha} if layout.alpha_field else {})}


def _with_pattern(
    values: Mapping[str, float | None], keys: Mapping[str, str]
) -> tuple[float | None, dict[str, float | None]]:
    """What most layers have, and {pattern: value} of the others."""
    most = _commonest(values[layer] for layer in keys)
    return most, {key: values[layer] for layer, key in keys.items() if values[layer] != most}


def _commonest(values: Iterable[float | None]) -> float | None:
    """The value that most have, the least of several: files must not depend on the order of layers."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value or 0.0))


def unsayable(entries: Sequence[Entry]) -> tuple[str, list[str]] | None:
    """Why no config can say the alphas and ranks of entries, and the layers that are to blame; None if one can."""
    ranks = ranks_of(entries)
    wrong = [e.layer for e in entries if not (_ALPHAS.holds(io.number(e.alpha)) and _RANKS.holds(ranks[e.layer]))]
    return ("in a config an alpha is a finite number, and a rank not endless", wrong) if wrong else None


def ranks_of(entries: Iterable[Entry]) -> dict[str, int]:
    """{layer: rank} of additive methods."""
    return {e.layer: rank(e.shapes) for e in entries}
