"""Norm: w' = w + w_norm, b' = b + b_norm: the factors and the bias of a normalising layer.  LyCORIS's `train_norm`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffpeft.methods.base import Additive, Spec, Tensors


class Norm(Additive):
    """Changes of a norm's factors and bias, [features] each. Its canonical weight is [features, 1]."""

    name = "norm"
    roles = ("w_norm", "b_norm")
    shifts = frozenset({"b_norm"})

    @classmethod
    def check(cls, p: Mapping[str, Any], spec: Spec) -> str:
        g = spec.geometry
        if g.columns != 1 or g.kernel or g.lookup:
            return f"{' and '.join(p)} are for a norm, the layer has a weight {g.shape}"
        wrong = {r: tuple(t.shape) for r, t in p.items() if math.prod(t.shape) != g.out or t.shape[:1] != (g.out,)}
        told = ", ".join(f"{role} ({g.out},), not {shape}" for role, shape in wrong.items())
        return f"the layer takes {told}" if told else ""

    @classmethod
    def adopt(cls, p: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
        return {role: t.flatten() for role, t in p.items()}

    @classmethod
    def rank(cls, p: Mapping[str, Any]) -> int:
        return 1

    @classmethod
    def scale(cls, p: Mapping[str, Any], spec: Spec) -> float:
        """1: there is no alpha."""
        return 1.0

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        w = p["w_norm"] if "w_norm" in p else torch.zeros_like(p["b_norm"])
        return w.view(spec.geometry.shape)

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return p.get("b_norm")
