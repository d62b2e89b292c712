"""diffpeft generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from diffpeft.cli.options import overwriting
from diffpeft.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpeft.pipeline.prompt import Tag

    Files = list[tuple[Path, float | Tag]]


class Asked(TypedDict):
    """The options of `diffpeft generate`, by the names that click gives them."""

    model: str | None
    base: str | None
    prompt: str
    negative: str | None
    images: tuple[str, ...]
    loras: tuple[str, ...]
    lora_dir: str
    out: str
    seed: int
    steps: int
    guidance: float | None
    width: int | None
    height: int | None
    dtype: str | None
    overwrite: bool


def weighted(text: str) -> tuple[str, float]:
    """FILE[:WEIGHT] -> file and weight."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon and file else (text, 1.0)
    except ValueError:
        return text, 1.0


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
@click.option("-p", "--prompt", required=True, help="What to draw; may name adapters: <lora:style:0.8>.")
@click.option("--negative", help="What not to draw.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="What a model of edits is to change, or what a video begins with; may be repeated.",
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
    help="Where NAME.safetensors is that the prompt names as <lora:NAME:0.8> and no --lora gives.",
)
@click.option(
    "-o", "--out", default="out.png", show_default=True, type=click.Path(dir_okay=False), help="The PNG to write."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the starting noise.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Denoising steps.")
@click.option(
    "--guidance", type=float, help="Guidance scale. Default: 4 for the embedded base, else the pipeline's own."
)
@click.option("--width", type=click.IntRange(min=8), help="In pixels. Default: the model's.")
@click.option("--height", type=click.IntRange(min=8), help="In pixels. Default: the model's.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: fp32 on a CPU, else bf16.")
@overwriting
def generate(**asked: Unpack[Asked]) -> None:
    """Draw a picture, with adapters or without.

    \b
    Example: diffpeft generate -p "an emoji of lemon" --lora demo-out/openmoji.diffusers.safetensors:0.8 -o lemon.png
             diffpeft generate -p "an emoji of lemon <lora:openmoji.kohya:0.8>" --lora-dir demo-out -o lemon.png

    Tags in the prompt are A1111's: <lora:NAME>, <lora:NAME:0.8>, <lora:NAME:TEXT_ENCODER:UNET>, and with weights by
    block <lora:NAME:1:1:lbw=OUTALL> or lbw=0,1,0.5,...
    """
    out = asked["out"]
    if Path(out).suffix.lower() != ".png":
        raise ConfigError(f"the output is {out!r}", remedy="It is a PNG: its name ends in .png.")
    from diffpeft.cli.errors import naming
    from diffpeft.files import refuse_existing, replacing

    refuse_existing([out], asked["overwrite"])
    prompt, files = _adapters(asked)
    image = _drawn(asked, prompt, files)
    with naming(out), replacing(out) as f:
        image.save(f, "PNG")
    click.echo(out)


def _adapters(asked: Asked) -> tuple[str, Files]:
    """The prompt without its tags, and the adapters' files. Their headers are read: a bad file is told before the model loads."""
    from diffpeft import converters
    from diffpeft.pipeline.open import check_model
    from diffpeft.pipeline.prompt import parsed, resolved

    prompt, tags = parsed(asked["prompt"])
    wanted = resolved([weighted(text) for text in asked["loras"]], tags, Path(asked["lora_dir"]))
    check_model(asked["model"], asked["base"])
    files = [(converters.located(file), strength) for file, strength in wanted]
    for file, _ in files:
        converters.read(file, names={})  # the model tells the family where names do not
    return prompt, files


def _drawn(asked: Asked, prompt: str, files: Files) -> Image:
    """The picture, of a model of clips one frame. The embedded base has a guidance of its own, other pipelines bring theirs."""
    import inspect

    import torch

    from diffpeft.pipeline.open import default_device, default_dtype, open_pipeline
    from diffpeft.train.progress import quiet_bars
    from diffpeft.train.sample import images_of, led

    quiet_bars()
    device = default_device()
    pipe = open_pipeline(asked["model"], asked["base"], dtype=asked["dtype"] or default_dtype(device), device=device)
    pipe.set_progress_bar_config(disable=True)
    _load(pipe, files)
    guidance = 4.0 if asked["guidance"] is None and asked["model"] is None else asked["guidance"]
    options = {
        "negative_prompt": asked["negative"],
        "width": asked["width"],
        "height": asked["height"],
        **_shown(pipe, asked["images"]),
    } | {name: 1 for name in ("num_frames", "frames") if name in inspect.signature(pipe.__call__).parameters}
    with led(pipe, {} if guidance is None else {"guidance_scale": guidance}) as scales:
        drawn = pipe(
            prompt,
            num_inference_steps=asked["steps"],
            generator=torch.Generator("cpu").manual_seed(asked["seed"]),
            output_type="pil",
            **scales,
            **{name: value for name, value in options.items() if value is not None},
        )
    image: Image = images_of(drawn)[0]
    return image


def _shown(pipe: object, files: Sequence[str]) -> dict[str, Image | list[Image]]:
    """Pictures in the keyword of a pipeline. Raises ConfigError for one that takes none."""
    import inspect

    from diffpeft.train.data.read import picture

    if not files:
        return {}
    takes = inspect.signature(type(pipe).__call__).parameters
    keyword = next((name for name in ("control_image", "image") if name in takes), None)
    if keyword is None:
        raise ConfigError(f"a {type(pipe).__name__} takes no picture", remedy="Leave --image out.")
    pictures = [picture(Path(file)) for file in files]
    return {keyword: pictures if len(pictures) > 1 else pictures[0]}


def _load(pipe: object, files: Files) -> None:
    """Load the adapters, and set their strengths: a number each, or what a tag of the prompt says."""
    import diffpeft
    from diffpeft.families import family_of
    from diffpeft.pipeline.prompt import Tag, strengths

    mix: dict[str, float | dict[str, float]] = {}
    for i, (file, strength) in enumerate(files):
        weight = 1.0 if isinstance(strength, Tag) else strength
        report = diffpeft.load_lora(pipe, file, name=f"lora-{i}", weight=weight)
        mix[report.name] = weight
        if isinstance(strength, Tag):
            mix[report.name] = strengths(strength, family_of(pipe), report.matched)
    if mix:
        diffpeft.set_adapters(pipe, mix)
