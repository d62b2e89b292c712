import torch

from diffpeft.train import draw


def test_a_draw_depends_on_its_key_alone():
    a = draw.uniform(1, 2, "noise", 3)
    torch.manual_seed(99)
    assert draw.uniform(1, 2, "noise", 3) == a
    assert (
        len(
            {draw.uniform(seed, step, "noise", i) for seed in (0, 1) for step in (0, 1) for i in (0, 1)}
            | {draw.uniform(0, 0, "level", 0)}
        )
        == 9
    )


def test_every_pass_shows_every_example_once_however_it_is_cut():
    whole = draw.order(7, 0, 21, 0, "instance")
    assert [sorted(whole[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert [i for step in range(7) for i in draw.order(7, 3 * step, 3, 0, "instance")] == whole
