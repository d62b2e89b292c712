"""The best product of few ranks: against the whole SVD in float64, on spectra of all kinds."""

from __future__ import annotations

import pytest
import torch

from diffpeft.methods import lowrank


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectra(o, c):
    """{name: (matrix, whether its 12th and 13th singular values differ)}"""
    n = min(o, c)
    U, V = torch.linalg.qr(randn(o, n))[0], torch.linalg.qr(randn(c, n, seed=1))[0]
    k = torch.arange(n, dtype=torch.float64)

    def of(S):
        return (U * S) @ V.T

    return {
        "low rank and little noise": of(torch.where(k < 12, 1 + k / 7, 1e-4)),
        "low rank and much noise": of(torch.where(k < 12, 2.0, 1.0)),
        "falling": of(1 / (1 + k)),
        "falling fast": of(0.7**k),
        "fewer ranks than asked for": of(torch.where(k < 5, 1.0, 0.0)),
        "flat": randn(o, c, seed=2),
        "zero": torch.zeros(o, c, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 150), (40, 300), (7, 5)])
def test_the_leading_part_is_that_of_the_whole_svd(shape, dtype):
    for name, D in spectra(*shape).items():
        spectrum = lowrank.leading(D.to(dtype), min(12, *shape))
        U, S, Vh = torch.linalg.svd(D.to(dtype).double(), full_matrices=False)
        rank = min(12, *shape)
        A, B = spectrum.cut(rank)
        ours, best = B.double() @ A.double(), (U[:, :rank] * S[:rank]) @ Vh[:rank]
        norm, least = float(D.norm()), float(S[rank:].norm())
        excess = float((D - ours).norm()) - least
        assert excess <= 2e-6 * max(norm, 1e-30), name
        if name != "flat":
            assert float((ours - best).norm()) <= 1e-5 * float(best.norm()), name
        assert spectrum.lost(rank) * norm == pytest.approx(least, rel=1e-3, abs=2e-3 * norm), name
        for left in (spectrum.U, spectrum.Vh.T):
            assert (
                torch.allclose(left.T @ left, torch.eye(left.shape[1], dtype=dtype), atol=1e-5)
                or not norm
                or "fewer" in name
            )


def test_the_same_seed_gives_the_same_numbers():
    D = randn(120, 90).float()
    first, again, other = (lowrank.leading(D, 6, seed).cut(6) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.allclose(first[1] @ first[0], other[1] @ other[0], atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 20, 4), (30, 20, 25), (5, 40, 5)])
def test_singular_values_of_a_product_are_those_of_the_matrix(shape):
    o, c, r = shape
    A, B = randn(r, c), randn(o, r, seed=1)
    spectrum = lowrank.of_product(A, B)
    S = torch.linalg.svdvals(B @ A)[: len(spectrum.S)]
    assert len(spectrum.S) == min(shape) and torch.allclose(spectrum.S, S)
    for rank in (1, 3, len(S)):
        A2, B2 = spectrum.cut(rank)
        assert torch.allclose(spectrum.S[rank:].norm(), (B2 @ A2 - B @ A).norm(), atol=1e-9)
        assert spectrum.lost(rank) == pytest.approx(float((B2 @ A2 - B @ A).norm() / (B @ A).norm()), abs=1e-7)
    assert lowrank.product_norm(A, B) == pytest.approx(float((B @ A).norm()))


def test_ranks_for_an_energy():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])
    shares = [9 / 14, 13 / 14, 1.0]
    assert [lowrank.ranks_for(S, share) for share in (0.01, *shares)] == [1, 1, 2, 3]
    assert lowrank.ranks_for(S, 9.01 / 14) == 2 and lowrank.ranks_for(S, 0.5, total=28.0) == 3


def test_a_kronecker_product_is_found_and_others_are_as_near_as_can_be():
    u, v = randn(3, 4), randn(5, 6, seed=1)
    (left, right), lost = lowrank.nearest_kronecker(torch.kron(u, v), (3, 4), (5, 6))
    assert torch.allclose(torch.kron(left, right), torch.kron(u, v)) and lost < 1e-7
    D = torch.kron(u, v) + 0.1 * randn(15, 24, seed=2)
    (left, right), lost = lowrank.nearest_kronecker(D, (3, 4), (5, 6))
    assert lost == pytest.approx(float((D - torch.kron(left, right)).norm() / D.norm()))
    nudged = torch.kron(left + 1e-3 * randn(3, 4, seed=3), right)
    assert (D - nudged).norm() > (D - torch.kron(left, right)).norm()
