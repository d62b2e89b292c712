"""Products with an epilogue, as autograd nodes: no pass over an activation that one matrix product does not make anyway.

Each has its plain form beside it for compiled code, where the compiler does this work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _added(y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool, into: bool) -> Tensor:
    """y + gate * B h, with features last (y [*n, o], h [*n, r]) or first (y [n, o, *m], h [n, r, *m]); B [o, r]."""
    if last:
        flat = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t()
        return (flat[0].addmm_(*flat[1:], alpha=gate) if into else torch.addmm(*flat, alpha=gate)).view(y.shape)
    flat = y.flatten(2), B.expand(len(y), -1, -1), h.flatten(2)
    return (flat[0].baddbmm_(*flat[1:], alpha=gate) if into else torch.baddbmm(*flat, alpha=gate)).view(y.shape)


class _Add(torch.autograd.Function):
    """`_added` in place: y's own gradient passes through untouched and uncopied."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.gate, ctx.last = gate, last
        ctx.mark_dirty(y)
        _added(y, h, B, gate, last, into=True)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h, B = ctx.saved_tensors
        if ctx.last:
            flat = g.reshape(-1, g.shape[-1])
            gh = (flat @ B).view(h.shape)
            gB = flat.t() @ h.reshape(-1, h.shape[-1])
        else:
            flat = g.flatten(2)
            gh = (B.t() @ flat).view(h.shape)
            gB = (flat @ h.flatten(2).mT).sum(0)
        return g, gh.mul_(ctx.gate), gB.mul_(ctx.gate), None, None


def add(y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool, into: bool) -> Tensor:
    """y + gate * B h (see `_added`). `into`: y is a fresh, contiguous result that nothing has saved, and may be written into."""
    if into and not torch.compiler.is_compiling():
        return _Add.apply(y, h, B, gate, last)
    return _added(y, h, B, gate, last, into=False)


class _LoraLinear(torch.autograd.Function):
    """x W^T + b + gate * (x A^T) B^T as one node: nothing is saved but x and the rank activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gate: Any) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ A.t()
        if isinstance(gate, Tensor):
            h *= gate
        y = F.linear(x, W, b)
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=1 if isinstance(gate, Tensor) else gate)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.gate = gate
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, W, A, B, h = ctx.saved_tensors
        gate, needs = ctx.gate, ctx.needs_input_grad
        scalar = 1.0 if isinstance(gate, Tensor) else gate
        flat, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        gh = flat @ B
        if isinstance(gate, Tensor):
            gh = gh * gate
        gx = torch.addmm(flat @ W, gh, A, alpha=scalar) if needs[0] else None
        gA = torch.mm(gh.t(), x).mul_(scalar) if needs[3] else None
        gB = torch.mm(flat.t(), h).mul_(scalar) if needs[4] else None
        gW = flat.t() @ x if needs[1] else None
        gb = flat.sum(0) if needs[2] else None
        return None if gx is None else gx.view(*g.shape[:-1], -1), gW, gb, gA, gB, None


def lora_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gate: float | Tensor) -> Tensor:
    """x W^T + b + gate * (x A^T) B^T.  x [*n, i], W [o, i], A [r, i], B [o, r], gate a number or [r]."""
    return _LoraLinear.apply(x, W, b, A, B, gate)


def block_product(t: Tensor, M: Tensor) -> Tensor:
    """Each block of features times its matrix.  t [n, k, b], M [k, b, c] -> [n, k, c]."""
    return torch.einsum("nkb,kbc->nkc", t, M)
