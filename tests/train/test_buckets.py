"""Sizes of pictures are those that sd-scripts prints, and nothing is left out."""

import pytest

from diffpeft.train.data.buckets import Sizing, bounds, buckets, covering, nearest, share

TALL_512 = [
    (256, 832),
    (256, 896),
    (256, 960),
    (256, 1024),
    (320, 704),
    (320, 768),
    (384, 640),
    (448, 576),
]  # as published


def turned(sizes):
    return {(h, w) for w, h in sizes}


def test_the_buckets_of_512_are_the_published_ones():
    sizes = buckets(512, *bounds(512))
    assert set(sizes) == {*TALL_512, (512, 512)} | turned(TALL_512) and list(sizes) == sorted(sizes)


@pytest.mark.parametrize(
    "resolution, step, least, most", [(768, 64, 256, 1024), (1024, 32, 256, 2048), (100, 12, 24, 200)]
)
def test_a_bucket_is_the_highest_of_its_width_or_the_widest_of_its_height(resolution, step, least, most):
    sides = [side for side in range(step, most + 1, step) if side >= least]
    fits = {(w, h) for w in sides for h in sides if w * h <= resolution**2 and (w - least) % step == 0}
    highest = {(w, h) for w, h in fits if not any(a == w and b > h for a, b in fits)}
    square = (resolution // step * step,) * 2
    assert set(buckets(resolution, step, least, most)) == highest | turned(highest) | {square}


def test_1024_has_the_sizes_that_sdxl_was_made_for():
    sizes = set(buckets(1024, *bounds(1024)))
    made_for = [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (1152, 896), (1216, 832), (1536, 640)]
    assert sizes >= set(made_for) and max(max(size) for size in sizes) == 2048


@pytest.mark.parametrize(
    "resolution, multiple", [(64, 16), (16, 16), (512, 8), (520, 8), (1000, 32), (1024, 48), (96, 8)]
)
def test_every_side_suits_the_model_and_no_area_is_larger(resolution, multiple):
    step, least, most = bounds(resolution, multiple)
    for width, height in buckets(resolution, step, least, most):
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2 or (width, height) == (step, step)
        assert (height, width) in buckets(resolution, step, least, most)


@pytest.mark.parametrize(
    "size, want",
    [
        ((1000, 1000), (512, 512)),
        ((3000, 4000), (448, 576)),  # 0.75: 0.778 is nearer than 0.6
        ((4000, 3000), (576, 448)),
        ((1920, 1080), (640, 384)),  # 1.78: 1.667 is nearer than 2.2
        ((320, 768), (320, 768)),
        ((1, 1), (512, 512)),
        ((10, 5000), (256, 1024)),
    ],
)
def test_an_image_goes_where_the_ratio_is_nearest(size, want):
    sizes = buckets(512, *bounds(512))
    got = nearest(size, sizes)
    errors = [abs(w / h - size[0] / size[1]) for w, h in sizes]
    assert abs(got[0] / got[1] - size[0] / size[1]) == min(errors)
    assert got == want


@pytest.mark.parametrize("size", [(1, 1), (333, 777), (640, 480), (5000, 10), (10, 5000), (512, 512), (1023, 997)])
@pytest.mark.parametrize("target", [(512, 512), (256, 1024), (832, 256)])
def test_a_scaled_image_covers_its_picture_and_touches_two_sides(size, target):
    width, height = covering(size, target)
    assert width >= target[0] and height >= target[1] and (width == target[0] or height == target[1])
    ratio = max(target[0] / size[0], target[1] / size[1])
    assert abs(width - size[0] * ratio) <= 0.5 and abs(height - size[1] * ratio) <= 0.5
    assert 0 < share(size, target) <= 1


def test_several_resolutions_use_an_image_in_each_that_does_not_enlarge_it():
    sizing = Sizing((512, 768, 1024))
    assert [w * h for w, h in sizing.targets((2000, 2000))] == [512**2, 768**2, 1024**2]
    assert sizing.targets((800, 800)) == ((512, 512), (768, 768))
    assert sizing.targets((20, 20)) == ((512, 512),)  # nothing is left out
    assert Sizing((512, 768), buckets=False).targets((2000, 1000)) == ((512, 512), (768, 768))
