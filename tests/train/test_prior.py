"""Class images follow from the seed and their number, and are never another prompt's or overwritten."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffpeft import ConfigError, DataError, TrainConfig
from diffpeft.families import open_family
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import prior
from diffpeft.train.prior import draw_missing, planned
from diffpeft.train.sample import pictures

PHOTO = EMBEDDED.parent / "demo" / "train" / "cat_face.png"
SEED = 77


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(prior, "STEPS", 1)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        model=str(EMBEDDED), data="d", out=str(tmp_path / "out"), class_prompt="an emoji of apple", num_class_images=3
    )


@pytest.fixture
def drawn(embedded):
    """Draws what a config's class images lack; {file name: pixels} of the folder afterwards."""

    def draw(config, seed=SEED):
        plan = draw_missing(planned(config), open_family(embedded), seed, lambda: None)
        assert sorted(p.name for p in plan.paths()) == sorted(p.name for p in plan.paths() if p.is_file())
        return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(plan.folder.glob("*.png"))}

    return draw


def test_an_image_is_what_its_own_seed_gives(config, drawn, embedded):
    want = [
        pictures(embedded, [config.class_prompt], [SEED + i], steps=1, guidance=prior.GUIDANCE)[0] for i in range(3)
    ]
    got = drawn(config)
    assert list(got) == ["class-0000.png", "class-0001.png", "class-0002.png"]
    assert all(np.array_equal(image, w) for image, w in zip(got.values(), want, strict=True))


def test_more_images_go_on_where_the_first_ended(config, drawn):
    few, many = drawn(replace(config, num_class_images=2)), drawn(replace(config, num_class_images=5))
    assert all(np.array_equal(few[name], many[name]) for name in few) and len(many) == 5
    images = list(many.values())
    assert not any(np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("gap", [(0,), (1,), (0, 2), (2,)])
def test_a_gap_is_filled_with_the_image_that_was_there_and_the_others_stay(gap, config, drawn, tmp_path):
    before = drawn(config)
    for number in gap:
        (tmp_path / "out" / "class" / f"class-{number:04d}.png").unlink()
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out" / "class").glob("*.png")}
    after = drawn(config)
    assert list(after) == list(before) and all(np.array_equal(before[name], after[name]) for name in before)
    assert all((p.read_bytes(), p.stat().st_mtime_ns) == was for p, was in kept.items())


def test_a_damaged_image_is_drawn_again(config, drawn, tmp_path):
    before = drawn(config)
    path = tmp_path / "out" / "class" / "class-0001.png"
    path.write_bytes(path.read_bytes()[:200])
    assert planned(config).damaged == (path,) and planned(config).missing == (1,)
    after = drawn(config)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_folder_says_what_its_images_were_drawn_with(config, drawn, tmp_path):
    drawn(config)
    assert json.loads((tmp_path / "out" / "class" / "class.json").read_text()) == {
        "prompt": "an emoji of apple", "negative": None, "model": str(EMBEDDED.resolve()), "seed": SEED, "sampler": "DDIMScheduler",
        "steps": 1, "guidance": 4.0, "first": 0,
    }  # fmt: skip


def test_another_seed_goes_on_with_the_seed_of_the_folder(config, drawn):
    want = drawn(config)
    got = drawn(replace(config, num_class_images=4), seed=5)
    assert all(np.array_equal(want[name], got[name]) for name in want)
    assert not np.array_equal(got["class-0003.png"], got["class-0000.png"])


def test_another_prompt_has_another_folder_and_finds_it_again(config, drawn, tmp_path):
    apples = drawn(config)
    car = replace(config, class_prompt="an emoji of a car")
    cars = drawn(car)
    assert planned(car).folder == tmp_path / "out" / "class-2" and not planned(car).missing
    assert planned(config).folder == tmp_path / "out" / "class" and not planned(config).missing
    assert not any(np.array_equal(apples[name], cars[name]) for name in apples)
    assert planned(replace(config, class_prompt="a third")).folder.name == "class-3"
    assert planned(replace(config, base_lora="style.safetensors:0.5")).folder.name == "class-3"  # another base


def test_in_a_folder_that_was_given_another_prompt_or_model_is_refused_with_both(config, drawn, tmp_path):
    given = replace(config, class_data=str(tmp_path / "mine"))
    drawn(given)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"an emoji of apple.*an emoji of a car"):
        planned(replace(given, class_prompt="an emoji of a car"))
    with pytest.raises(ConfigError, match=r"tiny-emoji.*owner/other"):
        planned(replace(given, model="owner/other"))
    assert sorted(tmp_path.rglob("*")) == before


def test_images_of_the_users_come_first_and_are_never_written_over(config, drawn, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("me.png", "class-0000.png", "class-0003.png"):  # the last two: not ours, nothing says what they are
        (folder / name).write_bytes(PHOTO.read_bytes())
    given = replace(config, class_data=str(folder), num_class_images=5)
    drawn(given)
    assert {p.name for p in folder.glob("*.png")} == {
        "me.png", "class-0000.png", "class-0003.png", "class-0004.png", "class-0005.png",
    }  # fmt: skip
    assert all(
        (folder / name).read_bytes() == PHOTO.read_bytes() for name in ("me.png", "class-0000.png", "class-0003.png")
    )
    assert not planned(given).missing and len(planned(given).by_user) == 3
    assert len(planned(replace(given, num_class_images=2)).paths()) == 2


def test_images_of_an_unknown_origin_in_the_usual_folder_are_left_alone(config, tmp_path):
    folder = tmp_path / "out" / "class"
    folder.mkdir(parents=True)
    (folder / "class-0000.png").write_bytes(PHOTO.read_bytes())
    assert planned(config).folder.name == "class-2"


def test_an_image_of_the_users_that_cannot_be_read_is_named(config, tmp_path):
    (tmp_path / "bad.png").write_bytes(PHOTO.read_bytes()[:300])
    with pytest.raises(DataError, match=r"bad\.png"):
        planned(replace(config, class_data=str(tmp_path)))
    (tmp_path / "bad.png").unlink()
    (tmp_path / "class.json").write_text("{")
    with pytest.raises(DataError, match=r"class\.json"):
        planned(replace(config, class_data=str(tmp_path)))


def test_an_interrupted_drawing_leaves_whole_images_and_is_taken_up_again(
    config, drawn, embedded, tmp_path, monkeypatch
):
    saves = []
    save = Image.Image.save

    def stops(image, file, *args, **options):
        if len(saves) == 1:
            file.write(b"half of an image")
            raise KeyboardInterrupt
        saves.append(1)
        save(image, file, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Image.Image, "save", stops)
        drawn(config)
    assert {p.name for p in (tmp_path / "out" / "class").iterdir()} == {"class-0000.png", "class.json"}
    after = drawn(config)
    (tmp_path / "other").mkdir()
    fresh = drawn(replace(config, out=str(tmp_path / "other")))
    assert all(np.array_equal(after[name], fresh[name]) for name in fresh) and len(after) == 3
