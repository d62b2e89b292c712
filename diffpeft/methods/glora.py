"""GLoRA as LyCORIS has it: W' = W + (alpha / r) (W a1 a2 + b1 b2), the first product over W's input channels.

After Chavan et al. 2023, arXiv:2306.07967. (PEFT's GLoRA is another method, elementwise.) W' x = W (x + a1 a2 x) + b1 b2 x, so that W need not be
touched. Old files of LyCORIS have the two of each pair in each other's place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffpeft.methods.base import Link, Method, Shaped, Spec, Strength, Tensors
from diffpeft.methods.fit import fitted
from diffpeft.methods.forms import Factors
from diffpeft.methods.linalg import tucker_factors

# In old files of LyCORIS: which role holds what another one should.
SWAPPED = {"glora_a1": "glora_a2", "glora_a2": "glora_a1", "glora_b1": "glora_b2", "glora_b2": "glora_b1"}


class GLoRA(Method):
    """GLoRA on layers without groups: a1 [in, r, *1], a2 [r, in, *1], b1 [out, r, *1], b2 [r, in, *k]; or with a core bm [r, r, *k] b2 [r, in, *1]."""

    name = "glora"

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        if spec.geometry.groups > 1:
            return "GLoRA mixes all input channels, and the layer has them in groups"
        return super().check(p, spec)

    @classmethod
    def adopt(cls, p: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
        """(Where r = in = out both orders fit: for LyCORIS that is new, for ComfyUI old.)"""
        form, _ = fitted(cls.name, {role: tuple(t.shape) for role, t in p.items()}, spec.geometry.layer)
        names = SWAPPED if form.axes["glora_a1"].startswith("r") else {}
        return {names.get(role, role): t for role, t in super().adopt(p, spec).items()}

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """alpha / rank; 1 without an alpha."""
        return 1.0 if spec.alpha is None else spec.alpha / cls.rank(p)

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        a1, a2, (down, up) = p["glora_a1"].flatten(1), p["glora_a2"].flatten(1), _pair(p)
        Wa = torch.einsum("oik,ir,rj->ojk", W.flatten(2) if W.dim() > 2 else W[..., None], a1, a2).reshape(W.shape)
        return W + cls.scale(p, spec) * (Wa + (up.flatten(1) @ down.flatten(1)).reshape(W.shape))

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        if spec.geometry.lookup:  # the input has no features to mix
            return super().apply(before, x, p, spec, s, bias)
        op, gate, pair = before.op, s * cls.scale(p, spec), Factors(*_pair(p))
        a1, a2 = p["glora_a1"].flatten(1), p["glora_a2"].flatten(1)
        mixed = op.blocks(op.blocks(x, a2.mT[None]), a1.mT[None])
        return op.plus(before(x + gate * mixed, bias), x, pair, gate)


def _pair(p: Tensors) -> tuple[Tensor, Tensor]:
    """down [r, in, *k] and up [out, r, *1], a core folded into down."""
    up, down = p["glora_b1"], p["glora_b2"]
    return (tucker_factors(p["glora_bm"], up.flatten(1).T, down.flatten(1))[0] if "glora_bm" in p else down), up
