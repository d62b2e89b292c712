"""DoRA: W' = m V / |V| with V = W + dW, dW of any additive method.  Liu et al. 2024, arXiv:2402.09353.

|V| is the norm of each output's row (the paper, PEFT) or of each input's column over all rows and kernel positions (LyCORIS without `wd_on_out`).
The norm takes no gradient (section 4.3 of the paper). For low-rank dW it needs no V:
|W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from diffpeft.methods import layout
from diffpeft.methods.base import Additive, Alpha, Fresh, Link, Method, Shaped, Site, Spec, Strength, Tensors
from diffpeft.methods.forms import Branch, Factors
from diffpeft.methods.linalg import squares, wide
from diffpeft.methods.loha import LoHa
from diffpeft.methods.lokr import LoKr
from diffpeft.methods.lora import Lora, LoraConfig, is_across
from diffpeft.methods.peft_config import PeftConfig

INNER: tuple[type[Additive], ...] = (Lora, LoHa, LoKr)
_METHODS = {method.name: method for method in INNER}
T = TypeVar("T")
PEFT, LYCORIS = "lora_magnitude_vector", "dora_scale"
NORM = "norm"  # among prepared tensors: |V|, worked out ahead


def norms(V: Tensor, axis: int) -> Tensor:
    """The norm over all axes but `axis`, in fp32 or better, without gradient."""
    return squares(V, axis).sqrt()


def axis_of(p: Mapping[str, Shaped], spec: Spec) -> int:
    """0: a magnitude for each output; 1: for each input. LyCORIS's vector tells by where its ones are; PEFT has outputs only."""
    return int(PEFT not in p and p[LYCORIS].shape[0] == 1 != max(spec.geometry.out, math.prod(p[LYCORIS].shape)))


def inner(p: Mapping[str, Shaped]) -> type[Additive]:
    """The method that the update is of."""
    return _METHODS[layout.inner(p) or ""]


class Dora(Method):
    """Weight decomposition over LoRA, LoHa and LoKr."""

    name = "dora"
    config = LoraConfig
    roles = tuple(dict.fromkeys((*layout.LAYOUTS["dora"].roles, *Lora.roles)))
    options = frozenset({"dora", "tucker", "across"})
    precise = frozenset({PEFT, LYCORIS})
    shifts = Lora.shifts

    @classmethod
    def init(cls, config: PeftConfig, site: Site, *, dora: str = "out", **options: object) -> Fresh:
        method = next(m for m in INNER if m.config is type(config))
        fresh = method.init(config, site, **options)
        W = site.weight()
        p = {role: t.to(W) for role, t in {**fresh.tensors, **fresh.frozen}.items()}
        spec = Spec(site.geometry, fresh.alpha, fresh.options)
        V = _beside(W, p, spec) if is_across(p) else method.weight(W, p, spec)
        m, ones = norms(V, 0 if dora == "out" else 1), [1] * len(site.geometry.kernel)
        if dora == "in":
            magnitude = {LYCORIS: m.view(1, -1, *ones)}
        elif method is Lora:
            magnitude = {PEFT: m.view(1, -1, *ones) if ones else m}
        else:
            magnitude = {LYCORIS: m.view(-1, 1, *ones)}
        return Fresh({**fresh.tensors, **magnitude}, fresh.alpha, fresh.options, fresh.frozen)

    @classmethod
    def stored(cls, p: dict[str, Tensor], alpha: Alpha) -> tuple[dict[str, Tensor], Alpha]:
        q, alpha = inner(p).stored(_rest(p), alpha)
        return {**q, **{role: t for role, t in p.items() if role in (PEFT, LYCORIS)}}, alpha

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        return inner(p).rank(_rest(p))

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return inner(p).bias(b, _rest(p), spec)

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        magnitudes = {role: wide(t) for role, t in p.items() if role in (PEFT, LYCORIS)}
        return {**inner(p).prepare(_rest(p), spec, training), **magnitudes}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        axis = axis_of(p, spec)
        V = inner(p).weight(W, _rest(p), spec)
        shape = [1] * W.dim()
        shape[axis] = -1
        return V * _ratio(p, norms(V, axis)).view(shape).to(W.dtype)

    @classmethod
    def ahead(cls, before: Link, p: Tensors, spec: Spec) -> dict[str, Tensor]:
        return {NORM: _norm(before, p, spec)} if _is_thin(p, spec) else {}

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        method, q, axis = inner(p), _rest(p), axis_of(p, spec)
        if is_across(q):
            return _with_branch(before, x, p, spec, s, bias)
        if not _is_thin(p, spec):
            return super().apply(before, x, p, spec, s, bias)
        scale = method.scale(q, spec)
        A, B = Lora.factors(q, spec)
        c = _ratio(p, _norm(before, p, spec))
        k = (1 + s * (c - 1)).to(before.dtype)
        op = before.op
        if axis == 1:
            y = before(op.scaled(x, k), bias)
            return op.plus(y, op.scaled(x, c.to(before.dtype)), Factors(A, B), s * scale)
        rows = (s * scale * c).to(before.dtype).view(-1, *(1 for _ in B.shape[1:]))
        return before.plus(x, Factors(A, B * rows), 1.0, bias, k)


def _is_thin(p: Tensors, spec: Spec) -> bool:
    """Whether the norm needs no V."""
    return inner(p) is Lora and (axis_of(p, spec) == 0 or not (spec.geometry.lookup or spec.geometry.groups > 1))


@torch.no_grad()
def _norm(before: Link, p: Tensors, spec: Spec) -> Tensor:
    """|V| of a LoRA on what was before, or what was worked out of that ahead."""
    if NORM in p:
        return p[NORM]
    q, axis = _rest(p), axis_of(p, spec)
    if is_across(q):
        return norms(_beside(before.weight(), q, spec), 0)
    change = (_rows if axis == 0 else _columns)(before.weight(), *Lora.factors(q, spec), Lora.scale(q, spec))
    return (before.squares(axis) + change).clamp_min(0).sqrt()


def _beside(W: Tensor, p: Tensors, spec: Spec) -> Tensor:
    """W with what PEFT's norm of a branch takes for its change: all numbers of B and A as one product of rank r.  W [o, i / groups, *k]."""
    A, B = p["lora_A"], p["lora_B"]
    return W + Lora.scale(p, spec) * (B.reshape(-1, len(A)) @ A.flatten(1)).reshape(W.shape)


def _with_branch(before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
    """W x, and a branch beside it, by the ratio of magnitude and norm; at strength s that share of the way there."""
    q = _rest(p)
    c = _ratio(p, _norm(before, p, spec))
    A, B = q["lora_A"], q["lora_B"]
    rows = (s * Lora.scale(q, spec) * c).to(before.dtype).view(-1, *(1 for _ in B.shape[1:]))
    return before.plus(x, Branch(A, B * rows), 1.0, bias, (1 + s * (c - 1)).to(before.dtype))


def _rest(p: Mapping[str, T]) -> dict[str, T]:
    return {role: t for role, t in p.items() if role not in (PEFT, LYCORIS)}


def _ratio(p: Tensors, norm: Tensor) -> Tensor:
    """m / |V|, and 1 where V is zero."""
    return torch.where(norm > 0, (p[PEFT] if PEFT in p else p[LYCORIS]).flatten() / norm.clamp_min(1e-38), 1)


def _rows(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|W + scale B A|^2 - |W|^2 of each row.  W [o, i, *k], A [r, i, *k], B [o, r, *1] -> [o]."""
    W, A, B = W.flatten(1), A.flatten(1), B.flatten(1)
    cross, A, B = wide(W @ A.t()), wide(A), wide(B)
    return ((2 * scale * cross + scale**2 * (B @ (A @ A.t()))) * B).sum(1)


def _columns(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|W + scale B A|^2 - |W|^2 of each input's column.  W [o, i, *k], A [r, i, *k], B [o, r, *1] -> [i]."""
    B = B.flatten(1)
    cross = wide(B.t() @ W.flatten(1)).view(A.shape)
    A, B = wide(A), wide(B)
    quad = ((B.t() @ B) @ A.flatten(1)).view(A.shape)
    return ((2 * scale * cross + scale**2 * quad) * A).sum([0, *range(2, A.dim())])
