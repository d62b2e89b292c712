"""Norm: w' = w + w_norm, b' = b + b_norm: the factors and the bias of a normalising layer.  LyCORIS's `train_norm`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffpeft.methods.base import Additive, Shaped, Spec, Tensors


class Norm(Additive):
    """Changes of a norm's factors and bias, [features] each. Its canonical weight is [features, 1]."""

    name = "norm"
    shifts = frozenset({"b_norm"})

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        g = spec.geometry
        if g.columns != 1 or g.kernel or g.lookup:
            return f"{' and '.join(p)} are for a norm, the layer has a weight {g.shape}"
        return super().check(p, spec)

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """1: there is no alpha."""
        return 1.0

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        w = p["w_norm"] if "w_norm" in p else torch.zeros_like(p["b_norm"])
        return w.view(spec.geometry.shape)

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return p.get("b_norm")
