"""What the options of the data do to a whole run: shapes, masks, repeats and captions reach the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft import ConfigError, TrainConfig
from diffpeft.families import Frame, open_family
from diffpeft.families.parts import Parts
from diffpeft.families.prompts import embedded as conditions_of
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.check import check
from diffpeft.train.objective import Batch, denoising


@pytest.fixture
def config(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (64, 64), "b.png": (120, 64), "c.png": (40, 96)}.items():
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
        image.save(tmp_path / "photos" / name)
    return TrainConfig(
        model=str(EMBEDDED), data=str(tmp_path / "photos"), out=str(tmp_path / "out"), instance_prompt="an emoji", steps=3, rank=1, targets="to_q",
        overwrite=True, sample_every=0,
    )  # fmt: skip


def test_pictures_of_all_shapes_are_trained_on_and_told_to_the_denoiser(config, monkeypatch):
    seen = []
    loss = dreambooth.denoising
    monkeypatch.setattr(dreambooth, "denoising", lambda f, batch, *rest: seen.append(batch) or loss(f, batch, *rest))
    run = dreambooth.train(replace(config, steps=6, flip=True, crop="random"))
    assert len(set(run.losses)) == 6 and np.isfinite(run.losses).all()
    shapes = {tuple(batch.latents.shape[2:]) for batch in seen}
    assert len(shapes) == 3 and (16, 16) in shapes
    for batch in seen:
        (frame,) = batch.frames
        assert tuple(4 * side for side in batch.latents.shape[2:]) == frame.target
        assert frame.original in {(64, 64), (64, 120), (96, 40)} and all(side >= 0 for side in frame.crop)


def test_a_place_that_the_mask_leaves_out_does_not_count(embedded):
    family = open_family(Parts(embedded))
    z, n, u = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6])
    mask = torch.rand(2, 1, 8, 8)
    mask[:, :, :4] = 0
    frames, prompts = [Frame((64, 64), (0, 0), (64, 64))] * 2, ["x", "y"]
    batch = Batch(z, n, u, prompts, torch.zeros(2, dtype=torch.bool), frames)
    texts = conditions_of(family, prompts)
    with torch.no_grad():
        noised = family.levels.noised(z, n, u)
        error = (family.predict(noised.x, noised.t, texts).double() - noised.target.double()).square()
        want = (error * mask.double()).mean((1, 2, 3))
        torch.testing.assert_close(
            denoising(family, replace(batch, mask=mask), texts).double(), want, rtol=1e-5, atol=0
        )
        whole = denoising(family, replace(batch, mask=torch.ones_like(mask)), texts)
        assert torch.equal(whole, denoising(family, batch, texts))


@pytest.mark.slow  # a run an option
def test_options_of_the_data_change_the_run_and_idle_ones_are_refused(config):
    plain = dreambooth.train(config).losses
    for options in (
        {"mask": "alpha"}, {"buckets": False}, {"resolution": (32, 64)}, {"data": (config.data, f"{config.data}:3"), "steps": 9},
        {"caption_dropout": 1.0}, {"seed": 1},
    ):  # fmt: skip
        assert dreambooth.train(replace(config, **options)).losses[:3] != plain, options
    assert dreambooth.train(config).losses == plain
    for options in ({"keep_tokens": 1}, {"cache_dir": "x"}, {"trigger": "zz"}):
        with pytest.raises(ConfigError):
            check(replace(config, **options))


def test_the_folder_that_is_written_to_is_not_the_folder_that_is_read(config, tmp_path):
    with pytest.raises(ConfigError, match="folder of the images"):
        check(replace(config, out=config.data))
    inside = replace(config, out=f"{config.data}/out")
    (tmp_path / "photos" / "out" / "samples").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "out" / "samples" / "a.png")
    assert len(check(inside).account.examples) == 3
