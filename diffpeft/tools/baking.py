"""bake: weights by block, written into a file, so that it is at strength 1 what it was with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffpeft.bundle import Bundle, Entry, Handle, parted
from diffpeft.errors import CannotConvertError, ConfigError, listed
from diffpeft.files import refuse_existing
from diffpeft.pipeline.prompt import Tag, block_weights, strengths
from diffpeft.readable import Readable
from diffpeft.tools.choosing import check_used, layers_of, of_blocks, one_answer, read, ways
from diffpeft.tools.rewriting import Changes, rewrite
from diffpeft.tools.scaling import scaled, unscalable


@dataclass(frozen=True, repr=False)
class BakeReport(Readable):
    """The weight that each layer got, by diffusers' names; layers of weight 0 are left out of the file."""

    path: str
    weights: Mapping[str, float]
    dropped: tuple[str, ...]


def bake(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weights: Mapping[str, float] | None = None,
    *,
    lbw: str | Sequence[float] | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> BakeReport:
    """Write an adapter with weights by block in it, in its own format.

    Where a method has a scale its factors keep their bytes and its alpha says the weight; others' tensors are multiplied and rounded once. A layer of weight
    0 is left out.

    Args:
        weights: {pattern: weight} as in `set_adapters`, also for A1111's blocks (`{"OUT03": 0.5}`); a layer that no pattern names keeps its weight.
        lbw: a preset of A1111's block weights (`OUTALL`), or the numbers; `weights` wins where both name a layer as closely.
        family: of the adapter, if that is not what the file looks like.
        overwrite: whether the output may replace what is there.

    Raises CannotConvertError for layers of a method that has no such file (DoRA, rotations), which are named, and for different weights on the parts of a joint
    layer; UnknownNameError for a pattern or a preset that there is not; ConfigError if the output is there.
    """
    refuse_existing([out], overwrite)
    bundle = read(os.fspath(source), family)
    by_layer = weights_by_layer(bundle, dict(weights or {}), lbw, Path(source).name.removesuffix(".safetensors"))
    by_entry = [
        one_answer(entry, [by_layer[layer] for layer in entry.targets], bundle.source) for entry in bundle.entries
    ]
    pairs = list(zip(bundle.entries, by_entry, strict=True))
    _refuse_curved(pairs, bundle.source)
    changes = [(entry, scaled(entry, weight) if weight else None) for entry, weight in pairs]
    try:
        rewrite(bundle, changes, out, overwrite=overwrite)
    except CannotConvertError:  # a format without a place for alphas
        rewrite(bundle, _in_factors(pairs), out, overwrite=overwrite)
    dropped = tuple(dict.fromkeys(layer for entry, weight in pairs if not weight for layer in entry.targets))
    return BakeReport(os.fspath(out), by_layer, dropped)


def _in_factors(pairs: Sequence[tuple[Entry, float]]) -> Changes:
    return [
        (entry, scaled(entry, weight, in_alpha=isinstance(entry.alpha, Handle)) if weight else None)
        for entry, weight in pairs
    ]


def weights_by_layer(
    bundle: Bundle, weights: dict[str, float], lbw: str | Sequence[float] | None, name: str
) -> dict[str, float]:
    """{layer: its weight}."""
    from diffpeft.model.mix import check_strength, strength_on

    if not weights and not lbw:
        raise ConfigError("there are no weights", remedy="For example lbw=OUTALL, or {'unet.up_blocks': 0.5}.")
    check_strength(name, weights)
    layers = layers_of(bundle)
    check_used({pattern: of_blocks(pattern, bundle.family) for pattern in weights}, bundle)
    if lbw:
        vector = block_weights(lbw, f"lbw={lbw}") if isinstance(lbw, str) else tuple(lbw)
        by_block = strengths(Tag(name, lbw=vector), bundle.family, layers)
        weights = {**(by_block if isinstance(by_block, dict) else {}), **weights}
    spelt = {way: weight for pattern, weight in weights.items() for way in ways(pattern, bundle.family)}
    levels = {layer: strength_on(spelt, *parted(layer)) for layer in layers}
    return {
        layer: level for layer, level in levels.items() if isinstance(level, float)
    }  # all are: no pattern has a schedule


def _refuse_curved(pairs: Sequence[tuple[Entry, float]], source: str) -> None:
    """Raise CannotConvertError for all layers whose method has no file at another strength."""
    curved = [entry for entry, weight in pairs if weight not in (0, 1) and unscalable(entry)]
    if curved:
        example = curved[0]
        raise CannotConvertError(
            f"{len(curved)} layers are {example.method}, which at another strength is no {example.method}: {unscalable(example)}",
            where=f"{source}: {listed([entry.layer for entry in curved], 5)}",
            remedy="Set the strength where the adapter is used (set_adapters, <lora:...:lbw=...>), or give these layers 0 or 1.",
        )
