"""Many pictures at once are those that the stock pipeline draws one by one; samplers, pictures that are drawn over, and models that are partly elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting, DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

import diffpeft
from diffpeft import schedule
from diffpeft.drawing import draw
from diffpeft.drawing.draw import Shot, drawn, generate, stage_for, steps_of
from diffpeft.drawing.opening import opened
from diffpeft.drawing.samplers import SAMPLERS, scheduler_for
from diffpeft.errors import ConfigError
from tests.families.pipelines import pipeline

SIZE = {"steps": 2, "width": 64, "height": 32}
PROMPTS = ["a red cat", "a blue dog that is sitting on a mat"]


@pytest.fixture(scope="module")
def sd15():
    torch.manual_seed(0)
    pipe = pipeline("sd15", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def same(a, b, levels=1):
    """Equal but for the rounding of one level, which batches may have."""
    a, b = pixels(a), pixels(b)
    return a.shape == b.shape and int(np.abs(a - b).max()) <= levels


def alone(pipe, prompt, seed, **keywords):
    """What the stock pipeline draws."""
    size = {"num_inference_steps": 2, "width": 64, "height": 32}
    return pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **size | keywords).images[0]


def test_a_batch_is_its_pictures_alone(sd15):
    images = generate(sd15, PROMPTS, seeds=(3, 4), guidance=5.0, negative="bad", batch=3, **SIZE)
    want = [alone(sd15, p, s, guidance_scale=5.0, negative_prompt="bad") for p in PROMPTS for s in (3, 4)]
    assert all(same(a, b) for a, b in zip(images, want, strict=True))
    assert not any(same(want[0], other, 8) for other in want[1:])
    assert (pixels(generate(sd15, PROMPTS[0], seeds=[3], **SIZE)[0]) == pixels(alone(sd15, PROMPTS[0], 3))).all()


KINDS = ["sd2, v", "sdxl", "sd3", "flux dev", "chroma", "z_image", "wan", "kandinsky5", "qwen_image"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_family_is_its_pictures_alone(kind):
    pipe = pipeline(kind, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, PROMPTS, seeds=(3, 4), batch=4, **SIZE)
    want = [generate(pipe, p, seeds=[s], batch=1, **SIZE)[0] for p in PROMPTS for s in (3, 4)]
    assert all(same(a, b) for a, b in zip(images, want, strict=True))
    assert not same(want[0], want[1])


def test_pictures_that_differ_in_more_are_more_batches(sd15, monkeypatch):
    sizes = []
    monkeypatch.setattr(draw, "_drawn", lambda pipe, shots: sizes.append(len(shots)) or [None] * len(shots))
    shots = [Shot("a", seed, steps=steps) for steps in (1, 2) for seed in range(5)]
    assert sorted(i for i, _ in drawn(sd15, [*shots, Shot("b", 9, steps=1)], 4)) == [*range(11)]
    assert sizes == [4, 2, 4, 1]


@pytest.mark.slow
def test_a_sampler_is_that_of_diffusers_and_goes_again(sd15):
    before = sd15.scheduler
    image = generate(sd15, "a cat", seeds=[1], scheduler="dpm++_2m_karras", **SIZE)[0]
    assert sd15.scheduler is before
    sd15.scheduler = DPMSolverMultistepScheduler.from_config(before.config, use_karras_sigmas=True)
    want = alone(sd15, "a cat", 1)
    sd15.scheduler = before
    assert (pixels(image) == pixels(want)).all() and not same(image, alone(sd15, "a cat", 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux dev", "wan"])
def test_every_sampler_that_fits_draws(kind):
    """And what does not fit is told before anything is drawn."""
    pipe = pipeline(kind, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    fitting = []
    for name in SAMPLERS:
        try:
            scheduler_for(pipe, name)
        except ConfigError as error:
            assert "euler" in error.remedy or name == "lms"
            continue
        images = generate(pipe, "a cat", seeds=(1, 2), scheduler=name, **{**SIZE, "steps": 4})
        want = generate(pipe, "a cat", seeds=[2], scheduler=name, **{**SIZE, "steps": 4})
        assert np.isfinite(pixels(images[0])).all() and same(images[1], want[0], 2), name
        fitting.append(name)
    assert len(fitting) >= (13 if kind in ("sd15", "sdxl") else 2), fitting
    if kind not in ("sd15", "sdxl"):  # its own, by name
        assert same(generate(pipe, "a cat", scheduler="euler", **SIZE)[0], generate(pipe, "a cat", **SIZE)[0], 0)


@pytest.fixture(scope="module")
def photo():
    ramp = np.linspace(0, 255, 64 * 32 * 3).reshape(32, 64, 3).astype(np.uint8)
    return Image.fromarray(ramp)


@pytest.mark.slow
def test_a_picture_that_is_drawn_over_is_img2img(sd15, photo):
    images = generate(sd15, "a cat", seeds=(1, 2), image=photo, strength=0.5, steps=4)
    stock = StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    for seed, image in zip((1, 2), images, strict=True):
        one = torch.Generator("cpu").manual_seed(seed)
        want = stock("a cat", image=photo, strength=0.5, num_inference_steps=4, generator=one).images[0]
        assert same(image, want)
    small = generate(sd15, "a cat", image=photo, strength=0.5, steps=2, width=32, height=32)[0]
    assert small.size == (32, 32)
    assert (
        steps_of(stage_for(sd15, [Shot("", images=(photo,))]), Shot("", steps=10, strength=0.25, images=(photo,))) == 2
    )


@pytest.mark.slow
def test_with_a_mask_it_is_inpainting(sd15, photo):
    mask = Image.new("L", (64, 32))
    mask.paste(255, (32, 0, 64, 32))
    images = generate(sd15, "a cat", seeds=(1, 2), image=photo, mask=mask, steps=2)
    stock = AutoPipelineForInpainting.from_pipe(sd15)
    keywords = {"image": photo, "mask_image": mask, "num_inference_steps": 2, "width": 64, "height": 32}
    want = stock("a cat", generator=torch.Generator("cpu").manual_seed(2), **keywords).images[0]
    assert same(images[1], want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux dev", "sd3", "sdxl", "z_image", "qwen_image"])
def test_a_batch_that_is_drawn_over_is_its_pictures_alone(kind, photo):
    pipe = pipeline(kind, torch.float32)
    common = {"image": photo, "strength": 0.6, "steps": 3}
    images = generate(pipe, "a cat", seeds=(1, 2), **common)
    assert all(
        same(image, generate(pipe, "a cat", seeds=[s], **common)[0]) for s, image in zip((1, 2), images, strict=True)
    )
    assert not same(*images)


WRONG = {
    "a width": ({"width": 61}, "multiple of"),
    "a strength without a picture": ({"strength": 0.5}, "strength"),
    "a strength of nothing": ({"strength": 0.0, "image": Image.new("RGB", (64, 64))}, "above 0"),
    "a mask without a picture": ({"mask": Image.new("L", (64, 64))}, "mask"),
    "a sampler": ({"scheduler": "dpm++_3m"}, "dpm\\+\\+_2m"),
    "no such noise levels": ({"scheduler": "ddim_karras"}, "Leave _karras out"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_pipeline_does_not_take_is_told_before_it_draws(kind, sd15, monkeypatch):
    keywords, says = WRONG[kind]
    monkeypatch.setattr(draw, "_drawn", None)
    with pytest.raises(diffpeft.DiffpeftError, match=says):
        generate(sd15, "a cat", **keywords)


@pytest.mark.slow
def test_what_other_pipelines_do_not_take():
    flux, wan = pipeline("flux dev", torch.float32), pipeline("wan", torch.float32)
    with pytest.raises(ConfigError, match="cannot be drawn with euler_a"):
        generate(flux, "a cat", scheduler="euler_a")
    with pytest.raises(ConfigError, match="takes no picture"):
        generate(wan, "a cat", image=Image.new("RGB", (64, 64)))


@pytest.mark.slow
def test_adapters_of_pictures_are_those_of_set_adapters(sd15):
    torch.manual_seed(1)
    diffpeft.attach(sd15, diffpeft.LoraConfig(r=2, init_lora_weights=False), targets="attn", name="style")
    try:
        mixes = [{"style": 0.0}, {"style": 1.0}, {"style": schedule.steps({0.0: 0.0, 0.5: 1.0})}]
        rows = [Shot("a cat", 1, adapters=(("style", float(i)),), **SIZE) for i in range(3)]
        images = dict(drawn(sd15, rows, 4, lambda shot: mixes[int(shot.adapters[0][1])]))
        for i, mix in enumerate(mixes):
            with diffpeft.adapters(sd15, mix):
                assert (pixels(images[i]) == pixels(alone(sd15, "a cat", 1))).all(), i
        assert not same(images[1], images[2], 0) and not same(images[0], images[2], 0)
        over = Shot("a cat", 1, steps=4, images=(Image.new("RGB", (64, 64), "red"),), adapters=())
        stage = stage_for(sd15, [over])
        late, never = (next(drawn(stage, [over], 1, lambda shot, mix=mix: mix))[1] for mix in (mixes[2], mixes[0]))
        assert not same(late, never, 0)
    finally:
        diffpeft.unload(sd15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "flux dev"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_pictures_are_the_same_with_blocks_on_the_host(kind, quantize, tmp_path):
    pipe = pipeline(kind, torch.float32)
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    diffpeft.attach(pipe, diffpeft.LoraConfig(r=2, init_lora_weights=False), targets="attn", name="style")
    diffpeft.save_lora(pipe, tmp_path / "style.safetensors")
    images = []
    for share in (0.0, 0.5, 1.0):
        ways = {"dtype": "fp32", "device": "cpu", "quantize": quantize, "offload": share}
        other = opened(str(tmp_path / "model"), None, **ways).whole()
        diffpeft.load_lora(other, tmp_path / "style.safetensors")
        images.append(generate(other, PROMPTS, seeds=[1], **SIZE))
    assert all((pixels(a) == pixels(b)).all() for row in images[1:] for a, b in zip(images[0], row, strict=True))
    plain = generate(pipe, PROMPTS, seeds=[1], **SIZE)
    assert all(same(a, b, 0 if quantize is None else 60) for a, b in zip(images[0], plain, strict=True))
