"""Runs of edit families on pairs, from folders to files: they learn to look at the control image, and their files do elsewhere what they do here."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import diffpeft
from diffpeft import TrainConfig
from diffpeft.families import CaptionReading, open_family
from diffpeft.families.densities import DENSITIES
from diffpeft.pipeline.open import open_pipeline
from diffpeft.train import dreambooth
from diffpeft.train.cache import Latents, Texts
from diffpeft.train.data import View
from diffpeft.train.draw import generator
from diffpeft.train.objective import Batch, denoising
from tests.families.pipelines import pipeline

COLOURS = {"a": (230, 20, 20), "b": (20, 230, 20), "c": (20, 20, 230), "d": (230, 230, 230)}
RUNS = {  # {kind: (control folders, tokens of captions, ModelSpec's architecture)}
    "flux kontext": (1, None, "flux-1-kontext-dev"),
    "flux control": (1, None, "flux-1-dev"),
    "flux2 klein": (2, 40, "Flux.2-klein"),
    "flux fill": (2, None, "flux-1-fill-dev"),
    "longcat_image edit": (1, 40, "longcat-image-edit"),
    "kandinsky5 edit": (1, 120, "kandinsky-5-image-edit"),
    "qwen_image edit": (1, 300, "Qwen-Image-Edit"),
    "qwen_image edit plus": (2, 300, "Qwen-Image-Edit-Plus"),
}
STEPS = {"flux fill": 180}  # its pictures are of four tokens
CELLS = [pytest.param(kind, marks=pytest.mark.slow) for kind in RUNS]


@torch.no_grad()
def standardised(pipe):
    """A pipeline whose latents of these pictures have mean 0 and deviation 1, as those of published models have."""
    vae, clips = pipe.vae, hasattr(pipe.vae, "temperal_downsample")
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1
    pixels = colours[:, :, None, None].expand(-1, -1, 32, 32)
    half = len(vae.quant_conv.bias) // 2  # a posterior without chance
    vae.quant_conv.weight[half:], vae.quant_conv.bias[half:] = 0, -20
    z = vae.encode(pixels.unsqueeze(2) if clips else pixels).latent_dist.mean
    if hasattr(vae, "bn"):
        z = torch.nn.functional.pixel_unshuffle(z, 2)
        vae.bn.running_mean.copy_(z.mean((0, 2, 3)))
        vae.bn.running_var.copy_(z.var((0, 2, 3)))
    elif clips:
        vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    else:
        vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    return pipe


@pytest.fixture(scope="module", params=CELLS)
def run(request, tmp_path_factory):
    """A finished run of 60 steps on 4 pairs whose control images alone say which picture it is."""
    folder, kind = tmp_path_factory.mktemp("run"), request.param
    standardised(pipeline(kind, torch.float32)).save_pretrained(folder / "model")
    folders = ["target", *("control", "control2")[: RUNS[kind][0]]]
    for name in folders:
        (folder / "pairs" / name).mkdir(parents=True)
        for stem, colour in COLOURS.items():
            picture = Image.new("RGB", (32, 32), colour if name != "control2" else (100, 100, 100))
            picture.save(folder / "pairs" / name / f"{stem}.png")
    config = TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "pairs"),
        out=str(folder / "out"),
        instance_prompt="make it so",
        name="edit",
        resolution=32,
        steps=(steps := STEPS.get(kind, 60)),
        batch_size=4,
        rank=8,
        targets="full",
        lr=3e-3,
        seed=1,
        max_length=RUNS[kind][1],
        **(
            {"sample_every": steps, "sample_steps": 1} if kind.startswith("flux ") else {"sample_every": 0}
        ),  # others draw large
    )
    torch.manual_seed(0)
    finished = dreambooth.train(config)
    return kind, finished, dreambooth.save(finished)


@torch.no_grad()
def losses(run, strength, shift=0):
    """The loss of every pair at eight levels [8 x 4] with the same noise; `shift`: with the control images of the pair so many places on."""
    family, examples = run.family, list(run.account.examples)
    others = examples[shift:] + examples[:shift]
    shown = [replace(e, controls=o.controls) for e, o in zip(examples, others, strict=True)]
    latents, texts = Latents(family), Texts(family)
    views = [View.centred(e.size, (32, 32)) for e in shown]
    moments = [latents(e, view) for e, view in zip(shown, views, strict=True)]
    z = torch.stack([m.mean for m in moments])
    conditions = {name: torch.stack([m.conditions[name] for m in moments]) for name in moments[0].conditions}
    prompts, controls = [e.caption for e in shown], [latents.controls(*pair) for pair in zip(shown, views, strict=True)]
    none, frames = torch.zeros(4, dtype=torch.bool), [v.frame(e.size) for e, v in zip(shown, views, strict=True)]
    with diffpeft.adapters(family.pipe, {run.name: strength}):
        read = texts(prompts, controls)
        rows = []
        for level in range(8):
            noise = torch.randn(z.shape, generator=generator("paired", level))
            u = DENSITIES[family.levels.density](torch.full((4,), (level + 0.5) / 8))
            batch = Batch(z, noise, u, prompts, none, frames, None, None, conditions, controls)
            rows.append(denoising(family, batch, read))
    return torch.cat(rows)


def test_sixty_steps_on_four_pairs_lower_the_paired_loss_by_more_than_three_standard_errors(run):
    _, finished, _ = run
    gain = losses(finished, 0.0) - losses(finished, 1.0)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_the_right_control_image_gives_a_lower_loss_than_another(run):
    _, finished, _ = run
    after, before = (
        torch.cat([losses(finished, strength, shift) - losses(finished, strength) for shift in (1, 2, 3)])
        for strength in (1.0, 0.0)
    )
    assert after.mean() > 3 * after.std() / len(after) ** 0.5
    learnt = after - before  # a random model has a liking of its own
    assert learnt.mean() > 3 * learnt.std() / len(learnt) ** 0.5


@torch.no_grad()
def answer(family, examples):
    """What the denoiser says to fixed noise beside an example's control images."""
    latents, view = Latents(family), View.centred(examples[0].size, (32, 32))
    moments, controls = latents(examples[0], view), latents.controls(examples[0], view)
    x = torch.randn(1, *moments.mean.shape, generator=torch.Generator().manual_seed(3))
    read = Texts(family)(["make it so"], [controls]) | {n: t[None] for n, t in moments.conditions.items()}
    return family.predict(x, torch.tensor([0.5]), read)


def test_every_file_does_on_a_fresh_pipeline_and_in_diffusers_what_was_trained(run):
    _, finished, files = run
    again = functools.partial(open_family, reading=CaptionReading(finished.config.max_length))
    finished.family.parts.whole()
    want = answer(finished.family, finished.account.examples)
    for file in files:
        fresh = open_pipeline(finished.config.model)
        base = answer(again(fresh), finished.account.examples)
        assert (want - base).abs().max() > 1e-2
        diffpeft.load_lora(fresh, file)
        torch.testing.assert_close(answer(again(fresh), finished.account.examples), want, rtol=0, atol=1e-4)
        if "kohya" in file.name or not hasattr(fresh, "load_lora_weights"):
            continue  # diffusers reads those in the published depths alone
        stock = diffusers.DiffusionPipeline.from_pretrained(finished.config.model)
        stock.load_lora_weights(str(file.parent), weight_name=file.name)
        torch.testing.assert_close(answer(again(stock), finished.account.examples), want, rtol=0, atol=1e-4)


def test_kept_conditions_are_those_that_would_be_computed(run):
    """A run with another cache and the same seed takes the same steps."""
    _, finished, _ = run
    config = replace(finished.config, cache="none", out=finished.config.out + "2", steps=3)
    torch.testing.assert_close(dreambooth.train(config).losses, finished.losses[:3], rtol=1e-5, atol=1e-6)


def test_the_page_and_the_files_say_what_was_trained(run):
    kind, finished, files = run
    assert finished.account.table()["controls"] == 4 * RUNS[kind][0]
    assert finished.family.architecture == RUNS[kind][2] and files
    if finished.config.sample_every:
        page = finished.live.page
        control = Path(finished.config.data) / "control" / "a.png"
        shown = [f"control {n}" for n in range(1, RUNS[kind][0] + 1)] if RUNS[kind][0] > 1 else ["control"]
        assert (
            page.samples.heads == [*shown, "0", str(finished.config.steps)]
            and page.samples.rows[0].pictures[0] == control
        )
        assert page.before_after.heads[0] == shown[0] and all(page.before_after.rows[0].pictures)
