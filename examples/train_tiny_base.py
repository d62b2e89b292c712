"""Train the tiny text-to-image model that diffpeft ships (diffpeft/assets/tiny-emoji/model), from pictures of emoji, on a CPU.

    for style in google twitter; do
        npm pack emoji-datasource-$style@16.0.0
        mkdir $style
        tar -xzf emoji-datasource-$style-16.0.0.tgz -C $style --strip-components=1
    done
    python examples/train_tiny_base.py --google google --twitter twitter -o tiny-emoji

Two and a half hours on two cores that compute in bfloat16; give others more time. The budgets are minutes, so a faster machine trains for more
steps, and weights differ from run to run.

    VAE:   |e|_1 + |dx e|_1 + |dy e|_1 + |e|^2 + 0.001 KL,  e = decode(encode(x)) - x      both styles
    UNet:  min(SNR_t, 5) / SNR_t |unet(z_t, t, text) - noise|^2                            Noto only
           Hang et al. 2023, arXiv:2303.09556; Rombach et al. 2022, arXiv:2112.10752

The VAE can draw Twemoji's style, but UNet and text encoder never see it: it is left for an adapter to learn.

Pictures: Noto Emoji, Copyright Google LLC, Apache License 2.0; Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0.
The npm packages: Copyright (c) 2013 Cal Henderson, MIT. These attributions travel with a model that you publish.
"""

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# The tokenizer is reused, not trained: BPE training breaks ties between equally frequent pairs by chance, and other merges give other token ids.
TOKENIZER = Path(__file__).parents[1] / "diffpeft/assets/tiny-emoji/model/tokenizer"
VAE = dict(  # 1.4 M parameters; 64x64 pixels are 16x16 latents of 4 channels
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(24, 48, 96),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
    mid_block_add_attention=False,
)
UNET = dict(  # 11.0 M parameters
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=192,
    attention_head_dim=4,
    norm_num_groups=16,
    sample_size=16,
)
TEXT = dict(  # 2.4 M parameters
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=6,
    max_position_embeddings=32,
    projection_dim=192,
)
NOISE = dict(  # Stable Diffusion's schedule, for training and for drawing
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
BATCH, LEARNING_RATE, SNR_LIMIT, VERSIONS, SAVE_EVERY, DRAWING_STEPS = 64, 1e-3, 5.0, 6, 400, 25
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
# bfloat16 pays where the CPU computes in it; elsewhere it is emulated and many times slower than float32. Old torch cannot tell: float32.
CPU = getattr(torch.cpu, "get_capabilities", dict)()
BFLOAT16 = bool(CPU.get("amx_bf16") or CPU.get("avx512_bf16"))
# How often a picture is drawn, relative to 1. A person comes with five near copies (couples with 25), which would crowd out everything else;
# flags, letters and signs say little about how things look.
TONED, CATEGORIES = 0.03, {"Flags": 0.1, "Symbols": 0.35, "People & Body": 0.6}
PROMPTS = [
    "grinning face",
    "an emoji of cat face",
    "dog face",
    "red heart",
    "slice of pizza",
    "automobile",
    "an emoji of rocket",
    "tree",
    "banana",
    "house building",
    "a red cat",
    "a blue heart",
    "a green car",
    "sad dog",
    "penguin",
    "strawberry",
]


@dataclass(frozen=True)
class Emoji:
    """One picture: its file, its name and other names for it, its category, its skin tones ("" if it has none)."""

    image: str
    name: str
    aliases: tuple[str, ...]
    category: str
    tone: str = ""

    @property
    def weight(self) -> float:
        return TONED if self.tone else CATEGORIES.get(self.category, 1.0)

    def caption(self) -> str:
        """A random caption; a tenth are empty, for classifier-free guidance."""
        if random.random() < 0.1:
            return ""
        name = self.name if random.random() < 0.6 else random.choice(self.aliases)
        return random.choices([name, f"an emoji of {name}", f"a picture of {name}"], [0.4, 0.4, 0.2])[0]


def clean(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("’", "'").split())


def emoji_of(entry: dict[str, Any]) -> Iterator[Emoji]:
    """The picture of an entry of emoji.json, and one for each of its skin tones."""
    name, aliases, category = (
        clean(entry["name"]),
        [clean(alias.replace("-", " ")) for alias in entry["short_names"]],
        entry["category"],
    )
    yield Emoji(entry["image"], name, tuple(aliases), category)
    for code, variation in entry.get("skin_variations", {}).items():
        tone = " and ".join(TONES[part] for part in code.split("-") if part in TONES)
        yield Emoji(
            variation["image"], f"{name}, {tone}", tuple(f"{alias}, {tone}" for alias in aliases), category, tone
        )


def picture(path: Path) -> Tensor:
    """The picture on white, [3, 64, 64] uint8."""
    drawing = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    return torch.from_numpy(np.array(white.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1)


def prepare(google: Path, twitter: Path, limit: int | None) -> tuple[list[Emoji], Tensor, Tensor]:
    """The n emoji that both packages draw, and their pictures in Noto's and in Twemoji's style, [n, 3, 64, 64] uint8 each."""
    folders = google / "img/google/64", twitter / "img/twitter/64"
    table = google / "emoji.json"
    entries = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else []
    emoji = [e for entry in entries for e in emoji_of(entry) if all((folder / e.image).is_file() for folder in folders)]
    if not emoji:
        raise click.ClickException(
            f"{table} names no picture that is in {folders[0]} and in {folders[1]}. Unpack both packages as in {__file__}."
        )
    if limit is not None:
        emoji = random.sample(emoji, min(limit, len(emoji)))
    noto, twemoji = (torch.stack([picture(folder / e.image) for e in emoji]) for folder in folders)
    return emoji, noto, twemoji


def scaled(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def augmented(x: Tensor) -> Tensor:
    """x [n, 3, h, w], each moved and scaled a little, with white around it. Never flipped: letters, flags and arrows have a direction."""
    n = len(x)
    scale, theta = 1 + (torch.rand(n) - 0.5) * 0.15, torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * 0.12
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return 1 + F.grid_sample(x - 1, grid, align_corners=False)  # grid_sample pads with 0, which is white here


def budget(stage: str, minutes: float, steps: int | None) -> Iterator[tuple[int, float]]:
    """(step, done) until `minutes` have passed or, if given, `steps` are done; done, in [0, 1), is how much of the budget is used."""
    start = time.monotonic()
    for step in itertools.count():
        seconds = time.monotonic() - start
        done = step / steps if steps is not None else seconds / (60 * minutes)
        if done >= 1:
            click.echo(f"{stage}: {step} steps in {seconds:.0f} s")
            return
        yield step, done


def update(loss: Tensor, optimizer: torch.optim.Optimizer, step: int, done: float, warmup: int) -> None:
    """One step down the gradient, clipped to norm 1. The rate warms up, then falls along a cosine to a hundredth."""
    group = optimizer.param_groups[0]
    group["lr"] = LEARNING_RATE * min(1, step / warmup) * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def vae_loss(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's loss on x [n, 3, h, w], and the L1 error in it. Errors of the gradients dx, dy keep edges sharp without a perceptual network."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        y = vae.decode(z).sample
    error = y.float() - x
    l1, gradients = error.abs().mean(), error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    kl = posterior.kl().float().mean() / z[0].numel()
    return l1 + gradients + error.square().mean() + 1e-3 * kl, l1


@torch.no_grad()
def encode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """x [n, 3, 64, 64] -> mean latents [n, 4, 16, 16], not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in x.split(128)])


def train_vae(pictures: Tensor, minutes: float, steps: int | None) -> AutoencoderKL:
    """A VAE of `pictures` [n, 3, 64, 64], its weights rounded to the fp16 they are stored in, so that the UNet learns the latents users get."""
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0)
    for step, done in budget("vae", minutes, steps):
        x = augmented(scaled(pictures[torch.randint(len(pictures), (BATCH,))])).contiguous(
            memory_format=torch.channels_last
        )
        loss, l1 = vae_loss(vae, x)
        update(loss, optimizer, step, done, warmup=100)
        if step % 25 == 0:
            click.echo(f"vae: {done:4.0%}, step {step}, loss {loss.item():.4f}, l1 {l1.item():.4f}")
    vae.half().float().eval()
    vae.register_to_config(scaling_factor=1 / encode(vae, scaled(pictures)).std().item())
    return vae


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    )


def unet_loss(model: nn.ModuleDict, scheduler: DDIMScheduler, z: Tensor, ids: Tensor) -> Tensor:
    """The denoising loss, with min-SNR weights, of latents z [n, 4, 16, 16] with captions ids [n, 32]."""
    noise, t = torch.randn_like(z), torch.randint(scheduler.config.num_train_timesteps, (len(z),))
    noisy = scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the backward pass of flash attention is slow on CPUs
        predicted = model["unet"](noisy, t, model["text"](ids).last_hidden_state).sample
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    return ((predicted.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=SNR_LIMIT) / snr).mean()


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move `average` towards `model`: the exponential moving average is what is saved."""
    decay = min(0.998, (2 + step) / (11 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def train_unet(
    vae: AutoencoderKL, emoji: list[Emoji], pictures: Tensor, minutes: float, steps: int | None, out: Path
) -> None:
    """Train a UNet and a text encoder on the latents of `pictures` [n, 3, 64, 64], and save the pipeline in `out` now and then."""
    tokenizer, scheduler = CLIPTokenizer.from_pretrained(TOKENIZER), DDIMScheduler(**NOISE)
    weights = torch.tensor([e.weight for e in emoji])
    x = scaled(pictures)
    latents = torch.stack([encode(vae, augmented(x) if k else x) for k in range(VERSIONS)]) * vae.config.scaling_factor
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    model = nn.ModuleDict({"unet": unet, "text": make_text_encoder(tokenizer)})
    average, running = copy.deepcopy(model), None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    for step, done in budget("unet", minutes, steps):
        picked = torch.multinomial(weights, BATCH, replacement=True)
        captions = [emoji[k].caption() for k in picked.tolist()]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        loss = unet_loss(model, scheduler, latents[torch.randint(VERSIONS, (BATCH,)), picked], ids)
        update(loss, optimizer, step, done, warmup=200)
        follow(average, model, step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            click.echo(f"unet: {done:4.0%}, step {step}, loss {running:.4f}")
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            save(vae, average, out)
    save(vae, average, out)


def save(vae: AutoencoderKL, model: nn.ModuleDict, out: Path) -> None:
    """Write a diffusers folder. Loaded without a dtype, all of it is fp32: transformers keeps the dtype on disk, diffusers does not."""
    vae, unet = copy.deepcopy(vae).half(), copy.deepcopy(model["unet"]).half()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=model["text"],
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet,
        scheduler=DDIMScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    file = out / "text_encoder" / "model.safetensors"  # in the names that every version of transformers reads
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def draw(folder: Path) -> Image.Image:
    """Two rows of eight pictures, as a user would get them from the saved pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        PROMPTS, num_inference_steps=DRAWING_STEPS, guidance_scale=4.0, generator=generator, output_type="np"
    ).images
    sheet = drawn.reshape(2, 8, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(128, 512, 3)
    return Image.fromarray((sheet * 255).round().astype("uint8")).resize((1024, 256))


@click.command()
@click.option(
    "--google",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Unpacked emoji-datasource-google.",
)
@click.option(
    "--twitter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Unpacked emoji-datasource-twitter.",
)
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--vae-minutes", type=click.FloatRange(min=0, min_open=True), default=45, show_default=True)
@click.option("--unet-minutes", type=click.FloatRange(min=0, min_open=True), default=100, show_default=True)
@click.option("--vae-steps", type=click.IntRange(min=1), help="Train the VAE for so many steps, whatever the time.")
@click.option(
    "--unet-steps", type=click.IntRange(min=1), help="Train UNet and text encoder for so many steps, whatever the time."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use so many pictures of each style, chosen by chance.")
def main(
    google: Path,
    twitter: Path,
    out: Path,
    vae_minutes: float,
    unet_minutes: float,
    vae_steps: int | None,
    unet_steps: int | None,
    limit: int | None,
) -> None:
    """Train the tiny emoji model."""
    random.seed(0)
    torch.manual_seed(0)
    emoji, noto, twemoji = prepare(google, twitter, limit)
    click.echo(f"{len(emoji)} pictures of each style; training in {'bfloat16' if BFLOAT16 else 'float32'}")
    vae = train_vae(torch.cat([noto, twemoji]), vae_minutes, vae_steps)
    train_unet(vae, emoji, noto, unet_minutes, unet_steps, out)
    draw(out).save(out / "sample.png")


if __name__ == "__main__":
    main()
