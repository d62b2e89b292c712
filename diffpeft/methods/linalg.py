"""Shared pure functions: Tucker and Khatri-Rao products, Cayley maps, block products."""

from __future__ import annotations

import torch
from torch import Tensor


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_pq core[p, q, *k] a[p, o] b[q, i].  core [p, q, *k], a [p, o], b [q, i] -> [o, i, *k]."""
    k = core.shape[2:]
    return torch.einsum("pqk,po,qi->oik", core.flatten(2), a, b).reshape(a.shape[1], b.shape[1], *k)


def khatri_rao(a1: Tensor, a2: Tensor) -> Tensor:
    """Column-wise products of every pair of columns.  a1 [o, p], a2 [o, q] -> [o, p * q]."""
    return (a1[:, :, None] * a2[:, None, :]).flatten(1)


def skew(upper: Tensor, b: int) -> Tensor:
    """The antisymmetric matrices with these strict upper triangles, row by row.  upper [n, b (b - 1) / 2] -> [n, b, b]."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    full = upper.new_zeros(upper.shape[0], b * b).index_copy(1, rows * b + columns, upper).view(-1, b, b)
    return full - full.mT


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q: Tensor) -> Tensor:  # type: ignore[override]
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        inverse = torch.linalg.inv(eye + Q)
        ctx.save_for_backward(inverse)
        return 2 * inverse - eye

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -2 * (inverse.mT @ g @ inverse.mT)  # d(I + Q)^-1 = -(I + Q)^-1 dQ (I + Q)^-1


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1: orthogonal for antisymmetric Q.  [n, b, b] -> [n, b, b], in fp32 or better; exactly I for Q = 0."""
    return _Cayley.apply(Q)


def cayley_neumann(Q: Tensor, terms: int, last: float = 1) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + last Q^(terms-1): a truncated series for (I + Q)(I - Q)^-1, so about the transpose of `cayley(Q)`; PEFT's default.

    PEFT's rule for the number of terms: 3 gives the same as 4. `last` is 2 in files of PEFT 0.16 and 0.17.
    """
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    powers = {1: 0, 2: 1}.get(terms, max(terms, 4) - 1)
    power = Q
    for n in range(1, powers + 1):
        R = R + (last if n == powers > 1 else 2) * power
        power = power @ Q if n < powers else power
    return R
