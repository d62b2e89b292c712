"""Which method a layer's tensors in a file are of, and what they lack; how a format spells a role is the format's affair."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from diffpeft.methods.axes import Shape
from diffpeft.methods.layout import BIAS, LAYOUTS, MAGNITUDES

OLD_OFT = ("oft_r", "oft_s")  # PEFT's before 0.16, which are read as what they are today: see engine.today

# Tensor names of methods that exist in files and that no method here reads: {how the last part of a key starts: method}.
FOREIGN = {
    "oft_diag": "early oft",
    "lambda_layer": "tlora",
    "q_layer": "tlora",
    "p_layer": "tlora",
    "glora_A": "glora of PEFT",
    "glora_B": "glora of PEFT",
    "delora_": "delora",
}


def split(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """{method: roles} of one layer, in the order in which they act; a DoRA's magnitudes stand behind the tensors that they are over.

    `oft_blocks` are OFT's with 3 axes, BOFT's with 4. A bias alone is `full`'s.
    """
    return {
        method: list(roles) for method, roles in _split(tuple((role, len(s)) for role, s in shapes.items())).items()
    }


@functools.cache
def _split(axes: tuple[tuple[str, int], ...]) -> dict[str, list[str]]:
    owners = {role: _owner(role, dict(axes)) for role, _ in axes if role not in (BIAS, *OLD_OFT)}
    methods: dict[str, list[str]] = {}
    for role, method in sorted(owners.items(), key=lambda row: row[0] in MAGNITUDES):
        methods.setdefault(method, []).append(role)
    methods = dict(sorted(methods.items(), key=lambda row: _turn(row[0])))
    if BIAS in dict(axes):
        (next(iter(methods.values())) if methods else methods.setdefault("full", [])).append(BIAS)
    return methods


def _turn(method: str) -> tuple[int, int]:
    """When a method acts on a layer; those of no method that is known come last."""
    known = list(LAYOUTS)
    return (LAYOUTS[method].stage, known.index(method)) if method in LAYOUTS else (len(known), 0)


def _owner(role: str, axes: Mapping[str, int]) -> str:
    """The method that a tensor is of: of several that have the role, the one that has most of the layer's tensors."""
    shares = {method: layout.share(axes, role) for method, layout in LAYOUTS.items() if role in layout.roles}
    method = max(shares, key=shares.__getitem__, default="")
    return method if method and shares[method] > (0, 0) else foreign(role)


def foreign(role: str) -> str:
    """The method, of none that is known here, that a tensor is of."""
    return next((method for start, method in FOREIGN.items() if role.startswith(start)), role)


def missing(roles: Collection[str]) -> tuple[str, ...] | None:
    """What one method's roles lack to be whole; None if they are parts of more than one whole."""
    return _missing(frozenset(roles))


@functools.cache
def _missing(roles: frozenset[str]) -> tuple[str, ...] | None:
    present = roles - {BIAS}
    layouts = [layout for layout in LAYOUTS.values() if present & {*layout.roles}] or [LAYOUTS["full"]]
    lacking = [form.needed - present for layout in layouts for form in layout.forms if present <= form.axes.keys()]
    fewest: Collection[str] = min(lacking, key=len, default=())
    return tuple(sorted(fewest)) if lacking else None
