"""resize: an adapter of fewer ranks, each layer's the best that so many ranks can do; and of another strength: scale.

The singular values come from the factors (a QR of each, and a matrix of rank x rank), never from out x in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.writing import files, planned
from diffpeft.errors import CannotConvertError, ConfigError, inside, listed, shown
from diffpeft.files import refuse_existing
from diffpeft.methods.layout import BIAS, LAYOUTS, MAGNITUDES
from diffpeft.methods.lowrank import Spectrum, of_matrix, of_product, ranks_for
from diffpeft.methods.shapes import rank as rank_of
from diffpeft.readable import Readable
from diffpeft.tools.choosing import read
from diffpeft.tools.rewriting import rewrite
from diffpeft.tools.scaling import scaled, unscalable
from diffpeft.tools.updates import (
    Summand,
    bent,
    check_cut,
    hides_kernel,
    lora_tensors,
    stored,
    under,
    update_of,
)

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?|)B?\s*", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class ResizeReport(Readable):
    """What became of each layer.

    `before` and `after`: {layer: rank}; `energy` {layer: share of the squared norm that is kept}, `kept_energy` that of all together. `became_lora`: layers
    of other methods that are LoRAs now; `unchanged`: {layer: why it was left as it is}. `size`: bytes of the file, `size_before` those of the input.
    """

    path: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    energy: Mapping[str, float]
    kept_energy: float
    became_lora: tuple[str, ...]
    unchanged: Mapping[str, str]
    size_before: int
    size: int


@dataclass(frozen=True)
class CutLayer:
    """A layer that can be cut: its entry, what it adds, the shape of its weight, its singular values, and the bytes of one rank."""

    entry: Entry
    shape: tuple[int, ...]
    S: Tensor
    energy: float
    cost: int


def resize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_size: int | str | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> ResizeReport:
    """Write an adapter of fewer ranks in its own format. One of `rank`, `energy` and `max_size` is given.

    Args:
        rank: the most that a layer has.
        energy: the share, in (0, 1], of each layer's squared norm that is kept, by as few ranks as that takes.
        max_size: of the file, in bytes or as "50MB", "48MiB". Ranks go where they keep most for their bytes.
        family: of the adapter, if that is not what the file looks like.
        overwrite: whether the output may replace what is there.

    A DoRA keeps its magnitudes, and what is under them is cut. LoHa, LoKr, whole differences and other sums become LoRAs, the best of their rank. What
    cannot be cut (rotations, norms, (IA)^3) stays as it is.
    Raises ConfigError if nothing can be cut, or a size cannot be met; CannotConvertError, CheckpointError.
    """
    size = _check(rank, energy, max_size)
    refuse_existing([out], overwrite)
    bundle = read(os.fspath(source), family)
    layers, unchanged = _layers(bundle)
    with inside(bundle.source, config=True):
        if not layers:
            reasons = listed(dict.fromkeys(unchanged.values()), 3)
            raise ConfigError(f"no layer has a rank that could be cut: {reasons}", remedy="Give another file.")
        ranks = _ranks(layers, rank, energy)
        if size is not None:
            ranks = _within(bundle, layers, size, out)
    cut = {id(layer.entry): _cut(layer, n) for layer, n in zip(layers, ranks, strict=True)}
    changes = [(entry, cut.get(id(entry), entry)) for entry in bundle.entries]
    rewrite(_plain(bundle), changes, out, overwrite=overwrite)
    return _report(bundle, layers, ranks, unchanged, out)


def _plain(bundle: Bundle) -> Bundle:
    """The bundle without its record of an older file, which it is not any more."""
    from diffpeft.converters.provenance import KEY

    return replace(bundle, metadata={key: text for key, text in bundle.metadata.items() if key != KEY})


def _check(rank: int | None, energy: float | None, max_size: int | str | None) -> int | None:
    """The size in bytes, if that is what was given. Raises ConfigError unless exactly one is, and has a value that it can have."""
    if sum(value is not None for value in (rank, energy, max_size)) != 1:
        raise ConfigError(
            "a resize is to a rank, an energy or a size",
            remedy="Give one of --rank 16, --energy 0.95, --max-size 50MB.",
        )
    check_cut(rank, energy)
    return None if max_size is None else bytes_of(max_size)


def bytes_of(size: int | str) -> int:
    """A size in bytes: a number, or a text such as 50MB (10^6) or 48MiB (2^20). Raises ConfigError."""
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    number = float(match[1]) * _UNITS[match[2].upper()] if match else size
    if isinstance(number, (str, bool)) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
        raise ConfigError(f"max_size is {shown(size)}", remedy="It is a number of bytes, or for example 50MB or 48MiB.")
    return int(number)


def _layers(bundle: Bundle) -> tuple[list[CutLayer], dict[str, str]]:
    """The layers that can be cut, and {layer: why it cannot}."""
    layers, unchanged = [], {}
    for entry in bundle.entries:
        if why := _whole(entry):
            unchanged[entry.layer] = why
            continue
        update = update_of(under(entry) or entry)
        if len(update.shape) < 2 or not update.acts:
            unchanged[entry.layer] = "it has one number an output"
        elif hides_kernel(entry.layer, update.shape) and not _is_plain(entry):
            unchanged[entry.layer] = "nothing tells the kernel of this convolution"
        else:
            spectrum = _spectrum(update)
            size = io.SIZES[next(iter(entry.tensors.values())).dtype]
            cost = size * (update.shape[0] + math.prod(update.shape[1:]))
            layers.append(CutLayer(entry, update.shape, spectrum.S, spectrum.energy, cost))
    return layers, unchanged


def _whole(entry: Entry) -> str:
    """Why an entry cannot be cut; empty if it can."""
    inside_dora = under(entry)
    return bent(inside_dora if inside_dora is not None else entry) and f"{entry.method} has no sum of ranks"


def _is_plain(entry: Entry) -> bool:
    """Whether an entry has a LoRA's two factors."""
    return {"lora_A", "lora_B"} <= {*entry.tensors} and not {"lora_mid", "lora_E"} & {*entry.tensors}


def _spectrum(update: Summand) -> Spectrum:
    if update.factors is not None:
        return of_product(*update.factors)
    assert update.matrix is not None
    return of_matrix(update.matrix)


def _ranks(layers: Sequence[CutLayer], rank: int | None, energy: float | None) -> list[int]:
    """The rank of each layer, at least 1."""
    if energy is not None:
        return [ranks_for(layer.S, energy) for layer in layers]
    return [min(rank or 1, len(layer.S)) for layer in layers]


def _within(bundle: Bundle, layers: Sequence[CutLayer], size: int, out: str | os.PathLike[str]) -> list[int]:
    """The ranks that keep most in a file of at most `size` bytes. Raises ConfigError if rank 1 everywhere is more."""
    gains = [
        (float(s) ** 2 / layer.cost, n) for n, layer in enumerate(layers) for s in layer.S[1:].tolist()
    ]  # the first of each is in any case
    order = [n for _, n in sorted(gains, key=lambda row: -row[0])]

    def ranks_of(steps: int) -> list[int]:
        ranks = [1] * len(layers)
        for n in order[:steps]:
            ranks[n] += 1
        return ranks

    smallest = _size(bundle, layers, ranks_of(0), out)
    if smallest > size:
        raise ConfigError(
            f"with rank 1 everywhere the file has {smallest} bytes, and {size} are asked for",
            remedy="Prune layers first, or convert to a smaller dtype.",
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _size(bundle, layers, ranks_of(middle), out) <= size else (low, middle - 1)
    return ranks_of(low)


def _size(bundle: Bundle, layers: Sequence[CutLayer], ranks: Sequence[int], out: str | os.PathLike[str]) -> int:
    """How many bytes the file will have: its tensors are zeros that nobody reads."""
    blank = {id(layer.entry): _blank(layer, n) for layer, n in zip(layers, ranks, strict=True)}
    changed = replace(_plain(bundle), entries=[blank.get(id(entry), entry) for entry in bundle.entries])
    drafts = [planned(part) for part in files(changed, bundle.format, out).values()]
    return sum(
        io.start_of(draft.tensors, draft.metadata) + sum(io.nbytes(h) for h in draft.tensors.values())
        for draft in drafts
    )


def _blank(layer: CutLayer, rank: int) -> Entry:
    o, *columns = layer.shape
    empty = torch.empty(0)
    return _with_tensors(
        layer,
        rank,
        lambda dtype: {
            role: Handle(handle.dtype, shape)
            for (role, handle), shape in zip(
                lora_tensors(
                    (empty.new_zeros(1, math.prod(columns)), empty.new_zeros(o, 1)), layer.shape, dtype
                ).items(),
                ((rank, *columns), (o, rank, *(1 for _ in columns[1:]))),
                strict=True,
            )
        },
    )


def _cut(layer: CutLayer, rank: int) -> Entry:
    """The layer's entry with the best factors of a rank. Factors that are not longer keep their bytes."""
    if _is_plain(layer.entry) and rank >= rank_of(layer.entry.shapes):
        return layer.entry
    update = update_of(under(layer.entry) or layer.entry)
    pair = _spectrum(update).cut(rank)
    with inside(layer.entry.layer, config=True):
        return _with_tensors(layer, rank, lambda dtype: lora_tensors(pair, layer.shape, dtype, update.lookup))


def _with_tensors(layer: CutLayer, rank: int, factors: Callable[[torch.dtype], Mapping[str, Handle]]) -> Entry:
    entry = layer.entry
    dtype = io.dtype_of(next(iter(entry.tensors.values())))
    beside = {role: handle for role, handle in entry.tensors.items() if role in MAGNITUDES or role in (BIAS,)}
    if "lora_B_bias" in entry.tensors:
        (shift,) = io.load([entry.tensors["lora_B_bias"]])
        alpha = io.number(entry.alpha)
        beside["lora_B_bias"] = stored(shift.double() * (1 if alpha is None else alpha / rank_of(entry.shapes)), dtype)
    method = entry.method if LAYOUTS[entry.method].over else "lora"
    return replace(entry, method=method, tensors={**factors(dtype), **beside}, alpha=float(rank), options={}, shared={})


def _report(
    bundle: Bundle,
    layers: Sequence[CutLayer],
    ranks: Sequence[int],
    unchanged: Mapping[str, str],
    out: str | os.PathLike[str],
) -> ResizeReport:
    captured = [float(layer.S[:n].double().square().sum()) for layer, n in zip(layers, ranks, strict=True)]
    total = sum(layer.energy for layer in layers)
    names = [layer.entry.layer for layer in layers]
    return ResizeReport(
        path=os.fspath(out),
        before={layer.entry.layer: _rank_before(layer) for layer in layers},
        after=dict(zip(names, ranks, strict=True)),
        energy={
            layer.entry.layer: energy / layer.energy if layer.energy else 1.0
            for layer, energy in zip(layers, captured, strict=True)
        },
        kept_energy=sum(captured) / total if total else 1.0,
        became_lora=tuple(layer.entry.layer for layer in layers if layer.entry.method not in ("lora", "dora")),
        unchanged=dict(unchanged),
        size_before=_bytes_at(bundle.source),
        size=_bytes_at(out),
    )


def _rank_before(layer: CutLayer) -> int:
    return rank_of(layer.entry.shapes) or len(layer.S)


def _bytes_at(path: str | os.PathLike[str]) -> int:
    """The bytes of a file, or of all files of a folder."""
    return sum(os.path.getsize(file) for file in _files_at(path))


def _files_at(path: str | os.PathLike[str]) -> Iterable[str]:
    if not os.path.isdir(path):
        return [os.fspath(path)] if os.path.exists(path) else []
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


@dataclass(frozen=True, repr=False)
class ScaleReport(Readable):
    """By how much an adapter was scaled, and how many layers it has."""

    path: str
    by: float
    layers: int


def scale(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    by: float,
    *,
    family: str | None = None,
    overwrite: bool = False,
) -> ScaleReport:
    """Write an adapter whose strength 1 is what strength `by` of this one is, in its own format.

    A method with an alpha says the number there, and its factors keep their bytes; of others the factors are multiplied. A negative number is one, too.

    Raises CannotConvertError, which names the layers, for DoRAs and rotations: at another strength these are none. ConfigError for a number that is none, or an
    output that is there.
    """
    if isinstance(by, bool) or not isinstance(by, (int, float)) or not math.isfinite(by):
        raise ConfigError(f"by is {shown(by)}", remedy="It is a finite number, such as 0.8.")
    refuse_existing([out], overwrite)
    bundle = read(os.fspath(source), family)
    curved = [entry for entry in bundle.entries if unscalable(entry)] if by != 1 else []
    if curved:
        raise CannotConvertError(
            f"{len(curved)} layers are {curved[0].method}, which at another strength is no {curved[0].method}: {unscalable(curved[0])}",
            where=f"{bundle.source}: {listed([entry.layer for entry in curved], 5)}",
            remedy="Set the strength where the adapter is used.",
        )
    try:
        rewrite(bundle, [(entry, scaled(entry, by)) for entry in bundle.entries], out, overwrite=overwrite)
    except CannotConvertError:  # a format without a place for alphas
        changes = [(e, scaled(e, by, in_alpha=isinstance(e.alpha, Handle))) for e in bundle.entries]
        rewrite(bundle, changes, out, overwrite=overwrite)
    return ScaleReport(os.fspath(out), float(by), len(bundle.entries))
