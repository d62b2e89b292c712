"""Control images: which belong to which pictures, what is said of those that are missing or strange, and how they are shown."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffpeft.errors import ConfigError, DataError
from diffpeft.train.data import Example, Sizing, View, pairing, survey
from diffpeft.train.data.account import Control
from diffpeft.train.data.batches import Batches
from diffpeft.train.data.controls import shown_with, sizes_with


def pictures(folder, *names, size=(40, 30), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


def named(account):
    return {e.name: [f"{c.path.parent.name}/{c.path.name}" for c in e.controls] for e in account.examples}


# -- which belong to which ---------------------------------------------------------------------------------------------------


def test_folders_beside_target_hold_the_control_images(tmp_path):
    pictures(tmp_path / "target", "a.png", "b.png")
    pictures(tmp_path / "control", "a.jpg", "b.png", seed=1)
    pictures(tmp_path / "control2", "a.png", size=(20, 20), seed=2)
    account = survey(tmp_path, "make it red")
    assert named(account) == {"target/a.png": ["control/a.jpg", "control2/a.png"], "target/b.png": ["control/b.png"]}
    said = str(account)
    assert "1 control image beside each of 1, 2 control images beside each of 1" in said
    assert "1 image with a control image of another shape, which is seen whole: 'target/a.png'" in said
    assert "1 image without a control image in a further folder: 'target/b.png'" in said
    assert "folders of which nothing is used" not in said and account.table()["controls"] == 3


def test_folders_of_their_own_and_numbers_after_a_name(tmp_path):
    pictures(tmp_path / "data" / "cats", "a.png", "b.png")
    pictures(tmp_path / "masks" / "cats", "a.png", seed=1)
    pictures(tmp_path / "masks", "b_0.png", "b_1.png", "other.png", seed=2)
    account = survey(tmp_path / "data", "x", control=str(tmp_path / "masks"))
    assert named(account) == {"cats/a.png": ["cats/a.png"], "cats/b.png": ["masks/b_0.png", "masks/b_1.png"]}
    assert account.stray_controls == ("other.png",) and "control images of no picture: 'other.png'" in str(account)


@pytest.mark.parametrize(
    "row",
    [
        {"control": "c/a.png", "control_2": "c/b.png"},
        {"control_path_0": "c/a.png", "control_path_1": "c/b.png"},
        {"control_images": ["c/a.png", "c/b.png"]},
        {"edit_image": ["c/a.png", "c/b.png"]},
        {"conditioning_image": "c/a.png", "conditioning_image_2": "c\\b.png"},
    ],
)
def test_columns_of_tables(row, tmp_path):
    pictures(tmp_path, "t.png")
    pictures(tmp_path / "c", "a.png", "b.png", seed=1)
    (tmp_path / "edits.jsonl").write_text(json.dumps({"image": "t.png", "prompt": "x", **row}))
    account = survey(tmp_path / "edits.jsonl", None)
    assert named(account) == {"t.png": ["c/a.png", "c/b.png"]}


def test_all_that_is_missing_is_said_at_once(tmp_path):
    pictures(tmp_path / "target", "a.png", "b.png", "c.png")
    pictures(tmp_path / "control", "b.png", seed=1)
    with pytest.raises(DataError, match=r"2 of 3 pictures have no control image: 'target/a.png', 'target/c.png'"):
        survey(tmp_path, "x")
    with pytest.raises(DataError, match=r"no such folder of control images(.|\n)*control"):
        survey(tmp_path / "target", "x", control=str(tmp_path / "contrl"))
    (tmp_path / "control" / "a.png").write_bytes(b"no picture")
    pictures(tmp_path / "control", "c.png", seed=1)
    with pytest.raises(DataError, match=r"a\.png"):
        survey(tmp_path, "x")
    (tmp_path / "rows.csv").write_text("image,text,control\ntarget/a.png,x,control/gone.png\n")
    with pytest.raises(DataError, match=r"gone\.png.*not there"):
        survey(tmp_path / "rows.csv", None)


def test_what_a_model_reads_is_checked(tmp_path):
    pictures(tmp_path / "target", "a.png", "b.png")
    pictures(tmp_path / "control", "a.png", size=(30, 30), seed=1)
    pictures(tmp_path / "control", "b.png", seed=1)
    account = survey(tmp_path, "x")
    bare = replace(account, examples=tuple(replace(e, controls=()) for e in account.examples))
    pairing.check(account, pairing.Wanted(0, 1))
    pairing.check(bare, pairing.Wanted(0, 0))
    for wanted, of, says in (
        (pairing.Wanted(0, 0), account, "this model reads none"),
        (pairing.Wanted(1, 3), bare, "2 of 2 pictures have fewer than 1 control image"),
        (
            pairing.Wanted(1, 1, aligned=True),
            account,
            "1 of 2 pictures have a control image of another shape.*ratio of sides",
        ),
        (pairing.Wanted(2, 3), account, "fewer than 2"),
    ):
        with pytest.raises(DataError, match=says):
            pairing.check(of, wanted)
    pictures(tmp_path / "more" / "target", "a.png")
    pictures(tmp_path / "more" / "control", "a.png")
    with pytest.raises(ConfigError, match="several data folders"):
        survey([tmp_path, tmp_path / "more"], "x")


# -- how they are shown ------------------------------------------------------------------------------------------------------


def gradient(path, size):
    """A picture that says where each of its places is: red from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(300, 200), (150, 100), (601, 401)])
def test_a_control_image_of_the_same_shape_is_cropped_and_mirrored_as_its_picture(size, flipped, tmp_path):
    target, control = gradient(tmp_path / "t.png", (300, 200)), gradient(tmp_path / "c.png", size)
    example = Example(target, "", (300, 200), controls=(Control(control, size),))
    view = View.at((300, 200), (64, 64), 1.0, 0.5, flipped)
    (image,) = shown_with(example, view, 16).images()
    want = np.asarray(view.of(Image.open(target)), dtype=float)
    assert image.size == (64, 64) and np.abs(np.asarray(image, dtype=float) - want).mean() < 2
    wrong = np.asarray(View.at((300, 200), (64, 64), 0.0, 0.5, flipped).of(Image.open(target)), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - wrong).mean() > 20


def test_one_of_another_shape_is_seen_whole_at_the_area_of_the_picture(tmp_path):
    control = gradient(tmp_path / "c.png", (100, 300))
    example = Example(tmp_path / "t.png", "", (300, 200), controls=(Control(control, (100, 300)),))
    view = View.centred((300, 200), (128, 64), flipped=True)
    (image,) = shown_with(example, view, 16).images()
    assert image.size == (48, 160) == sizes_with(example, (128, 64), 16)[0]
    pixels = np.asarray(image)
    assert pixels[:, 0, 0].mean() > 230 and pixels[:, -1, 0].mean() < 25  # mirrored, and nothing is cut off
    assert pixels[0, :, 1].mean() < 25 and pixels[-1, :, 1].mean() > 230


def test_batches_are_of_one_size_and_their_control_images_too():
    shapes = [(64, 64), (64, 64), (32, 64), (64, 64)]
    examples = [
        Example(None, str(n), (64, 64), controls=(Control(None, size),) * (n < 3)) for n, size in enumerate(shapes)
    ]
    batches = Batches(examples, Sizing((64,), False, 8), 2, 0)
    assert len(batches.buckets) == 3
    for step in range(12):
        assert len({batches.shape(shown.index, shown.view.target) for shown in batches.at(step)}) == 1
