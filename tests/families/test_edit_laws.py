"""Families with control images against their pipelines: what the denoiser reads of them is what the pipeline hands it, and the true target leads back."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as longcat
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image

from diffpeft.drawing.calls import images_of as pictures_of
from diffpeft.drawing.prompts import of_line
from diffpeft.errors import WrongBaseError
from diffpeft.families import CaptionReading, open_family, trainable
from diffpeft.train.cache import Texts
from diffpeft.train.config import TrainConfig
from diffpeft.train.data.read import numbers
from diffpeft.train.samples import drawn, keywords_of, settled
from tests.families.pipelines import KINDS, pipeline
from tests.families.test_family_laws import HEIGHT, WIDTH, calls, compare, first_level, times_set_by

PACKED = ("flux ", "qwen", "longcat")  # kinds whose pipelines take latents as tokens
# {kind: how its pipeline is asked for one picture without guidance}
ASKED = {
    "flux kontext": {"guidance_scale": 1.0, "max_sequence_length": 40},
    "flux control": {"guidance_scale": 1.0, "max_sequence_length": 40},
    "flux2 klein": {"guidance_scale": 1.0, "max_sequence_length": 40},
    "flux2 dev": {"guidance_scale": 1.0, "max_sequence_length": 120},
    "flux fill": {"guidance_scale": 1.0, "max_sequence_length": 40},
    "longcat_image edit": {"guidance_scale": 1.0},
    "kandinsky5 edit": {"guidance_scale": 1.0, "max_sequence_length": 120},
    "qwen_image edit": {"true_cfg_scale": 1.0, "max_sequence_length": 300},
    "qwen_image edit plus": {"true_cfg_scale": 1.0, "max_sequence_length": 300},
}
COUNTS = {  # {kind: control images}, where it is not one
    "flux2 klein": 3,
    "flux2 dev": 2,
    "flux fill": 2,
    "qwen_image edit plus": 3,
}
SIZES = {"flux2": [(72, 64), (64, 64), (64, 80)], "qwen_image": [(WIDTH, HEIGHT), (32, 64), (64, 32)]}
FAST = ("flux kontext", "flux control", "qwen_image edit plus")
CELLS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in ASKED]
PROMPT = "make the cat red"


def images_of(kind):
    """Control images, of sizes of their own where the pipeline lets them."""
    rng, sizes = np.random.default_rng(0), SIZES.get(kind.split()[0], [(WIDTH, HEIGHT)] * 2)[: COUNTS.get(kind, 1)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module", params=CELLS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    return pipeline(kind)


@pytest.fixture
def family(kind, pipe, monkeypatch):
    """A family whose pipeline takes small pictures for usual ones, and draws nothing from a posterior."""
    real = plus.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (*real(HEIGHT * WIDTH, ratio), None))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", HEIGHT * WIDTH)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    monkeypatch.setattr(longcat, "calculate_dimensions", lambda area, ratio: real(HEIGHT * WIDTH, ratio))
    return open_family(pipe, CaptionReading(max_length=ASKED[kind].get("max_sequence_length", 40)))


@pytest.fixture
def picture(family):
    """The VAE's own mean of a picture's latents, those that are trained on, and noise."""
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, dtype=torch.float64) * 2 - 1
    z, _ = family.encode(pixels)
    return z, torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def controls_of(images):
    return [numbers(image).double()[None] for image in images]


def read(family, images):
    """What training reads of a prompt and control images."""
    beside, conditions = controls_of(images), {}
    for encoder in family.text_encoders:
        looked = beside if encoder in family.looking else ()
        conditions |= family.embed(encoder, [PROMPT], looked)
    return conditions | family.condition(torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.float64), beside)


def sizes(family):
    """How a pipeline is told the size, where it is."""
    takes = inspect.signature(type(family.pipe).__call__).parameters
    return {name: side for name, side in (("height", HEIGHT), ("width", WIDTH)) if name in takes}


def packs(kind):
    return kind.startswith(PACKED)


def draw(kind, family, x, sigma, images, **options):
    """One step of the pipeline from noised latents at a share of noise; what its decoder is asked for."""
    pipe, decoded, times = family.pipe, [], family.pipe.scheduler.set_timesteps

    def begun(*_, sigmas=None, mu=None, device=None, **__):
        times(sigmas=[sigma], device=device, mu=mu)

    spelt = pipe._pack_latents(x, *x.shape) if packs(kind) else x
    if kind.startswith("kandinsky5"):  # whose pipeline takes all channels
        control = read(family, images)["control_1"]
        spelt = torch.cat([x, control, torch.ones_like(x[:, :1])], 1).unsqueeze(2).movedim(1, -1)
    pipe.vae.decode = lambda z, *_, **__: (
        decoded.append(z) or DecoderOutput(torch.zeros(len(z), 3, *z.shape[2:-2], HEIGHT, WIDTH))
    )
    try:
        with times_set_by(pipe, begun):
            pipe(prompt=[PROMPT], latents=spelt, output_type="pt", num_inference_steps=1, **sizes(family),
                 **family.pictured(images, (WIDTH, HEIGHT)), **ASKED[kind], **options)  # fmt: skip
    finally:
        del pipe.vae.decode
    return decoded[0]


def test_the_denoiser_reads_what_the_pipeline_hands_it(kind, family, picture):
    z, n = picture
    denoiser, images = family.parts(family.denoiser), images_of(kind)
    (theirs,) = calls(denoiser, lambda: draw(kind, family, n, 0.6, images))
    time = family.levels.noised(z, n, first_level(family, z.shape)[:1]).t
    (ours,) = calls(denoiser, lambda: family.predict(n, time, read(family, images)))
    assert ours.keys() == theirs.keys()
    compare(ours, theirs)


def test_other_control_images_are_other_answers_and_without_any_it_is_the_family_that_it_is_of(kind, family, picture):
    """A test that can fail: the control image reaches the answer."""
    z, n = picture
    images, time = images_of(kind), torch.full((1,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        answer = family.predict(n, time, read(family, images))
        other = family.predict(n, time, read(family, [image.rotate(180) for image in images]))
    assert answer.shape == z.shape and (answer - other).abs().max() > 1e-5
    if family.controls[0] == 0:
        with torch.no_grad():
            assert family.predict(n, time, read(family, [])).shape == z.shape


def test_one_step_with_the_true_target_leads_back_to_the_picture(kind, family, picture, monkeypatch):
    z, n = picture
    denoiser, images, target = family.parts(family.denoiser), images_of(kind), [n]

    def answered(hidden_states, **_):
        """The target in the first tokens, and something else after them, which the pipeline is to leave out."""
        if kind.startswith("kandinsky5"):
            return Transformer2DModelOutput(target[0].unsqueeze(2).movedim(1, -1))
        tokens = family.pipe._pack_latents(target[0], *z.shape) if packs(kind) else target[0].flatten(2).mT
        others = hidden_states.shape[1] - tokens.shape[1]
        return (torch.cat([tokens, tokens.new_full((1, others, tokens.shape[2]), 7.0)], dim=1),)

    monkeypatch.setattr(denoiser, "forward", answered)
    draw(kind, family, n, 0.6, images)
    noised = family.levels.noised(z, n, first_level(family, z.shape)[:1])
    target[0] = noised.target
    got = draw(kind, family, noised.x, 0.6, images)
    target[0] = torch.zeros_like(n)
    want = draw(kind, family, z, 0.6, images)  # a step of nothing: the pipeline's own way from z to what it decodes
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (want - draw(kind, family, noised.x, 0.6, images)).abs().max() > 1e-2


def test_prompts_as_embeddings_draw_what_the_texts_draw(kind, family):
    pipe, images = family.pipe, images_of(kind)
    options = {**sizes(family), "num_inference_steps": 2, "output_type": "pt", **ASKED[kind]}
    options |= family.pictured(images, (WIDTH, HEIGHT))
    seed = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with torch.no_grad():
        want = pipe(prompt=[PROMPT], generator=seed(), **options)[0]
        conditions = read(family, images)
        keywords = family.prompted(conditions, conditions)
        got = pipe(**keywords, generator=seed(), **options)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_control_model_of_the_width_of_an_image_is_refused():
    configs = {"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16}}
    with pytest.raises(WrongBaseError, match="64 channels and not the 128 of an image and its control image"):
        trainable("FluxControlPipeline", configs)
    assert trainable("FluxKontextPipeline", configs) == "flux_kontext" and KINDS["flux kontext"][0] == "flux_kontext"


@torch.no_grad()
def test_a_sample_is_what_the_pipeline_draws_of_its_texts_and_control_images(kind, family, tmp_path):
    images = [image.resize((64, 64)) for image in images_of(kind)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    led = "cfg" in family.guidance and not kind.startswith("flux2")
    files = " ".join(f"--ci {tmp_path / str(number)}.png" for number in range(len(images)))
    line = f"{PROMPT} --s 2 --w 64 --h 64 --d 5 {files}" + " --l 2.5 --n blurry" * led
    (prompt,) = settled(TrainConfig(), family, [of_line(line, "")], 32)
    assert len(prompt.controls) == len(images)
    options = {name: value for name, value in ASKED[kind].items() if name == "max_sequence_length"}
    options |= {"negative_prompt": "blurry"} if led else {}
    options |= family.pictured(images, (64, 64)) | keywords_of(family, prompt)
    seed = torch.Generator().manual_seed(5)
    want, *_ = pictures_of(family.pipe(prompt=PROMPT, generator=seed, output_type="pil", **options))
    (got,) = drawn(family, Texts(family), prompt, lambda: None)
    difference = np.asarray(got).astype(int) - np.asarray(want).astype(int)
    assert got.size == (want.size if kind.startswith("longcat") else (64, 64)) and np.abs(difference).max() <= 1
