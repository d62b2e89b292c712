"""What the shapes of a method's tensors say, by its layout: rank, the layer's size, which rows are whose, and what does not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

from diffpeft.methods.axes import Form, Shape, Sizes, alternatives, read, shown, size, told, written
from diffpeft.methods.layout import BIAS, LAYOUTS, RANKS, Layout

Shapes = Mapping[str, Shape]
Result = TypeVar("Result")


def _cached(function: Callable[[dict[str, Shape]], Result]) -> Callable[[Shapes], Result]:
    """A function of shapes that is computed once for equal ones: a file has few."""
    cached = functools.lru_cache(4096)(lambda items: function(dict(items)))
    return functools.wraps(function)(
        lambda shapes: cached(tuple((role, tuple(shape)) for role, shape in shapes.items()))
    )


def layout_of(shapes: Shapes) -> Layout:
    """The row of the method that tensors are of: the one that has most of them."""
    axes = {role: len(shape) for role, shape in shapes.items()}
    return max(LAYOUTS.values(), key=lambda layout: layout.share(axes))


def _sizes(shapes: Shapes) -> list[tuple[Layout, Form, Sizes]]:
    """What the shapes of a layer's tensors tell, method by method; a DoRA's is told by what it is over."""
    rows = [layout for layout in LAYOUTS.values() if not layout.over and layout.claims(shapes)]
    rows = [layout for layout in rows if not {*layout.roles}.isdisjoint(shapes)]
    forms = [layout.form(shapes) for layout in rows]
    return [(row, form, _told(form, shapes)) for row, form in zip(rows, forms, strict=True)]


def _told(form: Form, shapes: Shapes) -> Sizes:
    return read(form, {role: tuple(shapes[role]) for role in form.axes if role in shapes})[0]


@_cached
def rank(shapes: dict[str, Shape]) -> int:
    """The rank that the shapes show; 0 if they show none (a LoKr of two whole halves, a rotation)."""
    for layout, _, sizes in _sizes(shapes):
        for name in layout.ranks:
            if name in sizes and isinstance(n := sizes[name][0][1], int):
                return n
    return 0


def block(shapes: Shapes) -> int:
    """The size of a rotation's blocks; 1 for a method that has neither a rank nor blocks."""
    layout = layout_of(shapes)
    n = _told(layout.form(shapes), shapes).get(layout.block, [("", 1)])[0][1]
    return n if isinstance(n, int) else 1


@_cached
def extent(shapes: dict[str, Shape]) -> tuple[int, int] | None:
    """(rows, columns) of a layer's weight where its tensors show both, kernels aside. What has too few axes or is empty shows nothing."""
    for _, form, sizes in _sizes(_matrices(shapes)):
        rows, columns = size(form, sizes, "o"), size(form, sizes, "i")
        if rows and columns:
            return rows, columns
    return None


@_cached
def width(shapes: dict[str, Shape]) -> int | None:
    """The columns of a layer's weight, also where nothing shows its rows."""
    columns = (size(form, sizes, "i") for _, form, sizes in _sizes(_matrices(shapes)))
    return next(filter(None, columns), None)


def _matrices(shapes: Shapes) -> Shapes:
    return {role: shape for role, shape in shapes.items() if len(shape) > 1 and 0 not in shape}


def weight_shape(method: str, shapes: Shapes) -> Shape:
    """The shape of the weight that a method's tensors are for, as far as they show it: a kernel may be hidden in the columns."""
    form = LAYOUTS[method].form(shapes)
    sizes = _told(form, shapes)
    features = [n for name in ("o", "i") if (n := size(form, sizes, name)) is not None]
    kernel = sizes["k"][0][1] if "k" in sizes else ()
    assert isinstance(kernel, tuple)
    return (*features, *kernel)


@_cached
def row_axes(shapes: dict[str, Shape]) -> dict[str, tuple[int, int]]:
    """{role: (axis, unit)} of the tensors of one method with rows of the layer's outputs: at which axis, and how many outputs a row stands for."""
    form = layout_of(shapes).form(shapes)
    sizes = _told(form, shapes)
    units = {"o": 1}
    for product, (factor, second) in form.products.items():
        if product == "o" and (n := size(form, sizes, second)):
            units[factor] = n
    if form.turns == "o" and isinstance(b := sizes.get("b", [("", 0)])[0][1], int):
        units["n"] = b
    axes = {role: axes_read(form.axes[role], shapes[role]) for role in form.axes if role in shapes}
    places_of = {
        role: [(place, units[word]) for place, word in enumerate(words) if word in units]
        for role, words in axes.items()
    }
    return {role: places[0] for role, places in places_of.items() if places} | (
        {BIAS: (0, 1)} if BIAS in shapes else {}
    )


def axes_read(text: str, shape: Shape) -> tuple[str, ...]:
    """The axes that a shape has, of a tensor that can have several."""
    ways = alternatives(text)
    return next((axes for axes in ways if told(axes, shape) is not None), ways[0])


@_cached
def contradiction(shapes: dict[str, Shape]) -> str:
    """What about the shapes of one method's tensors cannot be, on any layer; empty if all is well."""
    layout = layout_of(shapes)
    present = {role for role in shapes if role in layout.roles}
    forms = [form for form in layout.forms if form.needed <= present <= form.axes.keys()]
    forms = [form for form in forms if not (form.lookup and BIAS in shapes)] or forms  # an embedding has no bias
    wrong = [_conflict(form, shapes, layout.pruned) for form in forms or [layout.form(shapes)]]
    return "" if "" in wrong else wrong[0]


def _conflict(form: Form, shapes: Shapes, pruned: bool) -> str:
    axes = {**form.axes, BIAS: "o *1"}
    sizes, misread = read(Form(axes), {role: shapes[role] for role in axes if role in shapes})
    if misread:
        return _misread(misread, axes, shapes)
    for roles, why in (*_unequal_letters(sizes), *_unequal_products(form, sizes), *_undivided(form, sizes)):
        return f"{shown(roles, shapes)} {why}"
    return "" if pruned else _empty(sizes, shapes)


def _misread(roles: list[str], axes: Mapping[str, str], shapes: Shapes) -> str:
    """That tensors have other axes than they can have."""
    beside = [role for role in shapes if role not in roles]
    where = f" beside {', '.join(beside)}" if beside else ""
    expected = ", ".join(written(axes[role]) for role in roles)
    return f"{shown(roles, shapes)} has other axes than this tensor has{where}: {expected}"


def _empty(sizes: Sizes, shapes: Shapes) -> str:
    """That tensors have a rank of 0, or no numbers; empty if all have some."""
    if unranked := [role for name in RANKS for role, n in sizes.get(name, ()) if n == 0]:
        return f"{shown(unranked, shapes)} have rank 0"
    empty = [role for role, shape in shapes.items() if 0 in shape]
    return f"{shown(empty, shapes)} is empty" if empty else ""


Unequal = tuple[list[str], str]  # roles, and what of them is not the same


def _unequal_letters(sizes: Sizes) -> list[Unequal]:
    """The letters with several sizes."""
    several = {name: places for name, places in sizes.items() if len({n for _, n in places}) > 1}
    return [([role for role, _ in places], _of_different(name)) for name, places in several.items()]


def _of_different(name: str) -> str:
    kinds = {"k": "have different kernels", **dict.fromkeys(RANKS, "have different ranks")}
    return kinds.get(name, "are of different layers")


def is_across(shapes: Shapes) -> bool:
    """Whether a LoRA's tensors are PEFT's for a convolution with groups: B [out, r / groups, *1] mixes the ranks by group."""
    if not {"lora_A", "lora_B"} <= shapes.keys() or "lora_mid" in shapes:
        return False
    return shapes["lora_A"][:1] != shapes["lora_B"][1:2]


def _undivided(form: Form, sizes: Sizes) -> list[Unequal]:
    """What is across groups and does not divide into several of them, as channels and features do, or has no kernel."""
    if not form.across:
        return []
    o, c, r, q = (sizes[name][0][1] for name in ("o", "I", "r", "q"))
    assert isinstance(o, int) and isinstance(c, int) and isinstance(r, int) and isinstance(q, int)
    groups, over = divmod(r, q) if q else (0, 0)
    fits = groups > 1 and not over and o % groups == c % groups == 0 and sizes["k"][0][1]
    return [] if fits else [(sorted(form.needed), "have different ranks")]


def _unequal_products(form: Form, sizes: Sizes) -> list[Unequal]:
    """The products that are told and are not what is told of the whole."""
    products = dict(form.products)
    if form.turns == "o" and not (form.shared and sizes.get("n", [("", 1)])[0][1] == 1):
        products["o"] = ("n", "b")
    unequal = []
    for product, factors in products.items():
        names = (product, *factors)
        if not all(name in sizes for name in names):
            continue
        total, left, right = (sizes[name][0][1] for name in names)
        if total != left * right:  # type: ignore[operator]
            roles = [role for name in names for role, _ in sizes[name]]
            unequal.append((roles, f"are of different layers: {left} * {right} features"))
    return unequal
