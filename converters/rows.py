"""Fused layers: an adapter of one of the original program's layers as adapters of diffusers' layers, and back.

Rows are a layer's out features. Bytes only move: rows are cut and put together, and what all parts share is copied; nothing is computed, but for
the scales of LoRAs with unequal ones, which can only be one in a fused layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from diffpeft import io
from diffpeft.bundle import Entry, Handle, Rule, dotted
from diffpeft.methods.layout import BIAS, LAYOUTS
from diffpeft.methods.shapes import extent, rank, row_axes

Blocks = Mapping[
    int, tuple[int, int, float]
]  # {part: its first rank, the end of them, what its second factor was multiplied by}
DOWN, UP, B_BIAS = LAYOUTS["lora"].forms[0].axes  # a LoRA's factors, which alone can stand in blocks, and its bias
CORE = "lora_mid"  # of its Tucker form, which cannot


class Unfit(Exception):
    """Why an adapter of a fused layer cannot be taken apart, or of its parts not be put together."""


@dataclass(frozen=True)
class Joined:
    """An entry of a fused layer. `blocks` tells the parts' ranks where they are not evident; `exact` is False if numbers were computed."""

    entry: Entry
    blocks: Blocks | None = None
    exact: bool = True


def split(entry: Entry, blocks: Blocks | None = None) -> list[Entry]:
    """The entries of diffusers' layers that do together what the entry of a fused layer does. Raises Unfit.

    A LoRA whose factors are zero off the diagonal is taken for several LoRAs, of the ranks in `blocks` or of equal ones.
    """
    rule = entry.rule
    if rule is None:
        return [entry]
    _check_mixing(entry, rule)
    total = _rows(entry) or math.lcm(sum(share for _, share in rule.parts), len(rule.chunks))
    cuts = [_ranges(rule, part, total) for part in range(len(rule.parts))]
    if UP in entry.tensors and len(cuts) > 1:
        blocks = _blocks(entry, cuts, blocks)
    parts = range(len(cuts)) if blocks is None else [part for part in range(len(cuts)) if part in blocks]
    rowed, out = _rowed_roles(entry), []
    for part in parts:
        tensors = {
            role: _cut(entry, role, cuts[part], total) if role in rowed else h for role, h in entry.tensors.items()
        }
        piece = replace(entry, layer=entry.targets[part], rule=None, tensors=tensors, shape=None, own=None)
        out.append(piece if blocks is None else _of_ranks(piece, *blocks[part]))
    return out


def _of_ranks(entry: Entry, start: int, end: int, ratio: float) -> Entry:
    """The part of a LoRA that is of the ranks [first, end), of which the second factor was multiplied by `ratio`."""
    r, alpha = rank(entry.shapes), io.number(entry.alpha)
    if (start, end) == (0, r):
        return entry
    A, B = entry.tensors[DOWN], entry.tensors[UP]
    undo = 1 / ratio if ratio else 1
    tensors = {DOWN: io.rows(A, [(start, end)]), UP: io.scaled(io.columns(B, start, end), undo)}
    if B_BIAS in entry.tensors:
        tensors[B_BIAS] = io.scaled(entry.tensors[B_BIAS], undo)
    alpha = None if alpha is None else alpha * ratio * (end - start) / r
    return replace(entry, tensors={**entry.tensors, **tensors}, alpha=alpha)


def joined(component: str, rule: Rule, parts: Mapping[int, Entry], wanted: int | None = None) -> Joined:
    """The entry of a fused layer that does what entries of its parts do. Parts that are missing stay as they are. Raises Unfit.

    LoRAs with the same first factor share it, others stand in blocks along the diagonal, as they all do where that gives the rank that is `wanted`.
    """
    model = next(iter(parts.values()))
    entries = dict(sorted(parts.items()))
    _check_kinds([*entries.values()])
    _check_mixing(model, rule)
    sizes = _sizes(rule, entries)
    keys = tuple(key for entry in entries.values() for key in entry.keys)
    layer = dotted(component, rule.original)
    fused = replace(model, layer=layer, rule=rule, shape=None, own=None, keys=keys)
    ranks = [rank(entry.shapes) for entry in entries.values()]
    in_blocks = wanted not in (None, 0, ranks[0]) and wanted == sum(ranks)
    if not in_blocks and _are_alike([*entries.values()]):
        return _shared(rule, fused, entries, sizes)
    if UP not in model.tensors or CORE in model.tensors:  # a DoRA may be over something else
        raise Unfit("its parts have no common factor, and this method has no blocks")
    return _diagonal(rule, fused, entries, ranks, sizes)


def _check_kinds(entries: Sequence[Entry]) -> None:
    """Raise Unfit for parts of different methods, options, tensors or dtypes."""
    if len({(entry.method, frozenset(entry.tensors), repr(entry.options)) for entry in entries}) > 1:
        raise Unfit("its parts have different methods or tensors")
    dtypes = {(role, handle.dtype) for entry in entries for role, handle in entry.tensors.items()}
    if len(dtypes) > len(entries[0].tensors):
        raise Unfit("its parts have different dtypes")


def _are_alike(entries: Sequence[Entry]) -> bool:
    """Whether parts have the same rank, alpha and bytes in all that is not theirs by rows."""
    model = entries[0]
    numbers = {(rank(entry.shapes), io.number(entry.alpha)) for entry in entries}
    shared = model.tensors.keys() - _rowed_roles(model)
    return len(numbers) == 1 and all(io.same(e.tensors[role], model.tensors[role]) for role in shared for e in entries)


def _shared(rule: Rule, fused: Entry, entries: Mapping[int, Entry], sizes: Sequence[int]) -> Joined:
    """Parts that are alike, row by row, with what they share once."""
    rowed = _rowed_roles(fused)
    shared = [role for role in fused.tensors if role not in rowed]
    tensors = {role: h if role in shared else _stack(role, rule, entries, sizes) for role, h in fused.tensors.items()}
    _check_missing(rule, entries, shared)
    partial = len(entries) < len(rule.parts) and UP in fused.tensors
    blocks = {part: (0, rank(entry.shapes), 1.0) for part, entry in entries.items()}
    return Joined(replace(fused, tensors=tensors), blocks if partial else None)


def _diagonal(
    rule: Rule, fused: Entry, entries: Mapping[int, Entry], ranks: Sequence[int], sizes: Sequence[int]
) -> Joined:
    """Each part's LoRA in columns of its own. The least scale is left, and others' ratios to it go into the second factor.

    So that nothing gets smaller than the dtype can say; a power of two is exact, and undone on the way back.
    """
    _check_missing(rule, entries, [DOWN])
    _check_alike(DOWN, {e.tensors[DOWN].shape[1:] for e in entries.values()})
    _check_alike(UP, {e.tensors[UP].shape[2:] for e in entries.values()})
    scale, ratios = _scales(entries, ranks)
    ends = list(itertools.accumulate(ranks))
    model = fused.tensors[UP]
    pieces = [
        io.scaled(entries[part].tensors[UP], ratios[part])
        if part in entries
        else Handle(model.dtype, (size, 0, *model.shape[2:]))
        for part, size in enumerate(sizes)
    ]
    tensors = {
        role: _stack(role, rule, entries, sizes, ratios if role == B_BIAS else None)
        for role in fused.tensors
        if role not in (DOWN, UP)
    }
    A = io.stacked(entry.tensors[DOWN] for entry in entries.values())
    B = io.rows(io.diagonal(pieces), _order(rule, sum(sizes), 1))
    alpha = None if scale is None else scale * sum(ranks)
    blocks = {part: (end - r, end, ratios[part]) for part, end, r in zip(entries, ends, ranks, strict=True)}
    exact = all(math.frexp(ratio)[0] in (0.5, -0.5) for ratio in ratios.values())
    return Joined(replace(fused, tensors={DOWN: A, UP: B, **tensors}, alpha=alpha), blocks, exact)


def _scales(entries: Mapping[int, Entry], ranks: Sequence[int]) -> tuple[float | None, dict[int, float]]:
    """The scale of parts together, the least of theirs (None if no part has an alpha), and what each part's is times it."""
    alphas = [io.number(entry.alpha) for entry in entries.values()]
    scales = [1.0 if alpha is None else alpha / r for alpha, r in zip(alphas, ranks, strict=True)]
    least = min(filter(None, scales), key=abs, default=0.0)
    ratios = [scale / least if least else 1.0 for scale in scales]
    return None if {*alphas} == {None} else least, dict(zip(entries, ratios, strict=True))


def _check_alike(role: str, axes: Collection[tuple[int, ...]]) -> None:
    """Raise Unfit if the parts' tensors have different axes beside the rows."""
    if len(axes) > 1:
        raise Unfit(f"its parts have {role} of different sizes: {' and '.join(map(str, sorted(axes)))}")


def _check_missing(rule: Rule, entries: Mapping[int, Entry], shared: Sequence[str]) -> None:
    """Raise if parts are missing and the tensors cannot leave their rows as they are."""
    model = next(iter(entries.values()))
    if len(entries) == len(rule.parts):
        return
    layout = LAYOUTS[model.method]
    unfilled = {*model.tensors} - {*shared, *layout.off, BIAS}
    acting = not layout.inner and shared and "on_input" not in shared
    if unfilled or acting or ("on_input" in shared and io.number(model.tensors["on_input"])):
        names = [name for part, (name, _) in enumerate(rule.parts) if part not in entries]
        raise Unfit(f"it has no adapter for {', '.join(names)}, whose rows {model.method} would change")


def _stack(
    role: str, rule: Rule, entries: Mapping[int, Entry], sizes: Sequence[int], ratio: Mapping[int, float] | None = None
) -> Handle:
    """The parts' rows in the original's order, zeros for missing parts. Raises Unfit if the rows are of different lengths."""
    model = next(iter(entries.values()))
    _check_alike(role, {_rowed(e.tensors[role]).shape[1:] for e in entries.values()})
    unit, pieces = _unit(model, role), []
    like = _rowed(model.tensors[role])
    for part, size in enumerate(sizes):
        if part in entries:
            h = _rowed(entries[part].tensors[role])
            pieces.append(io.scaled(h, ratio[part]) if ratio else h)
        else:
            pieces.append(Handle(like.dtype, (size // unit, *like.shape[1:])))
    stack = io.rows(io.stacked(pieces), _order(rule, sum(sizes), unit))
    lead = model.tensors[role].shape
    return io.reshaped(stack, (1, stack.shape[0], *lead[2:])) if lead[0] == 1 != like.shape[0] else stack


def _cut(entry: Entry, role: str, ranges: Sequence[tuple[int, int]], total: int) -> Handle:
    handle, unit = entry.tensors[role], _unit(entry, role)
    rowed = _rowed(handle)
    if rowed.shape[0] * unit != total:
        raise Unfit(f"{role} {handle.shape} does not have {total // unit} rows")
    cut = io.rows(rowed, _in_units(ranges, unit))
    return cut if rowed is handle else io.reshaped(cut, (1, cut.shape[0], *handle.shape[2:]))


def _rowed(handle: Handle) -> Handle:
    """PEFT's magnitude of a convolution is [1, out, 1, 1]: with the rows first."""
    if handle.shape[0] == 1 and len(handle.shape) > 2 and handle.shape[1] > 1:
        return io.reshaped(handle, handle.shape[1:])
    return handle


def aspect(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows a column, by which tables tell two layers of one name apart."""
    size = extent(shapes)
    return size[0] // size[1] if size else None


def _rowed_roles(entry: Entry) -> set[str]:
    """The roles whose tensors have rows of their own for each part."""
    inputs = "on_input" in entry.tensors and io.number(entry.tensors["on_input"])
    return {*row_axes(entry.shapes)} - ({"ia3_w"} if inputs else set())


def _rows(entry: Entry) -> int:
    """The layer's out features, as the tensors show them; 0 if they show none."""
    sizes = {_unit(entry, role) * _rowed(entry.tensors[role]).shape[0] for role in _rowed_roles(entry)}
    if len(sizes) > 1:
        raise Unfit(f"its tensors are for {' and '.join(map(str, sorted(sizes)))} rows")
    return sizes.pop() if sizes else 0


def _unit(entry: Entry, role: str) -> int:
    """How many of the layer's rows stand behind one row of a tensor."""
    return row_axes(entry.shapes)[role][1]


def _check_mixing(entry: Entry, rule: Rule) -> None:
    """Raise Unfit for what mixes the rows of several parts, or their order."""
    shapes = entry.shapes
    if len(shapes.get("oft_blocks", ())) == 4:
        raise Unfit("BOFT turns all rows together")
    if any(core in shapes for core in ("hada_t1", "hada_t2")):
        raise Unfit("a Tucker core turns its factors around")
    if len(rule.parts) == 1:
        return
    if "dora_scale" in shapes and "dora_scale" not in row_axes(shapes):
        raise Unfit("a DoRA with a magnitude for each input needs the norms of the base's parts")
    if "oft_blocks" in shapes and (entry.options.get("clamp") or io.number(entry.alpha)):
        raise Unfit("the bound is on all rows together")


def _ranges(rule: Rule, part: int, total: int) -> list[tuple[int, int]]:
    try:
        return rule.ranges(part, total)
    except ValueError as error:
        raise Unfit(str(error)) from error


def _in_units(ranges: Sequence[tuple[int, int]], unit: int) -> list[tuple[int, int]]:
    if any(n % unit for pair in ranges for n in pair):
        raise Unfit(f"blocks of {unit} rows lie across its parts")
    return [(a // unit, b // unit) for a, b in ranges]


def _sizes(rule: Rule, entries: Mapping[int, Entry]) -> list[int]:
    """The rows of each part, of missing ones by their share."""
    ratios = {n / rule.parts[part][1] for part, entry in entries.items() if (n := _rows(entry))}
    if len(ratios) > 1:
        raise Unfit("its parts have other shares of the rows than in this family")
    ratio = ratios.pop() if ratios else 1
    return [round(ratio * share) for _, share in rule.parts]


def _order(rule: Rule, total: int, unit: int) -> list[tuple[int, int]]:
    """For each range of the original's rows, where it lies among the parts' rows one after the other."""
    at, places = 0, []
    for part in range(len(rule.parts)):
        for a, b in _in_units(_ranges(rule, part, total), unit):
            places.append((a, at, at + b - a))
            at += b - a
    out: list[tuple[int, int]] = []
    for _, a, b in sorted(places):
        if out and out[-1][1] == a:
            a = out.pop()[0]
        out.append((a, b))
    return out


def _blocks(entry: Entry, cuts: Sequence[Sequence[tuple[int, int]]], known: Blocks | None) -> Blocks | None:
    """The ranks of the parts if the second factor has blocks, which is then zero off the diagonal; None if it is one LoRA."""
    r, B = rank(entry.shapes), entry.tensors.get(UP)
    if B is None or CORE in entry.tensors or math.prod(B.shape[2:]) != 1:
        return None
    if known is None and not r % len(cuts):
        size = r // len(cuts)
        equal = {part: (size * part, size * (part + 1), 1.0) for part in range(len(cuts))}
        return equal if _are_blocks(B, cuts, equal) and io.raw(B).strip(b"\0") else None
    if known is None or any(end > r for _, end, _ in known.values()):
        return None
    return known if _are_blocks(B, cuts, known) else None


def _are_blocks(B: Handle, cuts: Sequence[Sequence[tuple[int, int]]], blocks: Blocks) -> bool:
    """Whether a second factor [o, r, *1] is zero but for each part's rows at its ranks."""
    data, row = memoryview(io.raw(B)), io.nbytes(B) // B.shape[0]
    size, zero = row // B.shape[1], bytes(row)
    for part, ranges in enumerate(cuts):
        start, end, _ = blocks.get(part, (0, 0, 1.0))
        for n in itertools.chain.from_iterable(range(*span) for span in ranges):
            numbers = data[n * row : (n + 1) * row]
            left, right = numbers[: start * size], numbers[end * size :]
            if left != zero[: len(left)] or right != zero[: len(right)]:
                return False
    return True
