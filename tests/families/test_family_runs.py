"""A run of every family, from a folder to files: it learns, more than by chance, and its files do in other programs what they do here."""

from __future__ import annotations

import re
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import TrainConfig
from diffpeft.families import CaptionReading, Frame, open_family
from diffpeft.families.densities import DENSITIES
from diffpeft.families.prompts import embedded
from diffpeft.model.attach import attach
from diffpeft.model.state import slots_of
from diffpeft.model.target import PRESETS, select
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth
from diffpeft.train.cache import Latents, Texts
from diffpeft.train.data import View
from diffpeft.train.draw import generator
from diffpeft.train.objective import Batch, Objective, denoising
from diffpeft.train.paired import HeldoutPictures, Paired
from tests.families.clips import Guardrail
from tests.families.pipelines import cells, pipeline

IMAGES = ("cat_face", "airplane", "automobile", "alarm_clock")
OTHERS = ("bouquet", "bell_pepper")
RUNS = {  # {kind of pipeline: (learning rate, ModelSpec's architecture, sd-scripts' version)}
    "sd15": (1e-2, "stable-diffusion-v1", "sd_v1"),
    "sd2, v": (1e-2, "stable-diffusion-v2-768-v", "sd_v2_v"),
    "sdxl, v and zero-terminal SNR": (1e-2, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "flux dev": (1e-2, "flux-1-dev", "flux1"),
    "z_image": (1e-2, "Z-Image", "z_image"),
    "flux2 klein": (1e-2, "Flux.2-klein", "flux_2_klein"),
    "flux2 dev": (1e-2, "Flux.2-dev", "flux_2_dev"),
    "qwen_image": (1e-2, "Qwen-Image", "qwen_image"),
    "chroma": (1e-2, "chroma", "chroma"),
    "sd3": (1e-2, "stable-diffusion-3", "sd3"),
    "sd3.5": (1e-2, "stable-diffusion-3", "sd3"),
    "lumina2": (1e-2, "lumina-2", "lumina2"),
    "pixart alpha": (1e-2, "pixart-alpha", "pixart_alpha"),
    "pixart sigma": (1e-2, "pixart-sigma", "pixart_sigma"),
    "sana": (1e-2, "sana", "sana"),
    "auraflow": (1e-2, "auraflow", "auraflow"),
    "cogview4": (1e-2, "cogview4", "cogview4"),
    "hidream": (1e-2, "hidream-i1", "hidream_i1"),
    "krea2": (1e-2, "krea-2", "krea2"),
    "ideogram4": (1e-2, "ideogram-4", "ideogram4"),
    "ernie_image": (1e-2, "ernie-image", "ernie_image"),
    "wan": (1e-2, "wan2.1", "wan"),
    "ltx": (1e-2, "ltx-video", "ltx_video"),
    "hunyuan_video": (1e-2, "hunyuan-video", "hunyuan_video"),
    "hunyuan_video15": (1e-2, "hunyuan-video-1.5", "hunyuan_video_1_5"),
    "ltx2": (1e-2, "ltx-2", "ltx2"),
    "cogvideox": (1e-2, "cogvideox", "cogvideox"),
    "cogvideox 1.5": (1e-2, "cogvideox", "cogvideox"),
    "mochi": (1e-2, "mochi-1", "mochi"),
    "sana_video": (1e-2, "sana-video", "sana_video"),
    "kandinsky5 video": (1e-2, "kandinsky-5-video", "kandinsky5_video"),
    "skyreels_v2": (1e-2, "skyreels-v2", "skyreels_v2"),
    "easyanimate": (1e-2, "easyanimate-v5.1", "easyanimate"),
    "cosmos": (1e-2, "cosmos-predict2", "cosmos_predict2"),
    "cosmos 2.5": (1e-2, "cosmos-predict2.5", "cosmos_predict2_5"),
    "hunyuan_image": (1e-2, "hunyuan-image-2.1", "hunyuan_image"),
    "bria": (1e-2, "bria-3", "bria"),
    "bria_fibo": (1e-2, "bria-fibo", "bria_fibo"),
    "ovis_image": (1e-2, "ovis-image", "ovis_image"),
    "longcat_image": (1e-2, "longcat-image", "longcat_image"),
    "kandinsky5": (1e-2, "kandinsky-5-image", "kandinsky5"),
    "prx": (1e-2, "prx", "prx"),
    "nucleus_image": (1e-2, "nucleus-image", "nucleus_image"),
    "bria_fibo2": (1e-2, "bria-fibo-2", "bria_fibo2"),
    "generic, a flow": (1e-2, "Lumina", "Lumina"),
    "generic, levels by betas": (1e-2, "HunyuanDiT", "HunyuanDiT"),
}
# {kind: how many tokens of captions are read}: less than usual, for speed; those of some follow many of the system's
UNCOUNTED = (
    "bria_fibo2",
    "hunyuan_image",
    "longcat_image",
    "generic, levels by betas",
)  # whose pipelines take no number of tokens
LANGUAGE = {kind: 40 for kind in RUNS if not kind.startswith(("sd1", "sd2", "sdxl", "flux dev", *UNCOUNTED))} | {
    "lumina2": 80,
    "hunyuan_video": 120,
    "hunyuan_video15": 120,
    "krea2": 120,
    "qwen_image": 120,
    "flux2 dev": 120,
    "cosmos 2.5": 120,
}
# whose layers have no names of kohya's
UNNAMED = ("lumina2", "easyanimate", "ovis_image", "generic, a flow", "generic, levels by betas")
LEFT_OUT = {
    "sd3": {"text_encoder_3": None, "tokenizer_3": None},
    **{key: {"safety_checker": Guardrail()} for key in ("cosmos", "cosmos 2.5")},
}  # what the model is without, and diffusers is to be told
BLOCKS = (
    r"attentions\.|(?<!text_)(transformer|stream)_blocks\.|^(layers|blocks)\."  # where layers are that presets choose
)
ENCODERS = {  # {kind: what else is trained}
    "sdxl, v and zero-terminal SNR": {"text_encoder", "text_encoder_2"},
    "flux dev": {"text_encoder"},
}


@pytest.fixture(scope="module", params=cells(RUNS, ("flux dev",)))
def run(request, tmp_path_factory):
    """A finished run of 60 steps on 4 images."""
    folder = tmp_path_factory.mktemp("run")
    pipeline(request.param, torch.float32).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for name in IMAGES:
        (folder / "photos" / f"{name}.png").write_bytes((EMBEDDED.parent / "demo/train" / f"{name}.png").read_bytes())
        (folder / "photos" / f"{name}.txt").write_text(f"a picture of {name}")
    (folder / "others").mkdir()
    for name in OTHERS:
        (folder / "others" / f"{name}.png").write_bytes((EMBEDDED.parent / "demo/train" / f"{name}.png").read_bytes())
        (folder / "others" / f"{name}.txt").write_text(f"a picture of {name}")
    config = TrainConfig(
        sample_every=0,
        model=str(folder / "model"),
        data=str(folder / "photos"),
        heldout=str(folder / "others"),
        heldout_every=30,
        out=str(folder / "out"),
        name="style",
        resolution=32,
        steps=60,
        batch_size=4,
        rank=4,
        targets="attn-mlp",
        lr=RUNS[request.param][0],
        train_text_encoder=request.param in ENCODERS,
        max_length=LANGUAGE.get(request.param),
    )
    torch.manual_seed(0)
    finished = dreambooth.train(config)
    return request.param, finished, dreambooth.save(finished)


@torch.no_grad()
def losses(run, strength):
    """The loss of every image at eight levels [8 x 4], with the same noise whatever the strength."""
    family, examples = run.family, run.account.examples
    latents = dreambooth.Latents(family)
    views = [View.centred(e.size, (run.config.resolution,) * 2) for e in examples]
    z = torch.stack([latents(e, view).mean for e, view in zip(examples, views, strict=True)])
    prompts, frames = [e.caption for e in examples], [v.frame(e.size) for e, v in zip(examples, views, strict=True)]
    with diffpeft.adapters(family.pipe, {run.name: strength}):
        texts = embedded(family, prompts)
        return torch.cat([denoising(family, batch(family, z, prompts, level, frames), texts) for level in range(8)])


def batch(family, z, prompts, level, frames):
    u = DENSITIES[family.levels.density](torch.full((len(z),), (level + 0.5) / 8))
    noise = torch.randn(z.shape, generator=generator("paired", level))
    return Batch(z, noise, u, prompts, torch.zeros(len(z), dtype=torch.bool), frames)


def test_sixty_steps_on_four_images_lower_the_paired_loss_by_more_than_three_standard_errors(run):
    _, finished, _ = run
    gain = losses(finished, 0.0) - losses(finished, 1.0)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    assert losses(finished, 0.0).equal(losses(finished, 0.0))  # the noise is the same


def test_held_out_losses_agree_at_first_and_the_adapter_is_that_of_the_best(run):
    _, finished, _ = run
    first, *later = finished.heldout
    assert first.before == first.after and first.standard_error == 0 and first.images == 2
    assert [loss.step for loss in later] == [30, 60] and all(loss.before != loss.after for loss in later)
    best = min(later, key=lambda loss: loss.after)
    assert finished.best.step == best.step and len(best.bands) == 4
    family, account = finished.family, finished.account
    pictures = HeldoutPictures(account.heldout, account.sizing, finished.config.seed, Latents(family))
    paired = Paired(family, pictures, Texts(family), dreambooth.sampling_of(finished.config, family), Objective(), 8)
    with diffpeft.adapters(family.pipe, {finished.name: 1.0}):
        summary = paired.design().summary(0, paired(), paired())
    assert summary.after == pytest.approx(best.after, rel=1e-4)


def test_the_files_say_what_model_they_are_for(run):
    kind, _, files = run
    _, architecture, version = RUNS[kind]
    formats = ["diffusers"] if kind in UNNAMED else ["diffusers", "kohya"]
    assert [file.name for file in files] == [f"style.{format}.safetensors" for format in formats]
    for file in files:
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said["modelspec.architecture"] == f"{architecture}/lora" and said["ss_base_model_version"] == version
        assert said["modelspec.resolution"] == "32x32" and said["modelspec.title"] == "style"


@torch.no_grad()
def answer(family):
    """What the denoiser says to a fixed input."""
    g = torch.Generator().manual_seed(3)
    latents, _ = family.encode(torch.zeros(1, 3, 32, 32))
    x, prompts = torch.randn(2, *latents.shape[1:], generator=g), ["a picture of cat_face", ""]
    frames = [Frame((40, 60), (0, 4), (32, 32))] * 2
    t = family.levels.noised(x, x, torch.tensor([0.3, 0.8])).t
    return family.predict(x, t, embedded(family, prompts) | family.framed(frames))


def test_every_file_does_on_a_fresh_pipeline_what_was_trained(run):
    kind, finished, files = run

    def again(pipe):
        return open_family(pipe, CaptionReading(finished.config.max_length))

    finished.family.parts.whole()
    want = answer(finished.family)
    for file in files:
        fresh = open_pipeline(finished.config.model)
        base = answer(again(fresh))
        assert (want - base).abs().max() > 1e-2
        diffpeft.load_lora(fresh, file)
        torch.testing.assert_close(answer(again(fresh)), want, rtol=0, atol=1e-4)  # fp32
        if "kohya" in file.name and kind != "sd15":
            continue  # diffusers reads those of SDXL and Flux.1 in the published depths alone
        if not hasattr(fresh, "load_lora_weights") or kind == "prx":
            continue  # PixArt's has none, and PRX's looks for a UNet
        stock = diffusers.DiffusionPipeline.from_pretrained(finished.config.model, **LEFT_OUT.get(kind, {}))
        stock.load_lora_weights(str(file.parent), weight_name=file.name)
        torch.testing.assert_close(answer(again(stock)), want, rtol=0, atol=1e-4)


def test_presets_choose_what_the_diffusers_example_and_sd_scripts_train(run):
    """The example's list for Flux.1 is attention and MLPs of both streams; single blocks have theirs beside; nothing outside of blocks."""
    _, finished, _ = run
    family, config = finished.family, replace(finished.config, train_text_encoder=False)
    model = family.parts(family.denoiser)
    chosen = {preset: dreambooth.chosen_layers(replace(config, targets=preset), family) for preset in PRESETS}
    names = {preset: set(select({"m": model}, **of[family.denoiser])["m"]) for preset, of in chosen.items()}
    assert names["attn"] < names["attn-mlp"] < names["full"]
    assert all(re.search(BLOCKS, name) for name in names["attn-mlp"])
    unread = family.unread.get(family.denoiser, "")
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not re.search(BLOCKS, name) or re.fullmatch(unread, name):
            continue
        if re.search(r"\.(attn\d?|(self_)?attention)\.", name):
            assert name in names["attn"]
        if not re.search(r"attentions\.|\.norm|modulation|_mod\.", name):
            assert name in names["attn-mlp"]


@pytest.mark.parametrize("run", ["sdxl, v and zero-terminal SNR"], indirect=True)
@pytest.mark.slow
def test_a_run_goes_on_with_layers_that_nothing_reads(run, tmp_path):
    """Other programs adapt them too: such an adapter is no run that learns nothing."""
    _, finished, _ = run
    fresh = open_pipeline(finished.config.model)
    attach(fresh, diffpeft.LoraConfig(r=2), "all", targets="attn")
    diffpeft.save_lora(fresh, tmp_path / "all.safetensors", name="all")
    again = replace(finished.config, init_from=str(tmp_path / "all.safetensors"), out=str(tmp_path / "out"), steps=3)
    layers = set(slots_of(dreambooth.train(again).family.pipe, "style"))
    assert any("layers.2." in layer for layer in layers if layer.startswith("text_encoder."))


def test_the_clips_are_trained_on_request_and_t5_never(run):
    kind, finished, files = run
    prefixes = {key.partition("_encoder")[0] for key in load_file(files[-1]) if key.startswith("lora_te")}
    components = {layer.partition(".")[0] for layer in slots_of(finished.family.pipe, "style")}
    assert components == {finished.family.denoiser} | ENCODERS.get(kind, set())
    assert bool(prefixes) == (kind in ENCODERS)
