"""Full: W' = W + diff, or W' = value.

`diff` is LyCORIS's "full" (and what extracting tools write for small layers), `set_weight` ComfyUI's; at strength s both are a step along a line from
W, as every method. A change of nothing but the bias is a `full` without tensors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from diffpeft.methods.base import Additive, Geometry, Shaped, Spec, Tensors


class Full(Additive):
    """A whole weight, in the layer's shape: [out, in / groups, *kernel], of an embedding [rows, features], of a norm [features]."""

    name = "full"

    @classmethod
    def additive(cls, axes: Mapping[str, int]) -> bool:
        return "set_weight" not in axes

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        """The most that a matrix of this shape can have."""
        return min((min(t.shape[0], math.prod(t.shape[1:])) for t in p.values()), default=0)

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """1: an alpha that lies beside a diff means nothing."""
        return 1.0

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        return _canonical(p["diff"], spec)

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        return _canonical(p["set_weight"], spec) if "set_weight" in p else super().weight(W, p, spec)


def _shape(g: Geometry) -> tuple[int, ...]:
    """The shape in files: a table of embeddings is not transposed there."""
    return g.shape[::-1] if g.lookup else g.shape


def _canonical(t: Tensor, spec: Spec) -> Tensor:
    return t.t() if spec.geometry.lookup else t
