"""diffpeft generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from diffpeft.cli.completion import completed
from diffpeft.cli.options import Finite, overwriting
from diffpeft.drawing.opening import DEVICES, QUANTIZED
from diffpeft.drawing.samplers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpeft.drawing.job import Asked


_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@click.option(
    "-m",
    "--model",
    type=click.Path(),
    help="A diffusers folder, a single .safetensors file (with --base), or a Hub id. Default: the embedded base.",
)
@click.option(
    "--base", type=click.Path(), help="The folder or Hub id with the configs and the tokenizer of a single-file model."
)
@click.option(
    "-p", "--prompt", multiple=True, help="What to draw; may name adapters: <lora:style:0.8>; may be repeated."
)
@click.option(
    "--prompts",
    type=_FILE,
    help="A prompt on each line, with kohya's flags: a cat --n blurry --w 512 --h 768 --d 7 --l 7.5 --s 30. Or .toml, .json.",
)
@click.option("--negative", help="What not to draw.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=_FILE,
    help="The picture to draw over, what a model of edits is to change (may be repeated), or what a video begins with.",
)
@click.option("--mask", type=_FILE, help="Where --image is drawn over: where this picture is white.")
@click.option(
    "--strength", type=Finite(), help="How much of --image is drawn anew: above 0, to 1. Default: the pipeline's."
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:WEIGHT]",
    type=click.Path(),
    help="An adapter and its strength; may be repeated.",
)
@click.option(
    "--lora-dir",
    default=".",
    show_default=True,
    type=click.Path(exists=True, file_okay=False),
    help="Where NAME.safetensors is that a prompt names as <lora:NAME:0.8>, or a grid as lora=NAME, and no --lora gives.",
)
@click.option(
    "-o",
    "--out",
    default="out.png",
    show_default=True,
    type=click.Path(),
    help="The picture to write (.png, .jpg, .webp), a pattern such as 'cats/{n}-{seed}-{prompt}.png', or a folder.",
)
@overwriting
@click.option("--seed", default="0", show_default=True, help="Seed of the starting noise, or several: 1,2,5-8.")
@click.option("--num", type=click.IntRange(min=1), help="Pictures of each prompt: seeds from --seed on.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Pictures at once, at most.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Denoising steps.")
@click.option(
    "--guidance", type=Finite(), help="Guidance scale. Default: 4 for the embedded base, else the pipeline's own."
)
@click.option("--width", type=click.IntRange(min=8), help="In pixels. Default: the model's.")
@click.option("--height", type=click.IntRange(min=8), help="In pixels. Default: the model's.")
@click.option(
    "--scheduler",
    shell_complete=completed(list(SAMPLERS)),
    help="euler, euler_a, dpm++_2m, dpm++_2m_karras, ddim, unipc, lcm ... Default: the model's.",
)
@click.option(
    "--grid",
    "grids",
    multiple=True,
    help="Pictures side by side, with labels: strength=0:1.5:0.5 x lora=a,b. Axes: strength, lora, seed, prompt, steps, "
    "guidance, scheduler, and the name of an adapter for its weight.",
)
@click.option(
    "--singles", type=click.Path(file_okay=False), help="A folder for the pictures of --grid one by one, too."
)
@click.option(
    "--device",
    shell_complete=completed(DEVICES),
    help="cuda, mps or cpu. Default: cuda if there is one.",
)
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: fp32 on a CPU, else bf16.")
@click.option("--quantize", type=click.Choice(QUANTIZED), help="Hold the denoiser in few bits; nf4 needs bitsandbytes.")
@click.option(
    "--offload",
    type=Finite(0, 1),
    default=0.0,
    help="Share of the denoiser's blocks that live in the host's memory; text encoders then do as well.",
)
@click.argument("more", nargs=-1, metavar="")
def generate(grids: tuple[str, ...], more: tuple[str, ...], **asked: Unpack[Asked]) -> None:
    """Draw pictures, with adapters or without.

    \b
    Example: diffpeft generate -p "an emoji of lemon" --lora demo-out/openmoji.diffusers.safetensors:0.8 -o lemon.png
             diffpeft generate -p "an emoji of lemon <lora:openmoji.kohya:0.8>" --lora-dir demo-out -o lemon.png
             diffpeft generate -p "an emoji of lemon" --seed 1-4 --lora-dir demo-out --grid strength=0:1:0.5 x lora=openmoji.kohya

    Tags in the prompt are A1111's: <lora:NAME>, <lora:NAME:0.8>, <lora:NAME:TEXT_ENCODER:UNET>, with weights by block
    <lora:NAME:1:1:lbw=OUTALL> or lbw=0,1,0.5,..., and from when to when: <lora:NAME:0.8:start=0.2:stop=0.8>, step=5-10.
    """
    from diffpeft.cli.errors import naming
    from diffpeft.drawing import job

    if more and not grids:
        raise click.UsageError(f"Got unexpected extra arguments ({' '.join(more)})")
    asked["grid"] = " ".join([" x ".join(grids), *more])
    plan = job.planned(asked, _picture)
    from diffpeft.drawing.account import PictureAccount
    from diffpeft.train.progress import quiet_bars

    quiet_bars()
    stage = job.staged(asked, plan)
    account = PictureAccount.of(stage.pipe, asked["model"], plan.adapters)
    with naming(asked["out"]):
        for file in job.written(plan, stage, account, asked["batch"], asked["overwrite"]):
            click.echo(file)


def _picture(file: Path) -> Image:
    """An image file as pixels. Raises DataError."""
    from diffpeft.train.data.read import picture  # torch

    return picture(file)
