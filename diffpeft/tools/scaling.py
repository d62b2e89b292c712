"""An entry times a number: W + s (f(W) - W) written as an entry of the same method, where there is one.

A method that has a scale keeps its factors' bytes and says the number in its alpha; of the others the tensors that the change is proportional to
(`Layout.linear`) are multiplied, in float64 and rounded once. A rotation or a DoRA at another strength is none, so these are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import Entry, Handle
from diffpeft.errors import CannotConvertError, ConfigError, shown
from diffpeft.methods.layout import BIAS, LAYOUTS, is_scaled
from diffpeft.methods.shapes import rank

FACTORS = "ia3_l"  # what is there is multiplied by these, so that 1 changes nothing
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # what float32 holds with all its digits


def scaled(entry: Entry, by: float, *, in_alpha: bool = True) -> Entry:
    """The entry of which strength 1 is what strength `by` of this one is: f'(W) - W = by (f(W) - W) for every W.

    Args:
        entry: one method on one layer; nothing of it is read but alphas.
        by: any finite number. A negative one turns the sign of a factor, not of the alpha, which other programs take to be positive.
        in_alpha: whether a method that has a scale says the number in its alpha; else it goes into a factor, in its dtype. So does one that makes an
            alpha of 0 (sd-scripts takes that for the rank), or one that float32 cannot hold.

    Returns an entry of the same method, roles, shapes and dtypes (but for an alpha, which becomes float32).

    Raises CannotConvertError, which names the layer and why, for a method that has no such entry; ConfigError for a number that is not finite.
    """
    if not math.isfinite(by):
        raise ConfigError(f"the weight is {by}", where=entry.layer, remedy="It is a finite number, such as 0.8.")
    if by == 1:
        return entry
    if why := unscalable(entry):
        raise CannotConvertError(
            f"{entry.method} of strength {by:g} is not {entry.method}: {why}",
            where=shown(entry.layer),
            remedy="Set its strength where it is used, or leave the layer out.",
        )
    layout = LAYOUTS[entry.method]
    in_alpha = in_alpha and (not _alpha_times(entry, 1) or _LEAST <= abs(_alpha_times(entry, by)) <= _MOST)
    by_alpha = in_alpha and is_scaled(entry.method, entry.tensors) and (layout.patterns or not layout.peft)
    if "scale" in entry.options:  # a LoKr of two whole halves of PEFT's, whose alpha counts
        return _with_scale(entry, by) if in_alpha else _multiplied(entry, by, layout.linear | {BIAS})
    if not by_alpha:
        return _multiplied(entry, by, layout.linear | {BIAS})
    signed = _multiplied(entry, math.copysign(1, by), layout.linear)
    return replace(_multiplied(signed, by, {BIAS}), alpha=_alpha(entry, abs(by)))


def unscalable(entry: Entry) -> str:
    """Why no entry of the same method is this one at another strength; empty if there is one."""
    if LAYOUTS[entry.method].over:
        return "its magnitudes are those of the changed weight"
    if LAYOUTS[entry.method].linear.isdisjoint(entry.tensors) and {*entry.tensors} - {BIAS, FACTORS}:
        return "it replaces the weight" if "set_weight" in entry.tensors else "part of a rotation is no rotation"
    return ""


def _with_scale(entry: Entry, by: float) -> Entry:
    return replace(
        _multiplied(entry, by, {BIAS}), options={**entry.options, "scale": float(entry.options["scale"]) * by}
    )


def _alpha_times(entry: Entry, by: float) -> float:
    """The entry's alpha times a number. One that is missing is the rank, and 1 of a method without ranks."""
    alpha = io.number(entry.alpha)
    return (float(rank(entry.shapes) or 1) if alpha is None else alpha) * by


def _alpha(entry: Entry, by: float) -> Handle | float:
    """The entry's alpha times a number: stored where it was stored, of the same axes, in float32 or better."""
    value = _alpha_times(entry, by)
    if not isinstance(entry.alpha, Handle):
        return value
    dtype, code = ("F64", "<d") if entry.alpha.dtype == "F64" else ("F32", "<f")
    return io.of_bytes(dtype, entry.alpha.shape, struct.pack(code, value))


def _multiplied(entry: Entry, by: float, roles: Collection[str]) -> Entry:
    """The entry with those of its tensors that have these roles times a number."""
    tensors = {
        role: _offset(handle, by) if role == FACTORS else io.scaled(handle, by) if role in roles else handle
        for role, handle in entry.tensors.items()
    }
    return replace(entry, tensors=tensors)


def _offset(factors: Handle, by: float) -> Handle:
    """1 + by (l - 1), in the dtype of l."""
    (l,) = io.load([factors])
    return io.handle((1 + by * (l.double() - 1)).to(l.dtype))
