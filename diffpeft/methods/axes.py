"""The axes of tensors in words: which sizes a shape tells, and which shape sizes make.

A word is one axis: a letter (`o`) of that size, `i.k` of a product of sizes, `b^` of b (b - 1) / 2, `1` of one. A last word may be any number of axes:
`*1` of ones, `*k` of a kernel's sizes, `*k1` likewise, where PEFT gives a kernel of one axis a second one of 1. What is marked
so (`i?`) may be missing where it is one.
`a | b` is a tensor that is either, as its sizes tell; `a / b` one that is `a` on a layer without a kernel and `b` on one with a kernel.
Letters that a layer knows: `o` features out, `i` features in (of a group), `I` features in of all groups, `k` its kernel.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Shape = tuple[int, ...]
Size = int | Shape  # a kernel has the sizes of its axes
Axes = tuple[str, ...]
Sizes = dict[str, list[tuple[str, Size]]]  # {letter: (role, size) of each axis that has it}
KERNEL = 4  # the most axes of a kernel, with PEFT's second one


@dataclass(frozen=True)
class Form:
    """One complete set of tensors of a method.

    Args:
        axes: {role: its axes}.
        optional: the roles that may be left out.
        products: {letter, or `i.k`: the two whose product it is}, the second of which follows from the first.
        turns: the features (`o` or `i.k`) that `n` blocks of `b` are of.
        side: `input` or `output` where a rotation's tensors are of one side.
        shared: whether one block may stand for all.
        peft: whether PEFT has it.
        lookup: whether it is for embeddings alone (True), for other layers alone (False), or for both (None).
        across: whether it is for convolutions with `g` groups, and sees the channels of all.
    """

    axes: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    turns: str = ""
    side: str = ""
    shared: bool = False
    peft: bool = True
    lookup: bool | None = None
    across: bool = False

    @functools.cached_property
    def needed(self) -> frozenset[str]:
        """The roles that must be there."""
        return frozenset(self.axes) - self.optional

    def __or__(self, other: Mapping[str, str]) -> Form:
        """The form with more roles, which must be there."""
        return replace(self, axes={**self.axes, **other})


def form(words: str, **more: Any) -> Form:
    """A form from `role: axes; role?: axes`, where a question mark is behind what may be left out. `more` are its other fields."""
    rows = [tuple(part.strip() for part in row.split(":")) for row in words.split(";")]
    optional = frozenset(name[:-1] for name, _ in rows if name[-1] == "?")
    return Form({name.removesuffix("?"): text for name, text in rows}, optional, **more)


@functools.cache
def alternatives(text: str) -> tuple[Axes, ...]:
    """The axes that a tensor may have."""
    return tuple(tuple(words.split()) for words in re.split(r"[|/]", text))


@functools.cache
def told(axes: Axes, shape: Shape) -> tuple[tuple[str, Size], ...] | None:
    """The sizes of the letters in a shape; None if it cannot have these axes."""
    fixed = [word for word in axes if word[0] != "*"]
    shape = (*shape, *(1 for word in fixed[len(shape) :] if word[-1] == "?"))
    kernel, last = shape[len(fixed) :], axes[-1] if len(fixed) < len(axes) else ""
    if len(shape) < len(fixed) or not _is_kernel(kernel, last):
        return None
    sizes = [(letter(word), triangle(n) if word[-1] == "^" else n) for word, n in zip(fixed, shape, strict=False)]
    if not _is_consistent(sizes):
        return None
    named = tuple(pair for pair in sizes if pair[0] != "1")
    return (*named, ("k", kernel)) if last[:2] == "*k" else named


def _is_consistent(sizes: list[tuple[str, int]]) -> bool:
    """Whether every letter has one size, which there is, and what is to be one is one."""
    known = dict(sizes)
    return known.get("1", 1) == 1 and min(known.values(), default=0) >= 0 and len({*sizes}) == len(known)


def _is_kernel(sizes: Shape, word: str) -> bool:
    """Whether the last axes can be what the last word says; without one there are none."""
    return not sizes if not word else len(sizes) <= KERNEL and (word != "*1" or {*sizes} <= {1})


def least(axes: Axes) -> int:
    """The fewest axes that there must be."""
    return sum(word[0] != "*" and word[-1] != "?" for word in axes)


def letter(word: str) -> str:
    """The letter of a word, without its marks."""
    return word.rstrip("^?")


def letters(axes: Axes) -> set[str]:
    """The letters of axes, those of a product apart."""
    return {name for word in axes if word[0] not in "*1" for name in letter(word).split(".")}


def triangle(n: int) -> int:
    """The b of which n is b (b - 1) / 2; -1 if there is none."""
    b = (1 + math.isqrt(1 + 8 * n)) // 2
    return b if b * (b - 1) // 2 == n else -1


def read(form: Form, shapes: Mapping[str, Shape]) -> tuple[Sizes, list[str]]:
    """The sizes that shapes tell, and the roles whose shape has none of their axes. What can be read in two ways is read as the rest has it."""
    sizes: Sizes = {}
    misread = []
    for role in sorted(shapes, key=lambda role: len(alternatives(form.axes[role]))):
        ways = [way for axes in alternatives(form.axes[role]) if (way := told(axes, shapes[role])) is not None]
        if not ways:
            misread.append(role)
            continue
        agreeing = (way for way in ways if all(n == sizes[name][0][1] for name, n in way if name in sizes))
        for name, n in next(agreeing, ways[0]):
            sizes.setdefault(name, []).append((role, n))
    return sizes, misread


def size(form: Form, sizes: Sizes, name: str) -> int | None:
    """The size of a letter, told or made of its factors; a flattened kernel counts with its features. None if nothing tells it."""
    for written in (name, f"{name}.k"):
        if written in sizes and isinstance(n := sizes[written][0][1], int):
            return n
    factors = [size(form, sizes, factor) for factor in form.products.get(name, form.products.get(f"{name}.k", ()))]
    known = [n for n in factors if n is not None]
    return math.prod(known) if known and len(known) == len(factors) else None


def canonical(axes: Axes, sizes: Mapping[str, int], kernel: Shape) -> Shape:
    """The shape that sizes make."""
    known = {**sizes, "1": 1, "k": math.prod(kernel)}
    shape = tuple(_axis(word, known) for word in axes if word[0] != "*")
    ends = {"*1": (1,) * len(kernel), "*k": kernel, "*k1": (*kernel, 1) if len(kernel) == 1 else kernel}
    return shape + ends.get(axes[-1], ())


def _axis(word: str, known: Mapping[str, int]) -> int:
    """The size of one axis."""
    if word[-1] == "^":
        return known[letter(word)] * (known[letter(word)] - 1) // 2
    return math.prod(known[name] for name in letter(word).split("."))


def holds(shape: Shape, wanted: Shape, kernel: Shape) -> bool:
    """Whether a tensor of `shape` can be read as `wanted` [n, i, *k] or [n, i * prod(k)]: only the kernel flattened, or axes of 1, differ."""
    if shape == wanted:
        return True
    ends = tuple(shape[2:])
    same = shape[:1] == wanted[:1] and math.prod(shape) == math.prod(wanted) > 0
    return same and (ends in (kernel, (*kernel, 1)) or set(ends) <= {1})


def written(text: str) -> str:
    """The axes of a tensor, for a message."""
    return " or ".join(f"({', '.join(axes)})" for axes in alternatives(text)).replace("b^", "b (b - 1) / 2")


def shown(roles: Iterable[str], shapes: Mapping[str, Shape]) -> str:
    """Roles with their shapes, for a message."""
    return ", ".join(f"{role} {tuple(shapes[role])}" for role in dict.fromkeys(roles))
