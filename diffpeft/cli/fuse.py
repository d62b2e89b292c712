"""diffpeft fuse."""

from __future__ import annotations

from pathlib import Path

import click

from diffpeft.drawing.plan import weighted


@click.command()
@click.option("-m", "--model", type=click.Path(), help="A diffusers folder. Default: the embedded base.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    required=True,
    metavar="FILE[:WEIGHT]",
    type=click.Path(),
    help="An adapter and its strength; may be repeated, and they act in this order.",
)
@click.option("-o", "--out", required=True, type=click.Path(), help="The folder to write, which is new or empty.")
@click.option("--variant", help="Use the files *.VARIANT.safetensors, for example fp16.")
def fuse(model: str | None, loras: tuple[str, ...], out: str, variant: str | None) -> None:
    """Put adapters into a model's weights for good: a copy of a diffusers folder that needs no adapter.

    Example: diffpeft fuse -m stable-diffusion-v1-5 --lora style.safetensors:0.8 -o with-style

    Weights keep their dtype and their files, and memory holds one layer at a time, however large the model.
    """
    from diffpeft.cli.errors import naming
    from diffpeft.pipeline.bake import bake
    from diffpeft.pipeline.open import EMBEDDED
    from diffpeft.train.progress import quiet_bars

    quiet_bars()
    with naming(out), click.progressbar(length=1, label="fusing") as bar:

        def told(done: int, total: int) -> None:
            bar.length = total
            bar.update(1)

        layers = bake(
            Path(model) if model else EMBEDDED, [weighted(lora) for lora in loras], out, variant=variant, told=told
        )
    click.echo(f"{len(loras)} fused into " + ", ".join(f"{n} layers of {name}" for name, n in layers.items()))
    click.echo(out)
