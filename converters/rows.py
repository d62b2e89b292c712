"""Fused layers: an adapter of one of the original program's layers as adapters of diffusers' layers, and back.

Rows are a layer's out features. Bytes only move: rows are cut and put together, and what all parts share is copied; nothing is computed, but for
the scales of LoRAs with unequal ones, which can only be one in a fused layer.
"""

from __future__ import annotations

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
    own = _rowed_roles(entry)
    total = _rows(entry) or math.lcm(sum(share for _, share in rule.parts), len(rule.chunks))
    cuts = [_ranges(rule, part, total) for part in range(len(rule.parts))]
    if "lora_B" in entry.tensors and len(cuts) > 1:
        blocks = _blocks(entry, cuts, blocks)
    out = []
    for part, name in enumerate(entry.targets):
        if blocks is not None and part not in blocks:
            continue
        tensors = {
            role: _cut(entry, role, cuts[part], total) if role in own else h for role, h in entry.tensors.items()
        }
        alpha, r = entry.alpha, rank(entry.shapes)
        if blocks is not None and blocks[part][:2] != (0, r):
            first, end, ratio = blocks[part]
            tensors["lora_A"] = io.rows(tensors["lora_A"], [(first, end)])
            tensors["lora_B"] = io.scaled(io.columns(tensors["lora_B"], first, end), 1 / ratio if ratio else 1)
            if "lora_B_bias" in tensors and ratio:
                tensors["lora_B_bias"] = io.scaled(tensors["lora_B_bias"], 1 / ratio)
            number = io.number(alpha)
            alpha = None if number is None else number * ratio * (end - first) / r
        out.append(replace(entry, layer=name, rule=None, tensors=tensors, alpha=alpha, shape=None, own=None))
    return out


def joined(component: str, rule: Rule, found: Mapping[int, Entry], wanted: int | None = None) -> Joined:
    """The entry of a fused layer that does what entries of its parts do. Parts that are missing stay as they are. Raises Unfit.

    LoRAs with the same first factor share it, others stand in blocks along the diagonal, as they all do where that gives the rank that is `wanted`.
    """
    first = next(iter(found.values()))
    entries = dict(sorted(found.items()))
    layer = dotted(component, rule.original)
    if len({(e.method, frozenset(e.tensors), repr(e.options)) for e in entries.values()}) > 1:
        raise Unfit("its parts have different methods or tensors")
    if len({(role, h.dtype) for e in entries.values() for role, h in e.tensors.items()}) > len(first.tensors):
        raise Unfit("its parts have different dtypes")
    _check_mixing(first, rule)
    sizes = _sizes(rule, entries)
    fused = replace(
        first, layer=layer, rule=rule, shape=None, own=None, keys=tuple(k for e in entries.values() for k in e.keys)
    )
    ranks = [rank(e.shapes) for e in entries.values()]
    shared = [role for role in first.tensors if role not in _rowed_roles(first)]
    alphas = {io.number(e.alpha) for e in entries.values()}
    alike = len(set(ranks)) == 1 and len(alphas) == 1
    alike = alike and all(io.same(e.tensors[role], first.tensors[role]) for role in shared for e in entries.values())
    if alike and not (wanted and wanted != ranks[0] and wanted == sum(ranks)):
        tensors = {
            role: h if role in shared else _stack(role, rule, entries, sizes) for role, h in first.tensors.items()
        }
        _check_missing(rule, entries, shared)
        partial = len(entries) < len(rule.parts) and "lora_B" in first.tensors
        blocks = {part: (0, ranks[0], 1.0) for part in entries}
        return Joined(replace(fused, tensors=tensors), blocks if partial else None)
    if "lora_B" not in first.tensors or "lora_mid" in first.tensors:  # a DoRA may be over something else
        raise Unfit("its parts have no common factor, and this method has no blocks")
    return _diagonal(rule, fused, entries, ranks, sizes)


def _diagonal(
    rule: Rule, fused: Entry, entries: Mapping[int, Entry], ranks: Sequence[int], sizes: Sequence[int]
) -> Joined:
    """Each part's LoRA in columns of its own. The least scale is left, and others' ratios to it go into the second factor.

    So that nothing gets smaller than the dtype can say; a power of two is exact, and undone on the way back.
    """
    _check_missing(rule, entries, ["lora_A"])
    _check_alike("lora_A", {e.tensors["lora_A"].shape[1:] for e in entries.values()})
    _check_alike("lora_B", {e.tensors["lora_B"].shape[2:] for e in entries.values()})
    numbers = [io.number(e.alpha) for e in entries.values()]
    scales = [1.0 if a is None else a / r for a, r in zip(numbers, ranks, strict=True)]
    scale = min((s for s in scales if s), key=abs, default=0.0)
    ratios = [s / scale if scale else 1.0 for s in scales]
    ends = [sum(ranks[: n + 1]) for n in range(len(ranks))]
    blocks = {part: (end - r, end, q) for part, end, r, q in zip(entries, ends, ranks, ratios, strict=True)}
    ratio = dict(zip(entries, ratios, strict=True))
    model = fused.tensors["lora_B"]
    pieces = [
        io.scaled(entries[part].tensors["lora_B"], ratio[part])
        if part in entries
        else Handle(model.dtype, (size, 0, *model.shape[2:]))
        for part, size in enumerate(sizes)
    ]
    B = io.rows(io.diagonal(pieces), _order(rule, sum(sizes), 1))
    A = io.stacked(e.tensors["lora_A"] for e in entries.values())
    rest = {
        role: _stack(role, rule, entries, sizes, ratio if role == "lora_B_bias" else None)
        for role in fused.tensors
        if role not in ("lora_A", "lora_B")
    }
    alpha = None if set(numbers) == {None} else scale * sum(ranks)
    exact = all(math.frexp(r)[0] in (0.5, -0.5) for r in ratios)
    return Joined(replace(fused, tensors={"lora_A": A, "lora_B": B, **rest}, alpha=alpha), blocks, exact)


def _check_alike(role: str, axes: Collection[tuple[int, ...]]) -> None:
    """Raise Unfit if the parts' tensors have different axes beside the rows."""
    if len(axes) > 1:
        raise Unfit(f"its parts have {role} of different sizes: {' and '.join(map(str, sorted(axes)))}")


def _check_missing(rule: Rule, entries: Mapping[int, Entry], shared: Sequence[str]) -> None:
    """Raise if parts are missing and the tensors cannot leave their rows as they are."""
    first = next(iter(entries.values()))
    if len(entries) == len(rule.parts):
        return
    layout = LAYOUTS[first.method]
    unfilled = {*first.tensors} - {*shared, *layout.off, BIAS}
    acting = not layout.inner and shared and "on_input" not in shared
    if unfilled or acting or ("on_input" in shared and io.number(first.tensors["on_input"])):
        names = [name for part, (name, _) in enumerate(rule.parts) if part not in entries]
        raise Unfit(f"it has no adapter for {', '.join(names)}, whose rows {first.method} would change")


def _stack(
    role: str, rule: Rule, entries: Mapping[int, Entry], sizes: Sequence[int], ratio: Mapping[int, float] | None = None
) -> Handle:
    """The parts' rows in the original's order, zeros for missing parts. Raises Unfit if the rows are of different lengths."""
    first = next(iter(entries.values()))
    _check_alike(role, {_rowed(e.tensors[role]).shape[1:] for e in entries.values()})
    unit, pieces = _unit(first, role), []
    model = _rowed(first.tensors[role])
    for part, size in enumerate(sizes):
        if part in entries:
            h = _rowed(entries[part].tensors[role])
            pieces.append(io.scaled(h, ratio[part]) if ratio else h)
        else:
            pieces.append(Handle(model.dtype, (size // unit, *model.shape[1:])))
    whole = io.rows(io.stacked(pieces), _order(rule, sum(sizes), unit))
    lead = first.tensors[role].shape
    return io.reshaped(whole, (1, whole.shape[0], *lead[2:])) if lead[0] == 1 != model.shape[0] else whole


def _cut(entry: Entry, role: str, ranges: Sequence[tuple[int, int]], total: int) -> Handle:
    handle, unit = entry.tensors[role], _unit(entry, role)
    own = _rowed(handle)
    if own.shape[0] * unit != total:
        raise Unfit(f"{role} {handle.shape} does not have {total // unit} rows")
    cut = io.rows(own, _in_units(ranges, unit))
    return cut if own is handle else io.reshaped(cut, (1, cut.shape[0], *handle.shape[2:]))


def _rowed(handle: Handle) -> Handle:
    """PEFT's magnitude of a convolution is [1, out, 1, 1]: with the rows first."""
    if handle.shape[0] == 1 and len(handle.shape) > 2 and handle.shape[1] > 1:
        return io.reshaped(handle, handle.shape[1:])
    return handle


def aspect(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows a column, by which tables tell two layers of one name apart."""
    found = extent(shapes)
    return found[0] // found[1] if found else None


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
    at, found = 0, []
    for part in range(len(rule.parts)):
        for a, b in _in_units(_ranges(rule, part, total), unit):
            found.append((a, at, at + b - a))
            at += b - a
    out: list[tuple[int, int]] = []
    for _, a, b in sorted(found):
        if out and out[-1][1] == a:
            a = out.pop()[0]
        out.append((a, b))
    return out


def _blocks(entry: Entry, cuts: Sequence[Sequence[tuple[int, int]]], known: Blocks | None) -> Blocks | None:
    """The ranks of the parts if the second factor has blocks, which is then zero off the diagonal; None if it is one LoRA."""
    r, B = rank(entry.shapes), entry.tensors.get("lora_B")
    some = known is not None
    if B is None or "lora_mid" in entry.tensors or math.prod(B.shape[2:]) != 1:
        return None
    if known is None and not r % len(cuts):
        size = r // len(cuts)
        known = {part: (size * part, size * (part + 1), 1.0) for part in range(len(cuts))}
    if known is None or any(end > r for _, end, _ in known.values()):
        return None
    data, row = memoryview(io.raw(B)), io.nbytes(B) // B.shape[0]
    size = row // r
    zero = bytes(row)
    for part, ranges in enumerate(cuts):
        first, end, _ = known.get(part, (0, 0, 1.0))
        for n in (n for a, b in ranges for n in range(a, b)):
            own = data[n * row : (n + 1) * row]
            left, right = own[: first * size], own[end * size :]
            if left != zero[: len(left)] or right != zero[: len(right)]:
                return None
            some = some or own != zero
    return known if some else None
