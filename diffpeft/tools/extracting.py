"""extract: what a fine-tuned model has learnt, W_tuned - W_base, as an adapter. A layer at a time, from headers and the bytes of that layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.conversion import dtype_named
from diffpeft.converters.formats import FORMATS
from diffpeft.errors import (
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    WrongBaseError,
    inside,
    shown,
)
from diffpeft.files import refuse_existing
from diffpeft.methods.config import check_choice
from diffpeft.methods.layout import BIAS
from diffpeft.methods.lokr import factorization
from diffpeft.methods.lowrank import Spectrum, leading, nearest_kronecker, of_matrix, ranks_for, squared_norm
from diffpeft.methods.shapes import rank as rank_of
from diffpeft.readable import Readable
from diffpeft.tools.merging import with_note
from diffpeft.tools.models import ModelLayer, Weights, common_layers, weights_of
from diffpeft.tools.updates import check_cut, full_entry, lora_entry, stored

METHODS = ("lora", "lokr", "full")
_RANK = 16  # where neither rank nor energy is told


@dataclass(frozen=True, repr=False)
class ExtractReport(Readable):
    """What an extraction did.

    `residuals`: {layer: norm of what the adapter leaves out / norm of the difference}, `residual` that of all layers that it holds; `ranks` {layer: rank}.
    `equal`: how many layers are the same in both. `not_held`: parameters that differ and that the adapter does not hold, by name.
    """

    path: str
    format: str
    family: str
    method: str
    residual: float
    residuals: Mapping[str, float]
    ranks: Mapping[str, int]
    equal: int
    not_held: tuple[str, ...]


@dataclass(frozen=True)
class ExtractRecipe:
    """What a layer's difference becomes: see `extract`."""

    method: str
    rank: int | None
    energy: float | None
    factor: int
    seed: int
    dtype: torch.dtype | None


@dataclass
class Extracted:
    """A layer of the result: its entry, the squared norms of what it leaves out and of the difference."""

    entry: Entry
    residual: float
    energy: float


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    factor: int = 8,
    format: str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    family: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractReport:
    """Write the difference of two models as an adapter.

    Args:
        base, tuned: each a diffusers folder (also of several files a component), the folder of one component, or a single .safetensors file.
        method: "lora": the best of a rank. "lokr": the nearest Kronecker product. "full": the difference itself, norms and biases among it.
        rank: of each layer's LoRA; 16 if neither it nor `energy` is told.
        energy: instead of rank: the share, in (0, 1], of each difference's squared norm that is kept.
        factor: of a LoKr: the size of the first factor, or near it if it does not divide.
        format: one of `converters.FORMATS`. Default: kohya for single files and for what is no LoRA, else diffusers; or the next that holds all layers.
        dtype: of the factors; default: that of the tuned weights.
        variant: use `*.VARIANT.safetensors` of folders, for example fp16.
        family: of the models, where nothing tells it.
        seed: of the random vectors of the SVD.
        overwrite: whether the output may replace what is there.
        told: called with (layers done, all layers).

    Layers that are equal in both are left out. Raises WrongBaseError for models of different families, ShapeMismatchError for layers of different sizes,
    CheckpointError, ConfigError, CannotConvertError. Then nothing is written.
    """
    recipe = _recipe(method, rank, energy, factor, seed, dtype_named(dtype))
    UnknownNameError.check("format", format, FORMATS)
    refuse_existing([out], overwrite)
    of_base, of_tuned = (weights_of(model, variant=variant, family=family) for model in (base, tuned))
    if of_base.family != of_tuned.family:
        raise WrongBaseError(
            f"the tuned model is {of_tuned.family}, the base {of_base.family}", where=tuned, remedy="Give its own base."
        )
    layers, equal, not_held = _layers(of_base, of_tuned, recipe, told)
    if not layers:
        raise ConfigError("the models are equal in all layers", where=f"{base}, {tuned}", remedy="Give a tuned model.")
    bundle = Bundle("", of_base.family, [held.entry for held in layers], families=(of_base.family,))
    target = format or _format(bundle, method == "lora" and not (of_base.original and of_tuned.original))
    bundle = replace(bundle, format=target)
    report = _report(os.fspath(out), bundle, method, layers, equal, not_held)
    note = {"method": method, "residual": report.residual, "residuals": _rounded(report.residuals)}
    converters.write(
        bundle, out, format=target, finish=with_note("diffpeft.extract", json.dumps(note)), overwrite=overwrite
    )
    return report


def _format(bundle: Bundle, diffusers_first: bool) -> str:
    """The first format that holds all of an adapter; the likeliest, if none does."""
    names = ["kohya", "diffusers", "comfyui", "onetrainer", "peft"]
    names.sort(key=lambda name: diffusers_first and name != "diffusers")
    return next((name for name in names if converters.refusal(bundle, name) is None), names[0])


def _recipe(
    method: str, rank: int | None, energy: float | None, factor: int, seed: int, dtype: torch.dtype | None
) -> ExtractRecipe:
    check_choice("method", method, METHODS)
    if method != "lora" and (rank is not None or energy is not None):
        raise ConfigError(f"a {method} has no rank that could be chosen", remedy="Leave out rank and energy.")
    if rank is not None and energy is not None:
        raise ConfigError("rank and energy are both given", remedy="Give one of them.")
    check_cut(rank, energy)
    if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
        raise ConfigError(f"factor is {shown(factor)}", remedy="It is -1 or a whole number of at least 1.")
    return ExtractRecipe(method, _RANK if rank is None and energy is None else rank, energy, factor, seed, dtype)


def _layers(
    base: Weights, tuned: Weights, recipe: ExtractRecipe, told: Callable[[int, int], None]
) -> tuple[list[Extracted], int, list[str]]:
    """The layers that differ, how many do not, and what differs and is not held."""
    pairs, lacking = common_layers(base, tuned)
    norms = {name: (layer, tuned.norms[name]) for name, layer in base.norms.items() if name in tuned.norms}
    held: list[Extracted] = []
    not_held = [f"{name} (only in one of the models)" for name in lacking]
    total, equal = len(pairs) + len(norms), 0
    for number, (name, pair) in enumerate([*pairs.items(), *norms.items()]):
        with inside(name):
            layer, missed = _layer(*pair, recipe)
        equal += layer is None and not missed
        held += [] if layer is None else [layer]
        not_held += missed
        told(number + 1, total)
    others = [key for key, h in base.others.items() if key in tuned.others and not io.same(h, tuned.others[key])]
    return held, equal, [*not_held, *others]


def _layer(base: ModelLayer, tuned: ModelLayer, recipe: ExtractRecipe) -> tuple[Extracted | None, list[str]]:
    """What one layer's difference becomes (None if there is none, or it is not held), and the names of what differs and is not held."""
    D, shift = _difference(base.weight, tuned.weight), None
    if base.bias is not None and tuned.bias is not None:
        shift = _difference(base.bias, tuned.bias)
    dtype = recipe.dtype or _dtype(tuned.weight)
    name = tuned.entry.layer
    if recipe.method == "full":
        return _full(tuned.entry, D, shift, dtype), []
    missed = [f"{name}.bias"] if shift is not None else []
    if D is None or D.ndim == 1:
        return None, missed + ([f"{name}.weight"] if D is not None else [])
    factors = (_lora if recipe.method == "lora" else _lokr)(tuned.entry, D, recipe, dtype)
    return factors, missed


def _dtype(weight: Handle) -> torch.dtype:
    dtype = io.dtype_of(weight)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float16


def _difference(base: Handle, tuned: Handle) -> Tensor | None:
    """tuned - base in fp32 or better; None if they are equal. Raises ShapeMismatchError, NonFiniteError, or ConfigError for weights that are quantised."""
    if base.shape != tuned.shape:
        raise ShapeMismatchError(
            f"the base has {base.shape}, the tuned model {tuned.shape}", remedy="The models are of different sizes."
        )
    before, after = io.load([base, tuned])
    if not (before.is_floating_point() and after.is_floating_point()):
        raise ConfigError("the weights are quantised", remedy="Give models in fp32, fp16 or bf16.")
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    D = after.to(wide)
    D = D.sub_(before) if D.data_ptr() != after.data_ptr() or tuned.tensor is None else D - before
    largest = float(torch.linalg.vector_norm(D, math.inf))
    if not math.isfinite(largest):
        raise NonFiniteError(
            "the base or the tuned model has values that are not finite", remedy="Get the file anew: it is damaged."
        )
    return D if largest else None


def _full(entry: Entry, D: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Extracted | None:
    if D is None and shift is None:
        return None
    values = [t for t in (D, shift) if t is not None]
    energy = sum(float(t.double().square().sum()) for t in values)
    residual = sum(float((t - t.to(dtype).to(t.dtype)).double().square().sum()) for t in values)
    if entry.method == "norm":
        tensors = {role: stored(t, dtype) for role, t in (("w_norm", D), ("b_norm", shift)) if t is not None}
        return Extracted(replace(entry, tensors=tensors), residual, energy)
    beside = {} if shift is None else {BIAS: stored(shift, dtype)}
    if D is None:
        return Extracted(replace(entry, method="full", tensors=beside), residual, energy)
    full = full_entry(entry, D, tuple(D.shape), dtype, lookup=False)
    return Extracted(replace(full, tensors={**full.tensors, **beside}), residual, energy)


def _lora(entry: Entry, D: Tensor, recipe: ExtractRecipe, dtype: torch.dtype) -> Extracted:
    spectrum = _spectrum(D.flatten(1), recipe)
    rank = len(spectrum.S)
    lora = lora_entry(entry, spectrum.cut(rank), tuple(D.shape), dtype, {}, lookup=False)
    return Extracted(lora, spectrum.energy * spectrum.lost(rank) ** 2, spectrum.energy)


def _spectrum(D: Tensor, recipe: ExtractRecipe) -> Spectrum:
    """The leading singular values: as many as the recipe says, or as its energy takes."""
    side = min(D.shape)
    if recipe.rank is not None:
        return _cut(leading(D, min(recipe.rank, side), recipe.seed), recipe.rank)
    assert recipe.energy is not None
    n = min(2 * _RANK, side)
    while n * 4 < side:
        spectrum = leading(D, n, recipe.seed)
        if float(spectrum.S.double().square().sum()) >= recipe.energy * spectrum.energy:
            return _cut(spectrum, ranks_for(spectrum.S, recipe.energy, spectrum.energy))
        n *= 2
    spectrum = of_matrix(D)
    return _cut(spectrum, ranks_for(spectrum.S, recipe.energy, spectrum.energy))


def _cut(spectrum: Spectrum, rank: int) -> Spectrum:
    U, S, Vh, energy, partial = spectrum
    return Spectrum(U[:, :rank], S[:rank], Vh[:rank], energy, partial or rank < len(S))


def _lokr(entry: Entry, D: Tensor, recipe: ExtractRecipe, dtype: torch.dtype) -> Extracted:
    o, i, *kernel = D.shape
    (o1, o2), (i1, i2) = (factorization(n, recipe.factor) for n in (o, i))
    columns = math.prod(kernel)
    (u, v), residual = nearest_kronecker(D.flatten(1), (o1, i1), (o2, i2 * columns), recipe.seed)
    tensors = {"lokr_w1": stored(u, dtype), "lokr_w2": stored(v.reshape(o2, i2, *kernel), dtype)}
    energy = squared_norm(D)
    return Extracted(replace(entry, method="lokr", tensors=tensors), energy * residual**2, energy)


def _report(
    out: str, bundle: Bundle, method: str, layers: Sequence[Extracted], equal: int, not_held: Sequence[str]
) -> ExtractReport:
    total = sum(held.energy for held in layers)
    return ExtractReport(
        path=out,
        format=bundle.format,
        family=bundle.family,
        method=method,
        residual=math.sqrt(sum(held.residual for held in layers) / total) if total else 0.0,
        residuals={h.entry.layer: math.sqrt(h.residual / h.energy) if h.energy else 0.0 for h in layers},
        ranks={h.entry.layer: rank_of(h.entry.shapes) for h in layers if h.entry.method == "lora"},
        equal=equal,
        not_held=tuple(not_held),
    )


def _rounded(residuals: Mapping[str, float]) -> dict[str, float]:
    return {layer: float(f"{residual:.3g}") for layer, residual in residuals.items()}
