"""Batches hold one size, leave nobody out, and follow from seed, step and place."""

from collections import Counter
from pathlib import Path

import pytest

from diffpeft.train import draw
from diffpeft.train.data import Example, Sizing
from diffpeft.train.data.batches import CROPS, Batches, Showing

SIZES = [(600, 600), (600, 800), (700, 700), (800, 600), (610, 800), (2000, 400), (512, 512)]
EXAMPLES = [Example(Path(str(n)), f"a, b, c, {n}", size, 1 + n % 3) for n, size in enumerate(SIZES)]
SIZING = Sizing((512,))


def batches(size, examples=EXAMPLES, sizing=SIZING, seed=3, **showing):
    return Batches(examples, sizing, size, seed, showing=Showing(**showing))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("sizing", [SIZING, Sizing((512, 576)), Sizing((512,), buckets=False)])
def test_batches_are_full_and_of_one_size(size, sizing):
    plan = batches(size, sizing=sizing)
    for step in range(60):
        shown = plan.at(step)
        assert len(shown) == size and len({s.view.target for s in shown}) == 1
        assert all(s.view.target in sizing.targets(EXAMPLES[s.index].size) for s in shown)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("sizing", [SIZING, Sizing((512, 576))])
def test_after_some_epochs_each_example_was_shown_so_often_for_each_repeat_and_size(size, sizing):
    plan = batches(size, sizing=sizing)
    counts = Counter()
    for epoch in range(7):
        for example in EXAMPLES:
            for target in sizing.targets(example.size):
                seen = counts[EXAMPLES.index(example), target]
                assert epoch * example.repeats <= seen <= (epoch + size) * example.repeats
                assert size > 1 or seen == epoch * example.repeats
        for step in range(plan.start(epoch), plan.start(epoch + 1)):
            counts.update((s.index, s.view.target) for s in plan.at(step))


def test_one_size_is_one_endless_row_of_passes():
    plan = batches(2, sizing=Sizing((512,), buckets=False), examples=EXAMPLES[::3])
    assert {e.repeats for e in plan.examples} == {1}
    for step in range(10):
        assert [s.index for s in plan.at(step)] == draw.order(3, 2 * step, 2, 3, "instance")


def test_a_step_may_be_asked_for_without_those_before():
    straight = [batches(3, flip=True, crop="random").at(step) for step in range(40)]
    one = batches(3, flip=True, crop="random")
    assert [one.at(step) for step in reversed(range(40))] == straight[::-1]
    assert [batches(3, seed=4).at(step) for step in range(40)] != straight


def test_repeats_that_all_share_are_none():
    tens = [Example(e.path, e.caption, e.size, 10 * e.repeats) for e in EXAMPLES]
    assert [batches(2, examples=tens).at(step) for step in range(30)] == [batches(2).at(step) for step in range(30)]


def test_flips_and_crops_are_drawn_for_each_showing():
    plan = batches(
        1, examples=[Example(Path("a"), "x", (2000, 512))], sizing=Sizing((512,), False), flip=True, crop="random"
    )
    views = Counter(plan.at(step)[0].view for step in range(400))
    assert len(views) == 2 * CROPS and min(views.values()) > 15  # 40 are expected of each
    assert {v.left for v in views} == {372 * n for n in range(CROPS)} and {v.top for v in views} == {0}
    assert {batches(1).at(step)[0].view.flipped for step in range(20)} == {False}


def test_captions_are_shuffled_after_those_that_are_kept_and_dropped_by_chance():
    plan = batches(1, shuffle=True, keep=1, dropout=0.25)
    captions = [plan.at(step)[0].caption for step in range(400)]
    empty = captions.count("")
    assert 65 < empty < 140  # 100 are expected, with a standard deviation of 9
    said = [caption.split(", ") for caption in captions if caption]
    assert {tags[0] for tags in said} == {"a"} and all(sorted(tags)[-2:] == ["b", "c"] for tags in said)
    assert len({tuple(tags[1:]) for tags in said}) == 6 * len(EXAMPLES)
    one = batches(1, shuffle=True, keep=4)
    assert {one.at(step)[0].caption for step in range(50)} == {e.caption for e in EXAMPLES}


def test_what_a_run_needs_is_what_its_steps_show():
    plan = batches(2, flip=True, crop="random", shuffle=True, dropout=0.3)
    views, captions = plan.needed(range(5, 25))
    shown = [s for step in range(5, 25) for s in plan.at(step)]
    assert set(views) == {(s.index, s.view) for s in shown} and set(captions) == {s.caption for s in shown}


def test_without_examples_there_are_no_batches():
    assert batches(2, examples=[]).at(5) == [] and batches(2, examples=[]).needed(range(3)) == ({}, {})
