"""What entries add to their layers, as thin factors where there are such, and entries of factors: what merging, resizing and extracting share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.definition import definition_of
from diffpeft.errors import CannotConvertError, ConfigError, NonFiniteError, shown
from diffpeft.methods import METHODS
from diffpeft.methods.config import check_rank
from diffpeft.methods.layout import BIAS, LAYOUTS, MAGNITUDES, inner
from diffpeft.methods.lowrank import Pair
from diffpeft.methods.shapes import is_across

if TYPE_CHECKING:
    from diffpeft.methods import Geometry

B_BIAS = "lora_B_bias"
# the convolutions of a UNet, whose kernel a file with flattened tensors does not tell
_SQUARE = re.compile(r"(?:^|\.)(?:conv_in|conv_out|conv1|conv2|(?:down|up)samplers\.\d+\.conv)$")
_POINT = re.compile(r"(?:^|\.)(?:conv_shortcut|proj_in|proj_out)$")
_CONV = re.compile(r"conv[^.]*$|patch_embed|(?:pos_embed|x_embedder)\.proj$")


@dataclass(frozen=True)
class Summand:
    """What an entry adds at strength 1: B A, or where it has no thin factors a matrix [out, columns]; and what it adds to the bias [out].

    `shape` is that of the canonical weight, as far as the tensors show it. All numbers are float64.
    """

    shape: tuple[int, ...]
    factors: Pair | None = None
    matrix: Tensor | None = None
    shift: Tensor | None = None
    rank: int = 0
    lookup: bool = False

    @property
    def acts(self) -> bool:
        """Whether more than the bias changes."""
        return self.factors is not None or self.matrix is not None

    @property
    def dense(self) -> Tensor | None:
        """The matrix [out, columns], built from the factors if there are such; None if only the bias changes."""
        return self.matrix if self.factors is None else self.factors[1] @ self.factors[0]


def bent(entry: Entry) -> str:
    """Why an entry's change cannot be added to another's: it depends on the weight it is applied to. Empty if it can."""
    method = METHODS[entry.method]
    if LAYOUTS[entry.method].over:
        return "its magnitudes are those of the changed weight"
    if is_across(entry.shapes):
        return "PEFT's LoRA of a convolution with groups is a branch beside the layer, and no change of its weight"
    if not method.additive({role: len(shape) for role, shape in entry.shapes.items()}) and {*entry.tensors} - {BIAS}:
        return "what it adds depends on the weight that it is applied to"
    if method.shared and (entry.shape is None or not entry.shared):
        return "its file does not tell the layer's size"
    return ""


def check_finite(entry: Entry, tensors: Iterable[Tensor]) -> None:
    """Raise NonFiniteError for tensors of an entry, or an alpha, that are not all numbers: nothing can be computed from these."""
    if all(map(io.finite, tensors)) and math.isfinite(io.number(entry.alpha) or 0.0):
        return
    files = sorted(str(file.path) for handle in entry.tensors.values() for file in io.files_of(handle))
    raise NonFiniteError(
        "there are values that are not finite",
        where=": ".join([*files[:1], shown(entry.layer)]),
        remedy="The file is damaged: diffpeft verify lists its layers. Leave them out with diffpeft prune, or get the file anew.",
    )


def update_of(entry: Entry) -> Summand:
    """What an entry adds to its layer. Raises CannotConvertError for one whose change depends on the weight, NonFiniteError for NaN and Inf."""
    if why := bent(entry):
        raise CannotConvertError(
            f"{entry.method} cannot be added to others: {why}",
            where=shown(entry.layer),
            remedy="Load the adapters onto their model: set_adapters mixes any of them, diffpeft.to_lora and diffpeft.combine make a LoRA there.",
        )
    shift = io.load([entry.tensors[BIAS]])[0].double().flatten() if BIAS in entry.tensors else None
    check_finite(entry, [] if shift is None else [shift])
    if not {*entry.tensors} - {BIAS}:
        assert shift is not None
        return Summand((len(shift),), shift=shift)
    definition = definition_of(entry)
    method, (_, p, spec) = definition.additive, definition
    check_finite(entry, p.values())
    assert method is not None
    g = spec.geometry
    if (more := method.bias(None, p, spec)) is not None:
        shift = more.flatten() if shift is None else shift + more.flatten()
    scale, factors = method.scale(p, spec), method.factors(p, spec)
    if factors is not None:
        pair = factors.A.flatten(1), scale * factors.B.flatten(1)
        return Summand(_shape(entry, g), pair, shift=shift, rank=len(pair[0]), lookup=g.lookup)
    if entry.method == "norm" and "w_norm" not in entry.tensors:
        return Summand((g.out,), shift=shift)
    matrix = (scale * method.delta(p, spec)).reshape(g.out, -1)
    return Summand(_shape(entry, g), matrix=matrix, shift=shift, rank=min(matrix.shape), lookup=g.lookup)


def _shape(entry: Entry, g: Geometry) -> tuple[int, ...]:
    """The shape of the weight, with the kernel of a convolution of a UNet also where it lies in the columns."""
    if any(len(entry.tensors[role].shape) == 1 for role in ("w_norm", "diff") if role in entry.tensors):
        return (g.out,)
    if g.kernel or not parted(entry.layer)[0].startswith("unet"):
        return g.shape
    if _SQUARE.search(entry.layer) and g.columns % 9 == 0:
        return (g.out, g.columns // 9, 3, 3)
    return g.shape


def hides_kernel(layer: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer is a convolution of which no tensor tells the kernel."""
    return len(shape) == 2 and bool(_CONV.search(layer)) and not _POINT.search(layer)


def under(entry: Entry) -> Entry | None:
    """What a DoRA is over, as an entry without the magnitudes; None for another method."""
    if not LAYOUTS[entry.method].over:
        return None
    tensors = {role: handle for role, handle in entry.tensors.items() if role not in MAGNITUDES and role != BIAS}
    return replace(entry, method=str(inner(tensors)), tensors=tensors)


def lora_tensors(factors: Pair, shape: tuple[int, ...], dtype: torch.dtype, lookup: bool = False) -> dict[str, Handle]:
    """Factors A [r, columns] and B [out, r] as a file has them, for a layer with a weight of this shape."""
    A, B = factors
    if len(shape) > 2:
        A, B = A.reshape(len(A), *shape[1:]), B.reshape(*B.shape, *(1 for _ in shape[2:]))
    names = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A", "lora_B")
    return {name: stored(t, dtype) for name, t in zip(names, (A, B), strict=True)}


def stored(t: Tensor, dtype: torch.dtype) -> Handle:
    """A tensor in the dtype of a file. Raises CannotConvertError if that cannot hold its values."""
    out = t.to(dtype).contiguous()
    if not io.finite(out):
        raise CannotConvertError(
            f"there are values that are not finite in {dtype}", remedy="Save in a wider dtype: --dtype fp32."
        )
    return io.handle(out)


def lora_entry(
    layer: Entry, factors: Pair, shape: tuple[int, ...], dtype: torch.dtype, beside: Mapping[str, Handle], lookup: bool
) -> Entry:
    """A LoRA of scale 1 on the layer of an entry."""
    tensors = {**lora_tensors(factors, shape, dtype, lookup), **beside}
    return replace(
        layer, method="lora", tensors=tensors, alpha=float(len(factors[0])), options={}, keys=(), shared={}, shape=None
    )


def full_entry(layer: Entry, matrix: Tensor, shape: tuple[int, ...], dtype: torch.dtype, lookup: bool) -> Entry:
    """A change of a whole weight on the layer of an entry."""
    diff = matrix.t() if lookup else matrix.reshape(shape)
    tensors = {"diff": stored(diff, dtype)}
    return replace(layer, method="full", tensors=tensors, alpha=None, options={}, keys=(), shared={}, shape=None)


def check_cut(rank: object, energy: object) -> None:
    """Raise ConfigError for a rank or a share of the energy that cannot be one; None says nothing and is well."""
    if rank is not None:
        check_rank("rank", rank)
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise ConfigError(f"energy is {shown(energy)}", remedy="It is a share above 0 and at most 1.")
