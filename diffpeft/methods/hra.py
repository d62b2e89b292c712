"""HRA: W' = W H, H a chain of r Householder reflections.  Yuan et al. 2024, arXiv:2405.17484.

H = (I - 2 v_1 v_1^T) .. (I - 2 v_r v_r^T), v_j = u_j / |u_j|, or with Gram-Schmidt (`apply_GS`) I - 2 Q Q^T, the columns of Q orthonormal and with the
span of u. Either is I - V T V^T with a small T, so that W' x = W (x - V T V^T x): no matrix of in x in is made.
A fresh chain reflects twice along each v: the identity in exact arithmetic. With Gram-Schmidt no chain is.
W is flat(W) [out, in / groups * prod(kernel)], as in OFT. The features of an embedding are its output: W' = H W.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigWarning
from diffpeft.methods import config as checks
from diffpeft.methods.base import Fresh, Link, Method, Site, Spec, Strength, Tensors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming, wide
from diffpeft.methods.peft_config import PeftConfig, PeftType

NONE_LEFT = 64  # a column less what others span is nothing when it is shorter than so many roundings of itself


@dataclass
class HRAConfig(PeftConfig):
    """How to make an HRA. Names, meanings and defaults are PEFT's.

    Args:
        r: number of reflections, best even: an odd chain has no start that changes nothing.
        apply_GS: reflect along an orthonormal basis instead, by Gram-Schmidt. It has no start that changes nothing.
        target_modules, exclude_modules: as in LoraConfig.
        init_weights: True: each reflection twice, which is the identity. False: all of them random.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
        bias: which biases are trained too: "none", "hra_only", "all".
    """

    r: int = 8
    apply_GS: bool = False
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["hra"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_choice("apply_GS", self.apply_GS, (True, False))
        checks.check_choice("init_weights", self.init_weights, (True, False))
        checks.check_choice("bias", self.bias, ("none", "all", "hra_only"))


class Hra(Method):
    """HRA on any layer: `hra_u` [in / groups * prod(kernel), r], of an embedding [features, r]."""

    name = "hra"
    config = HRAConfig
    precise = frozenset({"V", "T"})

    @classmethod
    def init(cls, config: HRAConfig, site: Site, **_: object) -> Fresh:
        g, r = site.geometry, config.r
        features = g.out if g.lookup else g.columns
        twice = config.init_weights and not config.apply_GS and r % 2 == 0
        if config.init_weights and not twice:
            why = "apply_GS" if config.apply_GS else f"an odd r ({r})"
            warnings.warn(
                f"HRA with {why} has no start that changes nothing: its reflections are random",
                ConfigWarning,
                stacklevel=2,
            )
        u = kaiming(features, r // 2 if twice else r, generator=site.generator)
        return Fresh({"hra_u": u.repeat_interleave(2, 1) if twice else u}, options={"apply_GS": config.apply_GS})

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """V [features, r] and T [r, r], with H = I - V T V^T."""
        V = wide(p["hra_u"])
        V = orthonormal(V) if spec.options.get("apply_GS") else V / V.norm(dim=0)
        eye = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
        if spec.options.get("apply_GS"):
            return {"V": V, "T": 2 * eye}
        # a product of reflections in compact form: T^-1 has 1/2 on its diagonal and v_i . v_j above
        return {"V": V, "T": torch.linalg.solve_triangular(eye / 2 + (V.t() @ V).triu(1), eye, upper=True)}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        V, T, flat = p["V"].to(W.dtype), p["T"].to(W.dtype), W.flatten(1)
        change = V @ (T @ (V.t() @ flat)) if spec.geometry.lookup else (flat @ V) @ T @ V.t()
        return (flat - change).reshape(W.shape)

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x = W (x - s V T V^T x), in two thin products. Through the weight where a kernel or groups forbid it."""
        g, op = spec.geometry, before.op
        if not (g.pointwise or g.lookup):
            return super().apply(before, x, p, spec, s, bias)
        down, up = p["V"].to(before.dtype)[None], (p["T"].t() @ p["V"].t()).to(before.dtype)[None]
        t = before(x, bias) if g.lookup else x
        turned = t - s * op.blocks(op.blocks(t, down), up)
        return turned if g.lookup else before(turned, bias)


def orthonormal(u: Tensor) -> Tensor:
    """An orthonormal basis by Gram-Schmidt; zero in place of a column that the earlier ones span.  u [n, r] -> [n, r]."""
    columns = []
    least = u.norm(dim=0, keepdim=True).detach() * NONE_LEFT * torch.finfo(u.dtype).eps
    while u.shape[1]:
        length = u[:, :1].norm(dim=0, keepdim=True)
        there = length > least[:, :1]
        columns.append(torch.where(there, u[:, :1] / torch.where(there, length, 1), 0))
        u, least = u[:, 1:] - columns[-1] @ (columns[-1].t() @ u[:, 1:]), least[:, 1:]
    return torch.cat(columns, 1)
