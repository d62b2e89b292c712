"""merge: adapter files of one family as one file, whatever their formats and methods, a layer at a time.

D = sum_i w_i D_i, where D_i = scale_i B_i A_i is what file i adds to a layer at strength 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, Handle, trigger_words
from diffpeft.converters.conversion import dtype_named
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.spelling import Draft
from diffpeft.errors import CannotConvertError, ConfigError, ShapeMismatchError, inside, listed, shown
from diffpeft.files import refuse_existing
from diffpeft.methods.config import check_choice, check_rank
from diffpeft.methods.layout import BIAS
from diffpeft.methods.lowrank import Pair, Spectrum, leading, of_matrix, of_product, product_norm
from diffpeft.methods.merging import HOW, merged
from diffpeft.methods.shapes import rank as rank_of
from diffpeft.readable import Readable
from diffpeft.tools.aligning import Terms, aligned, common_family, parts_of
from diffpeft.tools.baking import weights_by_layer
from diffpeft.tools.choosing import read
from diffpeft.tools.updates import (
    B_BIAS,
    Summand,
    bent,
    check_finite,
    full_entry,
    hides_kernel,
    lora_entry,
    stored,
    update_of,
)

WAYS = ("cat", *HOW)
Weight = float | Mapping[str, float | str]  # of a file, or by pattern; "lbw" and "weight" among them
Weighted = Mapping[str, Weight] | Sequence[tuple[str, Weight]]
# metadata that are of the base, and so of anything that is made for it
_OF_THE_BASE = (
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.resolution",
)
_ZERO = 1e-12  # singular values below this share of the first are rounding


@dataclass(frozen=True, repr=False)
class MergeReport(Readable):
    """What became of a merge.

    `errors`: {layer: norm of the error / norm of the sum}, rounding to the file's dtype among it; `error` is that of all layers together. `ranks`
    {layer: rank of its LoRA}; what is no LoRA has none. `notes`: what was left out or done otherwise, in words.
    """

    path: str
    format: str
    family: str
    how: str
    layers: int
    error: float
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeRecipe:
    """How layers are put together: see `merge`."""

    how: str
    rank: int | None
    density: float
    seed: int
    dtype: torch.dtype


@dataclass
class Merged:
    """One layer of the result: its entry, the norms of its error and of the exact sum."""

    entry: Entry
    error: float
    norm: float


def merge(
    weights: Weighted,
    out: str | os.PathLike[str],
    *,
    how: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    format: str | None = None,
    dtype: torch.dtype | str | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write one adapter that does what several do together.

    Args:
        weights: {file: weight}, or pairs of them. A weight is a number, also a negative one, or {pattern: number} as in `set_adapters`; "lbw" in the place of
            a pattern takes a preset or numbers of A1111's block weights, and "weight" multiplies all of them.
        out: the file, or the folder of a format that is one.
        how: "cat": factors side by side, exact; the ranks add up. "linear": the same sum at its least rank. "svd": cut to `rank`. "ties", "dare",
            "dare_ties", "magnitude": entries of each change left out (and signs elected) before the sum is cut to `rank`.
        rank: the most ranks of a layer; for those that cut the largest among the files on that layer, if it is not told.
        density: the share of entries that "ties", "dare", "dare_ties" and "magnitude" keep.
        seed: of what DARE leaves out, and of the random vectors of the SVD.
        format: one of `converters.FORMATS`. Default: that of the first file.
        dtype: of the factors: fp64, fp32, fp16, bf16, or torch's. Default: one that holds the dtypes of all files.
        family: of the files, where they do not tell.
        overwrite: whether the output may replace what is there.

    The files are read and the output is written one layer at a time. Raises CannotConvertError, which names the layers, for a method whose change
    depends on the weight (DoRA, rotations, (IA)^3); WrongBaseError for files of different families; ConfigError, CheckpointError. Then nothing is written.
    """
    _check(how, rank, density)
    refuse_existing([out], overwrite)
    pairs = _pairs(weights)
    bundles = _bundles(pairs, family)
    families = bundles[0].families
    recipe = MergeRecipe(how, rank, density, seed, dtype_named(dtype) or _widest(bundles))
    layers = [_layer(terms, recipe) for terms in aligned(bundles).values()]
    carried, notes = _carried(bundles)
    target = format or next((b.format for b in bundles if FORMATS[b.format].writable), "kohya")
    bundle = Bundle(target, families[0], [m.entry for m in layers], carried, _metadata(bundles), families=families)
    told = json.dumps({"how": how, "files": [[Path(path).name, weight] for path, weight in pairs]})
    converters.write(bundle, out, format=target, finish=with_note("diffpeft.merge", told), overwrite=overwrite)
    return _report(os.fspath(out), target, families[0], how, layers, notes)


def _report(
    out: str, format: str, family: str, how: str, layers: Sequence[Merged], notes: Sequence[str]
) -> MergeReport:
    total = math.hypot(*(m.norm for m in layers))
    return MergeReport(
        path=out,
        format=format,
        family=family,
        how=how,
        layers=len(layers),
        error=math.hypot(*(m.error for m in layers)) / total if total else 0.0,
        errors={m.entry.layer: m.error / m.norm if m.norm else 0.0 for m in layers},
        ranks={m.entry.layer: rank_of(m.entry.shapes) for m in layers if m.entry.method == "lora"},
        notes=tuple(notes),
    )


def _check(how: str, rank: int | None, density: float) -> None:
    check_choice("how", how, WAYS)
    if rank is not None:
        check_rank("rank", rank)
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density is {shown(density)}", remedy="It is a share above 0 and at most 1.")


def _pairs(weights: Weighted) -> list[tuple[str, Weight]]:
    pairs = list(weights.items()) if isinstance(weights, Mapping) else list(weights)
    if not pairs:
        raise ConfigError(
            "there is nothing to merge", remedy="Give files with weights: a.safetensors:0.7 b.safetensors:0.3."
        )
    return [(os.fspath(path), weight) for path, weight in pairs]


def _bundles(pairs: Sequence[tuple[str, Weight]], family: str | None) -> list[Bundle]:
    """The files, all of one family, their entries with the weights that they get."""
    bundles = [read(path, family) for path, _ in pairs]
    families = common_family(bundles)[:1]
    same = [replace(bundle, family=families[0], families=families) for bundle in bundles]
    return [_weighted(bundle, weight) for bundle, (_, weight) in zip(same, pairs, strict=True)]


def _weighted(bundle: Bundle, weight: Weight) -> Bundle:
    """A bundle whose entries carry their weights as an option, so that a joint layer's parts have it too; what has weight 0 is left out."""
    with inside(bundle.source, config=True):
        levels = _levels(bundle, weight)
    _refuse_bent(bundle)
    entries = [scaled_entry for entry in bundle.entries for scaled_entry in _apart(entry, levels, bundle.source)]
    return replace(bundle, entries=entries)


def _levels(bundle: Bundle, weight: Weight) -> dict[str, float]:
    """{layer: its weight}."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys((target for entry in bundle.entries for target in entry.targets), _number(weight))
    lbw, times = weight.get("lbw"), _number(weight.get("weight", 1.0))
    patterns = {name: _number(value) for name, value in weight.items() if name not in ("lbw", "weight")}
    levels = weights_by_layer(bundle, patterns, lbw, Path(bundle.source).stem)  # type: ignore[arg-type]
    return {layer: times * level for layer, level in levels.items()}


def _number(weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError(f"the weight is {shown(weight)}", remedy="A weight is a finite number.")
    return float(weight)


def _apart(entry: Entry, levels: Mapping[str, float], source: str) -> list[Entry]:
    """An entry, or where its parts have different weights those of its parts, each with its weight in its options."""
    several = len({levels[target] for target in entry.targets}) > 1
    pieces = parts_of(entry, source) if several else [entry]
    return [replace(piece, options={**piece.options, _WEIGHT: levels[piece.targets[0]]}) for piece in pieces]


_WEIGHT = "merge weight"  # an option of entries while they are merged


def _refuse_bent(bundle: Bundle) -> None:
    """Raise CannotConvertError for all layers whose change depends on the weight it is applied to."""
    entries = [entry for entry in bundle.entries if bent(entry)]
    if entries:
        raise CannotConvertError(
            f"{len(entries)} layers are {entries[0].method}, which cannot be added to others: {bent(entries[0])}",
            where=f"{bundle.source}: {listed([entry.layer for entry in entries], 5)}",
            remedy="Load the adapters onto their model: set_adapters mixes any of them; diffpeft.to_lora and diffpeft.combine make a LoRA there.",
        )


def _widest(bundles: Sequence[Bundle]) -> torch.dtype:
    """A dtype that holds those of all factors."""
    dtypes = {io.dtype_of(h) for bundle in bundles for entry in bundle.entries for h in entry.tensors.values()}
    dtypes = {dtype for dtype in dtypes if dtype.is_floating_point}
    wide = [dtype if dtype.itemsize > 1 else torch.float16 for dtype in dtypes] or [torch.float32]
    out = wide[0]
    for dtype in wide[1:]:
        out = torch.promote_types(out, dtype)
    return out


def _layer(terms: Terms, recipe: MergeRecipe) -> Merged:
    """One layer of all files."""
    weighted = [(float(entry.options[_WEIGHT]), _without_weight(entry)) for _, entry in terms]
    with inside(weighted[0][1].layer, config=True):
        if recipe.how == "cat" and recipe.rank is None and _can_stand_side_by_side(weighted):
            return _side_by_side(weighted, recipe.dtype)
        return _computed(weighted, recipe)


def _without_weight(entry: Entry) -> Entry:
    return replace(entry, options={name: value for name, value in entry.options.items() if name != _WEIGHT})


WeightedEntries = Sequence[tuple[float, Entry]]


def _can_stand_side_by_side(weighted: WeightedEntries) -> bool:
    """Whether all are plain LoRAs of one kernel, with ranks that are together below the layer's."""
    if any(entry.method != "lora" or {*entry.tensors} != {"lora_A", "lora_B"} for _, entry in weighted):
        return False
    A, B = weighted[0][1].tensors["lora_A"], weighted[0][1].tensors["lora_B"]
    same = all(
        entry.tensors["lora_A"].shape[1:] == A.shape[1:] and entry.tensors["lora_B"].shape[0] == B.shape[0]
        for _, entry in weighted
    )
    return same and sum(rank_of(entry.shapes) for _, entry in weighted) < min(B.shape[0], math.prod(A.shape[1:]))


def _side_by_side(weighted: WeightedEntries, dtype: torch.dtype) -> Merged:
    """LoRAs as one: nothing is computed before it is written but the error of rounding."""
    downs, ups, pairs, roundings = [], [], [], []
    for weight, entry in weighted:
        A, B = (_in(entry.tensors[role], dtype, entry.layer) for role in ("lora_A", "lora_B"))
        alpha = io.number(entry.alpha)
        factor = weight * (1.0 if alpha is None else alpha / rank_of(entry.shapes))
        if not factor:
            continue
        downs.append(A)
        ups.append(io.scaled(B, factor))
        down, up = (t.double().flatten(1) for t in io.load(entry.tensors[role] for role in ("lora_A", "lora_B")))
        check_finite(entry, [down, up])
        exact = factor * up
        pairs.append((down, exact))
        roundings.append((down, io.load([ups[-1]])[0].double().flatten(1) - exact))
    layer = weighted[0][1]
    if not downs:
        return _computed([(0.0, layer)], MergeRecipe("svd", 1, 1.0, 0, dtype))
    tensors = {"lora_A": io.stacked(downs), "lora_B": io.beside(ups)}
    entry = replace(layer, tensors=tensors, alpha=float(tensors["lora_A"].shape[0]), options={}, keys=(), shape=None)
    return Merged(entry, product_norm(*_joined(roundings)), product_norm(*_joined(pairs)))


def _in(handle: Handle, dtype: torch.dtype, where: str) -> Handle:
    return handle if io.dtype_of(handle) == dtype else io.cast(handle, dtype, where)


def _joined(pairs: Iterable[Pair]) -> Pair:
    downs, ups = zip(*pairs, strict=True)
    return torch.cat(downs), torch.cat(ups, 1)


def _computed(weighted: WeightedEntries, recipe: MergeRecipe) -> Merged:
    """One layer from what each adds to it, computed in float64."""
    layer = weighted[0][1]
    summands = [(weight, update_of(entry)) for weight, entry in weighted]
    shape = max((summand.shape for _, summand in summands), key=len)
    _check_shapes(summands, shape, layer.layer)
    acting = [(weight, summand) for weight, summand in summands if summand.acts]
    shift = _shift(summands)
    if len(shape) == 1 or not acting:
        return _vectors(weighted, acting, shift, shape, recipe.dtype)
    exact = recipe.how == "cat" and recipe.rank is None
    if exact and any(summand.factors is None for _, summand in acting):
        return _with_shift(_whole(layer, acting, shape, recipe.dtype), BIAS, shift, recipe.dtype)
    role = BIAS if any(BIAS in entry.tensors for _, entry in weighted) else B_BIAS
    return _with_shift(_lora(layer, acting, shape, recipe), role, shift, recipe.dtype)


def _shift(summands: Sequence[tuple[float, Summand]]) -> Tensor | None:
    """What all together add to the bias."""
    shifts = [weight * summand.shift for weight, summand in summands if summand.shift is not None]
    return sum(shifts[1:], shifts[0]) if shifts else None


def _with_shift(layer: Merged, role: str, shift: Tensor | None, dtype: torch.dtype) -> Merged:
    beside = {} if shift is None else {role: stored(shift, dtype)}
    return replace(layer, entry=replace(layer.entry, tensors={**layer.entry.tensors, **beside}))


def _whole(layer: Entry, acting: Sequence[tuple[float, Summand]], shape: tuple[int, ...], dtype: torch.dtype) -> Merged:
    """The sum as one matrix, where one of the files has one."""
    total = _total(acting)
    error = float((total - total.to(dtype).double()).norm())
    return Merged(full_entry(layer, total, shape, dtype, acting[0][1].lookup), error, float(total.norm()))


def _lora(layer: Entry, acting: Sequence[tuple[float, Summand]], shape: tuple[int, ...], recipe: MergeRecipe) -> Merged:
    """The sum as a LoRA."""
    if hides_kernel(layer.layer, shape):
        raise CannotConvertError(
            "nothing in the file tells the kernel of this convolution, which a LoRA of it needs",
            where=layer.layer,
            remedy="Load the adapters onto their model and use diffpeft.combine.",
        )
    pair, error, norm = _factored(acting, recipe)
    rounded = _rounding(pair, recipe.dtype)
    entry = lora_entry(layer, pair, shape, recipe.dtype, {}, acting[0][1].lookup)
    return Merged(entry, math.hypot(error, rounded), norm)


def _check_shapes(updates: Sequence[tuple[float, Summand]], shape: tuple[int, ...], layer: str) -> None:
    """Raise ShapeMismatchError for updates of layers of different sizes."""
    sizes = {(u.shape[0], math.prod(u.shape[1:])) for _, u in updates if u.acts}
    rows = {u.shape[0] for _, u in updates}
    if len(sizes) > 1 or len(rows) > 1:
        raise ShapeMismatchError(
            f"the files have layers of different sizes: {' and '.join(str(u.shape) for _, u in updates)}",
            where=layer,
            remedy="They are for different models.",
        )


def _total(acting: Sequence[tuple[float, Summand]]) -> Tensor:
    total = torch.zeros(())
    for weight, update in acting:
        dense = update.dense
        assert dense is not None
        total = total + weight * dense
    return total


def _vectors(
    weighted: WeightedEntries,
    acting: Sequence[tuple[float, Summand]],
    shift: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Merged:
    """A layer of which one number an output changes: a norm, or nothing but the bias."""
    layer = weighted[0][1]
    total = _total(acting).flatten() if acting else None
    is_norm = any(entry.method == "norm" for _, entry in weighted)
    names = ("w_norm", "b_norm") if is_norm else ("diff", BIAS)
    tensors = {name: stored(t, dtype) for name, t in zip(names, (total, shift), strict=True) if t is not None}
    entry = replace(
        layer, method="norm" if is_norm else "full", tensors=tensors, alpha=None, options={}, keys=(), shape=None
    )
    values = torch.cat([t for t in (total, shift) if t is not None])
    return Merged(entry, float((values - values.to(dtype).double()).norm()), float(values.norm()))


def _factored(acting: Sequence[tuple[float, Summand]], recipe: MergeRecipe) -> tuple[Pair, float, float]:
    """The factors of the sum, the norm of what they leave out, and the norm of the sum."""
    how, rank = recipe.how, recipe.rank
    cuts = how not in ("cat", "linear")
    if cuts and rank is None:
        rank = max(1, *(update.rank for _, update in acting))
    pairs = [(u.factors[0], weight * u.factors[1]) for weight, u in acting if u.factors is not None]
    if how in ("cat", "linear", "svd") and len(pairs) == len(acting):
        pair = _joined(pairs)
        if how == "cat" and rank is None and len(pair[0]) < min(len(pair[1]), pair[0].shape[1]):
            return pair, 0.0, product_norm(*pair)
        spectrum = of_product(*pair, rank)
    else:
        spectrum = _of_dense(acting, recipe, rank)
    norm = spectrum.energy**0.5
    rank = _needed(spectrum) if rank is None else min(rank, _needed(spectrum))
    return spectrum.cut(rank), spectrum.lost(rank) * norm, norm


def _needed(spectrum: Spectrum) -> int:
    """How many singular values are more than rounding; at least one."""
    return max(1, int((_ZERO * spectrum.S[0] < spectrum.S).sum()))


def _of_dense(acting: Sequence[tuple[float, Summand]], recipe: MergeRecipe, rank: int | None) -> Spectrum:
    """The singular values of a sum that has to be built."""
    if recipe.how in ("cat", "linear", "svd"):
        total = _total(acting)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            matrices = [update.dense for _, update in acting]
            total = merged(
                recipe.how, [m for m in matrices if m is not None], [w for w, _ in acting], recipe.density, "total"
            )
    return of_matrix(total) if rank is None else leading(total, rank, recipe.seed)


def _rounding(pair: Pair, dtype: torch.dtype) -> float:
    """The norm of what storing factors in a dtype changes of their product."""
    (A, B), (down, up) = pair, (t.to(dtype).double() for t in pair)
    return product_norm(torch.cat([down, down - A]), torch.cat([up - B, B.double()], 1))


def _carried(bundles: Sequence[Bundle]) -> tuple[dict[str, Handle], list[str]]:
    """The tensors that are no adapter's of all files, of one name the first; and what was left out."""
    carried: dict[str, Handle] = {}
    dropped = []
    for bundle in bundles:
        for key, handle in bundle.carried.items():
            if key in carried and not io.same(carried[key], handle):
                dropped.append(f"{Path(bundle.source).name}: {key}")
            carried.setdefault(key, handle)
    notes = [
        f"{len(dropped)} tensors that are no adapter's are in several files, and the first was kept: {listed(dropped, 3)}"
    ]
    return carried, notes if dropped else []


def _metadata(bundles: Sequence[Bundle]) -> dict[str, str]:
    """What all files say of their base, and all trigger words."""
    told = {key: {b.metadata[key] for b in bundles if key in b.metadata} for key in _OF_THE_BASE}
    words = dict.fromkeys(word for bundle in bundles for word in trigger_words(bundle.metadata))
    metadata = {key: values.pop() for key, values in told.items() if len(values) == 1}
    return metadata | ({"modelspec.trigger_phrase": ", ".join(words)} if words else {})


def with_note(key: str, text: str) -> Callable[[Draft], Draft]:
    """What adds a line to the metadata of what is written."""
    return lambda draft: replace(draft, metadata={**draft.metadata, key: text})
