import pytest
import torch

from diffpeft.train.metrics import frechet


def test_the_distance_of_gaussians_that_commute_is_the_closed_form():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=g, dtype=torch.float64)
    x = torch.linalg.solve(
        torch.linalg.cholesky(torch.cov(x.T)), (x - x.mean(0)).T
    ).T  # exactly mean 0 and covariance 1
    a, b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    want = (shift.square().sum() + (a - b).square().sum()) / ((a.square().sum() + b.square().sum()) / 2)
    assert frechet(x * a, x * b + shift) == pytest.approx(want.item(), abs=1e-12)  # fp64
    assert frechet(x * a, x * a) == pytest.approx(0, abs=1e-12)


def test_the_distance_is_symmetric_and_needs_no_full_rank():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=g, dtype=torch.float64), torch.randn(60, 4, generator=g, dtype=torch.float64)
    y[:, 3] = y[:, 0]
    assert (
        frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-6) and frechet(x, y) > 0
    )  # the root of a singular matrix: half the digits
