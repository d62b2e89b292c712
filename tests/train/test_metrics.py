import numpy as np
import pytest
import torch

from diffpeft.train.metrics import frechet, shape_kept


def white(n=1):
    return np.full((n, 8, 8, 3), 255, np.uint8)


def test_the_shape_kept_is_the_mean_intersection_over_union_of_what_is_not_white():
    g = np.random.default_rng(0)
    before, after = (g.integers(200, 256, (5, 6, 7, 3), dtype=np.uint8) for _ in range(2))
    before[3] = after[3] = 255  # blank in both
    ratios = []
    for a, b in zip(before, after, strict=True):
        drawn = [
            {(y, x) for y in range(6) for x in range(7) if min(int(v) for v in image[y, x]) / 255 < 0.93}
            for image in (a, b)
        ]
        ratios.append(len(drawn[0] & drawn[1]) / len(drawn[0] | drawn[1]) if drawn[0] | drawn[1] else 1.0)
    assert len(set(ratios)) > 3 and shape_kept(before, after) == pytest.approx(sum(ratios) / 5, abs=1e-15)


def test_a_shape_is_what_has_any_channel_below_093_whatever_its_colour():
    red, black, pale = white(), white(), white()
    red[0, 2:6, 2:6] = (255, 0, 0)
    black[0, 2:6, 2:6] = 0
    pale[0, 2:6, 2:6] = (255, 255, 238)  # 0.933
    assert shape_kept(red, black) == 1.0
    assert shape_kept(red, pale) == shape_kept(pale, red) == 0.0
    pale[0, 2:4, 2:6, 1] = 237  # 0.929
    assert shape_kept(red, pale) == 0.5


def test_blank_pictures_keep_their_shape_and_shapes_that_vanish_or_move_away_are_lost():
    left, right = white(), white()
    left[0, :, :4], right[0, :, 4:] = 0, 0
    assert shape_kept(white(), white()) == 1.0
    assert shape_kept(left, white()) == shape_kept(white(), left) == shape_kept(left, right) == 0.0
    assert shape_kept(np.concatenate([left, left]), np.concatenate([left, right])) == 0.5


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
