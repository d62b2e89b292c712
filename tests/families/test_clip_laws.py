"""Families of videos on clips of several frames, and those that are shown the first one, against their pipelines."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft.families import FAMILIES, CaptionReading, family_of, open_family
from diffpeft.families.flow import Flow
from diffpeft.families.prompts import embedded
from diffpeft.train.objective import Batch, Objective, denoising
from tests.families.pipelines import FIRST_FRAMES, KINDS, made

COUNT, HEIGHT, WIDTH = 9, 32, 64
TEXT = {"hunyuan_video": 120}
PROMPTS = ["a red cat"]
CLIPS = ["wan, of clips", "wan, time by token", "ltx", "hunyuan_video"]
UNREAD = ("self", "return_dict", "attention_kwargs")
ASKED = {"hunyuan_video": {"true_cfg_scale": 1.0}, "ltx": {"frame_rate": 25}, "ltx_i2v": {"frame_rate": 25}}
SPELT = dict.fromkeys(("ltx", "ltx_i2v"), lambda x: x.flatten(2).mT)


def opened(kind):
    pipe = made({**KINDS, **FIRST_FRAMES}, kind, torch.float64)
    name = next(name for name, cls in FAMILIES.items() if type(pipe).__name__ in cls.pipelines)
    return open_family(pipe, CaptionReading(TEXT.get(name, 40))), name


def clip():
    """Nine frames whose numbers are those of 8 bits."""
    pixels = torch.randint(0, 256, (1, 3, COUNT, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))
    return pixels.double() / 127.5 - 1


def called(family, name, x, sigma, decoded=None, **asked):
    """[{argument: value}] of what a pipeline hands its denoisers in one step from a share of noise, and what it decodes."""
    pipe, seen, got = family.pipe, [], []
    times = pipe.scheduler.set_timesteps

    def begun(*_, sigmas=None, mu=None, device=None, **__):
        times(sigmas=[sigma], device=device, **({} if mu is None else {"mu": mu}))

    def note(model, args, kwargs):
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        seen.append((model, {k: v for k, v in bound.items() if v is not None and k not in UNREAD}))

    handles = [family.parts(part).register_forward_pre_hook(note, with_kwargs=True) for part in family.denoisers]
    pipe.scheduler.set_timesteps = begun
    pipe.vae.decode = lambda z, *_, **__: got.append(z) or (torch.zeros(1, 3, COUNT, HEIGHT, WIDTH),)
    options = {"guidance_scale": 1.0, "height": HEIGHT, "width": WIDTH, "num_frames": COUNT, "num_inference_steps": 1}
    options |= {"max_sequence_length": TEXT.get(name, 40), "output_type": "pt", **ASKED.get(name, {}), **asked}
    try:
        with torch.no_grad():
            pipe(**asked_for(family), latents=SPELT.get(name, lambda x: x)(x), **options)
    finally:
        del pipe.scheduler.set_timesteps, pipe.vae.decode
        for handle in handles:
            handle.remove()
    return seen, got[0]


def asked_for(family):
    """The prompts: as texts, or as embeddings where the pipeline would need another library to read them."""
    if not isinstance(family, FAMILIES["wan_i2v"]):
        return {"prompt": list(PROMPTS)}
    return {"prompt_embeds": embedded(family, PROMPTS)["text"]}


def compare(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            want = value.double().expand(ours[name].shape)
            torch.testing.assert_close(ours[name].double(), want, rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert ours[name] == pytest.approx(value), name


def read_by(family, pixels, x, sigma):
    """What our side hands its denoiser at a share of noise, and what the denoiser is."""
    seen = []

    def note(model, args, kwargs):
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        seen.append((model, {k: v for k, v in bound.items() if v is not None and k not in UNREAD}))

    handles = [family.parts(part).register_forward_pre_hook(note, with_kwargs=True) for part in family.denoisers]
    conditions = {k: v for k, v in family.condition(pixels, []).items() if k != "counts"}
    with torch.no_grad():
        family.predict(x, torch.full((len(x),), sigma, dtype=x.dtype), embedded(family, PROMPTS) | conditions)
    for handle in handles:
        handle.remove()
    return seen


def begun_with(family, pixels):
    """The first frame as the pipeline is given it."""
    if not family.first_frame:
        return {}
    rounded = ((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return family.pictured([Image.fromarray(rounded)], (WIDTH, HEIGHT))


@pytest.mark.parametrize(
    "kind", [*CLIPS[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in CLIPS[1:]), *FIRST_FRAMES]
)
def test_on_clips_the_denoiser_reads_what_the_pipeline_hands_it_and_the_target_leads_back(kind, monkeypatch):
    family, name = opened(kind)
    pixels = clip()
    z, _ = family.encode(pixels)
    assert z.shape[2] == (COUNT - 1) // family.temporal + 1 and family.rate
    n = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    first = begun_with(family, pixels)
    for sigma in (0.7, 0.2):  # of both experts, where there are two
        known = family.condition(pixels, []).get("first")
        begun = (
            n if known is None else torch.cat([known, n[:, :, 1:]], 2)
        )  # LTX's pipeline takes latents with it in its place
        (theirs,), _ = called(family, name, begun, sigma, **first)
        place = family.pipe.scheduler.sigmas[0].double().item()
        (ours,) = read_by(family, pixels, n, place)
        assert ours[0] is theirs[0]
        compare(ours[1], theirs[1])
        noised = family.levels.noised(z, n, family.levels.place(torch.tensor([place], dtype=z.dtype), z.shape))
        target = SPELT.get(name, lambda x: x)(noised.target)
        for part in family.denoisers:
            monkeypatch.setattr(family.parts(part), "forward", lambda *_, target=target, **__: (target,))
        _, decoded = called(family, name, noised.x, sigma, **first)
        monkeypatch.undo()
        want = raw(family, pixels)
        start = 0 if known is None else 1
        torch.testing.assert_close(decoded.double()[:, :, start:], want[:, :, start:], rtol=0, atol=1e-4)


@torch.no_grad()
def raw(family, pixels):
    return family.pipe.vae.encode(pixels).latent_dist.mean


def test_a_clip_is_shifted_by_its_frames_where_the_model_shifts_by_size():
    family, _ = opened("ltx")
    assert isinstance(family.levels, Flow) and family.levels.shift is None
    one, many = (family.levels.factor((1, 8, frames, 16, 16)) for frames in (1, 5))
    assert many > one


@pytest.mark.parametrize("kind", FIRST_FRAMES)
def test_what_is_known_is_not_learnt_and_the_first_frame_changes_what_is_said(kind):
    family, _ = opened(kind)
    name = FIRST_FRAMES[kind][0]
    assert f"{family_of(family.pipe)}_i2v" == name and type(family) is FAMILIES[name]
    pixels = clip()
    z, _ = family.encode(pixels)
    conditions, texts = family.condition(pixels, []), embedded(family, PROMPTS)
    batch = Batch(
        z, torch.randn_like(z), torch.tensor([0.5]), PROMPTS, torch.tensor([False]), [], conditions=conditions
    )
    (loss,) = denoising(family, batch, texts, Objective())
    moved = z.clone()
    moved[:, :, 0] += 1
    (other,) = denoising(family, Batch(**{**batch.__dict__, "latents": moved}), texts, Objective())
    assert (loss == other) == ("counts" in conditions)  # the first frame is neither read nor counted
    elsewhere = pixels.clone()
    elsewhere[:, :, 0] = -elsewhere[:, :, 0]
    x, t = torch.randn_like(z), torch.tensor([0.5], dtype=z.dtype)
    said = [
        family.predict(x, t, texts | {k: v for k, v in family.condition(p, []).items() if k != "counts"})
        for p in (pixels, elsewhere)
    ]
    assert not torch.equal(*said)
    later = pixels.clone()
    later[:, :, 1:] = 0
    assert all(torch.equal(v, family.condition(later, [])[k]) for k, v in conditions.items())
    still = family.condition(pixels[:, :, 0], [])
    assert "counts" not in still and family.encode(pixels[:, :, 0])[0].shape[2] == 1


def test_an_image_is_drawn_on():
    family, _ = opened("wan i2v, with eyes")
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [
        family.pipe(
            **asked_for(family),
            guidance_scale=1.0,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=1,
            output_type="np",
            generator=seed,
            **family.pictured([Image.new("RGB", (32, 32), colour)], (32, 32)),
        ).frames[0]
        for seed, colour in zip(seeds, ("red", "blue"), strict=True)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 0
