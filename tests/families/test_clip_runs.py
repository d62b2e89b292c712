"""A run of every family of clips on clips: frames are encoded, trained on and drawn, and the files do on a fresh pipeline what was trained."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import diffpeft
from diffpeft import TrainConfig
from diffpeft.errors import WrongBaseError
from diffpeft.families import FAMILIES, CaptionReading, open_family
from diffpeft.families.dit import ClipTransformer
from diffpeft.families.prompts import embedded
from diffpeft.pipeline import guardrail
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth
from tests.families.clips import FIRST_FRAMES, IN_PLACE, WITH_SOUND
from tests.families.pipelines import KINDS, made
from tests.families.test_family_laws import calls, compare

SIDE = 32
EVERY = {**KINDS, **FIRST_FRAMES, **WITH_SOUND, **IN_PLACE}
KINDS_OF_CLIPS = {family: kind for kind, (family, _) in EVERY.items() if issubclass(FAMILIES[family], ClipTransformer)}
LENGTHS = dict.fromkeys(
    ("hunyuan_video", "hunyuan_video15", "hunyuan_video15_i2v", "cosmos25", "skyreels_v1_i2v"), 120
)  # tokens of captions; of others 40


def footage(folder, name, count):
    """A folder of frames on which a picture moves, and its caption beside it."""
    picture = Image.open(EMBEDDED.parent / f"demo/train/{name}.png").convert("RGB").resize((2 * SIDE, 2 * SIDE))
    (folder / name).mkdir(parents=True)
    for number in range(count):
        picture.crop((number, 0, number + SIDE, SIDE)).save(folder / name / f"{number}.png")
    (folder / f"{name}.txt").write_text(f"{name} moves")


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS_OF_CLIPS)
def test_a_run_on_clips_and_a_picture(family, tmp_path):
    pipe = made(EVERY, KINDS_OF_CLIPS[family], torch.float32)
    unguarded = guardrail.is_lacking(type(pipe).__name__)
    pipe.save_pretrained(tmp_path / "model")
    for name in ("cat_face", "airplane"):
        footage(tmp_path / "data", name, 14)
    Image.open(EMBEDDED.parent / "demo/train/bell_pepper.png").save(tmp_path / "data/still.png")
    (tmp_path / "data/still.txt").write_text("a pepper")
    config = TrainConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        frames=(1, 13),
        fps=30,
        resolution=SIDE,
        steps=4,
        rank=2,
        lr=1e-2,
        targets="attn-mlp",
        max_length=LENGTHS.get(family, 40),
        **({"sample_every": 0} if unguarded else {"sample_prompt": f"a cat --f 13 --s 2 --w {SIDE} --h {SIDE}"}),
    )
    run = dreambooth.train(config)
    assert run.account.framing.step == run.family.temporal
    files = dreambooth.save(run)
    run.family.parts.whole()
    fresh = open_pipeline(config.model)
    diffpeft.load_lora(fresh, files[0])
    answers = [answer(open_family(pipe, CaptionReading(config.max_length))) for pipe in (run.family.pipe, fresh)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


@torch.no_grad()
def answer(family):
    """What the denoiser says of a clip."""
    z, _ = family.encode(torch.zeros(1, 3, 13, SIDE, SIDE))
    x = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    read = embedded(family, ["a cat"]) | family.condition(torch.zeros(1, 3, 13, SIDE, SIDE), [])
    return family.predict(x, family.levels.noised(x, x, torch.tensor([0.5])).t, read)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIRST_FRAMES)
def test_a_first_frame_is_read_as_the_pipeline_hands_it(kind, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mean)  # which the pipeline draws
    family = open_family(made(EVERY, kind, torch.float64), CaptionReading(LENGTHS.get(EVERY[kind][0], 40)))
    pixels = torch.randint(0, 256, (1, 3, 13, 32, 64), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    image = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))
    x, _ = family.encode(pixels)
    read = embedded(family, ["a red cat"])
    size = {"height": 32, "width": 64, "num_frames": 13, "num_inference_steps": 1, "guidance_scale": 1.0}
    takes = inspect.signature(type(family.pipe).__call__).parameters
    keywords = family.prompted(read, read) | family.pictured([image], (64, 32)) | {"output_type": "latent"}
    keywords |= {name: value for name, value in size.items() if name in takes}
    model, channels_first = family.parts(family.denoiser), "cogvideox" not in kind
    (theirs,) = calls(
        model, lambda: family.pipe(latents=x.clone() if channels_first else x.transpose(1, 2), **keywords)
    )
    conditions, time = read | family.condition(pixels, []), theirs["timestep"]
    (ours,) = calls(model, lambda: family.predict(x, time / 1000 if channels_first else time, conditions))
    assert ours.keys() == theirs.keys()
    compare(ours, theirs, rtol=1e-5, atol=1e-6)  # images are in single precision
    assert (conditions["known"][:, :, 0] != 0).all() and not conditions["known"][:, :, 1:].any()


def shown(kind):
    """A family that is shown a first frame, pixels of a clip, and the keywords of its pipeline for one like it without guidance."""
    family = open_family(made(EVERY, kind, torch.float64), CaptionReading(LENGTHS.get(EVERY[kind][0], 40)))
    pixels = torch.randint(0, 256, (1, 3, 13, 32, 64), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    image = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    read = embedded(family, ["a red cat"])
    size = {"height": 32, "width": 64, "num_frames": 13, "frames": 13, "num_inference_steps": 2, "guidance_scale": 1.0}
    takes = inspect.signature(type(family.pipe).__call__).parameters
    keywords = family.prompted(read, read) | family.pictured([image], (64, 32)) | {"output_type": "latent"}
    return family, pixels, read, keywords | {name: value for name, value in size.items() if name in takes}


LAYOUTS = {"kandinsky5 i2v": lambda z: z.movedim(-1, 1)[:, :4]}  # how a transformer reads clips


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_first_frame_in_its_place_is_read_as_the_pipeline_hands_it(kind, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    family, pixels, read, keywords = shown(kind)
    model = family.parts(family.denoiser)
    layout = LAYOUTS.get(kind, lambda z: z)
    theirs, *later = calls(model, lambda: family.pipe(**keywords, generator=torch.Generator().manual_seed(1)))
    x = layout(theirs["hidden_states"])
    noised = torch.cat([torch.full_like(x[:, :, :1], 9.0), x[:, :, 1:]], 2)  # which nothing reads
    conditions = family.condition(pixels, [])
    assert len(later) == 1 and conditions.pop("counts").flatten().tolist() == [0, *[1] * (x.shape[2] - 1)]
    time = theirs["timestep"].flatten()[-1:].double() / (1 if "cosmos" in kind else 1000)
    (ours,) = calls(model, lambda: family.predict(noised, time, read | conditions))
    assert ours.keys() == theirs.keys()
    assert theirs["timestep"].numel() == 1 or theirs["timestep"].flatten()[0] < 1e-3 < time
    compare(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_SOUND)
def test_a_first_frame_beside_sound_is_read_as_the_pipeline_hands_it(kind):
    family = open_family(made(EVERY, kind, torch.float64), CaptionReading(40))
    pixels = torch.randint(0, 256, (1, 3, 13, 32, 64), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    image = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    read, (z, _) = embedded(family, ["a red cat"]), family.encode(pixels)
    size = {"height": 32, "width": 64, "num_frames": 13, "num_inference_steps": 1, "output_type": "latent"}
    plain = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
    plain |= {f"audio_{name}": value for name, value in plain.items()}
    keywords = family.prompted(read, read) | family.pictured([image], (64, 32)) | size | plain
    model = family.parts(family.denoiser)
    (theirs,) = calls(model, lambda: family.pipe(**keywords, generator=torch.Generator().manual_seed(1)))
    begun = theirs["hidden_states"].mT.unflatten(2, z.shape[2:])
    noised = torch.cat([torch.full_like(begun[:, :, :1], 9.0), begun[:, :, 1:]], 2)  # which nothing reads
    conditions = {name: value for name, value in family.condition(pixels, []).items() if name != "counts"}
    time = theirs["sigma"].double() / 1000
    (ours,) = calls(model, lambda: family.predict(noised, time, read | conditions))
    names = ("hidden_states", "timestep", "audio_timestep", "sigma", "encoder_hidden_states")
    compare(*({name: reading[name] for name in names} for reading in (ours, theirs)), rtol=1e-5, atol=1e-5)
    apart = {"isolate_modalities": True, "return_dict": False}  # as training has it
    answers = [model(**reading | apart)[0] for reading in (ours, theirs)]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    assert not theirs["timestep"][:, : z[0, 0, 0].numel()].any() and theirs["timestep"].any()


def test_a_first_frame_of_one_size_alone_is_refused():
    pipe = made(EVERY, "cogvideox i2v", torch.float32)
    pipe.transformer.register_to_config(use_learned_positional_embeddings=True)
    with pytest.raises(WrongBaseError, match="of one size"):
        open_family(pipe, CaptionReading(40))
