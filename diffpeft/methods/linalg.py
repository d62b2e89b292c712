"""Shared pure functions: elementwise, Tucker and Khatri-Rao products, Cayley maps, block products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def khatri_rao(a1: Tensor, a2: Tensor) -> Tensor:
    """Column-wise products of every pair of columns.  a1 [o, p], a2 [o, q] -> [o, p * q]."""
    return (a1[:, :, None] * a2[:, None, :]).flatten(1)


def skew(upper: Tensor, b: int) -> Tensor:
    """The antisymmetric matrices with these strict upper triangles, row by row.  upper [n, b (b - 1) / 2] -> [n, b, b]."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    full = upper.new_zeros(upper.shape[0], b * b).index_copy(1, rows * b + columns, upper).view(-1, b, b)
    return full - full.mT


def traced() -> bool:
    """Whether the operations that run are recorded (compiled code, torch.jit.trace) or transformed (torch.func): they are to be plain ones then."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or torch._C._functorch.peek_interpreter_stack() is not None


def _cayley(Q: Tensor) -> Tensor:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * torch.linalg.inv(eye + Q) - eye


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q: Tensor) -> Tensor:
        R = _cayley(Q)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (R,) = ctx.saved_tensors
        inverse = (R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)) / 2
        return -2 * (inverse.mT @ g @ inverse.mT)  # d(I + Q)^-1 = -(I + Q)^-1 dQ (I + Q)^-1


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1: orthogonal for antisymmetric Q.  [n, b, b] -> [n, b, b], in fp32 or better; exactly I for Q = 0."""
    return _cayley(Q) if traced() else _Cayley.apply(Q)


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


class _Hadamard(torch.autograd.Function):
    """`hadamard` with nothing kept but the factors: both products are as large as the weight, and quickly made again."""

    @staticmethod
    def forward(ctx, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        ctx.save_for_backward(up1, down1, up2, down2)
        return (up1 @ down1).mul_(up2 @ down2)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        up1, down1, up2, down2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = []
        for (up, down), (other_up, other_down), (of_up, of_down) in (
            ((up1, down1), (up2, down2), needs[:2]),
            ((up2, down2), (up1, down1), needs[2:]),
        ):
            product = g * (other_up @ other_down)
            gradients += [product @ down.t() if of_up else None, up.t() @ product if of_down else None]
        return tuple(gradients)


def hadamard(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
    """(up1 down1) * (up2 down2), elementwise.  up [o, r], down [r, c] -> [o, c]."""
    same = len({t.dtype for t in (up1, down1, up2, down2)}) == 1
    if traced() or not same or not torch.is_grad_enabled():
        return (up1 @ down1) * (up2 @ down2)
    product: Tensor = _Hadamard.apply(up1, down1, up2, down2)
    return product


def tucker_factors(core: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """sum_pq core[p, q, *k] a[p, o] b[q, i] as a product of two.  core [p, q, *k], a [p, o], b [q, i] -> (down [p, i, *k], up [o, p])."""
    p, q, *k = core.shape
    return torch.einsum("pqk,qi->pik", core.reshape(p, q, -1), b).reshape(p, b.shape[1], *k), a.T


def kaiming(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """PEFT's init of adapter tensors, kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(size of one row)."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def added(y: Tensor, h: Tensor, gate: float | Tensor) -> Tensor:
    """y + gate h."""
    return y + gate * h if isinstance(gate, Tensor) else torch.add(y, h, alpha=gate)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or what is better: the dtype that formulas run in for tensors of a dtype, float8 among them."""
    return dtype if dtype.is_floating_point and dtype.itemsize >= 4 else torch.float32


def wide(t: Tensor) -> Tensor:
    """`t` in fp32 or better: what rotations are computed in."""
    return t.to(wide_dtype(t.dtype))


def is_finite(t: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in any dtype of floating point."""
    return t.numel() == 0 or bool(
        torch.stack((t if t.dtype.itemsize > 1 else t.float()).aminmax()).isfinite().all()
    )  # NaN is either's


def columns_times(W: Tensor, M: Tensor) -> Tensor:
    """W blockdiag(M).  W [o, n * b], M [n or 1, b, c] -> [o, n * c]."""
    return (W.unflatten(1, (-1, M.shape[-2])).transpose(0, 1) @ M).transpose(0, 1).flatten(1)


def rows_times(M: Tensor, W: Tensor) -> Tensor:
    """blockdiag(M) W.  M [n or 1, c, b], W [n * b, i] -> [n * c, i]."""
    return (M @ W.unflatten(0, (-1, M.shape[-1]))).flatten(0, 1)


def exchange(t: Tensor, axis: int, a: int, c: int, tail: int) -> Tensor:
    """Two factors of an axis trade places: index [n, a, c, tail] -> [n, c, a, tail]. `axis` is not negative."""
    return t.unflatten(axis, (-1, a, c, tail)).transpose(axis + 1, axis + 2).flatten(axis, axis + 3)


def butterfly(
    t: Tensor, stages: Iterable[tuple[int, Tensor]], exchange: Callable[..., Tensor], times: Callable[..., Tensor]
) -> Tensor:
    """t through the stages (i, matrices [n, b, b]) of a butterfly; stage i mixes halves of blocks that lie 2^i halves apart.

    `exchange(t, a, c, b / 2)` trades two factors of the turned axis (see `linalg.exchange`), `times(t, matrices)` multiplies its blocks.
    The permutation of stage i, the same for PEFT and LyCORIS up to the order inside a block: index [.., 2, 2^i, b / 2] <-> [.., 2^i, 2, b / 2].
    """
    for i, M in stages:
        k, half = 2**i, M.shape[-1] // 2
        t = times(exchange(t, 2, k, half) if i else t, M)
        t = exchange(t, k, 2, half) if i else t
    return t


def squares(W: Tensor, axis: int) -> Tensor:
    """Sums of squares over all axes but `axis`, in fp32 or better, without gradient."""
    W = W.detach()
    W = wide(W)
    return W.square().sum([i for i in range(W.dim()) if i != axis])
