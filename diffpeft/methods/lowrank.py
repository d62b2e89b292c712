"""Matrices as products of thin ones: D = B A, A [r, columns], B [out, r], and the best such product of fewer ranks (Eckart, Young 1936).

Of a product the singular values come from its factors, never from the matrix; of a matrix the leading ones come from a block Krylov space
(Musco, Musco 2015, arXiv:1504.05477), which stops by what it measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [r, columns], B [out, r]: the matrix B A

SAME_PAIR = 1e-6  # the leading part of a matrix is found when its relative error is estimated to be below this,
SAME_ENERGY = 1e-6  # or where singular values lie too close for that, when what is left out is the least by this much
_INDEPENDENT = 1e-2  # the least ratio of a Cholesky factor's diagonal at which it replaces a QR
_PATIENT, _EXACT = 5, 2  # above 1 / 5 of the smaller side the second is enough, above 1 / 2 all are computed


class Spectrum(NamedTuple):
    """D = U diag(S) Vh, or its leading part: U [out, n], S [n], Vh [n, columns], and the squared norm of all of D. There may be more values than vectors."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float
    partial: bool = False  # whether there are singular values beside these

    def cut(self, rank: int) -> Pair:
        """The best factors of at most `rank`, each with the root of the singular values."""
        root = self.S[:rank].sqrt()
        return root[:, None] * self.Vh[:rank], self.U[:, :rank] * root

    def lost(self, rank: int) -> float:
        """The norm of what `cut` leaves out / the norm of D; 0 for no D."""
        if not self.energy:
            return 0.0
        squares = self.S.double().square()
        beyond = max(self.energy - float(squares.sum()), 0.0) if self.partial else 0.0
        return ((float(squares[rank:].sum()) + beyond) / self.energy) ** 0.5


def ranks_for(S: Tensor, energy: float, total: float | None = None) -> int:
    """The least rank that keeps a share `energy` of the squared norm `total` (that of S, if it is not told); at least 1."""
    share = S.double().square().cumsum(0)
    total = float(share[-1]) if total is None else total
    return min(int((share < energy * total * (1 - 1e-12)).sum()) + 1, len(S))


def of_product(A: Tensor, B: Tensor, rank: int | None = None) -> Spectrum:
    """The singular values and vectors of B A, of a QR of each factor: A [r, columns], B [out, r] -> n = min(r, out, columns) of them, or `rank`."""
    if len(A) >= min(len(B), A.shape[1]):
        return of_matrix(B @ A)
    (Qb, Rb), (Qa, Ra) = _orthogonal(B), _orthogonal(A.t())
    U, S, Vh = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
    n = len(S) if rank is None else min(rank, len(S))
    return Spectrum(Qb(U[:, :n]), S, Qa(Vh[:n].t()).t(), float(S.double().square().sum()))


def _orthogonal(M: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(x -> Q x, R) with M = Q R, M [n, r]: by a Cholesky factor in float64 where columns are far from dependent, which is the quicker way; else by QR."""
    if M.dtype == torch.float64:
        L, failed = torch.linalg.cholesky_ex(M.t() @ M)
        sizes = L.diagonal()
        if not failed and float(sizes.min()) > _INDEPENDENT * float(sizes.max()):
            return lambda x: M @ torch.linalg.solve_triangular(L.t(), x, upper=True), L.t()
    Q, R = torch.linalg.qr(M)
    return lambda x: Q @ x, R


def squared_norm(D: Tensor) -> float:
    """The sum of squares, to fp32's precision and in one pass."""
    return float(torch.linalg.vector_norm(D, dim=-1).double().square().sum())


def of_matrix(D: Tensor) -> Spectrum:
    """All singular values and vectors of a matrix."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return Spectrum(U, S, Vh, float(S.double().square().sum()))


def leading(D: Tensor, rank: int, seed: int = 0) -> Spectrum:
    """The `rank` largest singular values of a matrix with their vectors, by random vectors of a seed. D [out, columns], in fp32 or better.

    The error against the exact ones is below 1e-5 of their norm where the singular values around `rank` differ; where they do not, and many pairs are
    as good, the norm of what is left out is the least to 1e-6.
    """
    if len(D) > D.shape[1]:
        turned = leading(D.t(), rank, seed)
        return Spectrum(turned.Vh.t(), turned.S, turned.U.t(), turned.energy, turned.partial)
    energy = squared_norm(D)
    width = rank + max(8, rank // 2)
    if energy == 0 or width * _EXACT >= len(D):
        return _first(of_matrix(D), rank)
    space = _Krylov(D, width, seed)
    while not space.holds(rank, energy):
        if (space.size + width) * _EXACT >= len(D):
            return _first(of_matrix(D), rank)
        space.grow()
    return space.spectrum(rank, energy)


def _first(spectrum: Spectrum, rank: int) -> Spectrum:
    U, S, Vh, energy, _ = spectrum
    return Spectrum(U[:, :rank], S[:rank], Vh[:rank], energy, rank < len(S))


class _Krylov:
    """An orthonormal basis Q of the space of (D D^T)^j D X, in blocks, with T = Q^T D and the Gram matrix T T^T in float64."""

    def __init__(self, D: Tensor, width: int, seed: int) -> None:
        X = torch.randn(D.shape[1], width, generator=torch.Generator().manual_seed(seed)).to(D)
        self.D = D
        self.Q = [torch.linalg.qr(D @ X)[0]]
        self.T = [self.Q[0].t() @ D]
        self.gram = _product(self.T[0], self.T[0])
        self.vectors = self.gram
        self.next = self._outside()

    @property
    def size(self) -> int:
        """How many vectors the basis has."""
        return len(self.gram)

    def _outside(self) -> tuple[Tensor, Tensor]:
        """What the next block adds: an orthonormal basis of it, and by how much it stands out of the space."""
        Y = self.D @ self.T[-1].t()
        Q = torch.cat(self.Q, 1)
        block, R = torch.linalg.qr(Y - Q @ (Q.t() @ Y))
        block, again = torch.linalg.qr(
            block - Q @ (Q.t() @ block)
        )  # what was small beside Y is rounding until it has length 1
        return block, again @ R

    def grow(self) -> None:
        """Take the next block in."""
        block = self.next[0]
        row = block.t() @ self.D
        beside = _product(torch.cat(self.T), row)
        self.gram = torch.cat([torch.cat([self.gram, beside], 1), torch.cat([beside.t(), _product(row, row)], 1)])
        self.Q.append(block)
        self.T.append(row)
        self.next = self._outside()

    def holds(self, rank: int, energy: float) -> bool:
        """Whether the leading part is in the space: by the residuals of D D^T u = s^2 u, and how far the values are from those that are left out."""
        values, self.vectors = torch.linalg.eigh(self.gram)
        values, W = values.flip(0), self.vectors.flip(1)[:, :rank]
        last = W[-self.next[1].shape[1] :]
        residuals = (self.next[1].double() @ last).square().sum(0)
        gaps = (values[:rank] - values[rank]).clamp_min(1e-300)
        captured = float(values[:rank].sum())
        error = float((residuals / gaps.square() * values[:rank]).sum()) ** 0.5
        if error <= SAME_PAIR * captured**0.5:
            return True
        patient = self.size * _PATIENT >= len(self.D)
        return patient and float((residuals / gaps).sum()) <= SAME_ENERGY * max(energy - captured, 1e-12 * energy)

    def spectrum(self, rank: int, energy: float) -> Spectrum:
        """The leading part that is in the space."""
        W = self.vectors.flip(1)[:, :rank].to(self.D)
        rows = W.t() @ torch.cat(self.T)  # S Vh
        S = torch.linalg.vector_norm(rows, dim=1)
        return Spectrum(torch.cat(self.Q, 1) @ W, S, rows / S.clamp_min(1e-30)[:, None], energy, True)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double().t()


def full_rank(D: Tensor) -> Pair:
    """A matrix as a product with an identity: exact, at the full rank."""
    o, columns = D.shape
    eye = torch.eye(min(o, columns), dtype=D.dtype, device=D.device)
    return (D, eye) if o <= columns else (eye, D)


def shortened(factors: Pair, rank: int | None, energy: float | None) -> Pair:
    """The best factors of at most `rank`, or of the least rank that keeps `energy` of the squared norm; as they are if they are no longer."""
    A, B = factors
    if rank is not None and len(A) <= rank:
        return factors
    spectrum = of_product(A, B)
    if rank is None:
        assert energy is not None
        rank = ranks_for(spectrum.S, energy)
    return spectrum.cut(rank)


def product_norm(A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of B A, without building it."""
    return max(float(((A.double() @ A.double().t()) * (B.double().t() @ B.double())).sum()), 0.0) ** 0.5


def nearest_kronecker(D: Tensor, left: tuple[int, int], right: tuple[int, int], seed: int = 0) -> tuple[Pair, float]:
    """The u [o1, i1] and v [o2, i2] with kron(u, v) nearest to D [o1 o2, i1 i2] (Van Loan, Pitsianis 1993), and what is lost / the norm of D."""
    (o1, i1), (o2, i2) = left, right
    blocks = D.reshape(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)
    spectrum = leading(blocks, 1, seed)
    v, u = spectrum.cut(1)
    return (u.reshape(o1, i1), v.reshape(o2, i2)), spectrum.lost(1)
