"""Whether tensors fit a layer, and in which shapes PEFT has them there, by a method's layout."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from diffpeft.errors import ShapeMismatchError
from diffpeft.methods.axes import (
    Form,
    Shape,
    alternatives,
    canonical,
    holds,
    least,
    letter,
    letters,
    shown,
    told,
    triangle,
    written,
)
from diffpeft.methods.layout import LAYOUTS, RANKS, Layout
from diffpeft.methods.shapes import Shapes, axes_read

Items = tuple[tuple[str, Shape], ...]  # shapes by role, as a key


class LayerShape(NamedTuple):
    """What of a layer decides which tensors fit it: the shape of its canonical weight, whether it looks rows up, and the groups of its channels."""

    shape: Shape
    lookup: bool = False
    groups: int = 1

    @property
    def kernel(self) -> Shape:
        return self.shape[2:]


def misfit(method: str, shapes: Shapes, layer: LayerShape, side: str = "") -> str:
    """What about the shapes of a method's tensors does not fit each other, the layer or the side of it; empty if they fit."""
    return _misfit(method, _items(method, shapes), layer, side)


def _items(method: str, shapes: Shapes) -> Items:
    """The shapes of a method's own tensors, as a key."""
    roles = LAYOUTS[method].axes
    return tuple((role, tuple(shape)) for role, shape in shapes.items() if role in roles)


@functools.lru_cache(4096)  # a model has few kinds of layers
def _misfit(method: str, items: Items, layer: LayerShape, side: str) -> str:
    layout, shapes = LAYOUTS[method], dict(items)
    forms = _forms(layout, shapes)
    elsewhere = [why for form in forms if (why := _elsewhere(form, layer, side))]
    here = [_unfit(form, shapes, layer, layout.pruned) for form in forms if not _elsewhere(form, layer, side)]
    reasons = here or elsewhere or [_incomplete(layout, shapes)]
    return "" if "" in reasons else reasons[0]


def too_small(method: str, shared: Shapes, shapes: Shapes, layer: LayerShape) -> str:
    """Which of an adapter's shared tensors have too few numbers for a layer, or another rank; empty if none."""
    layout = LAYOUTS[method]
    if missing := sorted(layout.shared.keys() - shared.keys()):
        return f"{', '.join(missing)} missing"
    sizes = bound(layout.form(shapes), shapes, layer)
    assert not isinstance(sizes, str)
    known = {**sizes, "i.k": math.prod(layer.shape[1:])}
    for role, words in layout.shared.items():
        pairs = zip(words, shared[role], strict=False)
        if len(shared[role]) != len(words) or any(n < known[w] or (w in RANKS and n != known[w]) for w, n in pairs):
            return f"{role} {tuple(shared[role])} is too small, or of another rank: the layer needs ({', '.join(str(known[w]) for w in words)})"
    return ""


def fitted(method: str, shapes: Shapes, layer: LayerShape) -> tuple[Form, Mapping[str, Shape]]:
    """The form of tensors that fit a layer, and the shapes that PEFT gives them there. Raises ShapeMismatchError for what cannot be shaped so."""
    return _fitted(method, _items(method, shapes), layer)


@functools.lru_cache(4096)
def _fitted(method: str, items: Items, layer: LayerShape) -> tuple[Form, Mapping[str, Shape]]:
    layout, shapes = LAYOUTS[method], dict(items)
    forms = [form for form in _forms(layout, shapes) if not _elsewhere(form, layer, "")]
    form = next((form for form in forms if not _unfit(form, shapes, layer, layout.pruned)), next(iter(forms), None))
    if form is None:
        raise ShapeMismatchError(_incomplete(layout, shapes))
    sizes = bound(form, shapes, layer)
    if isinstance(sizes, str):
        raise ShapeMismatchError(sizes)
    return form, {role: _shape(form.axes[role], sizes, shape, layer.kernel)[0] for role, shape in items}


def fresh(form: Form, sizes: Mapping[str, int], kernel: Shape) -> dict[str, Shape]:
    """PEFT's shapes of new tensors by role, in the order in which PEFT draws them."""
    return {
        role: canonical(alternatives(form.axes[role])[0], sizes, kernel) for role in form.axes if role in form.needed
    }


def bound(form: Form, shapes: Shapes, layer: LayerShape) -> dict[str, int] | str:
    """{letter: size} on a layer: its own, what follows from them, and what the shapes choose; or why there is none."""
    sizes = {"o": layer.shape[0], "i": layer.shape[1], "I": layer.groups * layer.shape[1]}
    products = {factor: (total, second) for total, (factor, second) in form.products.items()}
    places = _letters(form, shapes)
    for role, name, _ in places:
        if name in sizes:
            continue
        n = sizes[name] = Counter(n for _, other, n in places if other == name).most_common(1)[0][0]
        if name in products:
            total, second = products[name]
            features = sizes[total] if total in sizes else math.prod(layer.shape[1:])
            if not n or features % n or sizes.setdefault(second, features // n) != features // n:
                return f"{shown([role], shapes)} does not divide the layer's {features} features"
    return sizes


def _letters(form: Form, shapes: Shapes) -> list[tuple[str, str, int]]:
    """(role, letter, size) of every axis that is one letter, in the order of the form; 0 for an axis that is not there."""
    rows = []
    for role in (role for role in form.axes if role in shapes):
        shape, words = shapes[role], axes_read(form.axes[role], shapes[role])
        for word, n in zip(words, (*shape, *(0,) * len(words)), strict=False):
            if word[0] != "*" and "." not in word and word[0] != "1":
                rows.append((role, letter(word), triangle(n) if word[-1] == "^" else n))
    return rows


def _forms(layout: Layout, shapes: Shapes) -> list[Form]:
    """The forms that tensors of these roles can be."""
    return [form for form in layout.forms if form.needed <= shapes.keys() <= form.axes.keys()]


def _incomplete(layout: Layout, shapes: Shapes) -> str:
    lacking = [sorted(form.needed - shapes.keys()) for form in layout.forms if shapes.keys() <= form.axes.keys()]
    if lacking:
        return f"{', '.join(sorted(lacking, key=len)[0])} missing"
    return f"{', '.join(sorted(shapes))} are parts of several adapters, and the layer takes one of them"


def _elsewhere(form: Form, layer: LayerShape, side: str) -> str:
    """Why tensors of a form are not for such a layer, or for this side of it."""
    roles = " and ".join(sorted(form.needed))
    if form.across and layer.groups == 1:
        return f"{roles} of other ranks are for convolutions with groups"
    if form.lookup not in (None, layer.lookup):
        return f"{roles} is for {'embeddings' if form.lookup else 'layers that are no embeddings'}"
    return f"{roles} is for the {form.side} side, not the {side} side" if side and form.side not in ("", side) else ""


def _unfit(form: Form, shapes: Shapes, layer: LayerShape, pruned: bool) -> str:
    sizes = bound(form, shapes, layer)
    if isinstance(sizes, str):
        return sizes
    if any(sizes.get(name, 1) < 1 for name in RANKS) and not pruned:
        return f"{shown(shapes, shapes)} have rank 0"
    if form.turns and (unread := [role for role in sorted(shapes) if _is_unread(form.axes[role], shapes[role])]):
        return ", ".join(f"{role} is {shapes[role]}, not {written(form.axes[role])}" for role in unread)
    wanted = {role: _shape(form.axes[role], sizes, shape, layer.kernel) for role, shape in shapes.items()}
    if wrong := [f"{role} {shape}, not {shapes[role]}" for role, (shape, fits) in wanted.items() if not fits]:
        return f"the layer takes {', '.join(wrong)}"
    return _ungrouped(form, sizes, shapes, layer) or _unturned(form, sizes, shapes, layer)


def _ungrouped(form: Form, sizes: Mapping[str, int], shapes: Shapes, layer: LayerShape) -> str:
    """That tensors are for another number of groups than the layer has, if they are for groups."""
    if not form.across or sizes["g"] == layer.groups:
        return ""
    return f"{shown(shapes, shapes)} is for {sizes['g']} groups, the layer has {layer.groups}"


def _is_unread(text: str, shape: Shape) -> bool:
    return 0 in shape[:1] or all(told(axes, shape) is None for axes in alternatives(text))


def _unturned(form: Form, sizes: Mapping[str, int], shapes: Shapes, layer: LayerShape) -> str:
    """What keeps blocks from turning a layer's features, if they are to."""
    if not form.turns:
        return ""
    n, b = sizes["n"], sizes["b"]
    features = sizes["o"] if form.turns == "o" else math.prod(layer.shape[1:])
    if n * b == features or (form.shared and n == 1 and b and features % b == 0):
        return ""
    side = "output" if form.turns == "o" else "input"
    return f"{shown(shapes, shapes)} turns {n * b} features in {n} blocks of {b}, the layer has {features} {side} features to turn"


def _shape(text: str, sizes: Mapping[str, int], shape: Shape, kernel: Shape) -> tuple[Shape, bool]:
    """The shape that PEFT gives a tensor on a layer, and whether one of `shape` can be read as it."""
    axes = [words for words in alternatives(text) if "/" in text or letters(words) <= {*sizes, "k"}]
    ways = [canonical(words, sizes, kernel) for words in axes]
    enough = [way for way, words in zip(ways, axes, strict=True) if len(shape) >= least(words)]
    fitting = [way for way in enough if holds(tuple(shape), way, kernel)]
    return ways[bool(kernel)] if "/" in text else (fitting or ways)[0], bool(fitting)
