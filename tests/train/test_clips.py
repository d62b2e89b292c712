"""Clips as data: video files, folders of frames and animated images; which frames of them are trained on, and in what batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft import TrainConfig
from diffpeft.errors import ConfigError, DataError
from diffpeft.families import open_family
from diffpeft.families.base import Sizes
from diffpeft.train import dreambooth
from diffpeft.train.cache import Latents
from diffpeft.train.check import surveyed
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.data.footage import pictures_of, seen
from diffpeft.train.data.framing import Framing
from diffpeft.train.store import Disk, Memory, Nowhere
from tests.families.pipelines import FIRST_FRAMES, KINDS, made, pipeline

SIZE = (48, 32)
KNOWN = Sizes(32, 4, 2, 8.0)


def frame(number, size=SIZE):
    """A picture that says its number: red is eight times it."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0], pixels[:, : size[0] // 2, 1] = 8 * number, 200
    return Image.fromarray(pixels)


def number_of(image):
    return round(np.asarray(image)[..., 0].mean() / 8)


def folder_of(path, count, size=SIZE):
    path.mkdir(parents=True)
    for number in range(count):
        frame(number, size).save(path / f"shot_{number}.png")  # 10 comes after 9


def animation(path, count, duration=125):
    frame(0).save(
        path, save_all=True, append_images=[frame(n) for n in range(1, count)], duration=duration, lossless=True
    )


def video(path, count, rate=16):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=rate, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "rgb24"
        for number in range(count):
            out.mux(stream.encode(av.VideoFrame.from_image(frame(number))))
        out.mux(stream.encode())


@pytest.fixture
def data(tmp_path):
    """Two clips and a picture, each with a caption beside it."""
    folder = tmp_path / "data"
    folder_of(folder / "walk", 11)
    animation(folder / "jump.webp", 7)
    frame(3).save(folder / "still.png")
    for name in ("walk", "jump", "still"):
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


def account(data, known=KNOWN, **options):
    return surveyed(TrainConfig(data=str(data), **{"frames": 5, **options}), known)


def test_every_kind_of_clip_is_one_example_with_the_caption_beside_it(data):
    got = {e.name: (e.caption, e.length, e.frames, e.size) for e in account(data).examples}
    assert got == {
        "jump.webp": ("a jump", 7, (0, 1, 2, 3, 4), SIZE),
        "still.png": ("a still", 1, (), SIZE),
        "walk": ("a walk", 11, (0, 1, 2, 3, 4), SIZE),
    }
    text = str(account(data))
    assert "2 clips and 1 image of 48x32" in text and "clips: 2 of 5 frames at 8 a second, 1.25 s in all" in text


def test_without_frames_a_folder_of_frames_is_one_of_images(data):
    got = surveyed(TrainConfig(data=str(data), instance_prompt="x"), KNOWN)
    assert len(got.examples) == 13 and all(not e.frames and e.length == 1 for e in got.examples)
    assert "1 image with several frames, of which the first is used: 'jump.webp'" in str(got)


def test_a_folder_that_is_no_clip_is_entered(tmp_path):
    for name in ("a", "b1", "c2"):
        frame(1).save(tmp_path / f"{name}.png")
    folder_of(tmp_path / "captioned", 3)
    (tmp_path / "captioned/shot_1.txt").write_text("one")
    got = account(tmp_path, frames=1, instance_prompt="x")
    assert len(got.examples) == 6 and not any(e.frames for e in got.examples)


@pytest.mark.parametrize(
    "extract, want",
    [
        ("head", [(0, 1, 2, 3, 4)]),
        ("middle", [(3, 4, 5, 6, 7)]),
        ("uniform", [(0, 2, 5, 8, 10)]),
        ("chunks", [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]),
    ],
)
def test_what_of_a_longer_clip_is_used(extract, want, data):
    (data / "jump.webp").unlink()
    got = account(data, extract=extract)
    assert [e.frames for e in got.examples if e.frames] == want
    assert len({e.name for e in got.examples}) == len(got.examples)


def test_frames_are_rounded_down_to_what_the_model_has_and_each_clip_is_in_every_count_that_it_fills(data):
    got = account(data, frames=(1, 6, 10))
    assert got.framing.fitting == (9, 5, 1)
    counts = {(e.path.name, len(e.frames)) for e in got.examples if e.frames}
    assert counts == {("walk", 9), ("walk", 5), ("walk", 1), ("jump.webp", 5), ("jump.webp", 1)}
    assert "frames are rounded down to 9, 5, 1" in got.lines()


def test_clips_that_are_too_short_are_said_and_not_used(data):
    assert "1 clip is too short for 9 frames, and not used: 'jump.webp'" in account(data, frames=9).notes()
    for name in ("still.png", "still.txt"):
        (data / name).unlink()
    with pytest.raises(DataError, match="no clip has 21 frames at 8 a second"):
        account(data, frames=21)


def test_clips_are_shown_at_the_models_rate():
    framing = Framing((5,), rate=8.0)
    assert framing.cuts(20, 16.0) == [(0, 2, 4, 6, 8)]  # every other one
    assert framing.cuts(4, 4.0) == [(0, 0, 1, 1, 2)]  # each twice
    assert framing.cuts(20, 24.0) == [(0, 3, 6, 9, 12)] and framing.cuts(12, 24.0) == []
    assert framing.cuts(5, None) == [(0, 1, 2, 3, 4)] == Framing((5,)).cuts(5, 30.0)  # as they are
    times = np.array(framing.cuts(100, 29.97)[0]) / 29.97
    assert (np.abs(times - np.arange(5) / 8) < 1 / 29.97 + 1e-9).all()


def test_frames_are_read_by_their_numbers(data, tmp_path):
    video(tmp_path / "v.mp4", 12)
    for path, count, rate in ((data / "walk", 11, None), (data / "jump.webp", 7, 8.0), (tmp_path / "v.mp4", 12, 16.0)):
        look = seen(path)
        assert (look.size, look.frames, look.rate) == (SIZE, count, rate), path
        numbers = (2, 2, 5, count - 1)
        assert [number_of(image) for image in pictures_of(path, numbers)] == [*numbers], path


def test_a_video_file_is_used_as_it_is(tmp_path):
    video(tmp_path / "v.mp4", 12)
    (tmp_path / "v.txt").write_text("a video")
    (clip,) = account(tmp_path).examples
    assert (clip.caption, clip.frames) == ("a video", (0, 2, 4, 6, 8))
    with pytest.raises(DataError, match=r"only 2 other files.*--frames"):
        surveyed(TrainConfig(data=str(tmp_path)), KNOWN)


def test_a_video_without_what_reads_it_is_refused_with_the_remedy(tmp_path, monkeypatch):
    import sys

    (tmp_path / "v.mp4").write_bytes(b"no video")
    (tmp_path / "v.txt").write_text("a video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'diffpeft\[video\]'"):
        account(tmp_path)


def test_broken_frames_are_named(data, tmp_path):
    (data / "walk/shot_3.png").write_bytes((data / "walk/shot_3.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"walk. \(shot_3.png"):
        account(data)
    frame(3, (32, 32)).save(data / "walk/shot_3.png")
    with pytest.raises(DataError, match="another size"):
        account(data)


def test_a_table_names_clips(data):
    for text in data.glob("*.txt"):
        text.unlink()
    (data / "metadata.jsonl").write_text(
        '{"file_name": "walk", "text": "he walks"}\n{"file_name": "jump.webp", "text": "he jumps"}'
    )
    got = account(data, instance_prompt="x")
    assert {e.name: e.caption for e in got.examples} == {"walk": "he walks", "jump.webp": "he jumps", "still.png": "x"}


def test_frames_are_refused_with_a_model_of_images(data):
    with pytest.raises(ConfigError, match="one of images"):
        account(data, known=Sizes(512, 8))


def test_flips_and_crops_are_alike_in_all_frames_and_cached_equals_uncached(data, tmp_path):
    family = open_family(pipeline("wan, of clips", torch.float32))
    got = account(data, flip=True, crop="random", buckets=False)
    config = TrainConfig(seed=1, batch_size=1, flip=True, crop="random")
    batches = dreambooth.batches_of(config, got.examples, got.sizing, "instance")
    views = {(shown.index, shown.view) for step in range(24) for shown in batches.at(step)}
    assert {view.flipped for _, view in views} == {True, False} and len({view.left for _, view in views}) > 2
    clips = {name: k for k, name in enumerate(e.name for e in got.examples)}
    assert {len(shown.view.frames) for step in range(24) for shown in batches.at(step)} == {0, 5}
    stores = [Memory(), Disk(tmp_path / "cache", lambda: "vae"), Nowhere()]
    for index, view in list(views)[:6]:
        moments = [Latents(family, store)(got.examples[index], view) for store in stores for _ in range(2)]
        assert all(torch.equal(each.mean, moments[0].mean) for each in moments)
        still = index == clips["still.png"]
        assert moments[0].mean.shape[1] == (1 if still else 3)
        shown = (
            [view.of(image) for image in pictures_of(got.examples[index].path, view.frames or (0,))]
            if not still
            else []
        )
        assert [number_of(image) for image in shown] == [*view.frames]
        left = [np.asarray(image)[:, 0, 1].mean() > 100 for image in shown]
        assert len(set(left)) < 2
    flipped = replace(next(view for _, view in views if view.frames), flipped=True)
    other = replace(flipped, flipped=False)
    index = next(index for index, view in views if view.frames)
    assert not torch.equal(*(Latents(family)(got.examples[index], view).mean for view in (flipped, other)))


RUNS = [
    "wan, of clips",
    "wan i2v, with eyes",
    "wan i2v, in its place",
    "wan i2v, two experts",
    "ltx",
    "ltx i2v",
    "hunyuan_video",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_clips_and_images_learns_is_drawn_and_saved(kind, data, tmp_path):
    """With a sample of several frames, which begins with the first example's where the model is shown one."""
    made({**KINDS, **FIRST_FRAMES}, kind, torch.float32).save_pretrained(tmp_path / "model")
    frame(2).save(data / "still2.png")
    config = TrainConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        out=str(tmp_path / "out"),
        name="a",
        frames=(1, 9),
        instance_prompt="a still",
        resolution=32,
        steps=8,
        rank=2,
        lr=1e-2,
        batch_size=2,
        max_length=120,
        save_every=4,
        heldout=1,
        gradient_checkpointing=True,
        sample_every=8,
        sample_prompt="a walk --s 1 --w 32 --h 32",
    )
    run = dreambooth.train(config)
    counts = {len(example.frames) for example in run.account.examples}
    assert counts - {0} <= {1, 9} and run.heldout[-1].after != run.heldout[-1].before
    assert dreambooth.save(run)
    with Image.open(tmp_path / "out/samples/step00000008/p1_s42.webp") as clip:
        clip.load()
        assert (clip.n_frames, clip.size) == (9, (32, 32)) and clip.info["duration"] == round(1000 / run.family.rate)
    page = (tmp_path / "out/report.html").read_text()
    assert "data:image/webp" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/samples").rglob("*.webp")}
    first, *_ = checkpoints_in(tmp_path / "out")
    dreambooth.train(replace(config, resume=str(first.folder)))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if "step00000000" in str(path))
